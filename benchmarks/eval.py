"""Our Fréchet distance beside torch-fidelity's, and its memory: the record in benchmarks/results/eval.json.

    python -m benchmarks.eval [--images 50000] [--reference 10000] [--rounds 2] [--rows 1000 10000 50000]

Time: the same 32 x 32 pictures in memory go through `fastgen.eval` and through `torch_fidelity.calculate_metrics(fid=True)` in
one process, in turns, on the CPU. The features are 2,048 numbers of a fixed random layer, which cost next to nothing, so that
what is compared is what is not the network: the loop, mean and covariance of as many numbers as Inception gives, and the
distance, ours with its standard error and bias. With a real network in front both take longer by the same amount, and the
ratio comes nearer to 1. The seconds are those of the processor, which do not count what other programs on the machine take.

Memory: pictures that are made when they are asked for, in processes of their own, forked; the largest resident set (VmHWM).
Once for the distance alone, and once with the first 10,000 feature vectors, which other metrics look at.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from fastgen.eval.features import ROWS, Embedded, embed
from fastgen.eval.frechet import FrechetTo
from fastgen.eval.images import Images
from fastgen.eval.measures.fidelity import with_error
from fastgen.eval.moments import Moments
from fastgen.eval.world import World

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "eval.json"
PACKAGES = ("torch", "torch-fidelity", "numpy")
WIDTH, SIDE = 2048, 32
WORLD = World("photo", "benchmark-layer", "fastgen-toy")
LIMIT = 1.1
FEW = 200
"""Feature vectors that the standard error is taken from, where none are kept for other metrics."""


class Layer(torch_fidelity.FeatureExtractorBase):
    """relu(W x) of a picture's 8 x 8 thumbnail, W random and fixed."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.weight = torch.randn(WIDTH, 192, generator=torch.Generator().manual_seed(0))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("layer",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "layer"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        thumbnails = torch.nn.functional.avg_pool2d(images.float() / 255 - 0.5, 4).flatten(1)
        return ((thumbnails @ self.weight.T).relu(),)


class Drawn:
    """Random uint8 pictures [N, 3, 32, 32], drawn when they are asked for."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.shape = count, seed, (count, 3, SIDE, SIDE)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice, /) -> Tensor:
        places = range(self.count)[rows]
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + places.start)
        coarse = torch.rand(len(places), 3, 8, 8, generator=draw)
        brightness = torch.rand(len(places), 1, 1, 1, generator=draw)
        return (255 * torch.nn.functional.interpolate(coarse * brightness, SIDE)).to(torch.uint8)


class Pictures(Dataset):
    """The same pictures for torch-fidelity."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def ours(images: Images, reference: Images) -> float:
    """The distance with its standard error and its bias."""
    return distance(embed(images, WORLD), FrechetTo(embed(reference, WORLD, rows=0).moments))


def distance(generated: Embedded, reference: FrechetTo) -> float:
    """All that `fastgen eval` says of it."""
    found, moments = reference.compare(generated.moments), generated.moments
    found.bias(generated.rows["fid"], moments.mean, moments.count)
    return with_error(found, generated).value


def theirs(images: Tensor, reference: Tensor) -> float:
    """torch-fidelity's."""
    options = {"feature_extractor": WORLD.features, "batch_size": 128, "cuda": False, "cache": False, "verbose": False}
    found = torch_fidelity.calculate_metrics(
        input1=Pictures(images), input2=Pictures(reference), fid=True, save_cpu_ram=True, **options
    )
    value: float = found["frechet_inception_distance"]
    return value


def timed(what: Callable[[Tensor, Tensor], float], images: Tensor, reference: Tensor) -> dict[str, float]:
    wall, processor = time.perf_counter(), time.process_time()
    value = what(images, reference)
    seconds = {"seconds": time.process_time() - processor, "wall": time.perf_counter() - wall}
    return {"value": value, **{name: round(each, 2) for name, each in seconds.items()}}


def compare_time(images: int, reference: int, rounds: int) -> dict[str, Any]:
    """Both in turns; the ratio is that of the smallest times, which other programs disturbed least."""
    made, real = Drawn(images, 1)[:], (Drawn(reference, 2)[:].float() * 0.9).to(torch.uint8)
    for warm in (ours, theirs):
        warm(made[:256], real[:256])
    turns: dict[str, list[dict[str, float]]] = {"fastgen": [], "torch_fidelity": []}
    for turn in range(rounds):
        for name, what in (("fastgen", ours), ("torch_fidelity", theirs)):
            turns[name].append(timed(what, made, real))
            print(f"round {turn + 1}, {name:<15} {turns[name][-1]}", flush=True)
    own, other = (min(each["seconds"] for each in turns[name]) for name in turns)
    values = [turns[name][0]["value"] for name in turns]
    print(f"ratio {own / other:.3f}")
    return {
        "images": images,
        "reference": reference,
        "width": WIDTH,
        "turns": turns,
        "ratio": round(own / other, 3),
        "limit": LIMIT,
        "relative_difference": abs(values[0] - values[1]) / values[1],
    }


def memory_of(count: int, kept: int, reference: FrechetTo) -> dict[str, int]:
    """In this process: the largest resident set over one distance, and what was resident before."""
    small = embed(Drawn(256, 2), WORLD, rows=200).rows["fid"][:, :32]
    distance(Embedded.of({"fid": small}), FrechetTo(Moments.of(small)))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    distance(embed(Drawn(count, 1), WORLD, rows=kept), reference)
    return {"images": count, "kept": min(kept, count), "before": before, "peak": resident("VmHWM")}


def resident(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def compare_memory(counts: Sequence[int]) -> dict[str, Any]:
    """The largest resident set for each number of pictures, each in a process of its own, forked."""
    reference = FrechetTo(embed(Drawn(2 * WIDTH, 2), WORLD, rows=0).moments)
    found: dict[str, Any] = {"width": WIDTH}
    for name, kept in (("distance_alone", FEW), ("with_rows", ROWS)):
        found[name] = []
        for count in counts:
            read, write = os.pipe()
            if (child := os.fork()) == 0:
                with os.fdopen(write, "w") as pipe:
                    json.dump(memory_of(count, kept, reference), pipe)
                os._exit(0)
            os.close(write)
            with os.fdopen(read) as pipe:
                found[name].append(json.load(pipe))
            os.waitpid(child, 0)
            print(f"{name:<15} {found[name][-1]}", flush=True)
        peaks = [each["peak"] for each in found[name]]
        found[f"{name}_largest_to_smallest"] = round(max(peaks) / min(peaks), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000, 50_000])
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch_fidelity.register_feature_extractor(WORLD.features, Layer)
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.eval", *sys.argv[1:]]),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    if args.rows:
        record["memory"] = compare_memory(args.rows)
        write(record)
    if args.images:
        record["time"] = compare_time(args.images, args.reference, args.rounds)
        write(record)


def write(record: dict[str, Any]) -> None:
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
