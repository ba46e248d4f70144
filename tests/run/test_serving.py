"""A split release answers as the whole one: an LLM behind HTTP, and a client that holds all the rest."""

from pathlib import Path

import pytest
import torch
from completions_server import served
from release_samples import checkpoint, exported, llm, write_run  # noqa: F401
from safetensors.torch import load_file
from test_release_folders import merge_with_peft, merged  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

import aullm_dist
from aullm_dist.cli import main
from aullm_dist.errors import UserError
from aullm_dist.release import splitting
from aullm_dist.release.export import export
from aullm_dist.release.served import largest_difference, load_served

pytestmark = pytest.mark.launch
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serving_client.py"


@pytest.fixture(scope="module")
def split(merged, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("split") / "parts"
    assert main(["release", "split", str(merged), "--out", str(out)]) == 0
    return out


def example():
    """Return the example's module."""
    names: dict = {"__name__": "example"}
    exec(compile(EXAMPLE.read_text(encoding="utf-8"), str(EXAMPLE), "exec"), names)
    return names


def test_a_split_release_answers_as_the_whole(merged, split):  # noqa: F811
    whole = aullm_dist.load(merged)
    clips = torch.rand(3, 6, 64, 64)
    with served(split / "server") as url:
        release = load_served(split / "client", example()["asker"](url, "aullm", "none"))
        found = release.model.explain(release.views(clips))
        assert largest_difference(release) < 1e-4
        frames = (255 * clips[0]).to(torch.uint8).numpy()
        one, other = whole.predict(frames), release.predict(frames)
    expected = whole.model.explain(whole.views(clips)).logits
    assert expected.std() > 0.1
    assert torch.allclose(found.logits, expected, atol=1e-4)
    assert one.logits == pytest.approx(other.logits, abs=1e-4)
    assert (one.aus, one.threshold_policy) == (other.aus, other.threshold_policy)
    assert (release.thresholds, release.crop, release.corpora) == (whole.thresholds, whole.crop, whole.corpora)


@pytest.mark.parametrize("settings", [{"readout": "per_au"}, {"answer": "deduction", "structure": False}])
def test_other_readouts_and_answers_are_served_too(settings, tiny_dataset, llm, tmp_path):  # noqa: F811
    trained = write_run(tmp_path / "run", tiny_dataset, llm, **settings)
    export(trained, tmp_path / "release", format="merged", merge=merge_with_peft(trained, llm))
    assert main(["release", "split", str(tmp_path / "release"), "--out", str(tmp_path / "parts")]) == 0
    with served(tmp_path / "parts" / "server") as url:
        ask = example()["asker"](url, "aullm", "none")
        assert largest_difference(load_served(tmp_path / "parts" / "client", ask)) < 1e-4


def test_the_served_llm_has_a_vocabulary_of_aus(merged, split):  # noqa: F811
    weights = load_file(split / "server" / "model.safetensors")
    words = len(aullm_dist.load(merged).aus) + 1
    assert weights["lm_head.weight"].shape[0] == weights["model.embed_tokens.weight"].shape[0] == words
    assert not weights["lm_head.weight"][-1].any()
    # All else is the merged LLM's own, and nothing of the client's is on the server.
    before = load_file(merged / "llm" / "model.safetensors")
    assert all(torch.equal(weights[name], before[name]) for name in before if "layers" in name)
    assert sorted(path.name for path in (split / "client").iterdir()) == [
        "aullm_modules.safetensors", "config.json", "probe.safetensors", "prompt.safetensors",
    ]  # fmt: skip


def test_the_example_answers_clips(split, tiny_dataset, capsys):
    with served(split / "server") as url:
        assert example()["main"]([url, str(split / "client"), str(tiny_dataset), "--check"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert float(first.rpartition(" ")[2]) < 1e-4
    assert rows
    assert len(rows) % 8 == 0
    assert all(0 < float(row.split("\t")[2]) < 1 for row in rows)


def test_tied_llms_of_several_files_get_a_head_of_their_own(tmp_path):
    source, target = tmp_path / "llm", tmp_path / "server"
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(source, max_shard_size="20KB")
    target.mkdir()
    names = splitting._ends(source)
    assert names == ("model.embed_tokens", "lm_head", False)
    rows = torch.randn(3, 32)
    splitting._write_weights(source, target, {"model.embed_tokens.weight": 0 * rows, "lm_head.weight": rows})
    splitting._write_config(source, target, 3)
    assert len(list(target.glob("*.safetensors"))) > 1
    before, after = (LlamaForCausalLM.from_pretrained(folder) for folder in (source, target))
    assert torch.equal(after.lm_head.weight, rows)
    prompt = torch.randn(1, 5, 32)
    with torch.no_grad():
        hidden = before.model(inputs_embeds=prompt).last_hidden_state
        assert torch.allclose(after(inputs_embeds=prompt).logits, hidden @ rows.T, atol=1e-5)
    table = before.get_input_embeddings().weight
    assert torch.equal(splitting._rows(source, names[0], [7, 3, 7]), table[[7, 3, 7]])


def test_what_cannot_be_split_or_asked_is_one_line(exported, merged, split, tmp_path, capsys):  # noqa: F811
    for words, message in (
        ((exported, tmp_path / "new"), "allowed: a merged release"),
        ((merged, split), "is taken; give a new or an empty folder"),
        ((tmp_path, tmp_path / "new"), "is no release"),
    ):
        assert main(["release", "split", str(words[0]), "--out", str(words[1])]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=r"prompt\.safetensors is missing"):
        load_served(merged, lambda prompt: {})
    poor = load_served(split / "client", lambda prompt: {"AU1": -0.1})
    with pytest.raises(UserError, match="no log-probability of AU2"):
        largest_difference(poor)
    nobody = load_served(split / "client", example()["asker"]("http://127.0.0.1:9/v1", "aullm", "none"))
    with pytest.raises(UserError, match="cannot be reached"):
        largest_difference(nobody)
    with served(split / "server") as url:
        other = load_served(split / "client", example()["asker"](url, "another", "none"))
        with pytest.raises(UserError, match="answered 400"):
            largest_difference(other)
