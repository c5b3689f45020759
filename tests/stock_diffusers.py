"""Runs without fastgen: loads exports with stock diffusers, calls them as they say, and keeps the latents.

    python stock_diffusers.py FOLDER

FOLDER has `cases.json`, as `tests/exports.py` writes it; `latents.safetensors`, `weights.safetensors` and `problems.json`
are added.
"""

import inspect
import json
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import lora_conversion_utils, lora_pipeline, single_file_model, single_file_utils
from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

WHOLE = ("diffusers", "fused")
WIDTHS = {"3072": "32", "12288": "128", "2304": "32", "768": "16"}  # Of FLUX.1 and of Lumina 2, and of the tiny ones.


def narrowed(module: Any, name: str) -> Any:
    """One of diffusers' converters, into which a model's true widths are written, for a tiny model."""
    source = inspect.getsource(getattr(module, name))
    for true, tiny in WIDTHS.items():
        source = re.sub(rf"\b{true}\b", tiny, source)
    exec(source, module.__dict__)
    return getattr(module, name)


def narrow_converters() -> None:
    name = "_convert_kohya_flux_lora_to_diffusers"
    setattr(lora_pipeline, name, narrowed(lora_conversion_utils, name))
    converters = {kind: f"convert_{kind.lower()}_transformer_checkpoint_to_diffusers" for kind in ("Flux", "Chroma")}
    for kind, converter in (converters | {"Lumina2": "convert_lumina2_to_diffusers"}).items():
        known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[f"{kind}Transformer2DModel"]
        known["checkpoint_mapping_fn"] = narrowed(single_file_utils, converter)


class Positioned(PreTrainedTokenizerFast):
    """Kolors' tokenizer tells positions too; its own class is one that cannot be made without a file."""

    def __call__(self, text: Any = None, **options: Any) -> Any:
        answer = super().__call__(text, **options)
        answer["position_ids"] = (answer["attention_mask"].cumsum(1) - 1).clamp_min(0)
        return answer


def stock(name: str) -> Any:
    """A pipeline class; Kolors hides where an optional package is missing."""
    return KolorsPipeline if name == "KolorsPipeline" else getattr(diffusers, name)


def given(folder: Path) -> dict[str, Any]:
    """Parts of Kolors that diffusers cannot find by themselves here."""
    if "Kolors" not in (folder / "model_index.json").read_text():
        return {}
    tokenizer, encoder = Positioned.from_pretrained(folder / "tokenizer"), ChatGLMModel.from_pretrained(folder / "text_encoder")
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def run_card(folder: Path) -> Any:
    """The lines of an export's card, run as they are; the pipeline that they make."""
    [code] = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    card: dict[str, Any] = {}
    exec(code.replace("image.png", str(folder / "image.png")), card)
    return card["pipeline"].to("cpu")


def load(case: dict[str, Any], folder: Path, told: dict[str, Any]) -> Any:
    """The export as a pipeline, by its format."""
    kind, base = stock(told["pipeline"]), Path(case["base"])
    if told["format"] in WHOLE:
        return kind.from_pretrained(folder, **given(folder))
    if told["format"] == "single-file":
        file, local = str(folder / told["file"]), {"config": case["base"], "local_files_only": True}
        if told["network"] == "UNet2DConditionModel":
            return kind.from_single_file(file, **local)
        network = getattr(diffusers, told["network"]).from_single_file(file, subfolder="transformer", **local)
        return kind.from_pretrained(base, transformer=network, **given(base))
    pipeline = kind.from_pretrained(base, **given(base))
    pipeline.load_lora_weights(folder, **({"weight_name": told["file"]} if "file" in told else {}))
    return pipeline


def refused_without_trust(folder: Path) -> bool:
    try:
        diffusers.DiffusionPipeline.from_pretrained(folder)
    except ValueError as problem:
        return "trust_remote_code" in str(problem)
    return False


def drawn(case: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The latents that stock diffusers makes of one case's noise."""
    folder = Path(case["folder"])
    told = json.loads((folder / "fastgen.json").read_text())
    carded = run_card(folder) if case["card"] else None
    assert carded is None or (isinstance(carded, stock(told["pipeline"])) and (folder / "image.png").stat().st_size > 100)
    if "custom_pipeline" in told:
        pipeline: Any = carded
        assert refused_without_trust(folder) and type(pipeline).__name__ == told["custom_pipeline"]["class"]
    else:
        pipeline = load(case, folder, told)
        assert type(pipeline).__name__ == told["pipeline"]
        scheduler = getattr(diffusers, told["scheduler"]["class"])
        if told["format"] not in WHOLE:
            pipeline.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler")
        assert type(pipeline.scheduler) is scheduler
    if told["format"] == "single-file":
        parts = {name: part.state_dict() for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        for name, part in parts.items():
            weights.update({f"{case['name']}/{name}/{key}": value.clone() for key, value in part.items()})
    pipeline.set_progress_bar_config(disable=True)
    # Flow pipelines keep their generator from the scheduler, which then draws from the global one.
    torch.manual_seed(case["seed"])
    generator = torch.Generator().manual_seed(case["seed"])
    noise = load_file(case["noise"])["noise"]
    given_noise = {"latents": noise, "generator": generator, "output_type": "latent"}
    return pipeline(prompt=case["prompts"], **given_noise, **told["call"]).images.contiguous()


def main(root: Path) -> None:
    sys.modules["fastgen"] = None  # type: ignore[assignment]  # importing it is an error
    torch.set_num_threads(1)
    narrow_converters()
    weights: dict[str, torch.Tensor] = {}
    latents: dict[str, torch.Tensor] = {}
    problems: dict[str, str] = {}
    for case in json.loads((root / "cases.json").read_text()):
        try:
            latents[case["name"]] = drawn(case, weights)
        except Exception:
            problems[case["name"]] = traceback.format_exc()
    (root / "problems.json").write_text(json.dumps(problems))
    save_file(latents, root / "latents.safetensors")
    save_file(weights, root / "weights.safetensors")
    assert not any(name.startswith("fastgen.") for name in sys.modules)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
