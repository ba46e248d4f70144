"""Builds the structured prompt: a static prefix, then the soft tokens with the little text that must follow them.

Layout of one branch, P prefix tokens and S suffix tokens:

    prefix  [BOS] role, AUs under test with their FACS names, the three stages, "Evidence:"
    suffix  <CT> " Structure:" <IT> " Deduction: active AUs?" [one marker per AU when the readout is per_au]

Everything that can stand before the soft tokens stands before them: the prefix is the same for every clip and branch,
so a packed step (`packing/forward.py`) computes it once. Without the structure token its label goes too. The wording is
(ours).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from aullm_dist.errors import UserError
from aullm_dist.facs import au_name
from aullm_dist.wording import QUESTION_TEXT, STRUCTURE_TEXT, prefix_text

Readout = Literal["last", "per_au"]
READOUTS: tuple[Readout, ...] = get_args(Readout)


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the prompt needs."""

    bos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """Return an object whose `input_ids` are the token ids of `text`."""

    def __len__(self) -> int:
        """Return the number of ids, added tokens included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Token ids of the static text around the soft tokens of one branch."""

    aus: tuple[int, ...]
    """AU numbers under test, in the order of the logits."""
    readout: Readout
    text: str
    """The whole prompt for people: `<CT>`, `<IT>` and `<AU..>` stand where soft tokens go."""
    prefix_ids: tuple[int, ...]
    """[P], BOS included where the tokenizer itself begins a text with one."""
    structure_ids: tuple[int, ...]
    """Label of the instruction token; empty when the structure token is ablated."""
    question_ids: tuple[int, ...]
    name_ids: tuple[tuple[int, ...], ...]
    """Per AU the ids of its FACS name, for what starts from the LLM's own embedding of it."""
    use_structure: bool

    @property
    def prefix_tokens(self) -> int:
        """P, the tokens shared by all branches."""
        return len(self.prefix_ids)

    @property
    def suffix_tokens(self) -> int:
        """S, the tokens of one branch behind the prefix, soft tokens and markers included."""
        structure = len(self.structure_ids) + 1 if self.use_structure else 0
        return 1 + structure + len(self.question_ids) + (len(self.aus) if self.readout == "per_au" else 0)

    @property
    def readout_positions(self) -> tuple[int, ...]:
        """Positions within the suffix whose final hidden state is read: the last one, or one marker per AU."""
        last = self.suffix_tokens - 1
        return (last,) if self.readout == "last" else tuple(range(last - len(self.aus) + 1, last + 1))


def build_prompt(
    aus: Sequence[int], tokenizer: Tokenizer, *, readout: Readout = "last", use_structure: bool = True
) -> Prompt:
    """Build the prompt for the AU numbers `aus` with the backbone's tokenizer.

    The prefix begins with BOS exactly when the tokenizer begins an ordinary text with it (Llama does, Qwen has none);
    EOS is never appended, whatever the tokenizer is set to do.

    Raises:
        UserError: no AU, a repeated AU, an unknown readout, or a tokenizer that gives no usable ids.
    """
    aus = tuple(int(au) for au in aus)
    if not aus or len(set(aus)) != len(aus):
        raise UserError(f"prompt: AUs under test are {list(aus)}; allowed: one or more different AU numbers")
    if readout not in READOUTS:
        raise UserError(f"prompt: readout is {readout!r}; allowed: {', '.join(READOUTS)}")
    before = prefix_text(aus, use_structure=use_structure)
    structure_ids = _plain_ids(tokenizer, STRUCTURE_TEXT) if use_structure else ()
    structure_text = f"{STRUCTURE_TEXT}<IT>" if use_structure else ""
    markers = "".join(f"<AU{au}>" for au in aus) if readout == "per_au" else ""
    return Prompt(
        aus=aus,
        readout=readout,
        text=f"{before}<CT>{structure_text}{QUESTION_TEXT}{markers}",
        prefix_ids=_bos_ids(tokenizer) + _plain_ids(tokenizer, before),
        structure_ids=structure_ids,
        question_ids=_plain_ids(tokenizer, QUESTION_TEXT),
        name_ids=tuple(_plain_ids(tokenizer, au_name(au)) for au in aus),
        use_structure=use_structure,
    )


def _plain_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    unknown = getattr(tokenizer, "unk_token_id", None)
    usable = [i for i in ids if 0 <= i < len(tokenizer) and i != unknown]
    if not ids or len(usable) < len(ids):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise UserError(
            f"tokenizer {name}: gives {len(usable)} usable of {len(ids)} ids for {text[:40]!r}; "
            "allowed: a text tokenizer that covers plain English"
        )
    return ids


def _bos_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    bos = tokenizer.bos_token_id
    if bos is None or list(tokenizer("a").input_ids)[:1] != [bos]:
        return ()
    return (bos,)
