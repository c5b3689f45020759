"""Runs that are broken on purpose, and what the gauges say of them beside a healthy twin.

    python -m benchmarks.health [--updates N] [--output docs/health.md]

DMD2 in four steps on a mixture of Gaussians with a closed form, under three labels; every run takes some seconds of a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.analytic import MASK, Mixture
from fastgen.config import TrainConfig
from fastgen.data.source import Source, encode_prompts
from fastgen.denoiser import Condition, Denoiser
from fastgen.losses import shared_choice
from fastgen.method import Batch
from fastgen.methods.dmd2 import DMD2
from fastgen.process import Flow, Prediction
from fastgen.samplers import FewStep, even_times
from fastgen.training.gauges import GAUGES
from fastgen.training.grids import Grids
from fastgen.training.health import PREFIX
from fastgen.training.loop import Trainer
from fastgen.training.quality import Quality

SHAPE, COMPONENTS, LABELS = (3, 4, 4), 6, ("0 1 2", "2 3", "4 5")
UPDATES = 300
OPTIONS = TrainConfig(
    steps=UPDATES, batch=64, lr=1e-4, betas=(0.0, 0.99), log_every=30, sample_every=100, quality_every=50, quality_samples=256,
    teacher_steps=30, checkpoint_every=0, ema=0.95,
)  # fmt: skip


class Network(nn.Module):
    """Three layers that know the time and the label."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        size = SHAPE[0] * SHAPE[1] * SHAPE[2]
        self.enter, self.middle, self.leave = nn.Linear(size, width), nn.Linear(width, width), nn.Linear(width, size)
        self.known = nn.Linear(6 + COMPONENTS, width)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        waves = [t, (2 * t).cos(), (4 * t).sin(), (8 * t).cos(), (16 * t).sin(), (16 * t).cos()]
        known = self.known(torch.cat([torch.stack(waves, 1).to(x), mask.to(x)], 1))
        h = nn.functional.silu(self.enter(x.flatten(1)) + known)
        return self.leave(nn.functional.silu(self.middle(h) + known) + h).view_as(x)


def call(network: nn.Module, xt: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
    output: Tensor = network(xt, t.expand(len(xt)), condition.inputs[MASK])
    return output


class World:
    """What the trainer and DMD2 use of a pipeline: data in closed form, a teacher that has learnt it, prompts."""

    process, kind, latent_shape, default_guidance = Flow(), "flow", SHAPE, 1.0
    device, feature_layers = torch.device("cpu"), ("middle",)

    def __init__(self, updates: int = 1500):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            means = 0.5 * torch.randn(COMPONENTS, SHAPE[0], 1, 1) + 0.3 * torch.randn(COMPONENTS, *SHAPE)
            self.data = Mixture([1.0] * COMPONENTS, means.clamp(-1, 1), [0.25] * COMPONENTS, self.process, "flow")
            self.base = Network()
            self.learn(updates)

    def learn(self, updates: int) -> None:
        optimizer = torch.optim.Adam(self.base.parameters(), 2e-3)
        for step in range(updates):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / updates)
            condition = self.encode_prompts([LABELS[int(i)] for i in torch.randint(len(LABELS), (128,))])
            x0, t = self.data.sample(condition).float(), torch.rand(128)
            xt = self.process.add_noise(x0, torch.randn_like(x0), t)
            wanted = self.data(xt, t, condition).output
            loss = (call(self.base, xt, t, condition, None) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.base.requires_grad_(False)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        mask = torch.zeros(len(prompts), COMPONENTS, dtype=torch.bool)
        for row, prompt in zip(mask, prompts, strict=True):
            row[[int(word) for word in prompt.split()] if prompt else slice(None)] = True
        return Condition({MASK: mask}, null=Condition({MASK: torch.ones_like(mask)}))

    def frozen(self) -> Denoiser:
        return Denoiser(self.base, call, self.process, "flow").eval()

    def trainable(self, role: str) -> Denoiser:
        return Denoiser(copy.deepcopy(self.base).requires_grad_(True), call, self.process, "flow")

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents.float(), scale_factor=8).clamp(-1, 1)

    def source(self, size: int = 2048) -> Source:
        prompts = [LABELS[i % len(LABELS)] for i in range(size)]
        condition = encode_prompts(self, prompts)  # type: ignore[arg-type]
        latents = self.data.sample(condition, torch.Generator().manual_seed(5)).float()
        return Source(condition, SHAPE, latents, prompts=prompts)


@dataclass
class NoBackwardSimulation(DMD2):
    """DMD2 whose student learns from noised data at the times of its sampler, never from what its own calls make."""

    def last_call(self, batch: Batch) -> tuple[Prediction, int]:
        assert batch.latents is not None
        exit_at = shared_choice(len(self.times), self.device)
        t = torch.full((len(batch.latents),), self.times[exit_at])
        xt = self.process.add_noise(batch.latents, torch.randn_like(batch.latents), t)
        return self.student(xt, t, batch.condition), exit_at


@dataclass(frozen=True)
class Case:
    """A run, and what is wrong with it."""

    wrong: str
    method: Callable[..., DMD2] = DMD2
    settings: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    """The gauges that should say so."""


