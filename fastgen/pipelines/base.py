"""A diffusers pipeline as methods see it: prompts to conditions, images to latents, and a denoiser for every role.

Nothing here knows a model family. What a network is called with is recorded from the pipeline's own `__call__`
(`fastgen.pipelines.recording`); a family file exists where something cannot be seen from outside.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastgen.adapters import AdapterHost, LoraOptions, without_adapters
from fastgen.denoiser import Condition, Denoiser, EndInput, Groups, map_tensors
from fastgen.errors import UserError
from fastgen.pipelines.autoencoding import (
    autoencoder,
    decode_latents,
    encode_images,
    encodes_frames,
    latent_statistics,
    pack_patches,
    unpack_patches,
)
from fastgen.pipelines.end_time import end_input
from fastgen.pipelines.guidance import partial_guide, renormalised_guide
from fastgen.pipelines.probing import answered, guidance_argument
from fastgen.pipelines.recording import COMPANION, CallForm, learn_form, merge, read_scheduler, record_condition
from fastgen.pipelines.stable_diffusion import embed_guidance, with_guidance_embedding
from fastgen.process import Kind, Process

Mode = Literal["full", "lora"]

PROMPTS_AT_ONCE = 64

# Suffixes of the layers that LoRA adapts where the user names none; those that a network lacks are left out.
UNET_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
TRANSFORMER_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    *("img_qkv_proj", "txt_kv_proj", "gate_proj", "up_proj", "down_proj"),
    *("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer"),
    *("feed_forward.in_layer", "feed_forward.out_layer"),
)


class Pipeline:
    """Wraps a diffusers pipeline. Make one with `Pipeline.wrap`, or with `load_pipeline` from a folder or a hub name.

    `process` and `kind` are the scheduler's; `latent_shape` is one sample's, without the batch; `feature_layers` are the
    submodules that discriminators tap by default, `lora_targets` what LoRA adapts by default. `embeds_guidance`: the base
    network takes its guidance scale as an input. `default_guidance` is the scale that the pipeline uses when it is told none;
    1 is off.
    """

    handles: ClassVar[tuple[str, ...]] = ()
    """Names of the diffusers classes that a family's subclass serves."""
    makes: ClassVar[tuple[str, ...]] = ()
    """Arguments of the network that a family makes itself at every call, in `made_arguments`."""
    feels_padding: ClassVar[bool] = False
    """Whether the network's answer depends on how far prompts are padded, masks notwithstanding."""
    knows_time: ClassVar[bool] = False
    """Whether a family's `network_time` follows from our time alone, not from the scheduler's timestep at some scale."""
    scheduler_scale: float = 1.0
    """What the scheduler's latents are times ours."""

    process: Process
    kind: Kind
    latent_shape: tuple[int, ...]
    feature_layers: tuple[str, ...]
    lora_targets: tuple[str, ...]
    embeds_guidance: bool
    default_guidance: float

    def __init__(
        self,
        diffusers: Any,
        *,
        roles: Mapping[str, Mode] | None = None,
        lora: LoraOptions | None = None,
        height: int | None = None,
        width: int | None = None,
        gradient_checkpointing: bool = False,
    ):
        self.diffusers, self.roles, self.lora = diffusers, dict(roles or {}), lora or LoraOptions()
        self.height, self.width = height, width
        self.gradient_checkpointing = gradient_checkpointing
        self.network_name = network_name(diffusers)
        self.process, self.kind = self.read_scheduler()
        self._freeze()
        self.form: CallForm = learn_form(self)
        self.latent_shape, self.embeds_guidance = self.form.latent_shape, self.form.embeds_guidance
        self.default_guidance = self._default_guidance()
        self.feature_layers, self.lora_targets = feature_layers(self.network), lora_targets(self.network)
        self.partial_passes = self.batched_guidance = True  # of every denoiser made from now on: `Denoiser.partial`, and so on
        self._host: AdapterHost | None = None
        self._nulls: dict[tuple[int | None, int | None], Condition] = {}
        if gradient_checkpointing:
            checkpoint_blocks(self.network)

    @classmethod
    def wrap(cls, diffusers: Any, **options: Any) -> Pipeline:
        """The right family's `Pipeline` around a diffusers pipeline object; `options` are those of the constructor.

        Raises UserError for a pipeline that fastgen cannot distil and for a role that is neither "full" nor "lora".
        """
        for role, mode in (options.get("roles") or {}).items():
            if mode not in ("full", "lora"):
                raise UserError(f'role {role!r} must be "full" or "lora", not {mode!r}')
        names = {base.__name__ for base in type(diffusers).__mro__}
        family = next((sub for sub in families(Pipeline) if names & set(sub.handles)), Pipeline)
        return family(diffusers, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        """Copies of a denoiser go on sharing the pipeline that calls it."""
        return self

    @property
    def network(self) -> nn.Module:
        """The base network, "unet" or "transformer"; in LoRA mode the one that all roles share."""
        network: nn.Module = getattr(self.diffusers, self.network_name)
        return network

    @property
    def autoencoder(self) -> Any:
        """Between images and latents; for videos, frames in the third dimension. None where pixels are denoised."""
        return autoencoder(self.diffusers)

    @property
    def device(self) -> torch.device:
        """Where the base network is."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> Pipeline:
        """Move every component, and with them the adapters on the base; returns itself."""
        self.diffusers.to(device)
        self._nulls.clear()
        return self

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, height: int | None = None, width: int | None = None) -> Condition:
        """The condition of each prompt, with its unconditional twin, for images of `height` x `width` pixels.

        The twin is what the pipeline itself guides away from; where it never guides, the condition of the empty prompt.
        """
        height, width = height or self.height, width or self.width
        parts = []
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = list(prompts[start : start + PROMPTS_AT_ONCE])
            part = record_condition(self.diffusers, self.network, self.form, some, height, width)
            if part.null is None:
                part.null = self._null(height, width)[[0] * len(some)]
            parts.append(part)
        return Condition.cat(parts)

    def _null(self, height: int | None, width: int | None) -> Condition:
        if (height, width) not in self._nulls:
            self._nulls[height, width] = record_condition(self.diffusers, self.network, self.form, [""], height, width)
        return self._nulls[height, width]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, *latent_shape] of `images` [B, 3, H, W] in [-1, 1], float32: the posterior's mean, scaled and shifted."""
        if self.autoencoder is None:
            return images.float()
        raw = encode_images(self.autoencoder, images.to(self.autoencoder.dtype))
        mean, scale = self._latent_statistics(raw)
        return self.pack((raw.float() - mean) * scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] of `latents`, about [-1, 1], float32; differentiable. Videos are [B, 3, frames, H, W]."""
        if self.autoencoder is None:
            return latents.float()
        raw = self.unpack(latents)
        mean, scale = self._latent_statistics(raw)
        return decode_latents(self.autoencoder, (raw / scale + mean).to(self.autoencoder.dtype)).float()

    def pack(self, latents: Tensor) -> Tensor:
        """From the autoencoder's layout to the network's, which may be square patches as tokens [B, tokens, channels]."""
        return pack_patches(latents, self._patch) if len(self.latent_shape) == 2 else latents

    def unpack(self, latents: Tensor) -> Tensor:
        """Inverse of `pack`, for images of the pipeline's resolution."""
        if latents.ndim != 3:
            return latents
        height, width = self.form.pixels
        raw = unpack_patches(latents, self._patch, round(math.sqrt(latents.shape[1] * height / width)))
        return raw.unsqueeze(2) if encodes_frames(self.autoencoder) else raw

    @property
    def _patch(self) -> int:
        """Height and width of the square of latents that is one token."""
        config = self.autoencoder.config
        return math.isqrt(self.latent_shape[1] // (config.get("latent_channels") or config["z_dim"]))

    def made_arguments(self, arguments: Mapping[str, Any], xt: Tensor) -> dict[str, Any]:
        """The arguments in `makes`, from all others and the latents."""
        return {}

    def network_input(self, xt: Tensor, t: Tensor) -> Tensor:
        """What the network is shown of latents at times `t` [B]: the same, but in families that scale them."""
        return xt

    def network_output(self, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The network's output as the scheduler's prediction, which is `kind`'s: the same, but in families that convert it."""
        return output

    def read_scheduler(self) -> tuple[Process, Kind]:
        """The noise process and the kind of prediction."""
        return read_scheduler(self.diffusers.scheduler)

    def frozen(self) -> Denoiser:
        """The teacher: the base network without any role's adapter. Nothing of it can be trained."""
        shared = "lora" in self.roles.values()
        own = nn.Module() if shared else self.network
        return Denoiser(
            *(self.network, self.call, self.process, self.kind),
            own=own,
            activate=self._bare,
            embeds_guidance=self.embeds_guidance,
            **self._manners(),
        ).eval()

    def trainable(self, role: str, *, guidance_embedding: bool = False, end_time: bool = False) -> Denoiser:
        """A network that starts as the teacher and can be trained: a copy, or an adapter on the base, as `roles` says.

        `guidance_embedding` gives a network without one an input for the guidance scale, `end_time` one for the time at which
        a step ends, both at first without effect. Raises UserError where that cannot be done.
        """
        end = end_input(self.network).to(self.device) if end_time else None
        adds_input = guidance_embedding and not self.embeds_guidance
        if self.mode(role) == "lora":
            if adds_input:
                raise UserError(
                    f"role {role!r} cannot embed a guidance scale with LoRA, which has no place for the new input: "
                    f'merge one fixed guidance into the student instead, or train the role with "full"'
                )
            return self._adapted(role, end)
        network = without_adapters(copy.deepcopy(self.network))
        if adds_input:
            network = with_guidance_embedding(network)
        if self.gradient_checkpointing:
            checkpoint_blocks(network)
        network.requires_grad_(True).train()
        embeds = self.embeds_guidance or guidance_embedding
        manners = {"embeds_guidance": embeds, "end_input": end, **self._manners()}
        return Denoiser(network, self.call, self.process, self.kind, **manners)

    def mode(self, role: str) -> Mode:
        """How a role is trained; one that is not named in `roles` goes as the student does, so that it can copy its weights."""
        return self.roles.get(role, self.roles.get("student", "full"))

    def _adapted(self, role: str, end: EndInput | None) -> Denoiser:
        if self._host is None:
            self._host = AdapterHost(self.network)
            if self.gradient_checkpointing:
                checkpoint_blocks(self.network, self._host.checkpoint)
        adapter = self._host.add(role, self.lora, self.lora.targets or self.lora_targets)
        return Denoiser(
            *(self.network, self.call, self.process, self.kind),
            own=adapter,
            activate=adapter.activate,
            embeds_guidance=self.embeds_guidance,
            end_input=end,
            **self._manners(),
        )

    def guide(self, yes: Tensor, no: Tensor, scale: float | Tensor) -> Tensor:
        """Combine a conditional and an unconditional output as the pipeline does; `scale` as in `fastgen.denoiser.Guided`."""
        if self.form.guided_channels is not None:
            return partial_guide(yes, no, scale, self.form.guided_channels)
        return renormalised_guide(yes, no, scale, self.form.renormalises)

    def _manners(self) -> dict[str, Any]:
        """What a denoiser in any role does as the pipeline does it, and by how many passes."""
        groups: Groups | None = self.form.lengths.groups if self.form.lengths.separates else None
        passes = {"partial": self.partial_passes, "batched_guidance": self.batched_guidance}
        return {"guide": self.guide, "groups": groups, **passes}

    def _bare(self) -> AbstractContextManager[Any]:
        return self._host.selected(None) if self._host else nullcontext()

    def call(self, network: nn.Module, xt: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None = None) -> Tensor:
        """Invoke `network` as the diffusers pipeline does; the answer is in the network's own precision.

        `guidance` [B] goes to a network that embeds it; None means `default_guidance`.
        """
        dtype = base_dtype(network)
        inputs = map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, condition.inputs)
        arguments = merge(inputs, condition.shared)
        self.form.lengths.hand_over(arguments, len(xt))
        arguments |= {key: arguments[key].transpose(*dimensions) for key, dimensions in self.form.swapped.items()}
        arguments |= {key: arguments[key].repeat_interleave(xt.shape[2], 0) for key in self.form.framewise}
        arguments |= self.made_arguments(arguments, xt)
        if guidance is None:
            guidance = xt.new_full((len(xt),), self.default_guidance, dtype=torch.float32)
        if self.form.takes_guidance:
            arguments["guidance"] = guidance.float() * self.form.guidance_factor
        width = getattr(network.config, "time_cond_proj_dim", None)
        if width is not None:
            arguments["timestep_cond"] = embed_guidance(guidance, width).to(dtype)
        noisy = self.network_input(xt, t).to(dtype)
        if self.form.companion is not None:
            noisy = torch.cat([noisy, arguments.pop(COMPANION)], self.form.companion)
        arguments[self.form.sample_name] = list(noisy.unsqueeze(2)) if self.form.sample_lists else noisy
        arguments |= {key: [[value] for value in arguments[key]] for key in self.form.nested}
        arguments[self.form.time_name] = self.network_time(t).reshape(-1).expand(len(xt))
        output = self.form.predicted(answered(network(**arguments, return_dict=False)), xt)
        return self.network_output(output if self.form.sign == 1 else -output, xt, t)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told at times `t`."""
        timestep = self.process.timestep(t).float()
        if self.form.time_reversed:
            timestep = self.diffusers.scheduler.config.num_train_timesteps - timestep
        return timestep / round(1 / self.form.time_scale)  # As pipelines do; a product is rounded otherwise.

    def _latent_statistics(self, raw: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The shift and scale with which latents = (raw - shift) * scale; `raw` is the autoencoder's [B, C, H, W]."""
        if getattr(self.diffusers, "movq", None) is not None:  # Kandinsky's latents are taken as they come.
            return 0.0, 1.0
        return latent_statistics(self.autoencoder, raw)

    def _default_guidance(self) -> float:
        if self.form.guides == "single" and not self.embeds_guidance:
            return 1.0
        if not self.embeds_guidance and (guider := getattr(self.diffusers, "guider", None)) is not None:
            return float(guider.guidance_scale) + self.form.guidance_offset
        parameter = inspect.signature(type(self.diffusers).__call__).parameters.get(guidance_argument(self.diffusers))
        default = parameter.default if parameter is not None else None
        return float(default) + self.form.guidance_offset if isinstance(default, (int, float)) else 1.0

    def _freeze(self) -> None:
        for component in self.diffusers.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        vae = self.autoencoder
        if vae is not None and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            vae.float()


def families(base: type[Pipeline]) -> list[type[Pipeline]]:
    """Every family's subclass, those of a family that builds on another first."""
    return [family for sub in base.__subclasses__() for family in (*families(sub), sub)]


def network_name(diffusers: Any) -> str:
    """Which component denoises: "unet", "transformer", or Cascade's "decoder". Raises UserError where there is none."""
    present = [name for name in ("unet", "transformer", "decoder") if isinstance(getattr(diffusers, name, None), nn.Module)]
    if not present:
        raise UserError(f"{type(diffusers).__name__} has neither a unet nor a transformer, so there is no denoiser to distil")
    if getattr(diffusers, "scheduler", None) is None:
        raise UserError(f"{type(diffusers).__name__} lacks a scheduler, so the noise it was trained with is unknown")
    return present[0]


def checkpoint_blocks(network: Any, function: Callable[..., Any] | None = None) -> None:
    """Recompute a network's blocks in the backward pass, through `function` or torch's own checkpointing."""
    try:
        network.enable_gradient_checkpointing(gradient_checkpointing_func=function)
    except ValueError as problem:
        raise UserError(f"{type(network).__name__} does not support gradient checkpointing; turn it off") from problem


def base_dtype(network: nn.Module) -> torch.dtype:
    """The precision of a network's weights, whatever that of the adapters on it."""
    return next(p.dtype for name, p in network.named_parameters() if "lora_" not in name and p.is_floating_point())


def lora_targets(network: nn.Module) -> tuple[str, ...]:
    """The layers that LoRA adapts by default: those known by name that this network has, each a single linear map."""
    known = UNET_TARGETS if hasattr(network, "mid_block") else TRANSFORMER_TARGETS
    found = {target: [part for name, part in network.named_modules() if name.endswith("." + target)] for target in known}
    layers = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return tuple(target for target, parts in found.items() if parts and all(isinstance(part, layers) for part in parts))


def feature_layers(network: nn.Module) -> tuple[str, ...]:
    """Where a discriminator looks by default: a UNet's middle, a transformer at a half and three quarters of its depth.

    In a transformer that is the normalised stream that enters a block: what a block returns may put the text first.
    """
    if getattr(network, "mid_block", None) is not None:
        return ("mid_block",)
    blocks = []
    for stack in ("transformer_blocks", "single_transformer_blocks", "blocks", "layers"):
        for i, block in enumerate(getattr(network, stack, None) or ()):
            norm = next((name for name in ("norm1", "norm") if hasattr(block, name)), None)
            blocks.append(f"{stack}.{i}.{norm}" if norm else f"{stack}.{i}")
    return tuple(dict.fromkeys(blocks[int(len(blocks) * depth)] for depth in (0.5, 0.75))) if blocks else ()
