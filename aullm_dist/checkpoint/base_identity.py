"""Identifies the LLM of an adapter: its name, a hash of its config, and a fingerprint of its weight files."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aullm_dist.files import user_path
from aullm_dist.llm.identity import BaseIdentity, WeightFile
from aullm_dist.llm.stored.weight_files import weight_files
from aullm_dist.llm.stored.wrappers import wrapper_type
from aullm_dist.signed import file_sha256

_SAMPLES = 64
_SAMPLE_BYTES = 4096
# They say how or from where a config was loaded, not which function it describes.
_VOLATILE_KEYS = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "architectures",
        "attn_implementation",
        "dtype",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def base_identity(
    name_or_path: str, config: Mapping[str, Any], folder: Path | None, *, hash_files: bool = False
) -> BaseIdentity:
    """Describe the LLM that is trained on.

    Args:
        name_or_path: Hub name or local folder, as the user gave it.
        config: The LLM's own config as a dict (`llm.config.to_dict()`).
        folder: where its files are on this machine (`llm.present_folder`); None if they are not.
        hash_files: Read every weight file to the end for its SHA-256 (minutes for a 70B); otherwise a fingerprint over
            64 evenly spaced 4 KiB blocks (ours) tells two sets of weights apart in milliseconds.

    Raises:
        UserError: the index of the files cannot be read.
    """
    present = filter(Path.is_file, [] if folder is None else weight_files(folder))
    files = {
        path.name: WeightFile(
            path.stat().st_size, _sample_sha256(path), sha256=file_sha256(path) if hash_files else None
        )
        for path in present
    }
    is_folder = user_path(name_or_path).exists()
    # In full: a checkpoint is read from other working folders than it was written in.
    name = os.path.abspath(user_path(name_or_path)) if is_folder else str(name_or_path)
    # The Hub's cache names folders by the commit that they hold.
    revision = None if folder is None or is_folder else folder.name
    return BaseIdentity(
        name=name,
        revision=revision,
        config_sha256=config_sha256(config),
        files=files,
        wrapper=None if folder is None else wrapper_type(folder),
    )


def config_sha256(config: Mapping[str, Any]) -> str:
    """Return a hash of an LLM config that ignores where, by which version and in which dtype it was loaded."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def base_differences(saved: BaseIdentity | None, expected: BaseIdentity) -> list[str]:
    """Compare two identities; a folder that moved is the same base, as long as config and weights are.

    Returns:
        One phrase per difference, empty if they describe the same base.
    """
    if saved is None:
        return [f"no base LLM in the checkpoint, {expected.name} expected"]
    names = f"base {saved.name} in the checkpoint, {expected.name} expected"
    if saved.config_sha256 != expected.config_sha256:
        return [f"{names}, and their configs differ"]
    if not saved.files or not expected.files:
        # Without weights to compare, two different hub names are two models (a base and its chat version, say).
        comparable = not Path(saved.name).is_absolute() and not Path(expected.name).is_absolute()
        return [names] if comparable and saved.name != expected.name else []
    differences = [
        f"{names}, and their {name} differ"
        for name in sorted(saved.files.keys() | expected.files.keys())
        if _file_differs(saved.files.get(name), expected.files.get(name))
    ]
    return differences[:1]


def _file_differs(saved: WeightFile | None, expected: WeightFile | None) -> bool:
    return saved is None or expected is None or saved.differs_from(expected)


def _sample_sha256(path: Path) -> str:
    """Hash the size and evenly spaced blocks of a file, the first and the last among them."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(size - _SAMPLE_BYTES, 0)
    with open(path, "rb") as file:
        for index in range(_SAMPLES):
            file.seek(last * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
