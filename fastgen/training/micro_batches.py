"""How many parts a batch is computed in: as many as memory asks for, found by trying.

The joint batch, and with it what is learnt, stays the same but for the rounding of sums. Nothing is tried that the run does not
do anyway: a turn that runs out of memory is begun anew, with the same samples and draws, in at least twice the parts. What a
method itself counts calls by has then counted the broken attempt too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from fastgen.errors import UserError

__all__ = ["more_parts", "within_memory"]


def within_memory(attempt: Callable[[int], None], undo: Callable[[], None], parts: int, batch: int) -> int:
    """`attempt` with `parts` parts, after torch.OutOfMemoryError and `undo` with more, until it gets through; how many it took.

    Raises UserError where even single samples need more memory than there is.
    """
    while True:
        try:
            attempt(parts)
            return parts
        except torch.OutOfMemoryError as error:
            more = more_parts(parts, batch)
            if more is None:
                raise UserError(
                    f"train.micro_batches = 0: the device runs out of memory even with {batch // parts} sample at a time; "
                    "LoRA, train.gradient_checkpointing or a smaller data.height and data.width need less"
                ) from error
        # Only now are the frames of the failed attempt gone, and what they held.
        undo()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        parts = more


def more_parts(parts: int, batch: int) -> int | None:
    """The smallest number of equal parts of `batch` that is at least twice `parts`; None where there is none."""
    return next((number for number in range(2 * parts, batch + 1) if batch % number == 0), None)
