"""Release folders load as the model that was trained: here, by stock libraries, and in a process of their own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from release_samples import AUS, checkpoint, exported, llm, write_run  # noqa: F401
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import aullm_dist
from aullm_dist.cli import main
from aullm_dist.errors import UserError
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.release.export import CardOptions, export
from aullm_dist.release.layout import RELEASE_FILE, read_release_manifest, write_release_manifest
from aullm_dist.release.probe import Probe, answer_probe, probe_clips, read_probe, write_probe
from aullm_dist.release.verify import verify

pytestmark = pytest.mark.launch


class Receipt:
    note = "LoRA was added to the original weights of the base"
    probe = None

    def as_dict(self):
        return {"note": self.note, "checkpoint": "/home/somebody/runs", "llm": "/home/somebody/llm"}


def merge_with_peft(checkpoint: Path, llm: Path):
    """Return a merge by PEFT itself, which the merge of a release has to equal."""

    def merge(target: Path) -> Receipt:
        PeftModel.from_pretrained(plain(llm), checkpoint).merge_and_unload().save_pretrained(target)
        AutoTokenizer.from_pretrained(llm).save_pretrained(target)
        return Receipt()

    return merge


def plain(llm: Path):
    return AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)


@pytest.fixture(scope="module")
def merged(checkpoint, llm, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "release"
    done = export(checkpoint, out, format="merged", merge=merge_with_peft(checkpoint, llm))
    assert 0 < done.difference < 1e-4
    return out


def refused(capsys, *words: object) -> str:
    """Run a command that must end with 2, and return its one line."""
    assert main([str(word) for word in words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aullm-dist: error: ")]
    assert len(errors) == 1
    return errors[0]


def copy_of(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy"))


def test_an_adapter_release_answers_as_its_checkpoint(checkpoint, exported):
    trained, release = aullm_dist.load(checkpoint), aullm_dist.load(exported)
    clips = torch.rand(3, 6, 64, 64)
    assert torch.equal(
        release.model.explain(release.views(clips)).logits, trained.model.explain(trained.views(clips)).logits
    )
    assert (release.format, trained.format) == ("adapter", "checkpoint")
    for known in (release, trained):
        assert known.aus == AUS
        assert (known.num_frames, known.size, known.crop) == (6, 64, {"name": "none"})
        assert known.corpora == ("casme2",)
        assert not known.model.training
    assert release.thresholds == trained.thresholds


def test_what_limits_the_model_goes_with_it(checkpoint, exported, merged, tmp_path):
    marks = ["synthetic faces", "random LLM"]
    for folder in (exported, merged):
        assert json.loads((folder / "config.json").read_text())["caveats"] == marks
    faces, llm = aullm_dist.load(exported).caveats
    assert faces == "the model was trained on synthetic faces: its answers say nothing about real faces"
    assert "random weights" in llm
    assert aullm_dist.load(merged).caveats == aullm_dist.load(checkpoint).caveats == (faces, llm)
    # An older release says nothing; a newer one may know more.
    copy = copy_of(exported, tmp_path)
    described = json.loads((copy / "config.json").read_text())
    facts = read_release_manifest(copy)
    for recorded, said in ((None, ()), (["some other"], ("recorded with the model: some other",))):
        described.pop("caveats", None)
        described |= {} if recorded is None else {"caveats": recorded}
        (copy / "config.json").write_text(json.dumps(described))
        write_release_manifest(copy, facts)
        assert aullm_dist.load(copy).caveats == said


def test_a_merged_release_needs_no_base(merged, llm, checkpoint):
    expected = aullm_dist.load(checkpoint)
    hidden = llm.rename(llm.with_name("away"))
    try:
        release = aullm_dist.load(merged)
        found = verify(merged)
    finally:
        hidden.rename(llm)
    clips = torch.rand(3, 6, 64, 64)
    assert torch.allclose(
        release.model.explain(release.views(clips)).logits,
        expected.model.explain(expected.views(clips)).logits,
        atol=1e-4,
    )
    assert found.difference == 0
    assert read_release_manifest(merged).probe["difference_to_trained"] < 1e-4
    assert read_release_manifest(merged).merge == {"note": Receipt.note}
    assert Receipt.note in (merged / "README.md").read_text()


def test_the_auto_classes_load_a_release(exported, merged):
    config = AutoConfig.from_pretrained(exported)
    assert config.model_type == "aullm"
    assert config.aus == list(AUS)
    probe = read_probe(exported)
    model = AutoModel.from_pretrained(exported)
    assert torch.allclose(model(probe.clips / 255.0).logits, probe.logits, atol=1e-5)
    assert model.release.format == "adapter"
    assert len(AutoTokenizer.from_pretrained(exported)("brow").input_ids) > 1
    assert AutoModel.from_pretrained(merged).release.format == "merged"
    with pytest.raises(TypeError, match="dtype has no effect"):
        AutoModel.from_pretrained(exported, dtype=torch.float16)


def test_stock_libraries_load_the_parts(exported, merged, llm, checkpoint):
    """PEFT puts the adapter on the plain LLM, transformers loads the merged one: the same function."""
    ids = torch.arange(20)[None]
    adapted = PeftModel.from_pretrained(plain(llm), exported, subfolder="adapter").eval()
    dense = AutoModelForCausalLM.from_pretrained(merged, subfolder="llm").eval()
    with torch.no_grad():
        expected, found, base = adapted(ids).logits, dense(ids).logits, plain(llm)(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert (expected - base).abs().max() > 0.01
    assert len(AutoTokenizer.from_pretrained(merged / "llm")) == len(AutoTokenizer.from_pretrained(llm))


def test_the_hub_cache_serves_a_release(exported, tmp_path):
    repository, commit = tmp_path / "models--lab--release", "0" * 40
    shutil.copytree(exported, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = AutoModel.from_pretrained("lab/release", cache_dir=tmp_path, local_files_only=True)
    assert model.release.aus == AUS


def test_the_scores_of_another_run_may_stand_on_the_card(checkpoint, tiny_dataset, tmp_path):
    run = checkpoint.parents[2]
    alone = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    for scores, text in ((None, "None: the checkpoint lies in no run folder"), (run, "Scores of other models")):
        out = tmp_path / f"release-{scores is None}"
        export(alone, out, format="adapter", card=CardOptions(scores=scores), record=False)
        assert text in (out / "README.md").read_text()
    with pytest.raises(UserError, match="no scores for the card"):
        export(alone, tmp_path / "release", format="adapter", card=CardOptions(scores=tiny_dataset), record=False)


def test_verify_notices_another_function(exported, tmp_path, capsys):
    folder = copy_of(exported, tmp_path)
    probe = read_probe(folder)
    write_probe(folder, Probe(clips=probe.clips, logits=probe.logits + 0.01))
    facts = read_release_manifest(folder)
    (folder / RELEASE_FILE).unlink()
    write_release_manifest(folder, facts)
    assert "logits differ from those at export by up to 0.01; allowed: 0.001 in float32" in refused(
        capsys, "release", "verify", folder
    )


def test_merged_weights_are_hashed_by_verify(merged, tmp_path, capsys):
    folder = copy_of(merged, tmp_path)
    flip(folder / "llm" / "model.safetensors")
    assert "model.safetensors: altered" in refused(capsys, "release", "verify", folder)
    with pytest.raises(UserError, match="leave out the LLM"):
        aullm_dist.load(merged, llm="elsewhere")


def test_another_llm_is_refused(exported, checkpoint, tmp_path, capsys):
    """Same sizes, other weights: nothing but the base's fingerprint tells them apart."""
    other = build_tiny_backbone(tmp_path / "other", hidden=32, layers=2, heads=2, seed=1)
    assert "is of another model: base" in refused(capsys, "release", "verify", exported, "--llm", other)
    out = tmp_path / "release"
    for format, merge in (("adapter", None), ("merged", lambda target: pytest.fail("nothing may be merged"))):
        with pytest.raises(UserError, match="is of another model: base"):
            export(checkpoint, out, format=format, merge=merge, llm=str(other), record=False)
    assert list(tmp_path.iterdir()) == [other]


