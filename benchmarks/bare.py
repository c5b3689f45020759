"""A bare `nn.Module` as a pipeline: what methods and the trainer need of one, around any network called as (x, t, condition).

So a method can be measured on a network of one's own, or on the very module that another framework is measured with in the same
process. benchmarks/examples/convolutions.py says what such a module is.
"""

from __future__ import annotations

import copy
import importlib.util
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.adapters import AdapterHost, LoraOptions
from fastgen.data.source import Source
from fastgen.denoiser import Condition, Denoiser, EndInput
from fastgen.errors import UserError
from fastgen.process import Flow

EXAMPLES = Path(__file__).parent / "examples"
PRESETS = {"conv": f"{EXAMPLES / 'convolutions.py'}:make", "transformer": f"{EXAMPLES / 'transformer.py'}:make"}
EMBEDDING, NOTHING = "pooled", "nothing"
GUIDANCE = 3.0
SAMPLES = 64


def load_module(where: str) -> nn.Module:
    """The network that FACTORY() of `where`, "FILE.py:FACTORY", returns.

    Raises UserError where there is no such file or function, or what it returns is no such network.
    """
    path, _, name = where.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"--module {where}: it must be FILE.py:FACTORY, of a file that is there")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    factory = getattr(loaded, name, None)
    if not callable(factory):
        raise UserError(f"--module {where}: {path} has no function {name}")
    module = factory()
    shape = getattr(module, "sample_shape", None)
    if not isinstance(module, nn.Module) or shape is None or len(shape) != 3:
        raise UserError(f"--module {where}: {name}() must return an nn.Module whose sample_shape is (C, H, W)")
    return module


class Conditioned(nn.Module):
    """A bare module, whose condition passes through `text`: there a method can tell it where a step ends."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.text = module, nn.Identity()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        answer: Tensor = self.module(x, t, None if condition is None else self.text(condition))
        return answer


def call(network: nn.Module, xt: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
    """How a denoiser calls it."""
    found: Tensor = network(xt, t, condition.inputs.get(EMBEDDING))
    return found


class BarePipeline:
    """A bare module as teacher, and copies of it as students, or adapters on it; its answer is a flow's velocity.

    Prompts are vectors of their own for a module with a condition, else nothing. Images are the samples themselves.
    """

    process, kind = Flow(), "flow"
    embeds_guidance = False

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu", lora: LoraOptions | None = None):
        """With `lora` every role is an adapter on the submodules that the module's `lora_targets` name."""
        self.network = Conditioned(module).to(device).requires_grad_(False)
        self.device = torch.device(device)
        self.latent_shape = tuple(module.sample_shape)  # type: ignore[arg-type]
        self.width: int = getattr(module, "condition_width", 0)
        self.default_guidance = GUIDANCE if self.width else 1.0
        self.feature_layers = tuple(f"module.{name}" for name in getattr(module, "feature_layers", ()))
        self.lora, self.targets = lora, tuple(getattr(module, "lora_targets", ()))
        if lora is not None and not self.targets:
            raise UserError("a module without lora_targets, names of its layers, cannot be trained as LoRA")
        self.host = AdapterHost(self.network) if lora is not None else None

    def frozen(self) -> Denoiser:
        if self.host is None:
            return Denoiser(self.network, call, self.process, "flow").eval()
        bare = {"own": nn.Module(), "activate": lambda: self.host.selected(None)}
        return Denoiser(self.network, call, self.process, "flow", **bare).eval()  # type: ignore[arg-type]

    def trainable(self, role: str, *, guidance_embedding: bool = False, end_time: bool = False) -> Denoiser:
        """A copy, or an adapter on the base. Raises UserError for inputs that the module lacks."""
        if guidance_embedding:
            raise UserError("a bare module has no input for a guidance scale")
        if end_time and not self.width:
            raise UserError("a module without a condition cannot be told where a step ends; give it a condition_width")
        end = EndInput("text", self.width).to(self.device) if end_time else None
        if self.host is not None and self.lora is not None:
            own = self.host.add(role, self.lora.for_role(role), self.targets)
            adapter: dict[str, Any] = {"own": own, "activate": own.activate, "end_input": end}
            return Denoiser(self.network, call, self.process, "flow", **adapter)
        network = copy.deepcopy(self.network).requires_grad_(True).train()
        return Denoiser(network, call, self.process, "flow", end_input=end)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """A vector of normal numbers for each prompt, zeros for its twin and for the empty prompt."""
        if not self.width:
            return Condition({NOTHING: torch.zeros(len(prompts), 1, device=self.device)})
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            rows.append(torch.randn(self.width, generator=generator) if prompt else torch.zeros(self.width))
        text = torch.stack(rows).to(self.device)
        return Condition({EMBEDDING: text}, {}, Condition({EMBEDDING: torch.zeros_like(text)}))

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def random_source(pipeline: Any, needs: Collection[str], samples: int = SAMPLES) -> Source:
    """As many prompts with latents, and noise with targets where a method needs pairs, all drawn at random."""
    prompts = [f"a small red circle and {number} others" for number in range(samples)]
    condition, shape = pipeline.encode_prompts(prompts), tuple(pipeline.latent_shape)
    latents = torch.randn(samples, *shape) if "images" in needs else None
    pairs = None
    if "pairs" in needs:
        pairs = Condition({"noise": torch.randn(samples, *shape), "target": torch.randn(samples, *shape)})
    return Source(condition, shape, latents, pairs=pairs, prompts=prompts, device=pipeline.device)
