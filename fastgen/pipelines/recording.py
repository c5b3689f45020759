"""Learning how a diffusers pipeline calls its network by letting it speak for itself.

The pipeline's own `__call__` runs up to its first scheduler step, with the network's `forward` and the scheduler's `step`
replaced. Of the arguments that the network receives, the sample and the time change from step to step; the rest is the
condition. What the pipeline hands its scheduler, next to what the network answered, tells how guidance is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.denoiser import Condition, Nest
from fastgen.errors import UserError
from fastgen.pipelines.guidance import PROBE_GUIDANCE, Guides, read_guidance
from fastgen.pipelines.lengths import Lengths, is_list, is_repeated, learn_lengths
from fastgen.pipelines.probing import probe, record, sample_and_time, silent
from fastgen.process import VP, Flow, Kind, Process

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}

TIME_SCALES = (1.0, 1e-3)

# Arguments that the wrapped network gets anew at every call, so they are no part of a condition.
FRESH = ("return_dict", "guidance", "timestep_cond")


@dataclass(frozen=True)
class CallForm:
    """How a pipeline calls its network.

    `time_scale` times a scheduler's timestep is what the network gets, or with `time_reversed` times what is left of the
    schedule. `null_first` is the order of the two halves, or of the two calls. `guidance_offset` plus the pipeline's scale is
    the scale in the convention u + g (c - u); `renormalises`: the result then gets the conditional output's norm along the last
    dimension; with `guided_channels` so many channels are guided and the others are the conditional output's. `guidance_factor`
    times an embedded scale is what the network gets. `sign` times an output is what the scheduler gets. `sizes` mirrors the
    arguments of a call with the multiple of the batch that each tensor's first dimension is, 0 where it has none. `lengths`
    tells of arguments whose length depends on the prompt. `sample_lists`: the noisy latents go in, and come out, as a list of
    one tensor a sample, with a frame axis.
    """

    sample_name: str
    time_name: str
    time_scale: float
    guides: Guides
    null_first: bool
    guidance_offset: float
    takes_guidance: bool
    embeds_guidance: bool
    learns_variance: bool
    sizes: dict[str, Nest]
    latent_shape: tuple[int, ...]
    time_reversed: bool = False
    guidance_factor: int = 1
    sign: int = 1
    renormalises: bool = False
    guided_channels: int | None = None
    sample_lists: bool = False
    lengths: Lengths = field(default_factory=Lengths)


def read_scheduler(scheduler: Any) -> tuple[Process, Kind]:
    """The noise process and prediction type that a diffusers scheduler stands for.

    Raises UserError for processes other than variance-preserving ones and rectified flow.
    """
    config, name = scheduler.config, type(scheduler).__name__
    predicts = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or predicts == "flow_prediction":
        return Flow(config.get("num_train_timesteps", 1000)), "flow"
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"{name} is neither a variance-preserving nor a flow-matching scheduler; it cannot be distilled")
    if predicts not in KINDS:
        raise UserError(f"{name} has prediction_type {predicts!r}; it must be one of {', '.join(KINDS)}")
    return VP(scheduler.alphas_cumprod), KINDS[predicts]


def learn_form(pipeline: Any, network: nn.Module, height: int | None, width: int | None) -> CallForm:
    """Watch the pipeline denoise twice: with two prompts and its real network, small; with three, pretending, full size.

    Raises UserError where the pipeline does something to the network's output that fastgen would not repeat.
    """
    with silent():
        full, real, long, timed = probe(pipeline, network, height, width)
    first, name = real.calls[0], type(pipeline).__name__
    sample, time = sample_and_time(network)
    noisy = stacked(first[sample])
    if noisy.shape[1:] != real.sample.shape[1:]:
        raise UserError(f"{name} feeds its network more than noisy latents, as inpainting does; it cannot be distilled")
    scale, time_reversed = _read_time(pipeline, timed.calls[0][time], timed.timestep)
    flows = isinstance(read_scheduler(pipeline.scheduler)[0], Flow)  # A flow may point either way, an epsilon may not.
    outputs = [_without_variance(stacked(x), noisy) for x in real.outputs]
    guidance = read_guidance(outputs, _without_variance(real.handed, noisy), name, signs=(1, -1) if flows else (1,))
    fixed = (sample, time, *FRESH)
    lists = [key for key in first if key not in fixed and is_list(first[key], full.calls[0][key])]
    alike = [key for key in first if key not in lists and is_repeated(first[key], full.calls[0][key])]
    sizes = {key: _sizes(first[key], full.calls[0][key], key) for key in first if key not in (*fixed, *lists, *alike)}
    if first.get("timestep_r") is not None:
        raise UserError(f"{name} is distilled already: its network is told where a step ends as well as where it begins")
    takes_guidance, told = first.get("guidance") is not None, first.get("timestep_cond") is not None
    return CallForm(
        sample_name=sample,
        time_name=time,
        time_scale=scale,
        **guidance,
        takes_guidance=takes_guidance,
        embeds_guidance=takes_guidance or told,
        learns_variance=stacked(real.outputs[0]).shape[1] == 2 * noisy.shape[1],
        sizes=sizes,
        latent_shape=tuple(full.sample.shape[1:]),
        time_reversed=time_reversed,
        guidance_factor=round(float(first["guidance"].flatten()[0]) / PROBE_GUIDANCE) if takes_guidance else 1,
        sample_lists=isinstance(first[sample], (list, tuple)),
        lengths=learn_lengths(full.calls[0], long.calls[0], lists, alike, sizes),
    )


def stacked(samples: Any) -> Tensor:
    """A network's latents as one tensor, also where it takes or gives a list of one a sample, with a frame axis."""
    return torch.stack(list(samples)).squeeze(2) if isinstance(samples, (list, tuple)) else samples


