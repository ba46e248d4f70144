"""What a synthetic corpus is made of: one frozen, checked description, equal descriptions giving equal bytes."""

from dataclasses import dataclass
from typing import Literal, get_args

from aullm_dist.errors import UserError

SyntheticCorpus = Literal["casme2", "samm", "4dme", "casme", "mmew", "casme3a", "casme3c"]
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

# The order is part of every random stream's key: new corpora go to the end.
CORPORA: tuple[SyntheticCorpus, ...] = get_args(SyntheticCorpus)
SHIFTS: tuple[Shift, ...] = ("none", "corpus", "vignette_banding")
DAMAGES: tuple[Damage, ...] = get_args(Damage)

# (height, width) in the proportions of the real pictures (of CASME II the face region), scaled down.
_FRAME_SIZES: dict[str, tuple[int, int]] = {
    "casme2": (136, 112), "samm": (130, 192), "4dme": (96, 128), "casme": (90, 160), "mmew": (116, 116),
    "casme3a": (90, 160), "casme3c": (90, 160),
}  # fmt: skip
# Around the mean clip lengths of the real corpora, in frames: 66.8, 74.3, 21.4, 22.1 and 39.9; CAS(ME)^3's is not
# published and is (ours).
_CLIP_LENGTHS: dict[str, tuple[int, int]] = {
    "casme2": (50, 84), "samm": (56, 92), "4dme": (16, 27), "casme": (16, 28), "mmew": (30, 50), "casme3a": (8, 18),
    "casme3c": (8, 18),
}  # fmt: skip


@dataclass(kw_only=True, slots=True, frozen=True)
class SyntheticSpec:
    """Describes one synthetic corpus, for tests and demos only: no claim about real faces is made from it.

    Raises:
        UserError: a value lies outside its range.
    """

    corpus: SyntheticCorpus
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
        if self.corpus not in CORPORA:
            raise UserError(f"synthetic corpus: corpus is {self.corpus!r}; allowed: {', '.join(CORPORA)}")
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
    def frame_height_width(self) -> tuple[int, int]:
        """(height, width) of every frame in pixels."""
        return self.frame_size or _FRAME_SIZES[self.corpus]

    @property
    def clip_lengths(self) -> tuple[int, int]:
        """Fewest and most frames of a clip, onset to offset."""
        return self.num_frames or _CLIP_LENGTHS[self.corpus]

    @property
    def seed_words(self) -> tuple[int, int]:
        """Start of every random stream's key: no two corpora, and no two seeds, share a stream."""
        return self.seed, CORPORA.index(self.corpus)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"synthetic corpus: {name} is {value}; allowed: {low} to {high}")
