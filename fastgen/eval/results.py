"""A sweep's folder: `results.json` (protocol and rows), `prompts.json`, and the images of each row, lossless, in `images/`.

`results.json` is rewritten, by way of a temporary name, after every row. Rows of different protocols are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgen.errors import UserError

FORMAT = 1
REAL = "real images"


@dataclass
class Row:
    """What was measured of one candidate at one setting; the row of role "real" is the floor, real images against others.

    `calls` are network evaluations per image, counted (a guided step is two), `seconds` per image, the median over batches.
    `images` is the file of the images, relative to the sweep's folder; `fingerprint` stands for weights and setting.
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

    def images(self, row: Row) -> Tensor:
        """The row's images, uint8 [N, 3, H, W]."""
        return load_images(self.folder / row.images)[0]

    def right(self, row: Row) -> Tensor | None:
        """Of each toy image whether everything in it is right, bool [N]; None for other worlds."""
        return load_images(self.folder / row.images)[1]

    def has(self, row: Row) -> bool:
        """Whether a row of the same weights and setting is finished."""
        return any(other.fingerprint == row.fingerprint for other in self.rows) and (self.folder / row.images).is_file()

    def add(self, row: Row) -> None:
        """Add a row, in the place of one of the same key whose weights have changed since, and save."""
        self.rows = [other for other in self.rows if other.key != row.key] + [row]
        self.save()

    def save(self) -> None:
        record = {"format": FORMAT, "protocol": self.protocol, "rows": [asdict(row) for row in self.rows]}
        _write_json(self.folder / "results.json", record)


def load_results(folder: Path | str) -> Results:
    """Read a sweep's folder. Raises UserError where it is none or its files are damaged."""
    folder = Path(folder)
    try:
        record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        asked = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(f"{folder / 'results.json'} has format {record['format']}, but this fastgen reads {FORMAT}")
        return Results(folder, record["protocol"], asked["prompts"], asked["seeds"], [Row(**row) for row in record["rows"]])
    except OSError as error:
        raise UserError(f"{folder} is not a sweep: {error.filename} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a sweep: its results.json or prompts.json is damaged ({error!r})") from error


def open_results(folder: Path, protocol: Mapping[str, Any], prompts: list[str], seeds: list[int]) -> Results:
    """The sweep in `folder`, or a new one. Raises UserError where the one there follows another protocol."""
    asked = json.loads(json.dumps(protocol))
    if (folder / "results.json").exists():
        results = load_results(folder)
        theirs, ours = _flat(results.protocol), _flat(asked)
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                was, now = (json.dumps(each.get(name)) for each in (theirs, ours))
                raise UserError(
                    f"{folder / 'results.json'} holds rows of another protocol: {name} was {was} and is {now} now; "
                    "name another output, or remove this one"
                )
    else:
        results = Results(folder, asked, prompts, seeds)
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        _write_json(folder / "prompts.json", {"prompts": prompts, "seeds": seeds})
        results.save()
    except OSError as error:
        raise UserError(f"the sweep cannot be written to {folder}: {error.strerror}") from error
    return results


def _flat(nest: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nest.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def save_images(path: Path, images: Tensor, right: Tensor | None, measured: Mapping[str, Any]) -> None:
    """Write uint8 images [N, 3, H, W], which of them are right, and what was measured while they were made."""
    tensors = {"images": images.contiguous()} | ({} if right is None else {"right": right.contiguous()})
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, str(temporary), metadata={"measured": json.dumps(dict(measured))})
    temporary.replace(path)


def load_images(path: Path) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """What `save_images` wrote. Raises UserError where the file is missing or damaged."""
    try:
        with safe_open(str(path), "pt") as file:
            right = file.get_tensor("right") if "right" in file.keys() else None  # noqa: SIM118
            return file.get_tensor("images"), right, json.loads(file.metadata()["measured"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold a sweep's images ({error}); delete it to have them made again") from error
