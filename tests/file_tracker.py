"""A tracker of Accelerate that needs no network and no library: it writes what it is told, and fails when told to."""

import json
from pathlib import Path

import numpy as np
from accelerate.tracking import GeneralTracker, on_main_process


class FileTracker(GeneralTracker):
    """Writes a line of JSON for each call into `logging_dir`, and pictures as `.npy`."""

    name = "files"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.path, self.pictures = Path(logging_dir) / f"{run_name}.jsonl", Path(logging_dir) / "pictures"

    @property
    def tracker(self):
        return self.path

    @on_main_process
    def start(self):
        self.pictures.mkdir(parents=True, exist_ok=True)
        self._write("start")

    @on_main_process
    def store_init_configuration(self, values):
        self._write("settings", values)

    @on_main_process
    def log(self, values, step=None, **_):
        self._write("log", values, step)

    @on_main_process
    def log_images(self, values, step=None, **_):
        for name, (picture,) in values.items():
            np.save(self.pictures / f"{name.replace('/', '-')}-{step}.npy", picture)

    @on_main_process
    def finish(self):
        self._write("finish")

    def _write(self, what, values=None, step=None):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "values": values, "step": step}) + "\n")


class LostError(Exception):
    """A class that nobody but the tracker's library knows."""


class LostTracker(FileTracker):
    """Loses its server with the second thing that it logs."""

    name = "lost"

    def log(self, values, step=None, **_):
        if step > 1:
            raise LostError("the server is gone")
        super().log(values, step)


class BareTracker(FileTracker):
    """Takes no pictures."""

    name = "bare"
    log_images = property()
