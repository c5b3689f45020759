"""The README of an export: what it is, and the lines that sample it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen.export.layouts import UNET_PIPELINES
from fastgen.pipelines import Pipeline
from fastgen.pipelines.base import base_dtype

PROMPT = "a small red circle left of a large blue square, dark background"
SAMPLES = "samples.png"
CARD = "README.md"
LORAS = ("diffusers-lora", "kohya", "comfyui")


def write_card(pipeline: Pipeline, description: Mapping[str, Any], folder: Path, output: Path) -> None:
    """Write README.md into `folder`, which is to become the export at `output`, and the grid of samples beside it."""
    samples = description["record"].get("samples")
    if samples:
        shutil.copyfile(samples, folder / SAMPLES)
    (folder / CARD).write_text(model_card(pipeline, description, output), encoding="utf-8")


def model_card(pipeline: Pipeline, description: Mapping[str, Any], output: Path) -> str:
    """The model card of the export at `output`: front matter for the hub, a snippet to copy and run, and the facts."""
    record, sampler, format = description["record"], description["sampler"], description["format"]
    base, lora = record.get("base", ""), format in LORAS
    front = ["library_name: diffusers", "pipeline_tag: text-to-image"]
    if base:
        front.append(f"base_model: {json.dumps(base)}")
    tags = ["fastgen", "distillation", "few-step", *(["lora"] if lora else [])]
    front.append(f"tags: [{', '.join(tags)}]")
    steps = sampler["steps"]
    calls = f"{steps} network call{'s' if steps > 1 else ''}"
    method = f" by {record['method']}" if record.get("method") else ""
    title = f"A LoRA for {base or description['pipeline']}" if lora else f"A {description['pipeline']}"
    weights = "float32" if str(base_dtype(pipeline.network)) == "torch.float32" else "half precision"
    shift = "" if sampler["shift"] in (None, 1.0) else f" (even times shifted by {sampler['shift']:g})"
    custom = ", changed by `pipeline.py`" if "custom_pipeline" in description else ""
    facts = {
        "Method": record.get("method"),
        "Format": f"`{format}`{', the LoRA merged into the weights of its base' if format == 'fused' else ''}",
        "Base": f"`{base}`" if base else None,
        "Base's weights, SHA-256": f"`{description['base']['sha256']}`",
        "Weights in the base": f"`{record['teacher_weights']}`" if record.get("teacher_weights") else None,
        "LoRAs in the base": ", ".join(f"`{file}`" for file in record.get("teacher_loras", ())) or None,
        "Updates": record.get("updates"),
        "Weights": f"{weights}{', averaged over training' if record.get('averaged') else ''}",
        "Sampler": f"{steps} steps at times {_numbers(sampler.get('times', ()))}{shift}, gamma {sampler.get('gamma', 0):g}",
        "Networks": ", ".join(f"`{phase}`" for phase in description.get("phases", ())),
        "Timesteps": _numbers(sampler["timesteps"]),
        "Scheduler": f"`{description['scheduler']['class']}` (in `scheduler/`{custom})",
        "Call": f"`{_arguments(description['call'])}`",
        "Made with": f"fastgen {description['fastgen']}, diffusers {description['diffusers']}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value)
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {title} that samples in {calls}",
        *([f"**Not sampled as it was trained**: {record['forced']}."] if record.get("forced") else []),
        *([f"![Samples of the teacher and of the student, drawn in training]({SAMPLES})"] if record.get("samples") else []),
        f"Distilled{method} with fastgen; to use it, {_needs(description)} enough.",
        *([f"```python\n{snippet(pipeline, description, output)}```"] if description["in_diffusers"] else []),
        _advice(description),
        f"| | |\n|---|---|\n{table}",
        *_evaluation(record.get("evaluation")),
    ]
    return "\n\n".join(parts) + "\n"


def _needs(description: Mapping[str, Any]) -> str:
    if not description["in_diffusers"]:
        return "ComfyUI, or another program that reads this LoRA's keys, is"
    return "diffusers and peft are" if description["format"] in LORAS else "diffusers is"


def _evaluation(evaluation: Mapping[str, Any] | None) -> list[str]:
    """The scores of a record of `fastgen eval`, as a table."""
    if not evaluation:
        return []
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in evaluation["scores"].items())
    notes = "\n".join(f"- {note}" for note in evaluation.get("notes", ()))
    return ["## Evaluation", f"| measure | value |\n|---|---|\n{rows}", *([notes] if notes else [])]


def snippet(pipeline: Pipeline, description: Mapping[str, Any], output: Path) -> str:
    """Python that loads the export with plain diffusers and draws one picture."""
    dtype = str(base_dtype(pipeline.network))
    phases = description.get("phases", ())
    names, load = _loading(pipeline, description, _text(output / phases[0] if phases else output), dtype)
    prompt = json.dumps(description["record"].get("prompt", PROMPT), ensure_ascii=False)
    arguments, turns = _arguments(description["call"]), list[str]()
    if phases:
        more, turns = _turns(pipeline, description, output, dtype)
        names, arguments = names | more, f"{arguments}, callback_on_step_end=change"
    lines = [
        "import torch",
        f"from diffusers import {', '.join(sorted(names))}",
        "",
        *load,
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")',
        *turns,
        "",
        f"image = pipeline(prompt={prompt}, {arguments}).images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines) + "\n"


def _turns(pipeline: Pipeline, description: Mapping[str, Any], output: Path, dtype: str) -> tuple[set[str], list[str]]:
    """The names to import and the lines that define `change`, by which each step has its own phase's network."""
    phases, network = description["phases"], pipeline.network_name
    first, *others = dict.fromkeys(phases)
    if description["format"] in LORAS:
        names, each_step = set(), "set_adapters(phases[(step + 1) % len(phases)])"
        lines = [f"pipeline.load_lora_weights({_text(output / phase)}, adapter_name={_text(phase)})" for phase in others]
        lines.append(f"pipeline.set_adapters({_text(first)})")
    else:
        kind = description["network"]
        names, each_step = {kind}, f"{network} = networks[phases[(step + 1) % len(phases)]]"
        lines = [f"networks = {{{_text(first)}: pipeline.{network}}}"]
        for phase in others:
            load = f"{kind}.from_pretrained({_text(output / phase / network)}, dtype={dtype})"
            lines.append(f"networks[{_text(phase)}] = {load}.to(pipeline.device)")
    change = ["def change(pipeline, step, timestep, values):", f"    pipeline.{each_step}", "    return values"]
    return names, [*lines, f"phases = {json.dumps(phases)}  # of each step", "", "", *change, ""]


