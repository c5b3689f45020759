"""Options that cannot have what was asked: an option without effect beside the others, or beyond what is trained."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from fastgen import methods
from fastgen.config import DataConfig, RunConfig
from fastgen.errors import UserError
from fastgen.method import Method
from fastgen.methods.add import ADD
from fastgen.methods.consistency import ConsistencyModel
from fastgen.methods.dmd2 import DMD2
from fastgen.methods.hyper_sd import HyperSD
from fastgen.methods.ladd import LADD
from fastgen.methods.lcm import LCM
from fastgen.methods.mean_flow import MeanFlow
from fastgen.methods.pcm import PCM
from fastgen.methods.sana_sprint import SanaSprint
from fastgen.methods.sid_few_step import SiDFewStep
from fastgen.methods.sid_lsg import SiDLSG
from fastgen.methods.snapfusion import SnapFusion
from fastgen.methods.tdd import TDD
from fastgen.methods.tdm import TDM
from fastgen.methods.tscd import TSCD
from fastgen.training.run import teacher_guidance
from fastgen.training.speed import set_up
from tests.method_fakes import PROCESSES, FakePipeline, batches

IDLE: list[tuple[str, dict[str, Any], str]] = [
    ("sid", {"noise_law": "logit_normal", "high": 0.9}, 'high = 0.9 .* with noise_law = "logit_normal"'),
    ("dmd2", {"timesteps": (999, 499), "steps": 3}, r"steps = 3 .* beside timesteps = \[999, 499\]"),
    ("tdm", {"high": 0.5}, "high = 0.5 is without effect in tdm"),
    ("scm", {"angles": (1.5, 1.0, 0.5), "steps": 4}, r"steps = 4 .* beside angles = \[1.5, 1.0, 0.5\]"),
    ("tscd", {"segments": (8, 4), "adversary": 0.1}, r"adversary = 0.1 .* with segments = \[8, 4\]"),
    ("tscd", {"segments": (8, 4), "gamma": 0.5}, r"gamma = 0.5 .* with segments = \[8, 4\]"),
    (
        "hyper_sd",
        {"score_weight": 0.0, "rewards": ("toy-clip",), "anchor_weight": 5.0},
        "anchor_weight = 5.0 .* score_weight = 0",
    ),
]


@pytest.mark.parametrize(("name", "options", "words"), IDLE, ids=[f"{name}-{list(options)[-1]}" for name, options, _ in IDLE])
def test_an_option_without_effect_is_refused_with_the_one_that_takes_it_away(
    name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=f"^{words}.*; drop it$"):
        methods.find(name)(**options)


def test_what_is_switched_off_may_keep_its_details() -> None:
    """A recipe is varied by one override: what only details the part that it switches off is not held against anyone."""
    assert TDM(high=0.98).high == 0.98
    assert MeanFlow(tangent="exact", tangent_step=0.02).tangent_step == 0.02
    assert DMD2(gan_weight=0.0, critic_weight=0.5).critic_weight == 0.5


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (ConsistencyModel, {"teacher": False, "guidance_high": 1.0}, "ema_decay = 0.95 .* with teacher = false set it to 0"),
        (HyperSD, {"score_weight": 0.0, "rewards": ("toy-clip",), "reward_weight": 0.0}, "reward_weight = 0 leave nothing"),
        (SnapFusion, {"guidance": 30.0}, "guidance = 30 is outside .* 1 and guidance_low = 2 to guidance_high = 14"),
        (TSCD, {"segments": (16, 8, 4, 2, 1)}, r"segments = \[16, 8, 4, 2, 1\] may be 8 at most"),
    ],
)
def test_what_contradicts_is_named(cls: type[Method], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cls(**options)


EMBEDDING: list[tuple[Method, str]] = [
    (SiDLSG(fake_guidance=-1.0), "fake_guidance = -1.0 is without effect where networks are told their guidance"),
    (SiDLSG(fake_training_guidance=1.0), "fake_training_guidance = 1.0 is without effect"),
    (
        TDD(guidance_low=4.5, guidance_high=4.5, guidance=2.0),
        "guidance = 2 is outside .* guidance_low = 4.5 to guidance_high = 4.5",
    ),
]


@pytest.mark.parametrize(("method", "words"), EMBEDDING)
def test_scales_that_a_told_network_never_learns_are_refused(method: Method, words: str) -> None:
    method.setup(FakePipeline(PROCESSES["flow"], (2,)))  # type: ignore[arg-type]  # which is told nothing, and fine
    with pytest.raises(UserError, match=words):
        method.setup(FakePipeline(PROCESSES["flow"], (2,), embeds_guidance=True))  # type: ignore[arg-type]


def test_the_guidance_of_ladd_is_for_networks_that_are_told_it() -> None:
    LADD(guidance=7.0).setup(FakePipeline(PROCESSES["flow"], (3, 4, 4), embeds_guidance=True))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"guidance = 7\.0 is without effect where .*data\.pair_guidance"):
        LADD(guidance=7.0).setup(FakePipeline(PROCESSES["flow"], (3, 4, 4)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"margin": 0.3}, "margin = 0.3 and low = 0.02 leave no time .* from 1 to 0.75"),
        ({"low": 0.6}, "margin = 0.01 and low = 0.6 leave no time .* from 0.5 to 0.25"),
        ({"low": 0.6, "separate": False}, ""),
    ],
)
def test_tdm_needs_room_to_compare_in_every_step(options: dict[str, Any], words: str) -> None:
    pipeline: Any = FakePipeline(PROCESSES["flow"], (2,))
    if not words:
        return TDM(**options).setup(pipeline)
    with pytest.raises(UserError, match=words):
        TDM(**options).setup(pipeline)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (LADD(mismatch_weight=1.0), "mismatch_weight = 1 takes texts of other samples"),
        (SanaSprint(mismatched=True), "mismatched = true takes texts of other samples"),
    ],
)
def test_a_part_of_one_sample_has_no_other_text(method: Any, words: str) -> None:
    pipeline = FakePipeline(PROCESSES["flow"], (3, 4, 4))
    method.setup(pipeline)
    assert method.critic_loss(next(batches(pipeline, 2, pairs=True)))
    with pytest.raises(UserError, match=words):
        method.critic_loss(next(batches(pipeline, 1, pairs=True)))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (ADD(backbone="tiny", backbone_size=16), 'method.name = "add" looks at pictures'),
        (HyperSD(rewards=("toy-clip",)), r"rewards = \['toy-clip'\] looks at pictures"),
    ],
)
def test_what_looks_at_pictures_takes_no_videos(method: Method, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = FakePipeline(PROCESSES["flow"], (3, 4, 4))
    monkeypatch.setattr(pipeline, "decode", lambda latents: torch.zeros(len(latents), 3, 5, 32, 32))
    with pytest.raises(UserError, match=rf"{words}, and this pipeline makes videos, of shape \[3, 5, 32, 32\]"):
        method.setup(pipeline)


def test_segmented_students_have_a_sampler_in_every_stage() -> None:
    """Three steps do not go with eight, four or two segments: until there is one, they are the next number that does."""
    method = TSCD(steps=3)
    method.setup(FakePipeline(PROCESSES["vp"], (2,)))  # type: ignore[arg-type]
    found = []
    for step in range(4):
        method.advance(step, 4)
        found.append(method.sampler().steps)
    assert found == [8, 4, 4, 3]
    with pytest.raises(UserError, match="8 segments; steps must be a multiple, not 3"):
        method.advance(0, 4)
        method.sampler(3)


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="Small has no layer 'midle'; did you mean 'middle'"):
        LADD(layers=("midle",)).setup(FakePipeline(PROCESSES["flow"], (3, 4, 4)))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [DMD2(steps=4, shift=1000.0, gan_weight=0.0), MeanFlow(steps=2000)])
def test_calls_at_one_time_are_refused_in_words(method: Method) -> None:
    method.setup(FakePipeline(PROCESSES["vp"], (2,)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"calls must decrease, .*other steps or shift"):
        method.sampler()


def test_a_run_says_so_before_it_trains() -> None:
    pipeline: Any = FakePipeline(PROCESSES["vp"], (2,))
    with pytest.raises(UserError, match="calls must decrease"):
        set_up(RunConfig("mean_flow", MeanFlow(steps=2000)), pipeline, print)


def test_a_teacher_of_pairs_is_shown_as_they_are_made() -> None:
    pipeline: Any = FakePipeline(PROCESSES["flow"], (3, 4, 4), default_guidance=3.0)
    for method, scale in ((LADD(), 5.0), (DMD2(gan_weight=0.0), 3.0)):
        method.setup(pipeline)
        assert teacher_guidance(RunConfig("", method, data=DataConfig(pair_guidance=5.0)), pipeline) == scale


def test_the_teacher_is_shown_as_it_is_distilled() -> None:
    plain, told = (FakePipeline(PROCESSES["flow"], (2,), embeds_guidance=embeds) for embeds in (False, True))
    cases: list[tuple[Method, Any, float | None]] = [
        (TDD(guidance_low=4.5, guidance_high=4.5, guidance=2.0), plain, 4.5),  # the student is guided once more
        (LCM(guidance_low=3.0, guidance_high=9.0), plain, None),
        (PCM(guidance_low=1.0, guidance_high=1.0, prompt_dropout=0.1, guidance=7.0), plain, 7.0),  # as its teacher is
        (LCM(guidance_low=3.0, guidance_high=9.0, guidance=5.0), told, 5.0),
        (SiDFewStep(strategy="zero"), plain, 1.0),
        (DMD2(guidance=6.0, gan_weight=0.0), plain, 6.0),
    ]
    for method, pipeline, scale in cases:
        method.setup(pipeline)
        assert method.teacher_guidance == scale, method


@pytest.mark.parametrize("name", methods.names())
def test_limits_outlast_the_defaults_that_methods_set_anew(name: str) -> None:
    """A method that gives a family's option another default keeps the limits of what it may be."""
    cls = methods.find(name)
    limits = ("at_least", "at_most", "above", "below")
    for base in cls.__mro__[1:]:
        if not (isinstance(base, type) and issubclass(base, Method)):
            continue
        own = {each.name: each for each in fields(cls)}
        for each in fields(base):
            for limit in limits:
                if limit in each.metadata:
                    assert limit in own[each.name].metadata, f"{name}.{each.name} has lost {limit}"


def test_pairs_apart_by_the_finest_stage_are_apart_on_a_table() -> None:
    most = next(each for each in fields(ConsistencyModel) if each.name == "halvings").metadata["at_most"]
    method = ConsistencyModel(teacher=False, ema_decay=0.0, halvings=most)
    method.setup(FakePipeline(PROCESSES["vp"], (2,)))  # type: ignore[arg-type]
    method.stage = most - 1
    t, r = method.draw(100_000, torch.device("cpu"))
    process = PROCESSES["vp"]  # so near to an entry a table means the entry, and the loss is divided by how far they are
    assert bool((process.ratio(t.double()) > process.ratio(r.double())).all())
