"""The toy world's checker: a small network that reads a scene back from its picture, and tells a clean picture from mush.

It serves twice. Its answers give strict accuracy (is everything the caption asked for there?), and the vector before its heads
is the feature space of the toy Fréchet distance, kernel distance, precision and recall. It is trained on damaged renders too,
with heads that predict how strong each kind of damage is, so that the features move when a picture degrades.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgen.data.toy.corruptions import CORRUPTIONS, DESTRUCTIVE, corrupt
from fastgen.data.toy.scenes import (
    AXES,
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    TEXTURES,
    Scenes,
    render,
    sample_scenes,
)
from fastgen.errors import UserError

WEIGHTS = Path(__file__).parent / "weights" / "reader"
CALIBRATION = 2000
OBJECT_HEADS = {"shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES), "texture": len(TEXTURES)}
SCENE_HEADS = {"count": 4, "axis": len(AXES), "background": len(BACKGROUNDS)}
"""`count` 0 is an empty picture and 3 stands for more than two objects; neither occurs in the toy world itself."""


@dataclass(frozen=True)
class ReaderConfig:
    """Channels of the two resolutions (16, 8), width of each object's vector and of the layout vector."""

    channels: tuple[int, int] = (48, 96)
    slot: int = 48
    layout: int = 64

    @property
    def features(self) -> int:
        return 2 * self.slot + self.layout


