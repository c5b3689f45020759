"""Every fault that fastgen promises to survive, done to a real run: what it did, what it said, what was lost.

    python -m benchmarks.faults [--only WORD ...] [--pages]

Each run is `fastgen distill` on the toy teacher in a process of its own, with the fault put in its way: a signal, a file that
was cut, a disk that refuses (writes go to /dev/full, so that the refusal is the kernel's), a number that is not finite. The
record goes to benchmarks/results/faults.json and the page to docs/faults.md; `--pages` writes the page from the record alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults_page import AT, EVERY, METHOD, PAGE, RECORD, ROOT, STEPS, page
from fastgen import cli
from fastgen.training import checkpoint
from fastgen.training.loop import Trainer

OPTIONS = [
    *(f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.batch=2", "train.log_every=1", "train.sample_every=0"),
    *("train.threads=1", 'train.precision="fp32"', "train.teacher_steps=1", "data.pool=12", "data.cache=none"),
]
Action = Callable[[Trainer], None]


@dataclass
class Fault:
    """Something that goes wrong: in the process (`inject`), in its options, or in the run directory between two starts."""

    name: str
    injected: str
    inject: Callable[[], None] = lambda: None
    before: Callable[[Path], None] | None = None
    """What is done to the directory of a run that was stopped after `AT` updates, before the run that is recorded."""
    options: list[str] = field(default_factory=list)
    processes: int = 1
    quoted: str = ""
    """A word of the sentence to quote, where it is not the one that begins with "error:"."""
    goes_on: bool = True
    """Whether the same command is given again afterwards, to compare with a run that nothing happened to."""


# -- what is done to a run --------------------------------------------------------------------------


def after(updates: int, action: Action, rank: int = 0) -> Callable[[], None]:
    """Do this in the process of that number once so many updates are done."""

    def inject() -> None:
        update = Trainer.update

        def hooked(self: Trainer) -> None:
            update(self)
            if self.step == updates and int(os.environ.get("RANK", "0")) == rank:
                action(self)

        Trainer.update = hooked  # type: ignore[method-assign]

    return inject


def signalled(*numbers: int) -> Action:
    def action(trainer: Trainer) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # two at the same moment may count as one

    return action


def killed_while_saving() -> None:
    """SIGKILL in the middle of the second checkpoint, after its first weights."""
    write, seen = checkpoint.write, [0]

    def hooked(partial: Path, name: str, *rest: Any, **options: Any) -> None:
        write(partial, name, *rest, **options)
        seen[0] += name.startswith("player-")
        if seen[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write = hooked


def disk_full(times: int) -> Callable[[], None]:
    """After the first checkpoint, so many attempts to write weights meet a full disk."""

    def inject() -> None:
        save, calls = checkpoint.save_file, [0]

        def hooked(tensors: dict[str, torch.Tensor], path: Path) -> None:
            if path.name.startswith("player-"):
                calls[0] += 1
                if 1 < calls[0] <= 1 + times:
                    with open("/dev/full", "wb", buffering=0) as file:
                        file.write(bytes(1))
            save(tensors, path)

        checkpoint.save_file = hooked

    return inject


def metrics_full() -> None:
    """The lines of three updates meet a full disk."""
    sync, calls = os.fsync, [0]

    def hooked(handle: int) -> None:
        calls[0] += 1
        if os.readlink(f"/proc/self/fd/{handle}").endswith("metrics.jsonl") and 6 <= calls[0] <= 8:
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(bytes(1))
        sync(handle)

    os.fsync = hooked


def bad_data(trainer: Trainer) -> None:
    assert trainer.data.latents is not None
    trainer.data.latents.fill_(torch.nan)


def one_bad_sample(trainer: Trainer) -> None:
    assert trainer.data.latents is not None
    trainer.data.latents[3] = torch.inf


def loss_times(factor: Callable[[torch.Tensor], torch.Tensor]) -> Action:
    def action(trainer: Trainer) -> None:
        for turn in trainer.turns:
            loss = turn.player.loss

            def hooked(batch: Any, loss: Any = loss) -> dict[str, torch.Tensor]:
                return {name: factor(term) for name, term in loss(batch).items()}

            turn.player.loss = hooked

    return action


def deaf_tracker(trainer: Trainer) -> None:
    class Tracker:
        name = "tensorboard"

        def log(self, values: Any, step: int) -> None:
            raise ConnectionError("Connection refused")

        def finish(self) -> None:
            pass

    trainer.accelerator.trackers = [Tracker()]


def damaged(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Change the weights in the newest checkpoint."""
    return lambda run: change(checkpoint.find(run)[-1] / "player-student.safetensors")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


