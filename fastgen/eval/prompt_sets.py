"""Prompt sets: our own by name, and files that users bring, recognised by what they hold and not by their names.

| what | looks like |
| --- | --- |
| our own format | JSON lines with `prompt` and, if wanted, `category` and more |
| GenEval (Ghosh et al. 2023), its metadata | JSON lines with `tag`, `include`, `prompt`; the tag is the category |
| COCO captions, `captions_val2014.json` | `annotations` with `image_id`, `id`, `caption`; the first caption of each image |
| HPDv2 (Wu et al. 2023), `anime.json`, ... | a list of strings (the file's name is the category), or of objects with `prompt` |
| MJHQ-30K, `meta_data.json` | one object for each picture's name, with `prompt` and `category` |
| PartiPrompts (Yu et al. 2022), `PartiPrompts.tsv` | tab-separated, with a column `Prompt`; nothing is quoted |
| DrawBench (Saharia et al. 2022) | comma-separated, with a column `Prompts` |
| plain text | one prompt a line |

A folder is read as its .json files, one after another: HPDv2's benchmark.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.data.prompts import read_text
from fastgen.errors import UserError

SHIPPED = {path.stem: path for path in sorted((Path(__file__).parent / "prompts").glob("*.jsonl"))}
"""Prompt sets that come with the package, by name."""

COLUMNS = ("prompt", "prompts", "caption", "text")
Row = tuple[str, str | None, dict[str, Any]]
"""Prompt, category and whatever else the file says of it."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts with what is known of each: category (or None), and the file's other fields.

    `sha256` is that of the prompts, joined by newlines, so that it does not depend on the format they were read from.
    """

    name: str
    prompts: tuple[str, ...]
    categories: tuple[str | None, ...]
    extra: tuple[dict[str, Any], ...]
    sha256: str

    @classmethod
    def of(cls, name: str, rows: Sequence[Row]) -> PromptSet:
        """From rows of prompt, category and other fields."""
        prompts = tuple(row[0] for row in rows)
        digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
        return cls(name, prompts, tuple(row[1] for row in rows), tuple(row[2] for row in rows), digest)

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, number: int) -> PromptSet:
        """`number` of the prompts, spread evenly over the set (and so over its categories); all, where there are no more."""
        if number < 1:
            raise UserError(f"a prompt set must keep at least 1 prompt, not {number}")
        if number >= len(self):
            return self
        kept = [i * len(self) // number for i in range(number)]
        rows = [(self.prompts[i], self.categories[i], self.extra[i]) for i in kept]
        return PromptSet.of(f"{self.name}, {number} of {len(self)}", rows)


def read_prompt_set(source: Path | str) -> PromptSet:
    """The prompt set of that name (`SHIPPED`), or of that file or folder; a file wins over a name.

    Raises UserError where it is neither, or where the file holds something else, with the line or entry.
    """
    path = Path(source)
    if not path.exists() and str(source) in SHIPPED:
        path = SHIPPED[str(source)]
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise UserError(f"{path}: is a folder without .json files; name a file of prompts")
        return PromptSet.of(path.name, [row for file in files for row in read_rows(file)])
    if not path.exists():
        raise UserError(f"{source}: there is no such file, and no prompt set of that name; there are {', '.join(SHIPPED)}")
    return PromptSet.of(path.stem, read_rows(path))


def read_rows(path: Path) -> list[Row]:
    """The rows of one file. Raises UserError where it is not readable, empty, or not of a known format."""
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: is empty; it must hold prompts")
    rows = list(_reader(path, text)(path, text))
    if not rows:
        raise UserError(f"{path}: holds no prompts")
    return rows


def _reader(path: Path, text: str) -> Callable[[Path, str], Iterator[Row]]:
    """Which of the readers below fits what the file holds."""
    first = text.lstrip().splitlines()[0]
    if path.suffix == ".jsonl" or _is_object(first):
        return _json_lines
    if path.suffix == ".json" or (text.lstrip()[0] in "[{" and _is_json(text)):
        return _json
    for separator in ("\t", ","):
        cells = [cell.strip().strip('"').lower() for cell in first.split(separator)]
        if set(COLUMNS) & set(cells) and (len(cells) > 1 or path.suffix in (".csv", ".tsv")):
            return _tabs if separator == "\t" else _commas
    return _lines


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object with a prompt by itself."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(found, dict) and "prompt" in found


def _lines(path: Path, text: str) -> Iterator[Row]:
    yield from ((line.strip(), None, {}) for line in text.splitlines() if line.strip())


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error.msg}); each line must be one JSON object") from error
        yield _entry(path, f"line {number}", found)


def _json(path: Path, text: str) -> Iterator[Row]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from error
    if isinstance(found, dict) and isinstance(found.get("annotations"), list):
        yield from _coco(path, found)
    elif isinstance(found, dict) and found and all(isinstance(value, dict) for value in found.values()):
        for name, value in found.items():
            prompt, category, extra = _entry(path, f"entry {name!r}", value)
            yield prompt, category, {"name": name, **extra}
    elif isinstance(found, list):
        for i, value in enumerate(found, 1):
            if isinstance(value, str):
                yield _text(path, f"entry {i}", value), path.stem, {}
            else:
                yield _entry(path, f"entry {i}", value)
    else:
        expected = "a list of prompts, COCO's annotations, or one object with a prompt for each picture"
        raise UserError(f"{path}: is JSON, but no prompt set that is known; expected {expected}")


def _coco(path: Path, found: dict[str, Any]) -> Iterator[Row]:
    """The caption with the lowest id of each image, in the order of image ids."""
    first: dict[int, dict[str, Any]] = {}
    for i, value in enumerate(found["annotations"], 1):
        if not isinstance(value, dict) or not isinstance(value.get("image_id"), int) or "caption" not in value:
            raise UserError(f"{path}: annotation {i} must have an image_id and a caption, as in COCO's captions_*.json")
        known = first.get(value["image_id"])
        if known is None or value.get("id", i) < known.get("id", i):
            first[value["image_id"]] = value
    images = [image for image in found.get("images", []) if isinstance(image, dict)]
    files = {image.get("id"): image.get("file_name") for image in images}
    for number, value in sorted(first.items()):
        extra = {"image_id": number, "file_name": files.get(number)}
        yield _text(path, f"the caption of image {number}", value["caption"]), None, extra


def _tabs(path: Path, text: str) -> Iterator[Row]:
    yield from _table(path, csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))


def _commas(path: Path, text: str) -> Iterator[Row]:
    yield from _table(path, csv.reader(io.StringIO(text), strict=True))


def _table(path: Path, reader: Any) -> Iterator[Row]:
    try:
        names = [name.strip().lower() for name in next(reader)]
        column = next(names.index(name) for name in COLUMNS if name in names)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                raise UserError(f"{path}: line {reader.line_num} has {len(cells)} columns, the first line has {len(names)}")
            values = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
            prompt = _text(path, f"line {reader.line_num}", values.pop(names[column]))
            yield prompt, values.pop("category", None), values
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} cannot be read as a table: {error}") from error


def _entry(path: Path, where: str, value: Any) -> Row:
    """The row of an object with a prompt; GenEval calls the category `tag`."""
    if not isinstance(value, dict) or "prompt" not in value:
        raise UserError(f"{path}: {where} must be an object with a prompt, not {json.dumps(value)[:60]}")
    category = value.get("category", value.get("tag"))
    if category is not None and not isinstance(category, str):
        raise UserError(f"{path}: {where} has the category {category!r}; it must be a text")
    extra = {key: other for key, other in value.items() if key not in ("prompt", "category")}
    return _text(path, where, value["prompt"]), category, extra


def _text(path: Path, where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{path}: {where} has no prompt, but {value!r}; it must be a text that is not empty")
    return value.strip()
