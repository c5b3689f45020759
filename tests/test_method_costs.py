"""What `fastgen methods` says of costs, networks and steps is what is counted on the toy teacher."""

from __future__ import annotations

import pytest

from benchmarks.costs import cost
from fastgen import methods
from fastgen.cli.methods import costs, listing, spans, summary

FEW = ("progressive", "lcm", "dmd2")


def test_every_method_is_counted_and_belongs_to_a_family() -> None:
    ours = [name for name in methods.names() if methods.find(name).__module__.startswith("fastgen.methods.")]
    assert list(costs()) == ours
    assert {methods.find(name).family for name in ours} == {  # type: ignore[attr-defined]
        "progressive", "consistency", "distribution matching", "adversarial", "score identity",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in methods.names()]
)
def test_costs_are_those_counted(name: str) -> None:
    assert cost(name) == costs()[name]


def test_an_lcm_update_is_a_student_with_gradient_and_its_target_and_a_guided_teacher_without() -> None:
    assert (costs()["lcm"]["trained"], costs()["lcm"]["forward"]) == (1, 3)
    text = listing([summary("lcm", methods.find("lcm"))])
    assert "1 + 3" in text and "images, prompts" in text and "1-8" in text


def test_spans() -> None:
    assert spans([1, 2, 3, 8]) == "1-3, 8" and spans([4]) == "4" and spans([]) == ""