METHOD: dict[str, Any] = {"steps": 4, "student_every": 3, "gan_weight": 5e-3, "fake_lr_scale": 4.0}
CASES = {
    "healthy": Case("nothing"),
    "slow_critic": Case(
        "the fake score learns a hundredth as fast",
        settings={"fake_lr_scale": 0.04, "student_every": 1},
        names=("fake_score_lag",),
    ),
    "high_rate": Case("the learning rate is a hundred times too high", train={"lr": 1e-2}, names=("update_size",)),
    "wrong_shift": Case("scores are compared near the data alone", settings={"noise_shift": 0.02}, names=("noise_levels",)),
    "no_simulation": Case("the student learns from noised data", method=NoBackwardSimulation, names=("sampling_gap",)),
}


def train(world: World, case: Case, folder: Path, updates: int = UPDATES) -> list[dict[str, Any]]:
    """The lines of the metrics of a run, which is left in `folder`."""
    torch.manual_seed(1)
    options = replace(OPTIONS, steps=updates, **case.train)
    method = case.method(**{**METHOD, **case.settings})
    method.setup(world)  # type: ignore[arg-type]
    teacher = FewStep(even_times(options.teacher_steps))
    shown: dict[str, Any] = {"teacher": teacher, "at_once": 256}
    grids = Grids(world, folder / "samples", LABELS, seeds=range(6), **shown)  # type: ignore[arg-type]
    quality = Quality(world, folder / "samples", LABELS, samples=options.quality_samples, **shown)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    loop = Trainer(method, world.source(), options, run_directory=folder, device="cpu", grids=grids, quality=quality)
    loop.fit()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def colours(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many lines of each colour a gauge has had, players together."""
    found: dict[str, dict[str, int]] = {}
    for line in lines:
        for key in line:
            name = key.removeprefix(PREFIX)
            if name == key or "/t0" in name:
                continue
            counts = found.setdefault(name.split("/")[0], {"green": 0, "amber": 0, "red": 0})
            counts[line.get("health", {}).get(name, "green")] += 1
    return found


INTRODUCTION = """# Is my training going well?

While a run trains, its losses, its loop and its pictures give readings. Each is green, amber or red. A reading that turns is
told in the terminal, once, with what it usually means and what to try; all of them are in `metrics.jsonl` (`reading/NAME`, and
`health`, which names those that are not green) and in `report.html`, both in the run directory. Readings cost next to nothing:
they are taken from numbers that the losses have computed anyway, added up on the device, and read when a line of metrics is
due. No loss, no random number and no weight depends on them.

Readings of pictures come with the sample grids (`train.sample_every`), which show the teacher's pictures
(`train.teacher_steps`, drawn once) beside the student's; `quality` and `sampling_gap` with the measurements of quality
(`train.quality_every`). Quality is the Fréchet distance of fixed random features of latents between `train.quality_samples`
samples of the student and of the teacher. It needs no download and orders the states of one run; it is no FID. The checkpoint
of best quality is kept in `RUN/best` (`train.keep_best`; `fastgen export RUN --checkpoint best`), and `train.patience`
ends a run after so many measurements without a better one.

Bounds are rules of thumb. A method that does not use a fake score or a discriminator has no readings of them. A reading beyond
its bound by less than twice its standard error, where that is known, stays green.
"""


def gauges_text() -> str:
    """The gauges as Markdown."""
    parts = []
    for gauge in GAUGES:
        bounds = []
        for colour, (below, above) in (("amber", gauge.amber), ("red", gauge.red)):
            ends = ([f"below {below:g}"] if gauge.low else []) + ([f"above {above:g}"] if gauge.high else [])
            bounds.append(f"{colour} {' or '.join(ends)}")
        lines = [
            f"### {gauge.title} (`{gauge.name}`)",
            "",
            f"{gauge.about[0].upper()}{gauge.about[1:]}: {'; '.join(bounds)}.",
            "",
        ]
        for word, advice in (("Low", gauge.low), ("High", gauge.high)):
            if advice is not None:
                lines.append(f"- {word}: {advice.means}. Try: {advice.remedy}.")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def runs_text(seen: dict[str, dict[str, dict[str, int]]]) -> str:
    """Which colours the gauges had in runs that are broken on purpose, as Markdown."""
    rows = ["| gauge | " + " | ".join(name.replace("_", " ") for name in seen) + " |", "|---|" + "---|" * len(seen)]
    for gauge in GAUGES:
        counts = [seen[name].get(gauge.name) for name in seen]
        if any(counts):
            cells = ["" if each is None else f"{each['green']} / {each['amber']} / {each['red']}" for each in counts]
            rows.append(f"| {gauge.title} | " + " | ".join(cells) + " |")
    wrong = [f"- {name.replace('_', ' ')}: {CASES[name].wrong}." for name in seen]
    return "\n".join([*wrong, "", *rows]) + "\n"


def page(seen: dict[str, dict[str, dict[str, int]]]) -> str:
    """docs/health.md."""
    about = (
        f"DMD2 in 4 steps on a small mixture of Gaussians, {UPDATES} updates (`python -m benchmarks.health`): how many lines "
        "of the metrics were green / amber / red, players together."
    )
    runs = f"## Runs that are broken on purpose\n\n{about}\n\n{runs_text(seen)}"
    return f"{INTRODUCTION}\n## The readings\n\n{gauges_text()}\n{runs}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--output", type=Path, default=Path("docs/health.md"), help="the page to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = World()
    seen = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            seen[name] = colours(train(world, case, Path(folder) / name, args.updates))
            print(f"{name}: {seen[name]}")
    args.output.write_text(page(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
