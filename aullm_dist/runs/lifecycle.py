"""Records one attempt of a run, from its start to its end or its pre-emption, for whoever starts it again."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from aullm_dist.config import Config
from aullm_dist.log import get_logger, is_main_process
from aullm_dist.runs.job import JobRecord, begin_job, job_folder, write_marker, write_record
from aullm_dist.runtime.preemption import EXCHANGE_SECONDS, Agreement, AgreesToStop, Preempted
from aullm_dist.runtime.signals import StopSignals
from aullm_dist.runtime.slurm import job_of

logger = get_logger(__name__)


class Life:
    """What the parts of a run share about being ended and started again.

    Args:
        accelerator: the run's Accelerator.
        config: the run's configuration; names the grace period.
        signals: of this process.
        folder: of marker and record; None is that of the configuration.
    """

    def __init__(
        self, accelerator: Accelerator, config: Config, signals: StopSignals, folder: Path | None = None
    ) -> None:
        self.agreement: AgreesToStop = Agreement(accelerator, signals)
        self.signals = signals
        self.job = job_of(os.environ)
        self._main = accelerator.is_main_process
        self._folder = folder or job_folder(config)
        self._grace_seconds = config.training.grace_seconds
        self._record: JobRecord | None = None
        self._has_saved = self._has_stepped = self._has_warned = False
        signals.leave_loading = self._leave_loading

    @property
    def rehearses(self) -> bool:
        """Whether a checkpoint is due because a job, which has a grace period, has not written one in this life."""
        return self.job is not None and not self._has_saved

    @contextmanager
    def agreeing(self, agreement: AgreesToStop) -> Iterator[None]:
        """A region in which this process agrees with others than those of the run."""
        before, self.agreement = self.agreement, agreement
        try:
            yield
        finally:
            agreement.drain()
            self.agreement = before

    def loads(self) -> None:
        """Say that a run begins to load: a signal from here on finds nothing to save."""
        self.signals.loading()

    def begins(self) -> None:
        """Say that the run folder is open and the run ready to train; the main process clears the marker.

        Raises:
            Preempted: it was asked to stop meanwhile.
            OSError: the folder cannot be written.
        """
        if self._main and self._record is None:
            self._record = begin_job(self._folder, self.job)
        self.signals.loaded()

    def completed_step(self) -> None:
        """Say that an optimizer step was completed; the first one of an attempt is put on record."""
        if not self._has_stepped and self._main:
            assert self._record is not None, "a run begins before its first step"
            self._record = replace(self._record, step_completed=True)
            write_record(self._folder, self._record)
        self._has_stepped = True

    @contextmanager
    def saves(self) -> Iterator[None]:
        """A region that writes a checkpoint: measured, held against the grace period, and left in peace meanwhile."""
        begun = time.monotonic()
        with self.signals.busy():
            yield
        seconds = time.monotonic() - begun
        first, self._has_saved = not self._has_saved, True
        # From the signal: an exchange, the micro-batch in which it falls and those until the answer is read, the save.
        needed = EXCHANGE_SECONDS + 2.0 * self.agreement.seconds_per_tick + seconds
        if needed > self._grace_seconds and not self._has_warned:
            self._has_warned = True
            if is_main_process():
                logger.warning(
                    "Saving took %.1f s: from a signal to a checkpoint on disk this run needs about %.0f s, but "
                    "training.grace_seconds is %g; ask SLURM for more (--signal=B:USR1@SECONDS) and raise it",
                    seconds, needed, self._grace_seconds,
                )  # fmt: skip
        elif first and self.job is not None:
            logger.info(
                "Checkpoint written in %.1f s; from a signal to a checkpoint on disk about %.0f s of the %g s of "
                "training.grace_seconds", seconds, needed, self._grace_seconds,
            )  # fmt: skip

    def preempted(self, stop: Preempted) -> None:
        """Write the marker; every process calls it, behind its last save.

        Raises:
            OSError: the folder cannot be written.
        """
        self.agreement.drain()
        self.signals.deafen()
        seconds = time.monotonic() - self.signals.received_at if self.signals.received else None
        if self._main:
            run = {"run": stop.run} if stop.run else {}
            write_marker(self._folder, self.job, **run, fold=stop.fold, step=stop.step, seconds=seconds)
        stops = [*([(stop.run, stop.fold, stop.step)] if stop.step is not None else []), *stop.others]
        places = (f"step {step} of fold {fold}" + (f" of {run}" if run else "") for run, fold, step in stops)
        where = " at " + ", ".join(places) if stops else ""
        logger.info("Stopped as asked%s; --resume auto continues", where)

    def ends(self) -> None:
        """Say that all is trained: a signal from here on changes nothing."""
        self.agreement.drain()
        self.signals.deafen()

    def _leave_loading(self) -> None:
        if self._main and (self.job is not None or self._folder.exists()):
            write_marker(self._folder, self.job, fold=None, step=None, seconds=None)
