"""Frozen image networks whose features discriminators look at.

A backbone is named in a configuration: "dinov2" is DINOv2 ViT-S/14 (Oquab et al. 2024), any other bare name one of timm's
("vit_small_patch16_224.dino", "resnet50.a1_in1k"), "torchvision/NAME" one of torchvision's. "toy" is the trunk of the toy
world's scene reader, "tiny" a small network of fixed random weights for tests. Weights are read from safetensors alone: a file
of one's own, or timm's from the Hugging Face hub, its cache first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen.errors import UserError

ALIASES = {"dinov2": "vit_small_patch14_dinov2.lvd142m"}
TORCHVISION = "torchvision/"
HUB_FILE = "model.safetensors"
TOY_WEIGHTS = Path(__file__).parent / "data" / "toy" / "weights" / "reader" / "model.safetensors"
LEVELS = 4
"""From how many depths features are taken."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PLAIN = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Backbone(nn.Module):
    """A frozen network that gives features of images at several depths; gradients pass through it to the images."""

    def __init__(
        self,
        network: nn.Module,
        extract: Callable[[Tensor], Sequence[Tensor]],
        statistics: tuple[Sequence[float], Sequence[float]],
        size: int = 0,
    ):
        """`extract` maps normalised images to maps [B, C, H, W] or tokens [B, N, C]; `size` in pixels, 0: as images come."""
        super().__init__()
        self.network, self.extract, self.size = network.eval().requires_grad_(False), extract, size
        self.mean: Tensor
        self.std: Tensor
        for name, values in zip(("mean", "std"), statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Backbone:
        """Always in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features [B, C, N] of `images` [B, 3, H, W] in [-1, 1], from the shallowest to the deepest."""
        if self.size and images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        maps = self.extract(((images + 1) / 2 - self.mean.to(images)) / self.std.to(images))
        return [each.flatten(2) if each.ndim == 4 else each.transpose(1, 2) for each in maps]


def load_backbone(name: str, weights: str = "", *, size: int = 0, device: torch.device | str = "cpu") -> Backbone:
    """The backbone of this name, frozen, on `device`; `weights` is a safetensors file, needed for torchvision's networks.

    `size` is that of the pictures it looks at, by default its own (224 for those of any size). Raises UserError for a name
    that does not exist, and where the weights are not at hand, saying which file from where is missing.
    """
    path = Path(weights).expanduser() if weights else None
    if path is not None and (path.suffix != ".safetensors" or not path.is_file()):
        raise UserError(f"backbone_weights = {weights!r} must be a safetensors file that exists")
    if name == "tiny":
        return _tiny(size).to(device)
    if name == "toy":
        return _toy(path or TOY_WEIGHTS, size).to(device)
    if name.startswith(TORCHVISION):
        return _torchvision(name.removeprefix(TORCHVISION), path, size).to(device)
    return _timm(ALIASES.get(name, name), path, size).to(device)


def _stages(stages: Sequence[nn.Module]) -> Callable[[Tensor], list[Tensor]]:
    """Features after each of `stages`, called one after the other."""

    def extract(x: Tensor) -> list[Tensor]:
        found = []
        for stage in stages:
            x = stage(x)
            found.append(x)
        return found

    return extract


def _tiny(size: int) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.SiLU()) for a, b in ((3, 8), (8, 16))]
    return Backbone(nn.Sequential(*stages), _stages(stages), PLAIN, size)


def _toy(path: Path, size: int) -> Backbone:
    """The convolutions of `fastgen.data.toy.reader.SceneReader`, at 16 x 16 and at 8 x 8."""
    found = {name.removeprefix("trunk."): x.float() for name, x in load_file(path).items() if name.startswith("trunk.")}
    widths = [12, *(found[f"{i}.0.weight"].shape[0] for i in (1, 2, 3, 4))]

    def convolution(i: int) -> nn.Sequential:
        layer = nn.Conv2d(widths[i - 1], widths[i], 3, 2 if i == 3 else 1, 1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(widths[i]), nn.SiLU())

    trunk = nn.Sequential(nn.PixelUnshuffle(2), *(convolution(i) for i in (1, 2, 3, 4)))
    trunk.load_state_dict(found, strict=False)  # all but the batch normalisation's counters
    return Backbone(trunk, _stages([trunk[:3], trunk[3:]]), PLAIN, size or 32)