def _text(value: object) -> str:
    return json.dumps(str(value))


def _loading(pipeline: Pipeline, description: Mapping[str, Any], folder: str, dtype: str) -> tuple[set[str], list[str]]:
    """The names to import from diffusers and the lines that make `pipeline`."""
    name, format, record = description["pipeline"], description["format"], description["record"]
    if format in ("diffusers", "fused"):
        if "custom_pipeline" not in description:
            return {name}, [f"pipeline = {name}.from_pretrained({folder}, dtype={dtype})"]
        arguments = f"{folder}, custom_pipeline={folder}, trust_remote_code=True, dtype={dtype}"
        return {"DiffusionPipeline"}, [f"pipeline = DiffusionPipeline.from_pretrained({arguments})"]
    base = json.dumps(record.get("base") or "the base model")
    scheduler = description["scheduler"]["class"]
    names, place = {scheduler, name}, f'pipeline.scheduler = {scheduler}.from_pretrained({folder}, subfolder="scheduler")'
    if format == "single-file":
        names |= set() if description["network"] == "UNet2DConditionModel" else {description["network"]}
        return (names, [*_single_file(description, base, folder, dtype), place])
    load = [f"pipeline = {name}.from_pretrained({base}, dtype={dtype})"]
    for file in map(Path, record.get("teacher_loras", ())):
        parent, weights = json.dumps(str(file.parent)), json.dumps(file.name)
        load += [f"pipeline.load_lora_weights({parent}, weight_name={weights})", "pipeline.fuse_lora()"]
        load.append("pipeline.unload_lora_weights()")
    file_name = "" if "file" not in description else f", weight_name={json.dumps(description['file'])}"
    adapter = f", adapter_name={_text(description['phases'][0])}" if "phases" in description else ""
    load.append(f"pipeline.load_lora_weights({folder}{file_name}{adapter})")
    return names, [*load, place]


