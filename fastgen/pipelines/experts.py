"""A student of several networks, of which each answers at the times of its own phase."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastgen.denoiser import Condition, Denoiser
from fastgen.process import Prediction


class Experts(Denoiser):
    """Several denoisers as one: `experts[i]` answers at times above `edges[i]` and up to the edge before."""

    def __init__(self, experts: Sequence[Denoiser], edges: Sequence[float]):
        """`edges` decrease and end with 0, one for each expert."""
        first = experts[0]
        own = nn.ModuleList(experts)
        super().__init__(
            *(first.network, first.call, first.process, first.kind), own=own, embeds_guidance=first.embeds_guidance
        )
        self.experts, self.edges, self.guide = list(experts), tuple(edges), first.guide

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> Prediction:
        """As `Denoiser.forward`. Raises ValueError for times of a batch that belong to different experts."""
        first, last = (self.expert_at(float(time)) for time in (t.max(), t.min()))
        if first != last:
            raise ValueError(f"times from {float(t.min()):g} to {float(t.max()):g} belong to different experts")
        answer: Prediction = self.experts[first](xt, t, condition, guidance=guidance, features=features, end=end)
        return answer

    def expert_at(self, time: float) -> int:
        """Which expert answers at `time`; a float32 time is only near its edge."""
        return sum(time <= edge + 1e-6 for edge in self.edges[:-1])
