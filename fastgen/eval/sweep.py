"""Step-quality curves: every candidate at every setting on the same prompts and seeds, through stock diffusers pipelines.

Sweeping into the same folder again goes on where it stopped, batch by batch, and adds what is new (`fastgen.eval.results`).
Started by `accelerate launch` or torchrun, the processes share the drawing; the first one measures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgen.data.toy.scenes import IMAGE_SIZE
from fastgen.errors import UserError
from fastgen.eval.candidates import TEACHER_STEPS, Candidate, Setting, Source, fingerprint, row_of, student, teacher
from fastgen.eval.drawing import Prepare, Processes, draw, finish, is_drawn, loaded, processes
from fastgen.eval.evaluation import chosen_metrics, measure_images
from fastgen.eval.features import Extraction
from fastgen.eval.gathering import gather_parts, load_embedded, save_embedded
from fastgen.eval.images import Images, batches
from fastgen.eval.pictures import write_pictures
from fastgen.eval.protocol import computing, measuring
from fastgen.eval.registry import Metric
from fastgen.eval.registry import metrics as all_metrics
from fastgen.eval.results import REAL, Results, Row, load_json, load_results, open_results, save_tensors
from fastgen.eval.task import Task, make_task
from fastgen.eval.world import PHOTO, TOY, World

__all__ = ["TEACHER_STEPS", "Candidate", "Progress", "Setting", "Source", "student", "sweep", "teacher"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many images of how many are done."""


def sweep(
    candidates: Sequence[Candidate],
    output: Path | str,
    *,
    images: int = 1000,
    seed: int = 0,
    seeds_per_prompt: int = 2,
    prompts: Sequence[str] | None = None,
    prompts_from: str = "the user",
    reference: Tensor | Path | str | None = None,
    world: World | None = None,
    split: str = "held-out",
    objects: int | None = None,
    metrics: Sequence[str] | None = None,
    batch: int = 64,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    prepare: Prepare | None = None,
) -> list[Row]:
    """Measure every candidate at every setting, and real images against real ones, at `images` images each.

    Without `prompts` they are the toy world's (`split`, `objects`). With prompts, each is taken `seeds_per_prompt` times in a
    row, again and again until there are enough images, and `reference` (a tensor or a folder of real images) is what they are
    compared with; with at least twice as many real images as generated ones there is a floor. `metrics` names some of
    `fastgen.eval.metrics()` ("all": every one), by default the usual ones that there is evidence for. What the teacher draws at
    its most steps from the same noise is evidence for all other rows. Finished rows of an earlier sweep in `output` are kept
    where weights, setting and teacher are the same, and finished batches of images always. `prepare` is called with every
    pipeline before it draws. Gives the rows asked for, the floor first; none in a process that is not the first.

    Raises UserError for a bad argument, a folder that cannot be loaded, and an `output` with rows of another protocol.
    """
    output = Path(output)
    _check(candidates, images, seeds_per_prompt, metrics)
    team, device = processes(device)
    world = world or (TOY if prompts is None else PHOTO)
    chosen = chosen_metrics(world, metrics)
    task = make_task(images, seed, seeds_per_prompt, prompts, prompts_from, reference, split, objects, world, device, metrics)
    results = _open(output, task, chosen, team, batch, dtype)
    ordered = sorted(candidates, key=lambda candidate: candidate.role != "teacher")
    total = images * (sum(len(candidate.settings) for candidate in ordered) + (task.floor is not None))
    done = 0

    def tell(what: str, number: int) -> None:
        if progress is not None and team.first:
            progress(what, done + number, total)

    if task.floor is not None:
        if team.first:
            _measure_floor(results, task, tell)
        done += images
    plan = [_rows_of(candidate) for candidate in ordered]
    best = _best_teacher([row for rows in plan for _, row in rows], results)
    features = _features(task, chosen)
    for candidate, settings in zip(ordered, plan, strict=True):
        with loaded(candidate.source, device, dtype, prepare) as load:
            for setting, row in sorted(settings, key=lambda each: -each[0].steps * (candidate.role == "teacher")):
                folder = results.folder / row.images
                if not is_drawn(folder):
                    told = _teller(row, tell)
                    told(0)
                    draw(
                        *(load, setting, task.prompts, task.seeds, folder), name=row.name, batch=batch, features=features,
                        check=_check_size(row, task), team=team, tell=told,
                    )  # fmt: skip
                    team.wait()
                    if team.first:
                        finish(folder, images, batch, None if features is None else _keep_features(results, row, task))
                if team.first:
                    _measure(results, row, best, task, tell)
                done += images
                tell(row.label, 0)
    team.wait()
    if not team.first:
        return []
    asked = ["real", *(row.fingerprint for settings in plan for _, row in settings)]
    return [row for mark in asked for row in results.rows if row.fingerprint == mark]


def _rows_of(candidate: Candidate) -> list[tuple[Setting, Row]]:
    mark = fingerprint(candidate.source)
    return [(setting, row_of(candidate, setting, mark)) for setting in candidate.settings]


def _teller(row: Row, tell: Callable[[str, int], None]) -> Callable[[int], None]:
    return lambda number: tell(row.label, number)


def _best_teacher(rows: Sequence[Row], results: Results) -> Row | None:
    """The teacher at its most steps, of the rows asked for or else of those that are there: the first guidance of several."""
    asked = [row for row in rows if row.role == "teacher"]
    there = [row for row in results.rows if row.role == "teacher"]
    return max(asked or there, key=lambda row: row.steps, default=None)