def _convolution(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class SceneReader(nn.Module):
    """Images [B, 3, 32, 32] in [-1, 1] to attributes, corruption strengths and a feature vector [B, 160].

    The layout of the whole picture decides where to look: two attention maps over the 8 x 8 grid, the first for the left or
    upper object. What is seen there goes through one set of object heads shared by both.
    """

    def __init__(self, config: ReaderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ReaderConfig()
        low, high = config.channels
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(2),
            _convolution(12, low),
            _convolution(low, low),
            _convolution(low, high, stride=2),
            _convolution(high, high),
        )
        grid = (IMAGE_SIZE // 4) ** 2
        self.squeeze = _convolution(high, 16, size=1)
        self.layout = nn.Sequential(
            nn.Linear(16 * grid, 2 * config.layout), nn.SiLU(), nn.Linear(2 * config.layout, config.layout)
        )
        self.context = nn.Linear(config.layout, high)
        self.position = nn.Parameter(torch.randn(high, IMAGE_SIZE // 4, IMAGE_SIZE // 4) * 0.02)
        self.where = nn.Conv2d(high, 2, 1)
        self.what = nn.Conv2d(high, 2 * config.slot, 1)
        self.slot = nn.Linear(2 * config.slot, config.slot)
        self.object_heads = nn.ModuleDict({name: nn.Linear(config.slot, size) for name, size in OBJECT_HEADS.items()})
        self.scene_heads = nn.ModuleDict({name: nn.Linear(config.features, size) for name, size in SCENE_HEADS.items()})
        self.corruption_head = nn.Linear(config.features, len(CORRUPTIONS))
        self.register_buffer("centre", torch.zeros(config.features))
        self.register_buffer("spread", torch.ones(config.features))

    def features(self, images: Tensor) -> Tensor:
        """The vector before the heads, [B, 160]: first object, second object, layout."""
        grid = self.trunk(images)
        layout = self.layout(self.squeeze(grid).flatten(1))
        placed = F.silu(grid + self.position + self.context(F.silu(layout))[:, :, None, None])
        attention = self.where(placed).flatten(2).softmax(2)
        seen = torch.einsum("bkn,bcn->bkc", attention, F.silu(self.what(grid)).flatten(2))
        return torch.cat([self.slot(seen).flatten(1), layout], 1)

    def heads(self, features: Tensor) -> dict[str, Tensor]:
        """Logits by attribute ([B, classes], for objects [B, 2, classes]) and `corruption` [B, 7] from features."""
        slots = features[:, : 2 * self.config.slot].unflatten(1, (2, self.config.slot))
        answers = {name: head(F.silu(slots)) for name, head in self.object_heads.items()}
        active = F.silu(features)
        answers |= {name: head(active) for name, head in self.scene_heads.items()}
        return answers | {"corruption": self.corruption_head(active)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.heads(self.features(images))

    def measures(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What distances are taken of: features with mean 0 and deviation 1 over clean renders [B, 160], and predicted damage
        [B, 7] in [0, 1]."""
        features = self.features(images)
        damage = self.corruption_head(F.silu(features)).sigmoid()
        return (features - self.get_buffer("centre")) / self.get_buffer("spread"), damage

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Take mean and deviation of the features from clean renders."""
        features = torch.cat([self.features(some) for some in images.split(250)])
        self.get_buffer("centre").copy_(features.mean(0))
        self.get_buffer("spread").copy_(features.std(0))


@torch.no_grad()
def read(images: Tensor, reader: SceneReader | None = None) -> Scenes:
    """The scene seen in each image [B, 3, 32, 32] in [-1, 1], by the shipped reader unless another is given.

    As in drawn scenes, attributes of an absent second object and the axis of fewer than two objects are 0.
    """
    reader = reader or shipped_reader()
    parts: list[dict[str, Tensor]] = []
    for some in images.split(250):
        parts.append({name: logits.argmax(-1) for name, logits in reader(some).items() if name != "corruption"})
    seen = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    present = torch.stack([seen["count"] > 0, seen["count"] > 1], 1).long()
    for name in OBJECT_HEADS:
        seen[name] = seen[name] * present
    seen["axis"] = seen["axis"] * present[:, 1]
    return Scenes(**seen)


def correct(images: Tensor, scenes: Scenes, reader: SceneReader | None = None) -> dict[str, Tensor]:
    """Whether each image shows what its scene says: boolean [B] by attribute, and `strict` = everything right.

    An object attribute is right when it is right for every object that should be there; it is wrong for a picture with
    another number of objects only in `count` (and so in `strict`).
    """
    seen = read(images, reader)
    right = {name: getattr(seen, name) == getattr(scenes, name) for name in ("count", "background")}
    two = scenes.count == 2
    right["axis"] = (seen.axis == scenes.axis) | ~two
    absent = torch.stack([torch.zeros_like(two), ~two], 1)
    for name in OBJECT_HEADS:
        right[name] = ((getattr(seen, name) == getattr(scenes, name)) | absent).all(1)
    right["strict"] = torch.stack(list(right.values())).all(0)
    return right


def save_reader(reader: SceneReader, folder: Path) -> None:
    """Write the reader as bf16 safetensors and a JSON config (temporary names first)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in reader.state_dict().items()}
    state = {k: v.contiguous() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(state, folder / "model.safetensors.tmp")
    (folder / "config.json.tmp").write_text(json.dumps(asdict(reader.config), indent=2) + "\n")
    for name in ("model.safetensors", "config.json"):
        (folder / f"{name}.tmp").replace(folder / name)


def load_reader(folder: Path) -> SceneReader:
    """Read a reader saved by `save_reader`; computes in fp32. Raises UserError when a file is missing."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: a scene reader is a folder with config.json and model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    reader = SceneReader(ReaderConfig(**{**config, "channels": tuple(config["channels"])}))
    state = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    missing, unexpected = reader.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UserError(f"{folder / 'model.safetensors'} does not fit its config.json: {[*missing, *unexpected][:3]} differ")
    return reader.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def shipped_reader() -> SceneReader:
    """The reader that comes with the package."""
    return load_reader(WEIGHTS)


def training_batch(number: int, generator: torch.Generator) -> tuple[Tensor, Scenes, Tensor, Tensor]:
    """Images, their scenes, corruption strengths [B, 7] and the weight [B] with which the description still holds.

    Both splits are used (the reader is a measuring tool, not a contestant). A few pictures are empty or crowded.
    """
    third = number // 3
    scenes = Scenes.cat([sample_scenes(number - third, generator), sample_scenes(third, generator, split="held-out")])
    chance = torch.rand(number, generator=generator)
    empty, crowded = chance < 0.02, chance > 0.94
    scenes.count[empty] = 0
    images = render(scenes, generator)
    if crowded.any():
        images[crowded] = _crowd(images[crowded], scenes[crowded], generator)
        scenes.count[crowded] = 3
    images, strengths = corrupt(images, generator)
    fatal = torch.tensor([name in DESTRUCTIVE for name in CORRUPTIONS])
    weight = (1 - strengths[:, ~fatal]).prod(1) * (1 - 2.5 * strengths[:, fatal]).clamp_min(0).prod(1)
    return images, scenes, strengths, weight


def _crowd(images: Tensor, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Draw the objects of a second two-object scene over each picture."""
    extra = sample_scenes(len(images), generator, objects=2)
    extra.background = scenes.background.clone()
    drawn = render(extra, generator)
    ground = drawn.flatten(2).median(2).values[:, :, None, None]
    mask = ((drawn - ground).abs().amax(1, keepdim=True) > 0.12).float()
    return torch.lerp(images, drawn, mask)


def reader_loss(reader: SceneReader, images: Tensor, scenes: Scenes, strengths: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Cross-entropy by attribute, over the pictures and objects where it is defined, and of the corruption strengths."""
    answers = reader(images)
    crisp = weight * ((scenes.count == 1) | (scenes.count == 2))
    present = crisp[:, None] * torch.stack([torch.ones_like(scenes.count), (scenes.count == 2).long()], 1)
    weights = {"count": weight, "background": weight, "axis": crisp * (scenes.count == 2)}
    losses = {}
    for name in (*SCENE_HEADS, *OBJECT_HEADS):
        share = weights.get(name, present).flatten()
        logits, target = answers[name].flatten(0, -2), getattr(scenes, name).flatten()
        losses[name] = (F.cross_entropy(logits, target, reduction="none") * share).sum() / share.sum().clamp_min(1)
    losses["corruption"] = F.binary_cross_entropy_with_logits(answers["corruption"], strengths)
    return losses


def train_reader(
    updates: int = 2700,
    batch: int = 192,
    *,
    seed: int = 0,
    rate: float = 4e-3,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> SceneReader:
    """Train a reader from nothing; deterministic for a seed and number of threads. The defaults made the shipped one.

    `report(update, losses)` is called every 50 updates.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    reader = SceneReader().to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(reader.parameters(), lr=rate, weight_decay=0.02)
    average = torch.optim.swa_utils.AveragedModel(
        reader, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=True
    )
    for update in range(updates):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (update + 1) / 100) * (1 - update / updates)
        images, scenes, strengths, weight = training_batch(batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            losses = reader_loss(reader, images.contiguous(memory_format=torch.channels_last), scenes, strengths, weight)
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 5.0)
        optimiser.step()
        average.update_parameters(reader)
        if report is not None and update % 50 == 0:
            report(update, {name: loss.item() for name, loss in losses.items()})
    trained = average.module
    assert isinstance(trained, SceneReader)
    trained.eval().requires_grad_(False)
    trained.calibrate(render(sample_scenes(CALIBRATION, generator), generator))
    return trained
