"""Wraps a release as a transformers model, which is what `AutoModel.from_pretrained` returns for its folder."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from aullm_dist.files import user_path
from aullm_dist.release.auto import AULLMConfig
from aullm_dist.release.loading import Release, load

# The Auto classes hand these on whatever the user said.
_FROM_AUTO = frozenset({"_from_auto", "adapter_kwargs"})
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class AULLMModel(PreTrainedModel):
    """Gray clips in, one logit per AU out.

    Attributes:
        release: what was loaded: AUs, thresholds, preprocessing; its `model` is `network`.
    """

    config_class = AULLMConfig
    main_input_name = "pixel_values"

    def __init__(self, config: AULLMConfig, release: Release) -> None:
        super().__init__(config)
        self.release = release
        self.network = release.model

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a release fixes what the other arguments of the library choose
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: AULLMConfig | None = None,
        llm: str | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool | None = None,
        **others: Any,
    ) -> "AULLMModel":
        """Load a release, in evaluation mode.

        Args:
            pretrained_model_name_or_path: its folder, or the name of a Hugging Face repository that holds one.
            config: as AutoModel hands it over; None reads it from the folder.
            llm: as in `aullm_dist.load`.
            device: as in `aullm_dist.load`.
            trust_remote_code: as in `aullm_dist.load`.
            others: what the Auto classes add, and of a repository what `huggingface_hub.snapshot_download` takes:
                `cache_dir`, `force_download`, `local_files_only`, `revision`, `token`.

        Raises:
            UserError: as `aullm_dist.load`.
            TypeError: an argument that has no effect on a release, such as a dtype.
        """
        foreign = sorted(others.keys() - _FROM_AUTO - {*_OF_THE_HUB})
        if foreign:
            raise TypeError(f"{foreign[0]} has no effect on a release, which fixes its own; allowed: llm, device")
        place = {key: others[key] for key in _OF_THE_HUB if others.get(key) is not None}
        folder = _folder_of(pretrained_model_name_or_path, place)
        release = load(folder, device=device, llm=llm, trust_remote_code=bool(trust_remote_code))
        return cls(config or AULLMConfig.from_pretrained(folder), release).eval()

    def forward(self, pixel_values: Tensor) -> SequenceClassifierOutput:
        """Answer gray clips `[B, T, H, W]` in 0..1 with `logits` `[B, A]`; no gradient reaches clips through flow."""
        if self.network.stream != "led":
            pixel_values = self.release.views(pixel_values)
        index = torch.arange(len(pixel_values), device=pixel_values.device)
        branches = index[:, None].expand(-1, 2)
        return SequenceClassifierOutput(logits=self.network(pixel_values, index, None, branches).logits)

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """Refuse: what is loaded is a whole folder already, and only a checkpoint makes another.

        Raises:
            NotImplementedError: always, naming the folder to copy.
        """
        raise NotImplementedError(f"a release is copied as a folder: {self.release.path}")


def _folder_of(name_or_path: str | os.PathLike, place: dict[str, Any]) -> Path:
    folder = user_path(name_or_path)
    if folder.exists() or os.fspath(name_or_path).count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(os.fspath(name_or_path), **place))
