"""Optimisers by name, and one step of any of them that a gradient which is not finite leaves undone.

adamw       torch's AdamW, fused (Loshchilov and Hutter 2019, arXiv:1711.05101)
adamw8bit   bitsandbytes' AdamW, moments in 8 bits by blocks (Dettmers et al. 2022, arXiv:2110.02861)
adafactor   torch's Adafactor, second moments in rows and columns (Shazeer and Stern 2018, arXiv:1804.04235)
muon        torch's Muon for matrices, scaled so that AdamW's learning rates hold (Liu et al. 2025, arXiv:2502.16982,
            section 2.2), and AdamW for every other weight
came        pytorch-optimizer's CAME, second moments in rows and columns, smaller steps where they are unsure (Luo et al. 2023,
            arXiv:2307.02047, algorithm 2); what says how sure decays by the paper's 0.9999
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgen.config import TrainConfig
from fastgen.errors import UserError
from fastgen.method import Method
from fastgen.training.launch import processes

__all__ = ["MuonWithAdamW", "check_options", "make_optimizer", "step"]

SURENESS = 0.9999
STAGE_PLAYERS = ("student", "critic", "fake_score")  # whom a later stage of a method may bring


def check_options(options: TrainConfig, method: Method) -> None:
    """Raise UserError for settings that do not go together, or are of a player that the method has not."""
    if options.micro_batches == 0 and processes() > 1:
        raise UserError("train.micro_batches = 0 is for one process: find the number there, and set it for several")
    if options.precision == "fp16" and options.sharding != "none":  # each process would scale its loss by what its part needs
        raise UserError(f'train.precision = "fp16" does not go with train.sharding = "{options.sharding}"; take "bf16"')
    names = [player.name for player in method.players()]
    later = STAGE_PLAYERS if method.stage_end(0, options.steps) < options.steps else ()
    for name in options.players:
        if name not in (*names, *later):
            known = " and ".join(repr(each) for each in names)
            raise UserError(f"train.players.{name}: there is no such player; this run has {known}")


def make_optimizer(weights: Sequence[nn.Parameter], options: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """The optimiser that `options` name, fresh, at learning rate `lr`.

    Raises UserError where it is not installed or cannot work on the weights' device.
    """
    betas, decay = options.betas, options.weight_decay
    if options.optimizer == "adamw8bit":
        return eight_bit(weights, lr, betas, decay)
    if options.optimizer == "adafactor":
        return torch.optim.Adafactor(weights, lr=lr, weight_decay=decay)
    if options.optimizer == "came":
        return came(weights, lr, betas, decay)
    if options.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(f'train.optimizer = "muon" needs torch 2.9 or newer, not {torch.__version__}')
    if options.optimizer == "muon" and any(weight.ndim == 2 for weight in weights):
        return MuonWithAdamW(weights, lr, betas, decay)
    return torch.optim.AdamW(weights, lr=lr, betas=betas, weight_decay=decay, fused=True)


def step(optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float | None = None) -> Tensor:
    """One step with gradients of the whole norm `norm`, clipped to `max_norm`; or none, where the norm is not finite: neither
    weights nor moments move. Gives 1 where it was not, else 0 (a scalar on the norm's device).

    A fused AdamW does all that in its own pass over the gradients. The others must wait for the number: once a step, whatever
    the number of weights.
    """
    bad = 1 - torch.isfinite(norm).float()
    if optimizer.defaults.get("fused"):
        # What torch's GradScaler sets: gradients are divided by one, and nothing moves where the other is 1.
        if max_norm:
            optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp_min(1)  # type: ignore[attr-defined]
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(bad):
        if max_norm:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
        optimizer.step()
    return bad


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the weights of two dimensions, AdamW on the rest; groups, state and state_dict are one optimiser's.

    The first parameter group is Muon's, with torch's momentum of 0.95; `betas` are for AdamW.
    """

    def __init__(self, weights: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float):
        matrices, others = ([each for each in weights if (each.ndim == 2) == wanted] for wanted in (True, False))
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        ]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.share()

    def share(self) -> None:
        """Let the parts work on this optimiser's groups and state, which loading replaces."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # the trainer has no closure to give
        for part in self.parts:
            part.step()


def came(weights: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """CAME with weight decay decoupled, as AdamW has it; weights of fewer than two dimensions keep whole second moments."""
    try:
        from pytorch_optimizer import CAME
    except ImportError as error:
        cure = "pip install 'fastgen-diffusion[came]'"
        raise UserError(f'train.optimizer = "came" needs pytorch-optimizer; {cure}') from error
    return cast(torch.optim.Optimizer, CAME(weights, lr=lr, betas=(*betas, SURENESS), weight_decay=weight_decay))


def eight_bit(
    weights: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW; weights of fewer than 4096 numbers keep moments of 32 bits, as is its way."""
    wanted = 'train.optimizer = "adamw8bit"'
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(f"{wanted} needs bitsandbytes; pip install 'fastgen-diffusion[quantized]'") from error
    if weights[0].device.type == "cpu":
        trial = nn.Parameter(torch.zeros(4096))
        trial.grad = torch.zeros(4096)
        try:
            AdamW8bit([trial]).step()
        except (RuntimeError, NotImplementedError, AttributeError) as error:  # before its version 0.50
            raise UserError(f'{wanted} does not work on a CPU with this bitsandbytes; take a newer one, or "adamw"') from error
    return cast(torch.optim.Optimizer, AdamW8bit(weights, lr=lr, betas=betas, weight_decay=weight_decay))
