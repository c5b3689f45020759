"""Learning how a diffusers pipeline calls its network by letting it speak for itself.

The pipeline's own `__call__` runs up to its first scheduler step, with the network's `forward` and the scheduler's `step`
replaced. Of the arguments that the network receives, the sample and the time change from step to step; the rest is the
condition. What the pipeline hands its scheduler, next to what the network answered, tells how guidance is done.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgen.denoiser import Condition, Nest
from fastgen.errors import UserError
from fastgen.pipelines.guidance import PROBE_GUIDANCE, Guides, Renormalises, read_guidance
from fastgen.pipelines.lengths import Lengths, is_list, is_nested, is_repeated, learn_lengths
from fastgen.pipelines.probing import Recording, probe, record, sample_and_time, silent
from fastgen.process import EDM, VP, Flow, Kind, Process, Trig

if TYPE_CHECKING:
    from fastgen.pipelines.base import Pipeline

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}

TIME_SCALES = (1.0, 1e-3)

# Arguments that the wrapped network gets anew at every call, so they are no part of a condition.
FRESH = ("return_dict", "guidance", "timestep_cond")

# Where a condition keeps what the network is shown beside the noisy latents, in the same tensor.
COMPANION = "companion of the latents"


@dataclass(frozen=True)
class CallForm:
    """How a pipeline calls its network.

    `time_scale` times a scheduler's timestep is what the network gets, or with `time_reversed` times what is left of the
    schedule. `null_first` is the order of the two halves, or of the two calls. `guidance_offset` plus the pipeline's scale is
    the scale in the convention u + g (c - u); `renormalises`: whether the result then gets the conditional output's norm; with
    `guided_channels` so many channels are guided and the others are the conditional output's. `guidance_factor`
    times an embedded scale is what the network gets. `sign` times an output is what the scheduler gets. `sizes` mirrors the
    arguments of a call with the multiple of the batch that each tensor's first dimension is, 0 where it has none. `lengths`
    tells of arguments whose length depends on the prompt. `sample_lists`: the noisy latents go in, and come out, as a list of
    one tensor a sample, with a frame axis. `companion`: along this dimension the latents are followed by something that does
    not change, as the empty place of a reference picture. `swapped` are arguments with the batch in the second dimension, or
    the prompt's tokens in the third, with the two dimensions that a condition swaps to have it otherwise; `nested` are lists
    that hold a list of one tensor for each sample; `framewise` are repeated for each of a video's frames. `alone`: the
    pipeline takes one prompt a call. `pixels` are the height and width that were recorded.
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
    guidance_factor: float = 1
    sign: int = 1
    renormalises: Renormalises = "never"
    guided_channels: int | None = None
    sample_lists: bool = False
    lengths: Lengths = field(default_factory=Lengths)
    companion: int | None = None
    swapped: dict[str, tuple[int, int]] = field(default_factory=dict)
    framewise: tuple[str, ...] = ()
    nested: tuple[str, ...] = ()
    alone: bool = False
    pixels: tuple[int, int] = (0, 0)

    def predicted(self, output: Any, latents: Tensor) -> Tensor:
        """Of a network's output the part that belongs to `latents`: no variance, and nothing of what stood beside them."""
        return _own_part(output, latents, self.companion)


def read_scheduler(scheduler: Any) -> tuple[Process, Kind]:
    """The noise process and prediction type that a diffusers scheduler stands for.

    Raises UserError for processes other than variance-preserving ones and rectified flow.
    """
    config, name = scheduler.config, type(scheduler).__name__
    predicts = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or predicts == "flow_prediction":
        return Flow(config.get("num_train_timesteps", 1000)), "flow"
    if name == "SCMScheduler":
        return Trig(), "v"
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"{name} is neither a variance-preserving nor a flow-matching scheduler; it cannot be distilled")
    if predicts not in KINDS:
        raise UserError(f"{name} has prediction_type {predicts!r}; it must be one of {', '.join(KINDS)}")
    return VP(scheduler.alphas_cumprod), KINDS[predicts]


def step_time(process: Process, timestep: float, level: float | None) -> float:
    """Our time of a scheduler's step: from its noise level where it keeps one (which some do not tell as a timestep)."""
    if level is not None and isinstance(process, Flow):
        return level
    if level is not None and isinstance(process, EDM):
        return float(process.time_at(torch.tensor(level, dtype=torch.float64)))
    return float(process.time(torch.tensor(timestep, dtype=torch.float64)))


