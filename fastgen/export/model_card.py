"""The README of an export: what it is, and the lines that sample it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen.pipelines import Pipeline
from fastgen.pipelines.base import base_dtype

PROMPT = "a small red circle left of a large blue square, dark background"


def model_card(pipeline: Pipeline, description: Mapping[str, Any], output: Path) -> str:
    """The model card of the export at `output`: front matter for the hub, a snippet to copy and run, and the facts."""
    record, sampler = description["record"], description["sampler"]
    base, lora = record.get("base", ""), description["format"] == "diffusers-lora"
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
    facts = {
        "Method": record.get("method"),
        "Base": f"`{base}`" if base else None,
        "LoRAs in the base": ", ".join(f"`{file}`" for file in record.get("teacher_loras", ())) or None,
        "Updates": record.get("updates"),
        "Weights": f"{weights}{', averaged over training' if record.get('averaged') else ''}",
        "Sampler": f"{steps} steps at times {_numbers(sampler.get('times', ()))}, gamma {sampler.get('gamma', 0):g}",
        "Scheduler": f"`{description['scheduler']['class']}` (in `scheduler/`)",
        "Call": f"`{_arguments(description['call'])}`",
        "Made with": f"fastgen {description['fastgen']}, diffusers {description['diffusers']}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value)
    return f"""---
{chr(10).join(front)}
---

# {title} that samples in {calls}

Distilled{method} with fastgen; to use it, {"diffusers and peft are" if lora else "diffusers is"} enough.

```python
{snippet(pipeline, description, output)}```

{_advice(description)}

| | |
|---|---|
{table}
"""


def snippet(pipeline: Pipeline, description: Mapping[str, Any], output: Path) -> str:
    """Python that loads the export with plain diffusers and draws one picture."""
    name, record = description["pipeline"], description["record"]
    dtype = str(base_dtype(pipeline.network))
    folder = json.dumps(str(output))
    if description["format"] == "diffusers":
        imports = name
        load = [f"pipeline = {name}.from_pretrained({folder}, dtype={dtype})"]
    else:
        scheduler = description["scheduler"]["class"]
        imports = ", ".join(sorted((scheduler, name)))
        base = json.dumps(record.get("base") or "the base model")
        load = [f"pipeline = {name}.from_pretrained({base}, dtype={dtype})"]
        for file in map(Path, record.get("teacher_loras", ())):
            place, weights = json.dumps(str(file.parent)), json.dumps(file.name)
            load += [f"pipeline.load_lora_weights({place}, weight_name={weights})", "pipeline.fuse_lora()"]
            load.append("pipeline.unload_lora_weights()")
        load.append(f"pipeline.load_lora_weights({folder})")
        load.append(f'pipeline.scheduler = {scheduler}.from_pretrained({folder}, subfolder="scheduler")')
    prompt = json.dumps(record.get("prompt", PROMPT), ensure_ascii=False)
    lines = [
        "import torch",
        f"from diffusers import {imports}",
        "",
        *load,
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")',
        "",
        f"image = pipeline({prompt}, {_arguments(description['call'])}).images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines) + "\n"


def _advice(description: Mapping[str, Any]) -> str:
    call, sampler, notes = description["call"], description["sampler"], []
    explicit = next((key for key in ("timesteps", "sigmas") if key in call), None)
    if explicit:
        notes.append(f"Pass `{explicit}` as above: the student is sampled at just these; `num_inference_steps` gives others.")
    else:
        notes.append(f"Keep `num_inference_steps={call['num_inference_steps']}`, the number that this export was made for.")
    if sampler.get("guidance", 1.0) == 1.0:
        notes.append("It needs no guidance: leave the scale as above.")
    else:
        notes.append(f"Keep `guidance_scale={call['guidance_scale']:g}`.")
    if sampler.get("gamma", 0) > 0 and sampler["steps"] > 1:
        notes.append(
            "Noise is drawn between the steps, so a picture repeats only with the same `generator`; pipelines that keep theirs "
            "from the scheduler (SD3, FLUX) repeat after `torch.manual_seed`."
        )
    return "\n".join(f"- {note}" for note in notes)


def _arguments(call: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in call.items())


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
