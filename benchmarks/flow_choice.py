"""Which flow, and which network on it: f1 and AUC of small networks on synthetic corpora, without an LLM.

Trains each network on 20 subjects of 12 clips (CASME II's layout, all AUs about equally frequent, one fold of held-out
subjects), with BCE and the trainer's optimiser, and scores it at threshold 0.5 on the held-out subjects and on 10 x 8
clips of SAMM's layout under the unseen camera `vignette_banding` (AUs with 3 positives or more). Views are made as
loaders make them, with cut, shift and gain, once per epoch, and are shared by all networks. What came out is in
docs/model.md.

Run: `python benchmarks/flow_choice.py --seeds 201 --networks 2d --flows farneback-2-15-none dis-1-9-none`; flows are
method, enlargement, window, what is subtracted of the head's movement, and, if frames are divided by their local mean,
what share of the side that is (`16`: a sixteenth); `led` is the LED stream with its own network.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aullm_dist.config import TrainingConfig
from aullm_dist.data.clips import ClipStore, ClipView
from aullm_dist.data.flow import FlowSettings, clip_flow, strain_of
from aullm_dist.data.order import SampleStream
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.data.protocols import make_folds
from aullm_dist.data.synthetic import SyntheticSpec, write_corpus
from aullm_dist.evaluation.metrics import summarise
from aullm_dist.model.visual import ChannelAttention, LedCnn
from aullm_dist.training.batches import ClipRecipe, sample_of_clip
from aullm_dist.training.optimizer import build_optimizer, schedule, set_learning_rates

AUS = (1, 2, 4, 7, 12, 14, 15, 17)
SIDE, FRAMES, BATCH = 64, 6, 16
PAIRS = FRAMES - 1
TRAINING = ClipRecipe(num_frames=FRAMES, cut_fraction=0.2, augment=True, seed=0)
WHOLE = ClipRecipe(num_frames=FRAMES)


class FlowNet(nn.Module):
    """The network of `model.flow_cells` (`2d`), or that of the LED stream on flow (`3d`); with or without strain."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.kind, _, rest = name.partition("-")
        self.channels = 2 if rest == "uv" else 3
        self.conv1 = nn.Conv3d(self.channels, 32, (1, 5, 5), bias=False)
        self.norm1 = nn.GroupNorm(8, 32, eps=0.1)
        self.conv2 = nn.Conv3d(32, 64, (2 if self.kind == "3d" else 1, 3, 3), bias=False)
        self.norm2 = nn.GroupNorm(8, 64, eps=0.1)
        self.attention = ChannelAttention(64)
        self.dropout = nn.Dropout(0.1)
        self.summary = nn.Linear(162 * 64, 256)
        self.summary_norm = nn.LayerNorm(256)
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, len(AUS)))
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, views: Tensor) -> Tensor:
        """Return logits `[V, A]` of flow views `[V, 15, H, W]`."""
        maps = views.view(-1, PAIRS, 3, SIDE, SIDE) * torch.tensor([10.0, 10.0, 50.0]).view(3, 1, 1)
        x = F.max_pool3d(self.conv1(maps[:, :, : self.channels].transpose(1, 2)), (1, 3, 3))
        x = self.norm2(self.conv2(self.dropout(F.relu(self.norm1(x)))))
        x = F.relu(self.attention(x))
        x = F.max_pool3d(x, 2) if self.kind == "3d" else F.max_pool3d(x, (3, 2, 2), (2, 2, 2))
        return self.head(self.summary_norm(self.summary(self.dropout(x.flatten(2).transpose(1, 2).flatten(1)))))


@dataclass(frozen=True, slots=True)
class Views:
    """The views of one stream: of each epoch's training clips, and of both test sides."""

    training: np.ndarray
    labels: np.ndarray
    within: tuple[np.ndarray, np.ndarray]
    across: tuple[np.ndarray, np.ndarray]
    ms_per_view: float


def corpus(out: Path, seed: int, amplitude: float, shifted: bool) -> Path:
    """Write and prepare a corpus, once."""
    corpus, subjects, clips, shift = ("samm", 10, 8, "vignette_banding") if shifted else ("casme2", 20, 12, "corpus")
    spec = SyntheticSpec(
        corpus=corpus, subjects=subjects, clips_per_subject=clips, amplitude_percent=amplitude, num_frames=(12, 24),
        balance=1.0, shift=shift, seed=seed,
    )  # fmt: skip
    prepared = out / f"{corpus}-{amplitude}-{seed}"
    if not (prepared / "report.json").is_file():
        prepare(
            corpus, write_corpus(spec, out / "raw" / prepared.name), prepared, PrepareOptions(size=SIDE, num_workers=1)
        )
    return prepared