def learn_form(pipeline: Pipeline) -> CallForm:
    """Watch the pipeline denoise twice: with two prompts and its real network, small; with three, pretending, full size.

    Raises UserError where the pipeline does something to the network's output that fastgen would not repeat.
    """
    diffusers, network, name = pipeline.diffusers, pipeline.network, type(pipeline.diffusers).__name__
    with silent():
        seen = probe(diffusers, network, pipeline.height, pipeline.width)
    full, real, long = seen.full, seen.real, seen.long
    sample, time = sample_and_time(network)
    nested = tuple(key for key, value in real.calls[0].items() if is_nested(value))
    for each in (full, real, long):
        unnest(each, nested)
    companion = _companion(stacked(real.calls[0][sample]), real.sample, name)
    swapped = _batch_second(real.calls[0], full.calls[0]) | _tokens_third(full.calls[0], long.calls[0])
    framewise = _framewise(real.calls[0], sample)
    for each in (full, real, long):
        rearrange(each, sample, companion, swapped, framewise)
    first = real.calls[0]
    rows = len(stacked(first[sample]))
    scale, time_reversed = (1.0, False) if pipeline.knows_time else _read_time(diffusers, (real, seen.timed), time)
    flows = isinstance(pipeline.process, Flow)  # A flow may point either way, an epsilon may not.
    predicted = [_own_part(x, real.sample, companion) for x in real.outputs]
    handed = _own_part(real.handed, real.sample, None) / pipeline.scheduler_scale
    guidance = read_guidance([_as_handed(pipeline, x, real) for x in predicted], handed, name, signs=(1, -1) if flows else (1,))
    fixed = (sample, time, *FRESH, *pipeline.makes)
    if seen.alone:
        lists: list[str] = []
        alike: list[str] = []
        sizes = {key: _sizes_alone(full.calls[0].get(key), rows) for key in first if key not in fixed}
    else:
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
        learns_variance=real.sample.ndim != 3 and stacked(real.outputs[0]).shape[1] == 2 * real.sample.shape[1],
        sizes=sizes,
        latent_shape=tuple(full.sample.shape[1:]),
        time_reversed=time_reversed,
        guidance_factor=_guidance_factor(first["guidance"]) if takes_guidance else 1,
        sample_lists=isinstance(first[sample], (list, tuple)),
        lengths=learn_lengths(full.calls[0], long.calls[0], lists, alike, sizes, pipeline.feels_padding),
        companion=companion,
        swapped=swapped,
        framewise=framewise,
        nested=nested,
        alone=seen.alone,
        pixels=seen.pixels,
    )


