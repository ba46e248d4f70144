"""Defines the settings of corpora, protocol and the way clips become tensors."""

from dataclasses import dataclass
from typing import Literal

from aullm_dist.config.allowed import Filled, Unique, above, at_least, between, share
from aullm_dist.config.setting import Recorded, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Corpora, protocol and the way clips become tensors."""

    train: tuple[str, ...] = setting(
        (),
        "Prepared dataset folders (`aullm-dist prepare`). Empty: a synthetic corpus is generated below the run folder.",
        "data",
        place="path",
    )
    test: tuple[str, ...] = setting(
        (), "Prepared dataset folders of the target corpus; for `protocol: cross` only.", "data", place="path"
    )
    protocol: Literal["loso", "grouped", "cross", "lodo", "composite", "all"] = setting(
        "loso",
        "`loso` leaves one subject out, `grouped` whole groups of them, `cross` goes from `train` to `test`, `lodo` "
        "leaves one corpus out (CD6ME), `composite` one subject of several corpora; `all` has no test side.",
        "data",
    )
    folds_file: str | None = setting(
        None,
        "Folds to train on, as `aullm-dist folds` or a hand wrote them; protocol and AUs are then the file's.",
        "data",
        Filled("give a file, or null for the folds of data.protocol"),
        place="path",
    )
    fold: int | None = setting(
        None,
        "Train this fold only; null trains all folds.",
        "data",
        at_least(0, "a fold number from 0, or null for all folds"),
        may_differ=("resume", "ablation"),
    )
    folds: int = setting(5, "Number of folds of `protocol: grouped`.", "data", at_least(2))
    aus: tuple[int, ...] = setting(
        (), "AUs under test; empty takes the field's set for the corpora.", "data", Unique("AU")
    )
    inner_fraction: float = setting(
        0.15, "Share of a fold's training subjects held out to choose decision thresholds.", "data", share(0.5)
    )
    num_frames: int = setting(
        6,
        "Frames of a clip that the visual backbone sees.",
        "function",
        at_least(4, "4 or more, as the visual backbone needs them"),
        recorded=Recorded("num_frames"),
    )
    size: int = setting(
        64,
        "Image side in pixels; prepared datasets must have been written with the same `--size`.",
        "function",
        between(32, 512, "a side of 32 to 512 pixels"),
        recorded=Recorded("image_size"),
    )
    crops: tuple[str, ...] = setting(
        (),
        "Crops of the prepared datasets, by name; others are refused. Empty takes, and records, those that they have.",
        "data",
        may_differ=("resume",),  # resolved from the datasets, which must not change
        recorded=Recorded(),
    )
    cut_fraction: float = setting(
        0.2,
        "Training clips lose at most this share of their frames at either end, another one in each epoch.",
        "data",
        share(0.4),
    )
    neutral_share: float = setting(
        0.15,
        "Share of training clips, others in each epoch, that are seen without their movement and labelled with no AU. "
        "Corpora hold no such clips, and a model that has met none has an AU of its own for what it does not know.",
        "data",
        share(0.9),
        may_differ=("ablation",),
    )
    augment: bool = setting(True, "Random temporal cut, small shift and gain of training clips.", "data")
    shuffle_labels: bool = setting(
        False,
        "Negative control: gives each training clip the labels of another. Scores must then fall to the floors.",
        "data",
    )
    streaming: bool = setting(
        False,
        "Read training clips in a shuffled stream from Parquet files (`aullm-dist prepare --format parquet`) and not "
        "by random access: for corpora on slow or remote disks. The order then depends on the number of processes, and "
        "one loader process reads it, whatever `workers` says.",
        "data",
    )
    shuffle_buffer: int = setting(
        256,
        "Clips of a stream that are shuffled together, and held in memory by each loader process.",
        "data",
        above(0),
    )
    workers: int = setting(
        2,
        "Loader processes per rank; 0 loads in the training process.",
        "execution",
        at_least(0),
        may_differ=("resume", "ablation"),
    )
    synthetic_corpus: str = setting(
        "casme2",
        "Whose layout and AU proportions the synthetic corpus has: a name that `aullm-dist synthesize` takes.",
        "data",
    )
    synthetic_subjects: int = setting(20, "Subjects of the synthetic corpus.", "data", at_least(2))
    synthetic_clips: int = setting(12, "Clips per synthetic subject.", "data", above(0))
    synthetic_amplitude: float = setting(
        3.0, "Peak movement of the synthetic faces in % of face width; smaller is harder.", "data", above(0)
    )
    synthetic_frames: int | None = setting(
        None,
        "Fewest frames of a synthetic clip, the longest having twice as many; null takes those of the corpus.",
        "data",
        above(0),
    )
    synthetic_balance: float = setting(
        0.5,
        "0: AU combinations about as frequent as in the real corpus; 1: all AUs about equally frequent.",
        "data",
        share(),
    )
    synthetic_shift: Literal["none", "corpus", "vignette_banding"] = setting(
        "corpus",
        "Domain shift of the synthetic camera: the corpus's own (`corpus`), vignette and banding, or none.",
        "data",
    )
    synthetic_seed: int = setting(
        0, "Seed of the synthetic corpus: another seed, other faces and clips.", "data", between(0, 2**32 - 1)
    )
