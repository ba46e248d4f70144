"""Specifies a synthetic corpus: one frozen, checked description; equal descriptions give equal bytes."""

import zlib
from dataclasses import dataclass
from typing import Literal, get_args

from aullm_dist.data.corpora import CorpusSpec, SyntheticFacts, get_drawable
from aullm_dist.errors import UserError

Shift = Literal["none", "corpus", "vignette_banding"]
Damage = Literal[
    "missing_frame",
    "unreadable_frame",
    "missing_folder",
    "unlabelled_folder",
    "bad_au_cell",
    "onset_after_offset",
    "contradicting_row",
    "other_case",
]

SHIFTS: tuple[Shift, ...] = ("none", "corpus", "vignette_banding")
DAMAGES: tuple[Damage, ...] = get_args(Damage)


@dataclass(kw_only=True, slots=True, frozen=True)
class SyntheticSpec:
    """Describes one synthetic corpus, for tests and demos only: no claim about real faces is made from it.

    Raises:
        UserError: a value lies outside its range.
    """

    corpus: str
    """Whose disk layout, workbook, AU combinations and default domain shift are used."""
    subjects: int = 20
    clips_per_subject: int = 12
    seed: int = 0
    amplitude_percent: float = 2.0
    """Nominal peak displacement of an AU in % of the face width; a clip draws 0.75 to 1.25 of it. The difficulty."""
    balance: float = 0.0
    """0: AU combinations about as frequent as in the real corpus; 1: the AUs of its AU set about equally frequent."""
    frame_size: tuple[int, int] | None = None
    """(height, width) in pixels; None takes the corpus's own."""
    num_frames: tuple[int, int] | None = None
    """Fewest and most frames from onset to offset, both inclusive; None takes the corpus's own."""
    jitter_pixels: float = 0.25
    """Standard deviation, in pixels, of the head's drift (a random walk) by the last frame, along each axis."""
    flicker: float = 0.01
    """Standard deviation of the frame-to-frame gain of the light."""
    noise: float = 2.0
    """Standard deviation of the sensor noise in gray levels of 255."""
    shift: Shift = "corpus"
    """`none`; `corpus`: its own gamma, blur and noise; `vignette_banding`: vignette, rolling bands and gain drift."""
    context_frames: int = 0
    """Frames written before onset and after offset, which a loader must leave out."""

    def __post_init__(self) -> None:
        get_drawable(self.corpus)
        if self.shift not in SHIFTS:
            raise UserError(f"synthetic corpus: shift is {self.shift!r}; allowed: {', '.join(SHIFTS)}")
        _check_range("subjects", self.subjects, 1, 99)
        _check_range("clips_per_subject", self.clips_per_subject, 1, 99)
        _check_range("seed", self.seed, 0, 2**32 - 1)
        _check_range("amplitude_percent", self.amplitude_percent, 0.0, 6.0)
        _check_range("balance", self.balance, 0.0, 1.0)
        _check_range("jitter_pixels", self.jitter_pixels, 0.0, 8.0)
        _check_range("flicker", self.flicker, 0.0, 0.5)
        _check_range("noise", self.noise, 0.0, 64.0)
        _check_range("context_frames", self.context_frames, 0, 20)
        for side in self.frame_height_width:
            _check_range("frame_size", side, 32, 1024)
        shortest, longest = self.clip_lengths
        _check_range("num_frames", shortest, 5, 400)
        _check_range("num_frames", longest, shortest, 400)

    @property
    def corpus_spec(self) -> CorpusSpec:
        """The corpus whose layout is written."""
        return get_drawable(self.corpus)

    @property
    def facts(self) -> SyntheticFacts:
        """How that corpus is drawn."""
        facts = self.corpus_spec.synthetic
        assert facts is not None
        return facts

    @property
    def frame_height_width(self) -> tuple[int, int]:
        """(height, width) of every frame in pixels."""
        return self.frame_size or self.facts.frame_size

    @property
    def clip_lengths(self) -> tuple[int, int]:
        """Fewest and most frames of a clip, onset to offset."""
        return self.num_frames or self.facts.clip_lengths

    @property
    def seed_words(self) -> tuple[int, int]:
        """Start of every random stream's key: no two corpora, and no two seeds, share a stream."""
        stream = self.facts.stream
        return self.seed, zlib.crc32(self.corpus.encode()) if stream is None else stream


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"synthetic corpus: {name} is {value}; allowed: {low} to {high}")