def _as_handed(pipeline: Pipeline, output: Tensor, real: Recording) -> Tensor:
    """A recorded output as the scheduler's prediction."""
    xt = (real.sample / pipeline.scheduler_scale).repeat(len(output) // len(real.sample), *[1] * (real.sample.ndim - 1))
    t = torch.full((len(xt),), step_time(pipeline.process, float(real.timestep), real.level), dtype=torch.float64)
    return pipeline.network_output(output, xt, t.to(xt.device))


def _guidance_factor(given: Tensor) -> float:
    factor = float(given.flatten()[0]) / PROBE_GUIDANCE
    return round(factor) if factor >= 1 else factor


def _companion(shown: Tensor, latents: Tensor, name: str) -> int | None:
    """The dimension along which a network's input holds more than the latents, at its end; None where it holds no more."""
    if shown.shape[1:] == latents.shape[1:]:
        return None
    longer = [i for i in range(1, shown.ndim) if shown.ndim == latents.ndim and shown.shape[i] != latents.shape[i]]
    if len(longer) == 1 and shown.shape[longer[0]] > latents.shape[longer[0]]:
        dimension = longer[0]
        mine = shown[: len(latents)].narrow(dimension, 0, latents.shape[dimension])
        if torch.cosine_similarity(mine.flatten().float(), latents.flatten().float(), 0) > 0.999:
            return dimension
    raise UserError(f"{name} feeds its network more than noisy latents, as inpainting does; it cannot be distilled")


def _batch_second(two: dict[str, Any], three: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Arguments whose second dimension follows the batch, and the first does not: from the values for two and three samples."""

    def follows(x: Any, y: Any) -> bool:
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim > 2 and x.ndim == y.ndim
        return tensors and len(x) == len(y) and x.shape[1] % 2 == 0 and x.shape[1] * 3 == y.shape[1] * 2 <= 12

    return {key: (0, 1) for key in two if follows(two[key], three.get(key))}


def _tokens_third(short: dict[str, Any], long: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Arguments whose third dimension follows the prompt's length, and the second does not."""

    def follows(x: Any, y: Any) -> bool:
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim > 3 and x.ndim == y.ndim
        return tensors and x.shape[1] == y.shape[1] and x.shape[2] != y.shape[2]

    return {key: (1, 2) for key in short if follows(short[key], long.get(key))}


def unnest(seen: Recording, nested: Sequence[str]) -> None:
    """Take each sample's tensor out of the list that holds it alone."""
    for call in seen.calls:
        call |= {key: [value[0] for value in call[key]] for key in nested}


def _framewise(call: dict[str, Any], sample: str) -> tuple[str, ...]:
    """Arguments that hold each sample's as often as its video has frames."""
    video = stacked(call[sample])
    if video.ndim != 5 or video.shape[2] == 1:
        return ()
    rows, frames = len(video), video.shape[2]

    def repeats(x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > 1 and len(x) == rows * frames and torch.equal(x[::frames], x[1::frames])

    return tuple(key for key, value in call.items() if key != sample and repeats(value))


def rearrange(
    seen: Recording,
    sample: str,
    companion: int | None,
    swapped: Mapping[str, tuple[int, int]],
    framewise: Sequence[str],
) -> None:
    """Make every argument of the recorded calls batch first, then tokens, and one of its own of what follows the latents."""
    for call in seen.calls:
        call |= {key: call[key][:: call[sample].shape[2]] for key in framewise}
        call |= {key: call[key].transpose(*dimensions) for key, dimensions in swapped.items()}
        if companion is None:
            continue
        size = seen.sample.shape[companion]
        call[COMPANION] = call[sample].narrow(companion, size, call[sample].shape[companion] - size)
        call[sample] = call[sample].narrow(companion, 0, size)


def stacked(samples: Any) -> Tensor:
    """A network's latents as one tensor, also where it takes or gives a list of one a sample, with a frame axis."""
    return torch.stack(list(samples)).squeeze(2) if isinstance(samples, (list, tuple)) else samples


def _read_time(diffusers: Any, seen: Sequence[Recording], name: str) -> tuple[float, bool]:
    """How the network's time follows from the scheduler's: by which scale, and whether it runs the other way."""
    steps = diffusers.scheduler.config.get("num_train_timesteps", 1000)
    times = [float(torch.as_tensor(each.calls[0][name]).flatten()[0]) for each in seen]
    own = [float(each.timestep) for each in seen]
    for reverse, scale in itertools.product((False, True), TIME_SCALES):
        expected = [scale * (steps - each if reverse else each) for each in own]
        if all(abs(x - y) <= 1e-2 * max(y, scale * reverse) for x, y in zip(times, expected, strict=True)):
            return scale, reverse
    kind = type(diffusers).__name__
    raise UserError(
        f"{kind} tells its network the time {times[0]:.4g} at timestep {own[0]:.4g}, in a way fastgen does not know"
    )


def _own_part(output: Any, latents: Tensor, companion: int | None) -> Tensor:
    output = stacked(output)
    if companion is not None:
        output = output.narrow(companion, 0, latents.shape[companion])
    if latents.ndim == 3:  # Tokens, the last of a longer sequence.
        return output[:, -latents.shape[1] :]
    return output.chunk(2, 1)[0] if output.shape[1] == 2 * latents.shape[1] else output


def _sizes_alone(nest: Nest, rows: int) -> Nest:
    """As `_sizes`, from a call with one prompt, which has as many `rows` as it answers."""
    if isinstance(nest, Tensor):
        return rows if nest.ndim and len(nest) == rows else 0
    if isinstance(nest, Mapping):
        return {key: _sizes_alone(value, rows) for key, value in nest.items()}
    return [_sizes_alone(x, rows) for x in nest] if isinstance(nest, (list, tuple)) else 0


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
    if form.alone and len(prompts) > 1:
        return Condition.cat([record_condition(pipeline, network, form, [prompt], height, width) for prompt in prompts])
    seen = record(pipeline, network, prompts, height=height, width=width, pretend=True, alone=form.alone)
    unnest(seen, form.nested)
    rearrange(seen, form.sample_name, form.companion, form.swapped, form.framewise)
    if form.guides == "paired":
        yes, no = (seen.calls[1], seen.calls[0]) if form.null_first else (seen.calls[0], seen.calls[1])
        null = _condition(no, form, None)
        if len(null) < len(prompts):  # One empty prompt for all, which the network repeats.
            null = null[[0] * len(prompts)]
        return _condition(yes, form, None, null)
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