def _read_time(pipeline: Any, given: Any, timestep: Tensor) -> tuple[float, bool]:
    """How the network's time follows from the scheduler's: by which scale, and whether it runs the other way."""
    time, own = float(torch.as_tensor(given).flatten()[0]), float(timestep)
    left = pipeline.scheduler.config.get("num_train_timesteps", 1000) - own
    for scale in TIME_SCALES:
        if abs(time - own * scale) <= 1e-2 * own * scale:
            return scale, False
    for scale in TIME_SCALES:
        if abs(time - left * scale) <= 1e-2 * max(left, 1) * scale:
            return scale, True
    name = type(pipeline).__name__
    raise UserError(f"{name} tells its network the time {time:.4g} at timestep {own:.4g}, in a way fastgen does not know")


def _without_variance(output: Tensor, sample: Tensor) -> Tensor:
    return output.chunk(2, 1)[0] if output.shape[1] == 2 * sample.shape[1] else output


def _sizes(two: Nest, three: Nest, name: str) -> Nest:
    """For each tensor, by which multiple its first dimension follows the batch: from the same argument at batch 2 and at 3."""
    if isinstance(two, Tensor):
        multiple = two.shape[0] // 2 if two.ndim else 0
        return multiple if multiple in (1, 2) and two.shape[0] == 2 * multiple and three.shape[0] == 3 * multiple else 0
    if isinstance(two, Mapping):
        return {key: _sizes(two[key], three[key], f"{name}.{key}") for key in two}
    if isinstance(two, (list, tuple)):
        if len(two) != len(three):
            raise UserError(f"the network's argument {name} is a list with one entry per sample, which fastgen does not know")
        return [_sizes(x, y, f"{name}.{i}") for i, (x, y) in enumerate(zip(two, three, strict=True))]
    return 0


def record_condition(
    pipeline: Any, network: nn.Module, form: CallForm, prompts: Sequence[str], height: int | None, width: int | None
) -> Condition:
    """The condition of `prompts` as the pipeline makes it; the unconditional twin too, where the pipeline itself guides."""
    seen = record(pipeline, network, prompts, height=height, width=width, pretend=True)
    if form.guides == "paired":
        yes, no = (seen.calls[1], seen.calls[0]) if form.null_first else (seen.calls[0], seen.calls[1])
        return _condition(yes, form, None, _condition(no, form, None))
    if form.guides == "batched":
        halves = (1, 0) if form.null_first else (0, 1)
        yes_half, no_half = (_condition(seen.calls[0], form, half) for half in halves)
        return Condition(yes_half.inputs, yes_half.shared, no_half)
    return _condition(seen.calls[0], form, None)


def _condition(call: dict[str, Any], form: CallForm, half: int | None, null: Condition | None = None) -> Condition:
    """One call's arguments as a condition, taking that half of every tensor which holds both."""
    inputs, shared = {}, {}
    for key, sizes in form.sizes.items():
        mine, others = _split(call.get(key), sizes, half)
        if mine is not _NOTHING:
            inputs[key] = mine
        if others is not _NOTHING and key not in form.lengths.masks:
            shared[key] = others
    form.lengths.take(call, inputs, shared, half)
    return Condition(inputs, shared, null)


_NOTHING = object()


def _split(nest: Nest, sizes: Nest, half: int | None) -> tuple[Nest, Nest]:
    """The part of `nest` that follows the batch, and the part that does not."""
    if isinstance(nest, Mapping) and isinstance(sizes, Mapping) and nest:
        parts = {key: _split(nest[key], sizes[key], half) for key in nest}
        mine, others = ({k: p[i] for k, p in parts.items() if p[i] is not _NOTHING} for i in (0, 1))
        return mine or _NOTHING, others or _NOTHING
    if isinstance(nest, (list, tuple)) and any(_leaves(sizes)):
        return [_split(x, size, half)[0] for x, size in zip(nest, sizes, strict=True)], _NOTHING
    if isinstance(nest, Tensor) and sizes:
        return (nest.chunk(2)[half] if half is not None and sizes == 2 else nest), _NOTHING
    return _NOTHING, nest


def _leaves(sizes: Nest) -> list[int]:
    """Every number in a nest of sizes."""
    if isinstance(sizes, Mapping):
        return [leaf for value in sizes.values() for leaf in _leaves(value)]
    if isinstance(sizes, (list, tuple)):
        return [leaf for value in sizes for leaf in _leaves(value)]
    return [sizes]


def merge(inputs: Mapping[str, Nest], shared: Mapping[str, Nest]) -> dict[str, Nest]:
    """The two parts of a condition as one set of arguments again."""
    both = {**shared}
    for key, value in inputs.items():
        known = both.get(key)
        both[key] = merge(value, known) if isinstance(value, Mapping) and isinstance(known, Mapping) else value
    return both
