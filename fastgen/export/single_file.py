"""One checkpoint file under the names of a family's first release, as ComfyUI, A1111 and `from_single_file` read it.

For Stable Diffusion 1 and XL it holds the whole pipeline: the student, the autoencoder (CompVis' `first_stage_model`) and the
text encoders (`cond_stage_model`; of SDXL `conditioner.embedders`, the second one in OpenCLIP's layout). Of other families it
holds the transformer alone. A LoRA is merged into it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.export.directory import describe, metadata, new_directory, write_description
from fastgen.export.folder import merged
from fastgen.export.layouts import WHOLE, layout_of, original_weights
from fastgen.export.model_card import write_card
from fastgen.export.scheduler import stock_scheduler
from fastgen.pipelines import Pipeline
from fastgen.samplers import Sampler

SD2_WIDTH = 1024
"""Width of the text embeddings of Stable Diffusion 2, whose original text encoder has a layer more than diffusers keeps."""

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def export_single_file(
    pipeline: Pipeline, student: Denoiser, sampler: Sampler, output: Path, *, record: Mapping[str, Any]
) -> Path:
    """Write `NAME.safetensors` and `scheduler/`; NAME is the output's. See `fastgen.export.export`.

    Raises UserError for a family, or a network, that has no such layout.
    """
    layout = layout_of(pipeline, student.network, "single-file")
    whole = layout.network == "UNet2DConditionModel"
    if whole:
        _require_sd1_or_sdxl(pipeline)
    spec, scheduler, call = stock_scheduler(pipeline, student, sampler)
    weights = original_weights(layout, merged(student).state_dict())
    if whole:
        weights = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
        weights |= original_vae(pipeline.diffusers.vae) | original_text_encoders(pipeline.diffusers)
    file = f"{output.name}.safetensors"
    description = describe(pipeline, student, sampler, "single-file", spec=spec, call=call, record=record, file=file)
    with new_directory(output) as folder:
        save_file({key: _separate(value) for key, value in weights.items()}, folder / file, metadata=metadata(description))
        scheduler.save_pretrained(folder / "scheduler")
        write_description(folder, description)
        write_card(pipeline, description, folder, output)
    return output


def _require_sd1_or_sdxl(pipeline: Pipeline) -> None:
    whole: Any = pipeline.diffusers
    if not hasattr(whole, "text_encoder_2") and whole.unet.config.cross_attention_dim == SD2_WIDTH:
        raise UserError(f"the format 'single-file' is known for {WHOLE}, not for Stable Diffusion 2; export it as 'diffusers'")
    if type(whole.vae).__name__ != "AutoencoderKL":
        raise UserError(f"the format 'single-file' takes an AutoencoderKL, not {type(whole.vae).__name__}; use 'diffusers'")


def _separate(weight: Tensor) -> Tensor:
    """In memory of its own, on the CPU, as safetensors wants it."""
    return weight.detach().to("cpu", copy=True).contiguous()


def original_vae(vae: Any) -> dict[str, Tensor]:
    """The autoencoder's weights under CompVis' names; its attention is of 1 x 1 convolutions there."""
    last = len(vae.config.block_out_channels) - 1
    result = {}
    for key, weight in vae.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{last - int(found[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample", name)
        if ".mid_block.attentions.0." in name:
            coder, _, inner = name.partition(".mid_block.attentions.0.")
            layer, leaf = inner.rsplit(".", 1)
            name = f"{coder}.mid.attn_1.{VAE_ATTENTION[layer]}.{leaf}"
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        result[f"first_stage_model.{name}"] = weight
    return result


def original_text_encoders(whole: Any) -> dict[str, Tensor]:
    """The weights of a pipeline's one or two CLIP encoders, where SD 1 and SDXL keep them."""
    first = {key.removeprefix("text_model."): value for key, value in whole.text_encoder.state_dict().items()}
    second = getattr(whole, "text_encoder_2", None)
    place = "cond_stage_model" if second is None else "conditioner.embedders.0"
    result = {f"{place}.transformer.text_model.{key}": value for key, value in first.items()}
    if second is not None:
        result |= {f"conditioner.embedders.1.model.{key}": value for key, value in open_clip(second.state_dict()).items()}
    return result


def open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPTextModelWithProjection under OpenCLIP's names: queries, keys and values stacked, the projection transposed."""
    left = {key.removeprefix("text_model."): value for key, value in weights.items()}
    result = {name: left.pop(key) for key, name in OPEN_CLIP.items()}
    result["text_projection"] = left.pop("text_projection.weight").T
    layers = {key.split(".")[2] for key in left if key.startswith("encoder.layers.")}
    for i in sorted(layers, key=int):
        here, there = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for leaf in ("weight", "bias"):
            stacked = [left.pop(f"{here}.self_attn.{each}_proj.{leaf}") for each in "qkv"]
            result[f"{there}.attn.in_proj_{leaf}"] = torch.cat(stacked)
            for key, name in OPEN_CLIP_LAYER.items():
                result[f"{there}.{name}.{leaf}"] = left.pop(f"{here}.{key}.{leaf}")
    return result