def make_views(options: argparse.Namespace, seed: int, flow: str) -> Views:
    """Make every view that training and scoring ask for."""

    def view_of(view: ClipView, index: int, recipe: ClipRecipe, epoch: int) -> np.ndarray:
        frames = sample_of_clip(view.clip(index), np.zeros(0), recipe, epoch).views[0]
        if settings is None:
            return frames
        maps = clip_flow(frames, settings)
        strain = strain_of(maps[:, 0], maps[:, 1])[:, None]
        return np.concatenate([maps, strain], axis=1).reshape(-1, SIDE, SIDE)

    def whole(view: ClipView) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([view_of(view, i, WHOLE, 0) for i in range(len(view))]), view.labels(AUS)

    settings = None
    if flow != "led":
        method, upsample, window, stabilise, *lighting = flow.split("-")
        settings = FlowSettings(
            method, int(upsample), int(window), stabilise, 1 / float(lighting[0]) if lighting else 0.0
        )
    store = ClipStore([corpus(options.out, seed, options.amplitude, False)], SIDE)
    other = ClipStore([corpus(options.out, seed, 2.0, True)], SIDE)
    fold = make_folds(store.samples, "grouped", seed=0, num_folds=4, inner_fraction=0.15)[0]
    train = store.view(fold.train)
    started = time.process_time()
    # Flow fits into half the memory in float16; LED needs the digits.
    views = np.empty(
        (options.epochs, len(train), FRAMES if flow == "led" else 3 * PAIRS, SIDE, SIDE),
        np.float32 if flow == "led" else np.float16,
    )
    for epoch in range(options.epochs):
        for index in range(len(train)):
            views[epoch, index] = view_of(train, index, TRAINING, epoch)
    ms = 1e3 * (time.process_time() - started) / (options.epochs * len(train))
    across = other.view([sample.sample_id for sample in other.samples])
    return Views(views, train.labels(AUS), whole(store.view(fold.test)), whole(across), ms)


def score(network: nn.Module, side: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Return f1_macro and AUC in percent, over AUs with 3 positives or more."""
    views, labels = side
    network.eval()
    with torch.no_grad():
        parts = [network(torch.from_numpy(views[i : i + 32]).float()) for i in range(0, len(views), 32)]
    kept = labels.sum(axis=0) >= 3
    aus = [au for au, keep in zip(AUS, kept, strict=True) if keep]
    mean = summarise((labels[:, kept], torch.cat(parts).double().numpy()[:, kept]), aus)["mean"]
    return round(100 * mean["f1_macro"], 1), round(100 * mean["auc"], 1)


def train(name: str, views: Views) -> nn.Module:
    """Train a network from seed 0."""
    torch.manual_seed(0)
    network = LedCnn(len(AUS)) if name == "led" else FlowNet(name)
    settings = TrainingConfig()
    optimizer = build_optimizer(network, settings)
    epochs, clips = views.training.shape[:2]
    stream, steps = SampleStream(clips, 0), math.ceil(epochs * clips / BATCH)
    for step in range(steps):
        set_learning_rates(optimizer, schedule(step, steps, settings.warmup_fraction, settings.min_lr_fraction))
        places = [stream.at(position) for position in range(BATCH * step, BATCH * (step + 1))]
        chosen = np.stack([views.training[min(epoch, epochs - 1), index] for epoch, index in places])
        labels = torch.from_numpy(views.labels[[index for _, index in places]])
        network.train()
        loss = F.binary_cross_entropy_with_logits(network(torch.from_numpy(chosen).float()), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        optimizer.step()
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench/flow_choice"), help="where corpora are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[201], help="generator seeds (201)")
    parser.add_argument("--amplitude", type=float, default=2.0, help="peak movement of the training corpus (2)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--networks", nargs="+", default=["2d"], metavar="2d|3d[-uv]", help="-uv leaves out strain")
    parser.add_argument("--flows", nargs="+", default=["led", "farneback-2-15-none"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for flow in options.flows:
            views = make_views(options, seed, flow)
            for name in ["led"] if flow == "led" else options.networks:
                network = train(name, views)
                row = {"seed": seed, "flow": flow, "network": name, "ms_per_view": round(views.ms_per_view, 1)}
                print(
                    json.dumps({**row, "within": score(network, views.within), "across": score(network, views.across)})
                )


if __name__ == "__main__":
    main()
