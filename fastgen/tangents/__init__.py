"""The derivative of a denoiser along a trajectory, which continuous consistency models and mean flows are trained on."""

from __future__ import annotations

from fastgen.tangents.forward import Duals
from fastgen.tangents.ways import Way, answer_and_derivative, derivative, network_of, plain_attention

__all__ = ["Duals", "Way", "answer_and_derivative", "derivative", "network_of", "plain_attention"]
