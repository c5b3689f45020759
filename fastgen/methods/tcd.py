"""Trajectory consistency distillation: the student jumps to any earlier time of the guided teacher's trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.families.consistency import Consistency


@dataclass
class TCD(Consistency):
    """Trajectory consistency distillation (Zheng et al. 2024).

    As LCM, but the jumps from the two points of a trajectory meet at a random time s, along the student's own x0 and noise:
    the semi-linear consistency function of first order. So the student can be sampled without renewing all the noise at every
    call (strategic stochastic sampling, algorithm 4): `gamma` 0 follows the trajectory, 1 is LCM's sampling. On a table the
    default is the authors' 0.3; elsewhere it is 0, since diffusers has no scheduler for what lies between.

    Differences from the paper: no authors' training code is public; s is uniform between clean data and the later point, not
    one of the grid's points, since sampling stops between them too.
    """

    gamma: float | None = field(
        default=None,
        metadata={"help": "share of noise renewed between calls; none: 0.3 on a table, else 0", "at_least": 0, "at_most": 1},
    )
    ema_decay: float = field(default=0.95, metadata={"help": "decay of the target network; 0: the student itself"})

    @property
    def renewal(self) -> float:
        return self.renewal_on_tables(self.gamma, 0.3)

    def end(self, start: Tensor) -> Tensor:
        r = self.times[start + self.solver_steps]
        return r * torch.rand_like(r)
