"""Writes data for TensorBoard's embedding projector: vectors of held-out clips with their labels and thumbnails.

Only the newest evaluation is kept, so the files do not grow. Vectors are reduced to their principal components before
they are written, as TensorBoard itself does before it draws: 4096 numbers per clip as text would be megabytes.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from aullm_dist.files import write_text

COMPONENTS = 50
THUMBNAIL_PIXELS = 32
_FOLDER = "projector"


def write_projector(
    folder: Path,
    vectors: Mapping[str, np.ndarray],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    frames: np.ndarray | None,
) -> None:
    """Write the files of the projector of one TensorBoard run, in the place of older ones.

    Args:
        folder: of the run's event files.
        vectors: by name, `[n, D]`.
        header: names of the columns of `rows`, two or more.
        rows: what is known of each of the n clips.
        frames: `[n, H, W]` in 0..1 for thumbnails; None shows points alone.

    Raises:
        OSError: a file cannot be written.
    """
    entries = []
    (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
    table = [header, *rows]
    write_text(folder / _FOLDER / "metadata.tsv", "".join("\t".join(map(_cell, row)) + "\n" for row in table))
    sprite = ""
    if frames is not None:
        _write_sprite(folder / _FOLDER / "sprite.png", frames)
        size = f"single_image_dim: {THUMBNAIL_PIXELS} " * 2
        sprite = f'  sprite {{ image_path: "{_FOLDER}/sprite.png" {size}}}\n'
    for name, values in vectors.items():
        lines = ("\t".join(f"{value:.5g}" for value in row) for row in principal_components(values, COMPONENTS))
        write_text(folder / _FOLDER / f"{name}.tsv", "".join(line + "\n" for line in lines))
        entries.append(
            f'embeddings {{\n  tensor_name: "{name}"\n  tensor_path: "{_FOLDER}/{name}.tsv"\n'
            f'  metadata_path: "{_FOLDER}/metadata.tsv"\n{sprite}}}\n'
        )
    # Last: TensorBoard looks for this file alone.
    write_text(folder / "projector_config.pbtxt", "".join(entries))


def principal_components(values: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` principal components of `[n, D]` values, `[n, min(count, n, D)]`.

    Distances between the clips are those of the values, but for what the other components hold.
    """
    centred = values.astype(np.float64) - values.mean(axis=0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    return (left * scale)[:, :count]


def _cell(value: str) -> str:
    return value.replace("\t", " ").replace("\n", " ")


def _write_sprite(path: Path, frames: np.ndarray) -> None:
    side = int(np.ceil(np.sqrt(len(frames))))
    sheet = Image.new("L", (side * THUMBNAIL_PIXELS, side * THUMBNAIL_PIXELS))
    for place, frame in enumerate(frames):
        image = Image.fromarray((np.clip(frame, 0, 1) * 255).astype(np.uint8))
        image = image.resize((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.BOX)
        sheet.paste(image, (place % side * THUMBNAIL_PIXELS, place // side * THUMBNAIL_PIXELS))
    # TensorBoard may be reading the older one.
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".png")
    os.close(handle)
    sheet.save(temporary)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
