"""Which LLM an adapter belongs to: its name, a hash of its config, and a fingerprint of its weight files."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aullm_dist.model.weight_files import weight_files
from aullm_dist.training.manifest import file_sha256

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
) -> dict[str, Any]:
    """Describe the LLM that is trained on.

    Args:
        name_or_path: Hub name or local folder, as the user gave it.
        config: The LLM's own config as a dict (`llm.config.to_dict()`).
        folder: where its files are on this machine (`llm.present_folder`); None if they are not.
        hash_files: Read every weight file to the end for its SHA-256 (minutes for a 70B); otherwise a fingerprint over
            64 evenly spaced 4 KiB blocks (ours) tells two sets of weights apart in milliseconds.

    Returns:
        `{"name", "revision", "config_sha256", "files": {file name: {"size", "sample_sha256", "sha256"?}}}`. The
        revision is the commit of a model of the Hub, None for a folder; `files` is empty without safetensors files.

    Raises:
        UserError: the index of the files cannot be read.
    """
    files = {}
    for path in filter(Path.is_file, [] if folder is None else weight_files(folder)):
        files[path.name] = {"size": path.stat().st_size, "sample_sha256": _sample_sha256(path)}
        if hash_files:
            files[path.name]["sha256"] = file_sha256(path)
    # The Hub's cache names folders by the commit that they hold.
    revision = None if folder is None or Path(name_or_path).expanduser().exists() else folder.name
    return {
        "name": str(name_or_path),
        "revision": revision,
        "config_sha256": config_sha256(config),
        "files": files,
    }


def config_sha256(config: Mapping[str, Any]) -> str:
    """Return a hash of an LLM config that ignores where, by which version and in which dtype it was loaded."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def base_differences(saved: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> list[str]:
    """Compare two identities; a folder that moved is the same base, as long as config and weights are.

    Returns:
        One phrase per difference, empty if they describe the same base.
    """
    if saved is None:
        return [f"no base LLM in the checkpoint, {expected['name']} expected"]
    names = f"base {saved['name']} in the checkpoint, {expected['name']} expected"
    if saved["config_sha256"] != expected["config_sha256"]:
        return [f"{names}, and their configs differ"]
    if not saved["files"] or not expected["files"]:
        # Without weights to compare, two different hub names are two models (a base and its chat version, say).
        comparable = not Path(saved["name"]).is_absolute() and not Path(expected["name"]).is_absolute()
        return [names] if comparable and saved["name"] != expected["name"] else []
    differences = [
        f"{names}, and their {name} differ"
        for name in sorted(saved["files"].keys() | expected["files"].keys())
        if _file_differs(saved["files"].get(name), expected["files"].get(name))
    ]
    return differences[:1]


def _file_differs(saved: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> bool:
    if saved is None or expected is None:
        return True
    return any(
        saved[key] != expected[key] for key in ("size", "sample_sha256", "sha256") if key in saved and key in expected
    )


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
