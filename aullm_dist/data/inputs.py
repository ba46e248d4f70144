"""Finds the inputs of a prediction, in the order given: prepared datasets, folders of frames, videos."""

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from aullm_dist.data.clips import Clip, ClipStore, ClipView
from aullm_dist.data.crops import crop_for
from aullm_dist.data.protocols import SampleInfo
from aullm_dist.data.reading import read_clip
from aullm_dist.data.tables import is_dataset
from aullm_dist.errors import UserError, file_errors
from aullm_dist.files import user_path
from aullm_dist.log import get_logger

__all__ = ["InputClips"]

logger = get_logger(__name__)


class InputClips:
    """Clips behind what an evaluation asks of a `ClipView`; folders and videos are read when they are asked for.

    Args:
        inputs: prepared datasets, folders of frames and video files, as the user wrote them.
        size: height and width of the frames, in pixels.
        trained: identities of the crops that the model was trained on; none where they are not known.
        crop: crop of the folders and videos; None takes the model's.
        onset, offset: numbers of the first and last frame, for a single folder or video.
        only: sample ids of the clips to keep; none given keeps all.

    Attributes:
        samples: what is known of each clip; of folders and videos it is the name alone.
        labelled: `[N]` bool, whether a clip comes with labels, from a prepared dataset.

    Raises:
        UserError: an input is missing, a dataset is damaged or was prepared with another size or crop, a clip is named
            twice or not there, or an option does not fit the inputs. Folders and videos are not read yet.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        *,
        size: int,
        trained: Sequence[str],
        crop: str | None = None,
        onset: int | None = None,
        offset: int | None = None,
        only: Sequence[str] = (),
    ) -> None:
        self._size, self._onset, self._offset = size, onset, offset
        datasets, loose = _sorted_out(inputs)
        _check_options(datasets, loose, crop, onset, offset)
        self._crop = crop_for(trained, crop) if loose else None
        if self._crop is not None and (unused := self._crop.unused(loose)):
            logger.info("--crop %s: %d rows name none of the inputs, such as %s", crop, len(unused), unused[0])
        store = ClipStore([user_path(name) for name in datasets], size, trained) if datasets else None
        samples = [*(store.samples if store else ()), *(SampleInfo(name, "", "", ()) for name in loose)]
        named = {sample.sample_id: sample for sample in samples}
        if len(named) != len(samples):
            raise UserError(f"{_twice(samples)}: given twice; name each clip once")
        missing = [name for name in only if name not in named]
        if missing:
            raise UserError(f"--clip {missing[0]}: no such clip among the inputs; the first is {next(iter(named))}")
        self.samples = tuple(named[name] for name in only) if only else tuple(samples)
        stored = [sample.sample_id for sample in self.samples if sample.corpus]
        self._stored: ClipView | None = store.view(stored) if store else None
        self._rows = {name: row for row, name in enumerate(stored)}
        self._read: dict[str, Clip] = {}
        self.labelled = np.array([sample.sample_id in self._rows for sample in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def crop(self) -> str | None:
        """Identity of the crop of folders and videos; None where there are none."""
        return None if self._crop is None else self._crop.identity

    def read(self, indices: Iterable[int]) -> None:
        """Read these folders and videos ahead, and hold them.

        Raises:
            UserError: see `reading.read_clip`.
        """
        for index in indices:
            self.clip(index)

    def clip(self, index: int) -> Clip:
        """Return clip `index`, read again or from what was read before."""
        name = self.samples[index].sample_id
        if self._stored is not None and name in self._rows:
            return self._stored.clip(self._rows[name])
        if name not in self._read:
            self._read[name] = self._read_loose(name, self._size)
        return self._read[name]

    def _read_loose(self, name: str, size: int, only: Collection[int] | None = None) -> Clip:
        assert self._crop is not None, "folders and videos are cut"
        return read_clip(name, size=size, crop=self._crop, onset=self._onset, offset=self._offset, only=only)

    def pictures(self, index: int, numbers: Sequence[int], size: int) -> np.ndarray:
        """Return the frames of these numbers, `[n, S, S]` uint8: larger than the model's where they can be read so."""
        clip = self.clip(index)
        if clip.sample_id in self._rows:
            return clip.frames[np.searchsorted(clip.frame_numbers, numbers)]
        larger = self._read_loose(clip.sample_id, max(size, self._size), frozenset(numbers))
        return larger.frames[np.searchsorted(larger.frame_numbers, numbers)]

    def labels(self, aus: Sequence[int]) -> np.ndarray:
        """Return `[N, A]` float32, 1 where the AU is active; rows of clips without labels say nothing."""
        return np.array([[float(au in sample.aus) for au in aus] for sample in self.samples], dtype=np.float32)


def _sorted_out(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which inputs are datasets, and which are folders of frames and videos.

    Raises:
        UserError: one of them is not there, or cannot be looked at.
    """
    datasets, loose = [], []
    for name in inputs:
        if not name:
            raise UserError("an input is empty; give a folder of frames, a video file or a prepared dataset")
        with file_errors(name):
            if is_dataset(user_path(name)):
                datasets.append(name)
            elif user_path(name).exists():
                loose.append(name)
            else:
                raise UserError(f"{name}: does not exist; give a folder of frames, a video file or a prepared dataset")
    return datasets, loose


def _check_options(
    datasets: Sequence[str], loose: Sequence[str], crop: str | None, onset: int | None, offset: int | None
) -> None:
    if (onset is not None or offset is not None) and (datasets or len(loose) != 1):
        raise UserError("--onset and --offset belong to one folder of frames or one video; give that alone")
    if crop is not None and not loose:
        raise UserError(f"--crop {crop}: prepared datasets are cut already; leave it out")


def _twice(samples: Sequence[SampleInfo]) -> str:
    seen: set[str] = set()
    for sample in samples:
        if sample.sample_id in seen:
            return sample.sample_id
        seen.add(sample.sample_id)
    raise AssertionError("no clip is there twice")
