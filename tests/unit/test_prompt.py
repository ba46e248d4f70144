"""The structured prompt: what stands before the soft tokens, BOS and EOS, ablation, refusals."""

from types import SimpleNamespace

import pytest

from aullm_dist.data.corpora import CORPORA
from aullm_dist.errors import UserError
from aullm_dist.facs import CROSS_AUS
from aullm_dist.model.prompt import build_prompt


class WordTokenizer:
    """One id per word; `bos` and `eos` are added to ordinary texts, as Llama tokenizers may be set to do."""

    def __init__(self, bos: int | None = 1, eos: int | None = None, known: bool = True):
        self.bos_token_id, self.eos, self.known = bos, eos, known
        self.words: dict[str, int] = {}

    def __call__(self, text, *, add_special_tokens=True):
        ids = [self.words.setdefault(word, 10 + len(self.words)) for word in text.split()] if self.known else []
        if add_special_tokens:
            ids = [i for i in (self.bos_token_id, *ids, self.eos) if i is not None]
        return SimpleNamespace(input_ids=ids)

    def __len__(self):
        return 1000


def test_static_text_stands_before_the_soft_tokens():
    prompt = build_prompt((1, 12), WordTokenizer())
    before, after = prompt.text.split("<CT>")
    assert before.endswith("Evidence:")
    assert "AU1 Inner Brow Raiser, AU12 Lip Corner Puller." in before
    assert before.index("Evidence:") < before.index("Structure:") < before.index("Deduction:")
    assert after == " Structure:<IT> Deduction: active AUs?"


def test_bos_is_put_where_the_tokenizer_puts_it_and_eos_never():
    with_bos = build_prompt((1,), WordTokenizer(bos=1, eos=2))
    without = build_prompt((1,), WordTokenizer(bos=None, eos=2))
    assert with_bos.prefix_ids[0] == 1
    assert with_bos.prefix_ids.count(1) == 1
    assert with_bos.prefix_tokens == without.prefix_tokens + 1
    for prompt in (with_bos, without):
        assert 2 not in prompt.prefix_ids + prompt.structure_ids + prompt.question_ids
        assert 1 not in prompt.structure_ids + prompt.question_ids


def test_suffix_layout_and_readout_positions():
    last = build_prompt((1, 2, 4), WordTokenizer())
    per_au = build_prompt((1, 2, 4), WordTokenizer(), readout="per_au")
    assert last.suffix_tokens == 2 + len(last.structure_ids) + len(last.question_ids)
    assert last.readout_positions == (last.suffix_tokens - 1,)
    assert per_au.suffix_tokens == last.suffix_tokens + 3
    assert per_au.readout_positions == tuple(range(last.suffix_tokens, last.suffix_tokens + 3))
    assert per_au.prefix_ids == last.prefix_ids


def test_without_structure_token_its_label_goes_too():
    prompt = build_prompt((1,), WordTokenizer(), use_structure=False)
    assert "Structure" not in prompt.text
    assert "<IT>" not in prompt.text
    assert prompt.structure_ids == ()
    assert prompt.suffix_tokens == 1 + len(prompt.question_ids)


@pytest.mark.parametrize("aus", [*(spec.aus for spec in CORPORA.values()), CROSS_AUS])
def test_suffix_is_short_and_prefix_holds_the_text(tiny_tokenizer, aus):
    prompt = build_prompt(aus, tiny_tokenizer)
    assert prompt.suffix_tokens <= 16
    assert 60 <= prompt.prefix_tokens <= 180
    assert tiny_tokenizer.decode(prompt.prefix_ids[1:]) == prompt.text.split("<CT>")[0]
    assert [tiny_tokenizer.decode(ids).split()[0] for ids in prompt.name_ids] == [f"AU{au}" for au in aus]


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from aullm_dist.llm.tiny import build_tiny_backbone

    folder = build_tiny_backbone(tmp_path_factory.mktemp("tiny") / "llama", hidden=32, layers=1, heads=2)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("aus", "options", "match"),
    [
        ((), {}, "one or more different AU numbers"),
        ((1, 1), {}, "one or more different AU numbers"),
        ((1,), {"readout": "first"}, "allowed: last, per_au"),
    ],
)
def test_refusals(aus, options, match):
    with pytest.raises(UserError, match=match):
        build_prompt(aus, WordTokenizer(), **options)


def test_tokenizer_without_usable_ids_is_refused():
    with pytest.raises(UserError, match="gives 0 usable of 0 ids"):
        build_prompt((1,), WordTokenizer(known=False))
    unknown = WordTokenizer()
    unknown.unk_token_id = 10
    with pytest.raises(UserError, match="usable of"):
        build_prompt((1,), unknown)
