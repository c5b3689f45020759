"""Conditions whose samples differ in length: joined, indexed, dropped, moved, saved; and what a network is handed of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgen.denoiser import Condition, Denoiser, Guided, pad_alike
from fastgen.errors import UserError
from fastgen.pipelines.lengths import Lengths, is_list, is_repeated, learn_lengths
from fastgen.process import Flow

LISTED = Lengths(lists=("text",))


def words(lengths: list[int], seed: int = 0) -> list[Tensor]:
    """One tensor [length, 3] a sample, without zeros."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(length, 3, generator=generator) + 1 for length in lengths]


def condition(samples: list[Tensor], null: list[Tensor] | None = None) -> Condition:
    inputs: dict = {"label": torch.arange(len(samples))}
    LISTED.take({"text": samples}, inputs, {}, None)
    return Condition(inputs, {}, condition(null) if null else None)


def handed(made: Condition) -> list[Tensor]:
    arguments = dict(made.inputs)
    LISTED.hand_over(arguments, len(made))
    return arguments["text"]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) and all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(sizes, sizes)
def test_a_joint_batch_holds_each_sample_at_its_own_length(first: list[int], second: list[int]) -> None:
    a, b = words(first), words(second, seed=1)
    joint = Condition.cat([condition(a), condition(b)])
    assert len(joint) == len(first) + len(second)
    same(handed(joint), [*a, *b])
    order = list(reversed(range(len(joint))))
    same(handed(joint[order]), [*a, *b][::-1])
    same(handed(joint.repeat(2)), [x for x in (*a, *b) for _ in range(2)])


@given(sizes, st.data())
def test_dropping_mixes_the_lengths_of_both_twins(lengths: list[int], data: st.DataObject) -> None:
    drop = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    yes, no = words(lengths), words([2] * len(lengths), seed=1)
    dropped = condition(yes, no).dropout(torch.tensor(drop))
    same(handed(dropped), [n if gone else y for y, n, gone in zip(yes, no, drop, strict=True)])


def test_moving_saving_and_loading_keep_the_lengths(tmp_path: Path) -> None:
    samples, empty = words([3, 5]), words([1, 1], seed=1)
    made = condition(samples, empty)
    made.save(tmp_path / "condition.safetensors")
    again = condition(words([1]), words([1])).load(tmp_path / "condition.safetensors").to(dtype=torch.float64)
    assert again.null is not None and again.inputs["text"]["lengths"].dtype == torch.long
    same(handed(again), [x.double() for x in samples])
    same(handed(again.null), [x.double() for x in empty])


def test_padding_is_zeros_at_the_end_of_every_dimension_but_the_first() -> None:
    a, b = pad_alike([torch.ones(2, 1, 3), torch.ones(1, 2, 2)])
    assert a.shape == (2, 2, 3) and b.shape == (1, 2, 3)
    assert a.sum() == 6 and b.sum() == 4 and a[:, :1].all() and b[:, :, :2].all()
    with pytest.raises(ValueError, match="different structure"):
        pad_alike([torch.ones(2, 1), torch.ones(2, 1, 1)])


def test_variable_arguments_are_told_from_two_calls() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    short = {"text": torch.ones(3, 3, 4), "mask": mask, "pooled": torch.ones(3, 4), "left": mask.flip(1)}
    long = {"text": torch.ones(1, 9, 4), "mask": None, "pooled": torch.ones(1, 4), "left": torch.ones(1, 9).long()}
    found = learn_lengths(short, long, [], [], dict.fromkeys(short, 1), padded=False)
    assert found == Lengths((), ("text", "mask", "left"), {"mask": torch.int64}, omits_masks=True)
    assert is_list([torch.ones(1)] * 2, [torch.ones(1)] * 3) and not is_list([torch.ones(1)] * 2, [torch.ones(1)] * 2)
    assert is_repeated([[8, 8]] * 2, [[8, 8]] * 3) and not is_repeated([3, 5], [3, 5, 4])


def test_a_mask_is_made_again_and_left_out_where_the_pipeline_would() -> None:
    masked = Lengths((), ("text", "mask"), {"mask": torch.bool}, omits_masks=True)
    inputs: dict = {"text": torch.ones(2, 3, 1)}
    masked.take({}, inputs, {}, None)
    whole = Condition(inputs)
    inputs = {"text": torch.ones(1, 5, 1), "mask": torch.tensor([[True, True, False, False, False]])}
    masked.take({}, inputs, {}, None)
    mixed = Condition.cat([whole, Condition(inputs)])
    for index, shape, marks in (([0, 1], 3, None), ([2], 2, None), ([0, 2], 3, [3, 2])):
        arguments = dict(mixed[index].inputs)
        masked.hand_over(arguments, len(index))
        assert arguments["text"].shape[1] == shape
        assert (arguments["mask"] is None) if marks is None else (arguments["mask"].sum(1).tolist() == marks)


class Sum(nn.Module):
    """Adds a prompt's mean, which padding would change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.lengths: list[int] = []


def test_samples_of_different_length_are_called_apart_and_come_back_in_order() -> None:
    unmasked = Lengths((), ("text",))

    def call(network: nn.Module, xt: Tensor, t: Tensor, given: Condition, guidance: Tensor | None) -> Tensor:
        arguments = dict(given.inputs)
        unmasked.hand_over(arguments, len(xt))
        network.lengths.append(arguments["text"].shape[1])
        return network.layer(xt * t[:, None] + arguments["text"].mean(1))

    samples = words([4, 2, 4, 1])
    made = Condition({"text": condition(samples).inputs["text"]})
    denoiser = Denoiser(Sum(), call, Flow(), "flow", groups=unmasked.groups)
    xt, t = torch.randn(4, 3), torch.rand(4)
    prediction = denoiser(xt, t, made, features=("layer",))
    assert denoiser.network.lengths == [1, 2, 4]
    inputs = torch.stack([x * time + sample.mean(0) for x, time, sample in zip(xt, t, samples, strict=True)])
    torch.testing.assert_close(prediction.output, denoiser.network.layer(inputs))
    torch.testing.assert_close((prediction.features or {})["layer"], prediction.output)
    torch.testing.assert_close(denoiser(xt, t[0], made).output, denoiser(xt, t[0].expand(4), made).output)


def test_guidance_is_the_denoisers_own_and_needs_a_twin() -> None:
    def call(network: nn.Module, xt: Tensor, t: Tensor, given: Condition, guidance: Tensor | None) -> Tensor:
        return xt + given.inputs["label"][:, None]

    largest = Denoiser(nn.Identity(), call, Flow(), "flow", guide=lambda yes, no, scale: torch.maximum(yes, no) * scale)
    xt, t = torch.randn(2, 3), torch.full((2,), 0.5)
    made = Condition({"label": torch.tensor([1.0, -1.0])}, {}, Condition({"label": torch.zeros(2)}))
    expected = (xt + torch.tensor([[1.0], [0.0]])) * 3
    torch.testing.assert_close(Guided(largest, 3.0)(xt, t, made).output, expected)
    made.null = None
    torch.testing.assert_close(Guided(largest, 1.0)(xt, t, made).output, call(nn.Identity(), xt, t, made, None))
    with pytest.raises(UserError, match="needs an unconditional twin"):
        Guided(largest, 3.0)(xt, t, made)
