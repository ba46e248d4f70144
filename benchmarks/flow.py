"""What optical flow costs a loader process: milliseconds per view and clips per second of a core.

The clips are smooth noise that drifts; flow costs the same whatever moves. Times are CPU time of one thread, so that a
machine that is shared gives the same numbers. Run: `python benchmarks/flow.py [--json FILE]`.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from common import commit, cpu_name, markdown_table, versions, write_json

from aullm_dist.data.clips import Clip
from aullm_dist.data.corpora import CORPORA
from aullm_dist.data.flow import FlowSettings, clip_flow
from aullm_dist.data.views import Visual, view_channels, view_of
from aullm_dist.model.counterfactual import Chances
from aullm_dist.model.relations import build_relations, sample_structure_edit
from aullm_dist.training.batches import ClipRecipe, sample_of_clip

NUM_FRAMES = 6
SIZES = (64, 128)
SETTINGS = (
    FlowSettings(upsample=1, window=9),
    FlowSettings(),
    FlowSettings(upsample=3, window=21),
    FlowSettings(stabilise="median"),
    FlowSettings(stabilise="affine"),
    FlowSettings(method="dis", upsample=1),
    FlowSettings(method="dis"),
)


def make_clip(size: int, frames: int = 20) -> Clip:
    """Return a clip of smooth noise that drifts by a tenth of a pixel per frame."""
    noise = np.random.default_rng(0).random((size, size)).astype(np.float32)
    smooth = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2.0), None, 0.0, 255.0, cv2.NORM_MINMAX)
    moved = [
        cv2.warpAffine(smooth, np.float32([[1, 0, 0.1 * t], [0, 1, 0]]), (size, size), borderMode=cv2.BORDER_REFLECT)
        for t in range(frames)
    ]
    return Clip("clip", np.stack(moved).round().astype(np.uint8), np.arange(frames))


def cpu_seconds(work: Callable[[int], object], repeats: int) -> float:
    """Return the CPU seconds of one call, on average, after one that does not count."""
    work(0)
    started = time.process_time()
    for number in range(repeats):
        work(number)
    return (time.process_time() - started) / repeats


def recipe_of(visual: Visual, training: bool) -> ClipRecipe:
    """Return the recipe of evaluation, or the demo's of training with its counterfactual twins."""
    if not training:
        return ClipRecipe(NUM_FRAMES, visual=visual)
    relations = build_relations(CORPORA["casme2"].aus)
    return ClipRecipe(
        num_frames=NUM_FRAMES,
        cut_fraction=0.2,
        augment=True,
        chances=Chances(2, {"structure": 1.0, "appearance": 1.0, "neutral": 1.0}),
        prior_mask=relations.prior_mask,
        edit_structure=partial(sample_structure_edit, relations, 0.15),
        contradiction=True,
        visual=visual,
    )


def measure_views(repeats: int) -> list[dict[str, object]]:
    """Measure one view of six frames per setting and size."""
    rows = []
    for size in SIZES:
        clip = make_clip(size)
        frames = (clip.frames[:NUM_FRAMES] / 255).astype(np.float32)
        for settings in SETTINGS:
            seconds = cpu_seconds(lambda _, s=settings, f=frames: clip_flow(f, s), repeats)
            name = f"{settings.method} {settings.upsample}x, window {settings.window}, {settings.stabilise}"
            rows.append({"size": size, "settings": name, "ms_per_view": 1e3 * seconds})
    return rows


def measure_clips(repeats: int) -> list[dict[str, object]]:
    """Measure whole samples as loader processes make them, per stream."""
    rows = []
    for size in SIZES:
        clip, label = make_clip(size), np.zeros(8, np.float32)
        for visual in ("led", "flow", "both"):
            row: dict[str, object] = {"size": size, "visual": visual}
            for side, training in (("evaluation", False), ("training", True)):
                recipe = recipe_of(visual, training)
                make = partial(sample_of_clip, clip, label, recipe)
                seconds = cpu_seconds(make, repeats)
                row[f"{side}_clips_per_second_per_core"] = 1 / seconds
            row["kib_per_view"] = view_channels(visual, NUM_FRAMES) * size * size * 4 / 1024
            assert view_of(clip.frames[:NUM_FRAMES] / np.float32(255), visual).nbytes == 1024 * row["kib_per_view"]
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40, metavar="N", help="calls per row (40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    args = parser.parse_args()
    report = {
        "views": measure_views(args.repeats),
        "clips": measure_clips(args.repeats),
        "cpu": cpu_name(),
        "commit": commit(),
        "versions": versions(("numpy", "opencv-python-headless")),
    }
    print(f"{report['cpu']}, commit {report['commit']}, {report['versions']}\n")
    for rows in (report["clips"], report["views"]):
        cells = [[f"{v:.1f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
        print("\n".join(markdown_table([key.replace("_", " ") for key in rows[0]], cells, left=2)) + "\n")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