def _single_file(description: Mapping[str, Any], base: str, folder: str, dtype: str) -> list[str]:
    """The lines that make `pipeline` of a single file; `base` gives the configuration, and what is not in the file."""
    name, network, path = (
        description["pipeline"],
        description["network"],
        json.dumps(f"{json.loads(folder)}/{description['file']}"),
    )
    if network == "UNet2DConditionModel":
        return [f"pipeline = {name}.from_single_file({path}, config={base}, dtype={dtype})"]
    arguments = f'config={base}, subfolder="transformer", dtype={dtype}'
    return [
        f"transformer = {network}.from_single_file({path}, {arguments})",
        f"pipeline = {name}.from_pretrained({base}, transformer=transformer, dtype={dtype})",
    ]


def _advice(description: Mapping[str, Any]) -> str:
    call, sampler, notes = description["call"], description["sampler"], []
    if "custom_pipeline" in description:
        file, gamma = description["custom_pipeline"]["file"], sampler["gamma"]
        why = (
            f"No stock scheduler of diffusers samples with gamma {gamma:g}"
            if gamma
            else ("No stock pipeline of diffusers tells its network where a step ends")
        )
        notes.append(
            f"{why}, so `{file}` beside this card does it"
            + ("" if gamma else ", with the weights in `end_time.safetensors`")
            + "; it needs no fastgen, and `trust_remote_code=True` lets diffusers run it."
        )
    if "phases" in description:
        notes.append(
            "It is several networks, one for each phase of the steps, in a folder each; none is right by itself. `change` above"
            " hands every step to its own, and programs that cannot do that cannot sample it."
        )
    explicit = next((key for key in ("timesteps", "sigmas") if key in call), None)
    if explicit:
        notes.append(f"Pass `{explicit}` as above: the student is sampled at just these; `num_inference_steps` gives others.")
    else:
        notes.append(f"Keep `num_inference_steps={call['num_inference_steps']}`, the number that this export was made for.")
    if sampler.get("guidance", 1.0) == 1.0 or "guidance_scale" not in call:
        notes.append("It needs no guidance: leave the scale as above.")
    else:
        notes.append(f"Keep `guidance_scale={call['guidance_scale']:g}`.")
    if sampler.get("gamma", 0) > 0 and sampler["steps"] > 1:
        notes.append(
            "Noise is drawn between the steps, so a picture repeats only with the same `generator`; pipelines that keep theirs "
            "from the scheduler (SD3, FLUX) repeat after `torch.manual_seed`."
        )
    if description["format"] in LORAS:
        notes.append("Load it at strength 1.0: the scale is in the weights.")
    if description["format"] in ("kohya", "comfyui", "single-file"):
        notes.append(_in_comfyui(description))
    return "\n".join(f"- {note}" for note in notes)


def _in_comfyui(description: Mapping[str, Any]) -> str:
    """What to set in ComfyUI's KSampler, by what its samplers compute."""
    sampler, name = description["sampler"], description["pipeline"]
    gamma, shift, guidance = sampler.get("gamma", 0.0), sampler["shift"], sampler.get("guidance", 1.0)
    if gamma not in (0.0, 1.0) or shift is None or (shift != 1.0 and name.startswith("StableDiffusion") and "3" not in name):
        return "ComfyUI has no stock sampler with these times; use diffusers."
    settings = [f"sampler `{'lcm' if gamma else 'euler'}`", "scheduler `simple`", f"steps {sampler['steps']}"]
    if name.startswith("Flux"):
        settings += ["cfg 1", f"FluxGuidance {guidance:g}", f"ModelSamplingFlux with both shifts {math.log(shift):.4g}"]
    else:
        settings += [f"cfg {guidance:g}", *([] if name in UNET_PIPELINES else [f"ModelSamplingSD3 with shift {shift:g}"])]
    return f"In ComfyUI: {', '.join(settings)} (by ComfyUI's code; not run there)."


def _arguments(call: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in call.items())


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
