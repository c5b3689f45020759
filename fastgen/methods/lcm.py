"""Latent consistency distillation: the student's clean estimate is held constant along the guided teacher's trajectories."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastgen.denoiser import Condition, Predicts
from fastgen.families.consistency import Consistency
from fastgen.samplers import TIMESTEP_SCALING

SIGMA_DATA = 0.5


@dataclass
class LCM(Consistency):
    """Latent consistency models (Luo et al. 2023a), and LCM-LoRA (Luo et al. 2023b) when the student is trained as LoRA.

    From diffused data x_t the teacher takes one guided DDIM step down the solver grid to x_r, with a guidance scale drawn
    for each sample; the student at x_t is pulled towards a target network at x_r. With `embed_guidance` the scale is an
    input of the student (a full network; the scale is then chosen when sampling); without, the range is averaged into the
    student, as in LCM-LoRA.

    The consistency function is c_skip x + c_out x0 with tau = 10 * 1000 t (equation 9). It only matters at t
    = 0, where it hands back its input: from the first solver point on (tau = 200) c_skip is below 1e-5 and c_out above 1 -
    1e-5, so the sampler, which takes x0, and diffusers' LCMScheduler, which applies the skip with the same scaling, agree.

    Differences from diffusers' scripts: scales are in the convention where 1 is off (theirs plus 1); at t = 1 the input is
    noise alone, as in sampling; the last solver step ends at clean data instead of the table's first entry; the grid is
    evenly spaced from t = 1 whether or not its size divides the table.
    """

    gamma: float = field(
        default=1.0, metadata={"help": "share of noise renewed between calls in sampling, 0 to 1", "at_least": 0, "at_most": 1}
    )

    @property
    def renewal(self) -> float:
        return self.gamma

    def end(self, start: Tensor) -> Tensor:
        return self.times[-1].expand(len(start))

    def jump(self, network: Predicts, x: Tensor, t: Tensor, s: Tensor, condition: Condition, scale: Tensor) -> Tensor:
        return self.consistency(network, x, t, condition, scale)

    def consistency(self, network: Predicts, x: Tensor, t: Tensor, condition: Condition, scale: Tensor) -> Tensor:
        """c_skip x + c_out x0 (LCM, equation 9); `scale` [B] is told to a network that embeds it."""
        x0 = network(x, t, condition, guidance=scale if network.embeds_guidance else None).x0
        tau = (TIMESTEP_SCALING * 1000 * t).view(-1, *[1] * (x.ndim - 1))
        return SIGMA_DATA**2 / (tau**2 + SIGMA_DATA**2) * x + tau / (tau**2 + SIGMA_DATA**2).sqrt() * x0
