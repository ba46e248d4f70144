"""How fast clips are prepared and read back: clips per second and core, on a release of pictures made on the spot.

The pictures are smooth noise of CASME II's raw size (640x480 JPEG, 67 frames a clip); they only have to cost what
real pictures cost to decode. Run: `python benchmarks/prepare.py [--clips 16] [--json FILE]`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import load_from_disk
from openpyxl import Workbook
from PIL import Image, ImageFilter

from aullm_dist.data.prepare import prepare

FRAMES_PER_CLIP = 67
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


def read_clips(dataset: object, num_reads: int) -> float:
    """Clips per second of random reads, each turned into `[T, H, W]`."""
    order = np.random.default_rng(0).integers(0, len(dataset), num_reads)
    started = time.perf_counter()
    for index in order:
        row = dataset[int(index)]
        np.frombuffer(row["frames"], np.uint8).reshape(row["num_frames"], row["height"], row["width"])
    return num_reads / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "release", Path(folder) / "out"
        make_release(root, args.clips)
        started = time.perf_counter()
        report = prepare("casme2", root, out, size=args.size, num_workers=1)
        seconds = time.perf_counter() - started
        read = read_clips(load_from_disk(str(out)), num_reads=2000)
    result = {
        "prepare_clips_per_second_per_core": report["num_clips"] / seconds,
        "prepare_frames_per_second_per_core": report["num_frames"] / seconds,
        "read_clips_per_second": read,
        "frames_per_clip": FRAMES_PER_CLIP,
        "source": "640x480 JPEG",
        "size": args.size,
    }
    for key, value in result.items():
        print(f"{key:<36}{value:>14.1f}" if isinstance(value, float) else f"{key:<36}{value:>14}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