def test_a_base_that_moved_is_found_by_name(exported, llm, tmp_path, capsys):
    moved = Path(shutil.copytree(llm, tmp_path / "moved"))
    hidden = llm.rename(llm.with_name("away"))
    try:
        assert f"its base LLM is not at {llm}; say where it is with --llm" in refused(
            capsys, "release", "verify", exported
        )
        assert main(["release", "verify", str(exported), "--llm", str(moved)]) == 0
    finally:
        hidden.rename(llm)


def test_an_nf4_base_is_quantised_again_as_it_was(tiny_dataset, llm, tmp_path):
    checkpoint = write_run(tmp_path / "run", tiny_dataset, llm, quantization="nf4")
    export(checkpoint, tmp_path / "release", format="adapter", record=False)
    clips = probe_clips(6, 64)
    expected = answer_probe(aullm_dist.load(checkpoint).model, clips)
    release = aullm_dist.load(tmp_path / "release")
    assert torch.equal(answer_probe(release.model, clips), expected)
    assert release.config.model.quantization == "nf4"


def test_a_baseline_loads_but_is_no_release(tiny_dataset, tmp_path):
    checkpoint = write_run(tmp_path / "run", tiny_dataset, "none")
    assert answer_probe(aullm_dist.load(checkpoint).model, probe_clips(6, 64)).shape == (4, len(AUS))
    with pytest.raises(UserError, match="is of the baseline led_cnn, which has no LLM to release"):
        export(checkpoint, tmp_path / "release", format="adapter")


def test_a_changed_tokenizer_is_refused(exported, llm, tmp_path):
    changed = Path(shutil.copytree(llm, tmp_path / "changed"))
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="the LLM's tokenizer gives other prefix_ids"):
        aullm_dist.load(exported, llm=str(changed))


def test_loading_leaves_the_generator_alone(exported):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    release = aullm_dist.load(exported)
    answer_probe(release.model, probe_clips(6, 64))
    assert torch.equal(torch.rand(2), expected)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


_FRESH = """
import sys
import aullm_dist
from aullm_dist.cli import main
assert not {"torch", "transformers", "huggingface_hub"} & set(sys.modules), "import aullm_dist is not light"
from transformers import AutoConfig, AutoModel, AutoTokenizer
from safetensors.torch import load_file
assert AutoConfig.from_pretrained(sys.argv[1]).format == "adapter"
AutoTokenizer.from_pretrained(sys.argv[1])
probe = load_file(sys.argv[1] + "/probe.safetensors")
found = AutoModel.from_pretrained(sys.argv[1])(probe["clips"] / 255.0).logits
assert (found - probe["logits"]).abs().max() < 1e-5
sys.exit(main(["release", "verify", sys.argv[1]]))
"""


def test_a_fresh_process_loads_it_by_the_auto_classes_and_verifies_it(exported):
    result = subprocess.run(
        [sys.executable, "-c", _FRESH, str(exported)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "every hash as at export" in result.stdout
