"""The state of every random generator that training may draw from, as tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_state", "seed_everything", "set_random_state", "undisturbed"]


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch (CPU and `device`), numpy and Python."""
    version, keys, gauss = random.getstate()
    kind, array, position, has_gauss, cached = np.random.get_state(legacy=True)
    if version != 3 or kind != "MT19937":
        raise RuntimeError(f"unknown random generators (Python's version {version}, numpy's {kind})")
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(keys),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.array(array, dtype=np.int64)),
        "numpy_place": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Inverse of `random_state`."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_place"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def undisturbed(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """A block whose draws leave the random state as it was; drawn from `seed` where one is given."""
    kept = random_state(device)
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        set_random_state(kept, device)
