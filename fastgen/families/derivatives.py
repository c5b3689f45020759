"""How methods take the derivative of their student along a trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastgen.method import Method
from fastgen.tangents import Way


@dataclass
class TakesDerivatives(Method):
    """The options of `fastgen.tangents`."""

    tangent: Way = field(
        default="exact",
        metadata={"help": "how derivatives are taken: exact, plain (by torch alone), or by differences: central, semi"},
    )
    tangent_step: float = field(
        default=1e-3, metadata={"help": "half the step of differences, in time from 0 to 1", "at_least": 1e-5}
    )
    one_pass: bool = field(
        default=True, metadata={"help": "an exact derivative comes with the answer that is trained, not from a pass of its own"}
    )