def _torchvision(name: str, path: Path | None, size: int) -> Backbone:
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"torchvision has no network {name!r}; see torchvision.models.list_models()")
    if path is None:
        raise UserError(
            f"torchvision's weights of {name!r} are pickled files, which are not read: save its state_dict with safetensors "
            f"and name the file in backbone_weights"
        )
    network = torchvision.models.get_model(name, weights=None)
    _fill(network, path, name)
    return Backbone(network, _tapped(network, _depths(network, name)), IMAGENET, size or 224)


def _depths(network: Any, name: str) -> list[nn.Module]:
    """Modules at even depths: a ResNet's layers, or blocks of `features`, or of a transformer's `encoder.layers`."""
    blocks = [getattr(network, f"layer{i}") for i in range(1, 5) if hasattr(network, f"layer{i}")]
    if not blocks and hasattr(network, "encoder"):
        blocks = list(network.encoder.layers)
    blocks = blocks or list(getattr(network, "features", []))
    if not blocks:
        raise UserError(f"torchvision's {name!r} has neither layers, features nor encoder.layers to take features from")
    return [blocks[len(blocks) * (i + 1) // LEVELS - 1] for i in range(LEVELS)] if len(blocks) >= LEVELS else blocks


def _tapped(network: nn.Module, modules: Sequence[nn.Module]) -> Callable[[Tensor], list[Tensor]]:
    """What `modules` give in a call of the network."""

    def extract(x: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        hooks = [module.register_forward_hook(lambda module, args, output: seen.append(output)) for module in modules]
        try:
            network(x)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    return extract


def _timm(name: str, path: Path | None, size: int) -> Backbone:
    try:
        import timm
    except ImportError:
        raise UserError(f"backbone {name!r} is one of timm's, which is not installed: pip install timm") from None

    if not timm.is_model(name):
        raise UserError(
            f"timm has no network {name!r}; see timm.list_models(), or write torchvision/NAME for one of torchvision's"
        )
    config = timm.models.get_pretrained_cfg(name)
    fixed = bool(config is not None and config.fixed_input_size)
    size = size or 224
    options: dict[str, Any] = {"img_size": size} if fixed else {}
    file = path or _from_hub(name, config.hf_hub_id if config is not None else None)
    try:
        network: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **options)
    except (RuntimeError, AssertionError, KeyError) as problem:
        raise UserError(
            f"{file} does not fit timm's {name!r} at {size} pixels: {str(problem).splitlines()[0][:200]}"
        ) from problem
    depth = len(network.feature_info)
    levels = [depth * (i + 1) // LEVELS - 1 for i in range(LEVELS)] if depth >= LEVELS else list(range(depth))

    def extract(x: Tensor) -> list[Tensor]:
        found: list[Tensor] = network.forward_intermediates(x, indices=levels, intermediates_only=True)
        return found

    return Backbone(network, extract, (config.mean, config.std) if config is not None else IMAGENET, size)


def _from_hub(name: str, repository: str | None) -> Path:
    """timm's weights in the hub's cache, downloaded where that is allowed (HF_HUB_OFFLINE forbids it)."""
    if not repository:
        raise UserError(f"timm has no weights for {name!r}: name a safetensors file in backbone_weights, or a tagged network")
    from huggingface_hub import hf_hub_download

    for local in (True, False):
        try:
            return Path(hf_hub_download(repository, HUB_FILE, local_files_only=local))
        except (OSError, ValueError) as problem:  # the hub's own errors are of these kinds
            cause = problem
    raise UserError(
        f"the weights of backbone {name!r} are missing: get {HUB_FILE} from https://huggingface.co/{repository} and name it in "
        f"backbone_weights, or run once without offline mode"
    ) from cause


def _fill(network: nn.Module, path: Path, name: str) -> None:
    try:
        network.load_state_dict(load_file(path))
    except RuntimeError as problem:
        raise UserError(f"{path} does not fit {name!r}: {str(problem).splitlines()[-1].strip()[:200]}") from problem
