"""The next batch made ready meanwhile: the same batches in the same order, resumed at the same place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen.data.ahead import Ahead, ahead
from fastgen.data.cache import Cache, pick
from fastgen.data.source import Buckets, Source, encode_prompts
from fastgen.method import Batch
from tests.training_fakes import PROMPTS, SHAPE, FakePipeline


def plain(seed: int = 0, **options: Any) -> Source:
    latents = torch.arange(11.0).view(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()
    return Source(encode_prompts(FakePipeline(), PROMPTS), SHAPE, latents, prompts=PROMPTS, seed=seed, **options)  # type: ignore[arg-type]


def bucketed() -> Buckets:
    parts = [plain(), plain()]
    return Buckets(parts, seed=3)


def same(one: Batch, other: Batch) -> bool:
    assert one.latents is not None and other.latents is not None
    texts = torch.equal(one.condition.inputs["text"], other.condition.inputs["text"])
    return one.prompts == other.prompts and one.shape == other.shape and torch.equal(one.latents, other.latents) and texts


@pytest.mark.parametrize("make", [plain, bucketed])
def test_what_comes_is_what_would_have_come(make: Any) -> None:
    one, other = make(), Ahead(make())
    for size in (4, 4, 4, 3, 3, 4, 4):
        assert same(one.batch(size), other.batch(size)) and one.state() == other.state()
    kept, expected = other.state(), [one.batch(4) for _ in range(4)]
    assert all(same(each, other.batch(4)) for each in expected)
    other.load_state(kept)  # what was ready is forgotten
    assert all(same(each, other.batch(4)) for each in expected)
    resumed = Ahead(make())
    resumed.load_state(kept)
    assert all(same(each, resumed.batch(4)) for each in expected)


def test_it_is_one_batch_ahead_and_no_more() -> None:
    source = plain()
    other = Ahead(source)
    other.batch(4)
    assert other.next is not None and other.next[1].result().prompts and source.position == 8 and other.state()["position"] == 4


def test_a_mistake_in_the_thread_is_told_when_its_batch_is_due() -> None:
    source = plain()
    other = Ahead(source)
    other.batch(4)
    other.next[1].result()  # type: ignore[index]
    source.latents = torch.zeros(0)
    other.batch(4)
    with pytest.raises(IndexError):
        other.batch(4)


def test_only_what_is_read_or_sent_is_fetched_ahead(tmp_path: Path) -> None:
    assert not isinstance(ahead(plain()), Ahead)
    assert isinstance(ahead(plain(device="cuda")), Ahead), "nothing is moved before a batch is asked for"
    whole: Any = plain()
    rows = Cache(tmp_path, "prompts", {}).fill(PROMPTS, lambda index: pick(whole.condition, torch.tensor(index)))
    stored = [Source(rows, SHAPE, whole.latents, prompts=PROMPTS) for _ in range(2)]
    early = ahead(stored[0])
    assert isinstance(early, Ahead) and all(same(early.batch(4), stored[1].batch(4)) for _ in range(5))
    index = torch.tensor([3, 1])
    assert torch.equal(early.take(index).inputs["text"], stored[1].take(index).inputs["text"])
