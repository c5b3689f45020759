"""Features that are computed where images are drawn, batch by batch and in any process, and put together afterwards.

A batch's features are kept layer by layer in its file; `gather_parts` makes of them, in order, what one pass over the
images gives (`fastgen.eval.features.embed`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.features import ROWS, Embedded, metric_layers
from fastgen.eval.inception_score import Splits
from fastgen.eval.moments import Moments
from fastgen.eval.results import load_tensors, save_tensors
from fastgen.eval.world import World


def gather_parts(parts: Iterable[dict[str, Tensor]], world: World, total: int) -> Embedded:
    """What is kept of the features of a set of `total` images, from the features of its batches in order.

    The batches hold features by layer, as `fastgen.eval.features.Extraction.features` gives them.
    """
    layers = metric_layers(world)
    kept: dict[str, list[Tensor]] = {layers["fid"]: [], layers["prc"]: []}
    moments: Moments | None = None
    splits: Splits | None = None
    before = 0
    for part in parts:
        values = part[layers["fid"]]
        moments = (moments or Moments(values.shape[1])).add(values)
        for layer, rows in kept.items():
            rows.append(part[layer][: max(0, ROWS - before)].clone())
        if "isc" in layers:
            logits = part[layers["isc"]]
            splits = splits or Splits(total, logits.shape[1])
            splits.add(logits)
        before += len(values)
    assert moments is not None
    whole = {layer: torch.cat(found) for layer, found in kept.items()}
    return Embedded(moments, {metric: whole[layers[metric]] for metric in ("fid", "prc")}, splits)


def save_embedded(path: Path, embedded: Embedded) -> None:
    """Write what is kept of a set's features; layers that are the same once."""
    tensors = {f"moments.{key}": value for key, value in embedded.moments.tensors().items()} | {"fid": embedded.rows["fid"]}
    if embedded.rows["prc"] is not embedded.rows["fid"]:
        tensors["prc"] = embedded.rows["prc"].clone()
    if embedded.splits is not None:
        tensors |= {"probabilities": embedded.splits.probabilities, "negative_entropy": embedded.splits.negative_entropy}
        tensors["total"] = torch.tensor(embedded.splits.total)
    save_tensors(path, tensors)


def load_embedded(path: Path) -> Embedded | None:
    """What `save_embedded` wrote; None where there is no file. Raises UserError where it is damaged."""
    kept = load_tensors(path)
    if not kept:
        return None
    try:
        moments = Moments.from_tensors({key: kept[f"moments.{key}"] for key in ("count", "mean", "scatter")})
        splits = None
        if "total" in kept:
            splits = Splits(int(kept["total"]), kept["probabilities"].shape[1], len(kept["negative_entropy"]))
            splits.probabilities, splits.negative_entropy = kept["probabilities"], kept["negative_entropy"]
            splits.seen = splits.total
        return Embedded(moments, {"fid": kept["fid"], "prc": kept.get("prc", kept["fid"])}, splits)
    except KeyError as error:
        raise UserError(f"{path} does not hold features ({error} is missing); delete it to have them made again") from error