def _check(candidates: Sequence[Candidate], images: int, seeds_per_prompt: int, metrics: Sequence[str] | None) -> None:
    if images < 4:
        raise UserError(f"a sweep needs at least 4 images a row, not {images}")
    if seeds_per_prompt < 1:
        raise UserError(f"seeds_per_prompt must be at least 1, not {seeds_per_prompt}")
    keys = [row_of(candidate, setting, "").key for candidate in candidates for setting in candidate.settings]
    if not keys:
        raise UserError("there is nothing to sweep: give at least one candidate with at least one setting")
    if twice := sorted(key for key in set(keys) if keys.count(key) > 1):
        raise UserError(f"two candidates are called {twice[0]!r}; give each a name or steps of its own")
    if unknown := sorted(set(metrics or ()) - all_metrics().keys() - {"all"}):
        raise UserError(f"no metric is called {unknown[0]!r}; there are {', '.join(sorted(all_metrics()))}")
    for candidate in candidates:
        if wrong := [setting.steps for setting in candidate.settings if setting.steps < 1]:
            raise UserError(f"{candidate.name}: steps must be at least 1, not {wrong[0]}")


def _open(output: Path, task: Task, chosen: Sequence[Metric], team: Processes, batch: int, dtype: torch.dtype) -> Results:
    """The results in `output`: the first process opens them, the others read what it wrote."""
    protocol = measuring(task.world, chosen) | task.asked | computing(task.device, batch, dtype)
    if not team.first:
        team.wait()
        return load_results(output)
    results = open_results(output, protocol, task.prompts, task.seeds)
    team.wait()
    return results


def _features(task: Task, chosen: Sequence[Metric]) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """What computes features while images are drawn, where a metric compares with a reference and weights are at hand."""
    if task.reference is None or not any({"reference", "reference_or_statistics"} & set(entry.needs) for entry in chosen):
        return None
    try:
        return Extraction(task.world, device=task.device).features
    except UserError:
        return None  # the metrics say what is missing


def _keep_features(results: Results, row: Row, task: Task) -> Callable[[Iterator[dict[str, Tensor]]], None]:
    def keep(parts: Iterator[dict[str, Tensor]]) -> None:
        save_embedded(results.file("features", row), gather_parts(parts, task.world, len(task.prompts)))

    return keep


def _check_size(row: Row, task: Task) -> Callable[[Tensor], None]:
    def check(images: Tensor) -> None:
        if task.scenes is not None and images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            made = f"{images.shape[3]} x {images.shape[2]}"
            raise UserError(f"{row.name} makes {made} images, not toy scenes; give prompts of its own")

    return check


def _measure_floor(results: Results, task: Task, tell: Callable[[str, int], None]) -> None:
    assert task.floor is not None
    row = Row(REAL, "real", 0, None, 0.0, 0.0, {}, "images/real", "real")
    if not results.has(row):
        tell(REAL, 0)
        start = 0
        for shown in batches(task.floor):
            words = [{"model": REAL, "prompt": prompt} for prompt in task.prompts[start : start + len(shown)]]
            write_pictures(shown, results.folder / row.images, words, start=start)
            start += len(shown)
        _score(results, row, task, None)


def _measure(results: Results, row: Row, best: Row | None, task: Task, tell: Callable[[str, int], None]) -> None:
    """Score a row whose images are drawn, unless that is done."""
    drawn = load_json(results.folder / row.images / "drawn.json")
    row.calls, row.seconds, row.sampler = drawn["calls"], drawn["seconds"], drawn["sampler"]
    row.guidance = row.sampler["guidance"] if row.guidance is None else row.guidance
    row.protocol = {
        "model": {"name": row.name, "fingerprint": row.fingerprint},
        "sampler": row.sampler,
        "attention": drawn["attention"],
    }
    teacher: Images | None = None
    if best is not None and best.fingerprint != row.fingerprint and results.has(best):
        teacher = results.images(best)
        if tuple(teacher.shape) == tuple(results.images(row).shape):
            row.protocol["teacher"] = {"row": best.key, "fingerprint": best.fingerprint}
        else:
            teacher = None
    former = results.find(row)
    if former is not None and results.has(row) and former.protocol == json.loads(json.dumps(row.protocol)):
        return
    tell(f"{row.label}: scores", len(task.prompts))
    _score(results, row, task, teacher, best)


def _score(results: Results, row: Row, task: Task, teacher: Images | None, best: Row | None = None) -> None:
    images = results.images(row)
    evidence = task.evidence(images, teacher)
    if known := load_embedded(results.file("features", row)):
        evidence.provide("images", known)
    if teacher is not None and best is not None and (known := load_embedded(results.file("features", best))):
        evidence.provide("teacher", known)
    measured = measure_images(evidence, task.metrics)
    if (real := evidence.known("reference")) and not results.reference.exists():
        save_embedded(results.reference, real)
    right = task.right(images)
    values = measured.each | ({} if right is None else {"right": right.to(torch.uint8)})
    save_tensors(results.file("values", row), values or {"none": torch.zeros(0)})
    row.scores, row.intervals, row.notes = measured.scores, measured.intervals, list(measured.notes)
    row.features = evidence.world.features
    results.add(row)