FAULTS = [
    Fault("killed", f"SIGKILL after update {AT}", after(AT, signalled(signal.SIGKILL))),
    Fault("killed while saving", "SIGKILL in the middle of writing the second checkpoint", killed_while_saving),
    Fault("told to end", f"SIGTERM after update {AT}", after(AT, signalled(signal.SIGTERM)), quoted="SIGTERM"),
    Fault("interrupted", f"SIGINT (Ctrl-C) after update {AT}", after(AT, signalled(signal.SIGINT)), quoted="SIGINT"),
    Fault(
        "told twice",
        f"SIGINT twice after update {AT}",
        after(AT, signalled(signal.SIGINT, signal.SIGINT)),
        quoted="interrupted",
    ),
    Fault(
        "one of two told to end",
        f"SIGTERM to the second of two processes after update {AT}",
        after(AT, signalled(signal.SIGTERM), 1),
        processes=2,
        quoted="SIGTERM",
    ),
    Fault(
        "one of two killed",
        f"SIGKILL to the second of two processes after update {AT}",
        after(AT, signalled(signal.SIGKILL), 1),
        processes=2,
    ),
    Fault("disk full for a while", "ENOSPC from the kernel at two checkpoints in a row", disk_full(2), quoted="no checkpoint"),
    Fault("disk stays full", "ENOSPC from the kernel at every checkpoint but the first", disk_full(99)),
    Fault(
        "no room for metrics", "ENOSPC from the kernel at three lines of metrics.jsonl", metrics_full, quoted="metrics.jsonl"
    ),
    Fault(
        "directory cannot be written",
        "the run directory is asked for where a file is in its way",
        options=["FILE/run"],
        goes_on=False,
    ),
    Fault("checkpoint cut off", "the weights in the newest checkpoint truncated to half", before=damaged(cut)),
    Fault("checkpoint altered", "one bit of the weights in the newest checkpoint flipped", before=damaged(altered)),
    Fault("checkpoint incomplete", "the weights of the newest checkpoint deleted", before=damaged(Path.unlink)),
    Fault(
        "another method's run",
        "a run of another method in the same directory",
        before=lambda run: None,
        options=["dmd2"],
        goes_on=False,
    ),
    Fault(
        "another configuration",
        "the same run with another learning rate",
        before=lambda run: None,
        options=["train.lr=0.5"],
        goes_on=False,
    ),
    Fault("data not finite", f"all latents become NaN after update {AT}", after(AT, bad_data)),
    Fault(
        "one sample not finite",
        "one of twelve latents is infinite from the first update on",
        after(1, one_bad_sample),
        quoted="done",
        goes_on=False,
    ),
    Fault("loss not finite", f"the loss becomes NaN after update {AT}", after(AT, loss_times(lambda term: term * torch.nan))),
    Fault(
        "gradient not finite",
        f"a finite loss with an infinite gradient after update {AT}",
        after(AT, loss_times(lambda term: (term * 0).sqrt())),
    ),
    Fault(
        "tracker lost",
        f"a tracker whose connection is refused after update {AT}",
        after(AT, deaf_tracker),
        quoted="tracker",
        goes_on=False,
    ),
    Fault(
        "foreign code", "trust_remote_code = true in the configuration", options=["data.trust_remote_code=true"], goes_on=False
    ),
]


# -- runs -------------------------------------------------------------------------------------------


def command(folder: Path, options: list[str]) -> list[str]:
    """The arguments of `fastgen` for a run in `folder`; FILE/... is an output below a file, a method's name is its recipe."""
    method, output = METHOD, folder / "run"
    rest = list(OPTIONS)
    for option in options:
        if option.startswith("FILE/"):
            (folder / "file").write_text("")
            output = folder / "file" / "run"
        elif "=" in option:
            rest.append(option)
        else:
            method = option
    return ["distill", str(ROOT / "configs" / "toy" / f"{method}.toml"), *rest, "--device", "cpu", "--output", str(output)]


