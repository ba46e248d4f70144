"""How fast clips are prepared and read back: clips per second and core, on a release of pictures made on the spot.

The pictures are smooth noise of CASME II's raw size (640x480 JPEG, 67 frames a clip); they only have to cost what
real pictures cost to decode. Run: `python benchmarks/prepare.py [--clips 16] [--json FILE]`.

`--scale 1000 10000` instead prepares releases of so many clips, each in a process of its own, and prints time and peak
memory per clip. They are of 8 frames of 320x240 a clip, all links to the same few pictures: what grows is what the
preparation itself does, in the sheet, the folders and the files.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from common import write_json
from datasets import load_from_disk
from flow import recipe_of
from openpyxl import Workbook
from PIL import Image, ImageFilter

from aullm_dist.data.clips import ClipStore
from aullm_dist.data.corpora import CORPORA
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.training.batches import make_sample

FRAMES_PER_CLIP = 67
SCALE_FRAMES = 8
HEADER = ["Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Action Units", "Estimated Emotion"]


def make_release(root: Path, num_clips: int) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (520, 680, 3), np.uint8)).filter(ImageFilter.GaussianBlur(4))
    smooth = np.asarray(noise, np.int16)
    grain = rng.integers(-4, 5, smooth.shape, np.int16)
    texture = np.clip((smooth - 128) * 6 + 128 + grain, 0, 255).astype(np.uint8)
    book = Workbook()
    book.active.append(HEADER)
    for clip in range(num_clips):
        book.active.append([1, f"EP{clip:02d}_01", 1, "/", FRAMES_PER_CLIP, "4+7", "others"])
        folder = root / "CASME2_RAW_selected" / "sub01" / f"EP{clip:02d}_01"
        folder.mkdir(parents=True)
        for number in range(1, FRAMES_PER_CLIP + 1):
            x, y = (number + clip) % 40, number % 40
            Image.fromarray(texture[y : y + 480, x : x + 640]).save(folder / f"img{number}.jpg", quality=90)
    book.save(root / "coding.xlsx")


def make_large_release(root: Path, num_clips: int) -> None:
    rng = np.random.default_rng(0)
    pictures = []
    root.mkdir(parents=True)
    for number in range(SCALE_FRAMES):
        small = Image.fromarray(rng.integers(0, 256, (260, 340), np.uint8)).filter(ImageFilter.GaussianBlur(3))
        pictures.append(root / f"picture{number}.jpg")
        small.crop((0, 0, 320, 240)).save(pictures[-1], quality=90)
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(HEADER)
    for clip in range(num_clips):
        subject, name = clip % 200 + 1, f"EP{clip:05d}_01"
        sheet.append([subject, name, 1, 4, SCALE_FRAMES, "4+7", "others"])
        folder = root / "CASME2_RAW_selected" / f"sub{subject:02d}" / name
        folder.mkdir(parents=True)
        for number, picture in enumerate(pictures, start=1):
            os.link(picture, folder / f"img{number}.jpg")
    book.save(root / "coding.xlsx")


def measure_scale(num_clips: int, workers: int, fmt: str) -> dict[str, float | int | str]:
    """Prepare a release in a process of its own and return time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "release", Path(folder) / "out"
        make_large_release(root, num_clips)
        command = [sys.executable, __file__, "--measure", str(root), str(out), str(workers), fmt]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    clips = result["num_clips"]
    per_clip = {
        "ms_per_clip": 1000 * result["seconds"] / clips,
        "cpu_ms_per_clip": 1000 * result["cpu_seconds"] / clips,
    }
    return {"workers": workers, "format": fmt, **result, **per_clip}


def prepare_and_measure(root: str, out: str, workers: str, fmt: str) -> None:
    """Prepare, and print seconds and peak memory of this process and of its largest worker as JSON.

    `peak_rss` counts pages of mapped Arrow files, which the system drops when it needs them; `peak_own` does not.
    """
    before, peak_own, running = _own_memory_mib(), 0.0, True

    def watch() -> None:
        nonlocal peak_own
        while running:
            peak_own = max(peak_own, _own_memory_mib())
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    report = prepare("casme2", root, out, PrepareOptions(size=64, num_workers=int(workers), fmt=fmt))
    seconds = time.perf_counter() - started
    running = False
    watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    cpu = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    memory = {
        "peak_rss_mib": peak / 1024,
        "own_mib_at_start": before,
        "peak_own_mib": peak_own,
        "peak_rss_of_a_worker_mib": worker / 1024,
    }
    print(json.dumps({"num_clips": report["num_clips"], "seconds": seconds, "cpu_seconds": cpu, **memory}))


def _own_memory_mib() -> float:
    """Return the resident memory that is this process's own, without files that are mapped and can be dropped."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def run_scale(args: argparse.Namespace) -> None:
    rows = [measure_scale(clips, args.workers, args.format) for clips in args.scale]
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if args.json:
        write_json(args.json, {"scale": rows, "frames_per_clip": SCALE_FRAMES, "source": "320x240 JPEG, linked"})


def read_clips(dataset: object, num_reads: int) -> float:
    """Clips per second of random reads, each turned into `[T, H, W]`."""
    order = np.random.default_rng(0).integers(0, len(dataset), num_reads)
    started = time.perf_counter()
    for index in order:
        row = dataset[int(index)]
        np.frombuffer(row["frames"], np.uint8).reshape(row["num_frames"], row["height"], row["width"])
    return num_reads / (time.perf_counter() - started)


def make_training_samples(folder: Path, size: int, num_samples: int) -> float:
    """Training samples per second: decoded, cut, augmented, with two interventions, as a loader makes them."""
    store = ClipStore([folder], size)
    view = store.view([sample.sample_id for sample in store.samples])
    recipe = recipe_of("led", training=True)
    labels = view.labels(CORPORA["casme2"].aus)
    started = time.perf_counter()
    for number in range(num_samples):
        index = number % len(view)
        make_sample(view, index, labels[index], recipe, epoch=number // len(view))
    return num_samples / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--scale", type=int, nargs="+", metavar="CLIPS", help="sizes of large releases to prepare")
    parser.add_argument("--workers", type=int, default=1, help="processes of --scale")
    parser.add_argument("--format", default="arrow", help="of --scale: arrow or parquet")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        prepare_and_measure(*args.measure)
        return
    if args.scale:
        run_scale(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "release", Path(folder) / "out"
        make_release(root, args.clips)
        started = time.perf_counter()
        report = prepare("casme2", root, out, PrepareOptions(size=args.size, num_workers=1))
        seconds = time.perf_counter() - started
        read = read_clips(load_from_disk(str(out)), num_reads=2000)
        samples = make_training_samples(out, args.size, num_samples=500)
    result = {
        "prepare_clips_per_second_per_core": report["num_clips"] / seconds,
        "prepare_frames_per_second_per_core": report["num_frames"] / seconds,
        "read_clips_per_second": read,
        "training_samples_per_second_per_core": samples,
        "frames_per_clip": FRAMES_PER_CLIP,
        "source": "640x480 JPEG",
        "size": args.size,
    }
    for key, value in result.items():
        print(f"{key:<36}{value:>14.1f}" if isinstance(value, float) else f"{key:<36}{value:>14}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
