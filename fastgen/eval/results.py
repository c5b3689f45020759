"""A sweep's folder: `results.json` (protocol and rows), `prompts.json`, and of each row the images, lossless, in
`images/<row>/`, the values of single images in `values/<row>.safetensors`, the features in `features/<row>.safetensors`.

`results.json` is rewritten, by way of a temporary name, after every row. Rows of different protocols are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.images import PictureFolder
from fastgen.eval.protocol import differences

FORMAT = 2
REAL = "real images"


@dataclass
class Row:
    """What was measured of one candidate at one setting; the row of role "real" is the floor, real images against others.

    `calls` are network evaluations per image, counted (a guided step is two), `seconds` per image, the median over batches that
    nothing else ran beside. `images` is the folder of the images, relative to the sweep's; `fingerprint` stands for weights and
    setting, `protocol` for what the sweep's own does not tell: model, sampler, attention, the teacher it was measured against.
    `features` names the network of the distances.
    """

    name: str
    role: Literal["teacher", "student", "real"]
    steps: int
    guidance: float | None
    calls: float
    seconds: float
    scores: dict[str, float]
    images: str
    fingerprint: str
    sampler: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    features: str = ""

    @property
    def label(self) -> str:
        """Such as "teacher, 50 steps"."""
        return self.name if self.role == "real" else f"{self.name}, {self.steps} step{'s' * (self.steps != 1)}"

    @property
    def key(self) -> str:
        """What tells a row from the others of its sweep: label and guidance."""
        return self.label if self.guidance is None else f"{self.label}, guidance {self.guidance:g}"


@dataclass
class Results:
    """A sweep: what was asked, and the rows so far."""

    folder: Path
    protocol: dict[str, Any]
    prompts: list[str]
    seeds: list[int]
    rows: list[Row] = field(default_factory=list)

    def images(self, row: Row) -> PictureFolder:
        """The row's images, [N, 3, H, W]. Raises UserError where they are missing."""
        try:
            return PictureFolder(self.folder / row.images)
        except UserError as error:
            raise UserError(f"the images of {row.key} are not in the sweep any more: {error}") from error

    def pictures(self, row: Row, indices: Sequence[int]) -> Tensor:
        """Some of the row's images, uint8 [n, 3, H, W]."""
        folder = self.images(row)
        return torch.cat([folder[index : index + 1] for index in indices])

    def right(self, row: Row) -> Tensor | None:
        """Of each toy image whether everything in it is right, bool [N]; None for other worlds."""
        found = self.values(row).get("right")
        return None if found is None else found.bool()

    def values(self, row: Row) -> dict[str, Tensor]:
        """Values [N] of single images by key; none for a row that has none."""
        return load_tensors(self.file("values", row))

    def file(self, kind: Literal["values", "features"], row: Row) -> Path:
        """Where values or features of a row are kept."""
        return self.folder / kind / f"{Path(row.images).name}.safetensors"

    @property
    def reference(self) -> Path:
        """Where the features of the real images are kept."""
        return self.folder / "features" / "reference.safetensors"

    def protocol_of(self, row: Row) -> dict[str, Any]:
        """The whole protocol of a row: the sweep's and its own."""
        return {**self.protocol, **row.protocol}

    def has(self, row: Row) -> bool:
        """Whether a row of the same weights and setting is finished."""
        there = (self.folder / row.images).is_dir() and self.file("values", row).is_file()
        return self.find(row) is not None and there

    def find(self, row: Row) -> Row | None:
        """The finished row of the same weights and setting."""
        return next((other for other in self.rows if other.fingerprint == row.fingerprint), None)

    def add(self, row: Row) -> None:
        """Add a row, in the place of one of the same key whose weights have changed since, and save."""
        self.rows = [other for other in self.rows if other.key != row.key] + [row]
        self.save()

    def save(self) -> None:
        record = {"format": FORMAT, "protocol": self.protocol, "rows": [asdict(row) for row in self.rows]}
        write_json(self.folder / "results.json", record)


def load_results(folder: Path | str) -> Results:
    """Read a sweep's folder. Raises UserError where it is none or its files are damaged."""
    folder = Path(folder)
    try:
        record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        asked = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(f"{folder / 'results.json'} has format {record['format']}, but this fastgen reads {FORMAT}")
        rows = [Row(**row) for row in record["rows"]]
        for row in rows:
            row.intervals = {key: (low, high) for key, (low, high) in row.intervals.items()}
        return Results(folder, record["protocol"], asked["prompts"], asked["seeds"], rows)
    except OSError as error:
        raise UserError(f"{folder} is not a sweep: {error.filename} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a sweep: its results.json or prompts.json is damaged ({error!r})") from error


def open_results(folder: Path, protocol: Mapping[str, Any], prompts: list[str], seeds: list[int]) -> Results:
    """The sweep in `folder`, or a new one. Raises UserError where the one there follows another protocol."""
    asked = json.loads(json.dumps(protocol))
    if (folder / "results.json").exists():
        results = load_results(folder)
        on_cpu = asked.get("computation", {}).get("device") == "cpu"
        harmless = ("time",) if on_cpu else ("time", "machine.threads")  # seconds are compared, and depend on the CPU's threads
        for name, was, now in differences(results.protocol, asked, ignore=harmless):
            was, now = (json.dumps(each, ensure_ascii=False) for each in (was, now))
            raise UserError(
                f"{folder / 'results.json'} holds rows of another protocol: {name} was {was} and is {now} now; "
                "name another output, or remove this one"
            )
    else:
        results = Results(folder, asked, prompts, seeds)
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        write_json(folder / "prompts.json", {"prompts": prompts, "seeds": seeds})
        results.save()
    except OSError as error:
        raise UserError(f"the sweep cannot be written to {folder}: {error.strerror}") from error
    return results


def write_json(path: Path, content: Any) -> None:
    """Write JSON by way of a temporary name."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def load_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises UserError where it is missing or damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    return found


def save_tensors(path: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str] | None = None) -> None:
    """Write tensors by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({key: value.contiguous() for key, value in tensors.items()}, str(temporary), metadata=dict(words or {}))
    temporary.replace(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What `save_tensors` wrote; nothing where there is no file. Raises UserError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to have its row measured again") from error
