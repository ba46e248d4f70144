"""What libraries raise becomes one line that says what failed and where; our own mistakes keep their traceback."""

import json

import pytest
import tokenizers
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aullm_dist.errors import UserError
from aullm_dist.library_errors import in_one_line, refusing
from aullm_dist.llm.blame import key_refusal, read_object
from aullm_dist.packing.shrink import shrink


def raised(work):
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def refuse(error):
    return UserError(in_one_line(error))


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        RuntimeError("x"),
        OSError("x"),
        raised(lambda: tokenizers.Tokenizer.from_str("{}")),
        raised(lambda: AutoConfig.for_model("llama", vocab_size="x")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_libraries_are_refused(error):
    with pytest.raises(UserError) as caught, refusing(refuse):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


class Ours(Exception):
    pass


@pytest.mark.parametrize(
    "error", [Ours("x"), torch.OutOfMemoryError("x"), KeyboardInterrupt(), MemoryError(), UserError("said already")]
)
def test_everything_else_passes(error):
    with pytest.raises(type(error)) as caught, refusing(refuse):
        raise error
    assert caught.value is error


def test_words_for_callers_stay_and_those_of_python_get_their_place():
    assert in_one_line(ValueError("two\n lines")) == "two lines"
    assert in_one_line(KeyError("x")) == "KeyError: 'x'"
    assert in_one_line(ValueError(f"First sentence. {'x' * 300}")) == "First sentence."
    assert len(in_one_line(ValueError("x" * 300))) == 200
    wrong_type = raised(lambda: AutoConfig.for_model("llama", vocab_size="x"))
    assert in_one_line(wrong_type) == "Field 'vocab_size' expected int, got str (value: 'x')"
    unknown = raised(lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", hidden_act="new")))
    assert in_one_line(unknown) == "ClassInstantier.__getitem__ fails with KeyError: 'new'"


def test_an_argument_that_nobody_gave_is_named():
    """The indexer of DeepSeek 3.2 reads a mask that packed branches do not have."""
    model = AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model("deepseek_v32")))
    attention, hidden = model.model.layers[0].self_attn, torch.zeros(1, 3, 64)
    position = model.model.rotary_emb(hidden, torch.arange(3)[None])
    error = raised(lambda: attention(hidden, position_embeddings=position, attention_mask=None))
    assert in_one_line(error) == "DeepseekV32Attention.forward needs attention_mask"


def test_the_key_is_named_that_the_library_cannot_do_without():
    def make(values):
        if values.get("outer", {}).get("wrong") or "alone" in values:
            raise KeyError("deep inside")

    def refusal(values):
        return str(key_refusal("base", "config.json", KeyError("deep inside"), values, make))

    assert "config.json cannot be used: outer.wrong is 3 (KeyError" in refusal({"a": 1, "outer": {"b": 2, "wrong": 3}})
    assert "cannot be used: alone is [1] (" in refusal({"alone": [1]})
    assert "cannot be used (KeyError" in refusal({"alone": 1, "outer": {"wrong": 1}}), "two faults: neither is it alone"
    assert "cannot be used (KeyError" in refusal({"a": 1}), "it works: the failure was another"


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[1]", b"3", b"[" * 100_000])
def test_files_that_hold_no_object(tmp_path, content):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"backbone base: some.json (cannot be read|holds a \w+)"):
        read_object(file, "base")
    file.write_text(json.dumps({"a": 1}))
    assert read_object(file, "base") == {"a": 1}
