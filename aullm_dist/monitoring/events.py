"""Writes TensorBoard event files in a thread of its own, so that nothing that happens to the disk holds a run up.

torch's SummaryWriter lets a full disk raise in the training loop, and a disk that hangs hold it up. Here whatever goes
wrong is reported once; from then on the run continues without event files.
"""

import itertools
import os
import queue
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aullm_dist.log import get_logger

logger = get_logger(__name__)

_numbers = itertools.count()
_said: set[Path] = set()
"""Folders of runs whose warning was logged: the folds of a run share a disk."""
_WAITING = 256
"""Events that may wait for the disk."""
_FLUSH_SECONDS = 10.0
_CLOSE_SECONDS = 20.0
"""How long the end of a fold waits for a slow disk."""


class EventFile:
    """One event file; a file that cannot be written warns once and is disabled.

    Args:
        folder: made if it is not there.
        purge_step: earlier files' events at or beyond this step are dropped, as they are written again; None keeps all.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        # Not in the thread: two threads that import one library may wait for each other.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._record_writer, self.folder = Event, Summary, RecordWriter, folder
        self._queue: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._problem: str | None = None
        self._given_up = False
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.path = folder / name
        # A daemon: a disk that hangs must not keep the process alive either.
        self._thread = threading.Thread(target=self._work, name="tensorboard", daemon=True)
        self._thread.start()
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            purge = SessionLog(status=SessionLog.START)
            self._put(Event(wall_time=time.time(), step=purge_step, session_log=purge))

    @property
    def works(self) -> bool:
        """Whether what is written still has a chance to arrive."""
        return not self._given_up

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars by tag, all in one event."""
        rows = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.summary(self._summary(value=rows), step)

    def summary(self, summary: Any, step: int) -> None:
        """Write a Summary protocol buffer, as the functions of `torch.utils.tensorboard.summary` make them."""
        self._put(self._event(wall_time=time.time(), step=step, summary=summary))

    def failed(self, problem: str) -> None:
        """Give the file up and say why, once for all files of a run."""
        self._given_up = True
        run = self.folder.parent
        if run not in _said:
            _said.add(run)
            logger.warning("TensorBoard: %s; the run continues without event files in %s", problem, run)

    def close(self) -> bool:
        """Wait until all is on disk, but not for ever; whether it is."""
        if self._problem is None and not self._given_up:
            try:
                self._queue.put(None, timeout=_CLOSE_SECONDS)
                self._thread.join(_CLOSE_SECONDS)
            except queue.Full:
                pass
            if self._thread.is_alive():
                self.failed(f"the disk did not take what was logged within {_CLOSE_SECONDS:.0f} s")
        if self._problem is not None:
            self.failed(self._problem)
        complete, self._given_up = not self._given_up, True
        return complete

    def _put(self, event: Any) -> None:
        if self._problem is not None:
            self.failed(self._problem)
        if self._given_up:
            return
        try:
            self._queue.put_nowait(event.SerializeToString())
        except queue.Full:
            self.failed(f"the disk has not taken {_WAITING} events that wait for it")

    def _work(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "xb") as file:
                writer, flush_at = self._record_writer(file), 0.0
                while (event := self._next(flush_at)) is not None:
                    if event:
                        writer.write(event)
                    if time.monotonic() >= flush_at:
                        file.flush()
                        self._look()
                        flush_at = time.monotonic() + _FLUSH_SECONDS
                file.flush()
                self._look()
        except OSError as error:
            self._problem = f"{error.filename or self.path}: {error.strerror or error}"

    def _next(self, flush_at: float) -> bytes | None:
        """Return the next event, nothing where a flush is due before one comes, None at the end."""
        try:
            return self._queue.get(timeout=max(0.0, flush_at - time.monotonic()) or _FLUSH_SECONDS)
        except queue.Empty:
            return b""

    def _look(self) -> None:
        # Writing to a file whose name is gone works, and reaches nobody.
        if not self.path.exists():
            raise FileNotFoundError(0, "the event file was removed", str(self.path))