def start(arguments: list[str], inject: Callable[[], None], output: Path, world: dict[str, str]) -> int:
    """`fastgen` in a forked process, what it says going to the file `output`; the process's id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.environ.update(world)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        torch.set_num_threads(1)
        inject()
        status = cli.main(arguments)
        sys.stderr.flush()
    finally:
        os._exit(status)


def run(fault: Fault | None, folder: Path, options: list[str], arguments: list[str]) -> tuple[list[int], str]:
    """Exit statuses of a run's processes, and what they said."""
    processes = fault.processes if fault else 1
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    pids, outputs = [], []
    for rank in range(processes):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        outputs.append(folder / f"said-{rank}.txt")
        line = [*command(folder, options), *arguments]
        pids.append(start(line, fault.inject if fault else lambda: None, outputs[-1], world if processes > 1 else {}))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes, "\n".join(output.read_text(errors="replace") for output in outputs)


def sentence(text: str, fault: Fault, folder: Path) -> str:
    """The line that a run says of a fault, with the names of this machine taken out."""
    lines = [line for line in text.splitlines() if (fault.quoted in line if fault.quoted else line.startswith("error:"))]
    return lines[0].replace(str(folder), "RUNS").replace("RUNS/run", "RUN") if lines else ""


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended in the same bits."""
    paths = [checkpoint.find(each)[-1] for each in (one, other)]
    names = sorted(path.name for path in paths[0].glob("*.safetensors"))
    alike = paths[0].name == paths[1].name and names == sorted(path.name for path in paths[1].glob("*.safetensors"))
    return alike and all(checkpoint.digest(paths[0] / name) == checkpoint.digest(paths[1] / name) for name in names)


def step(path: Path) -> int:
    found = checkpoint.latest_good(path)
    return 0 if found is None else checkpoint.step_of(found)


def reached(path: Path) -> int:
    """The last update that a run has written a line of."""
    lines = (path / "metrics.jsonl").read_text().splitlines() if (path / "metrics.jsonl").exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def measure(fault: Fault, straight: Path, folder: Path) -> dict[str, Any]:
    """Do it: statuses, sentence, updates reached and kept, and whether the run gone on with ended in the same bits."""
    path = folder / "run"
    if fault.before is not None:
        run(Fault("", "", after(AT, signalled(signal.SIGTERM))), folder, [], [])
        fault.before(path)
    codes, text = run(fault, folder, fault.options, [])
    if 70 in codes or "Traceback" in text:
        raise RuntimeError(f"{fault.name}: {codes}\n{text}")
    record: dict[str, Any] = {"injected": fault.injected, "status": codes, "said": sentence(text, fault, folder)}
    record |= {"reached": reached(path), "kept": step(path)}
    last = path / "checkpoints" / f"step-{step(path):08d}" / "state.json"
    record["skipped"] = json.loads(last.read_text())["skipped"]["student"][0] if last.exists() else 0
    if fault.goes_on:
        resume = ["--resume", str(checkpoint.latest_good(path))] if fault.before else []
        again, text = run(None, folder, [], resume)
        record["again"] = again[0]
        record["same_bits"] = same(straight, path) if fault.processes == 1 else None
    return record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", default=[], nargs="*", metavar="WORD", help="faults so named; the others' records stay")
    parser.add_argument("--pages", action="store_true", help="write the page from the record")
    args = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if not args.pages:
        with tempfile.TemporaryDirectory() as root:
            straight = Path(root) / "straight"
            straight.mkdir()
            codes, text = run(None, straight, [], [])
            if codes != [0]:
                raise RuntimeError(text)
            for i, fault in enumerate(FAULTS):
                if not args.only or any(word in fault.name for word in args.only):
                    folder = Path(root) / str(i)
                    folder.mkdir()
                    began = time.monotonic()
                    record[fault.name] = measure(fault, straight / "run", folder)
                    print(f"{fault.name} ({time.monotonic() - began:.0f} s): {json.dumps(record[fault.name])}", flush=True)
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        record = {fault.name: record[fault.name] for fault in FAULTS if fault.name in record}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
