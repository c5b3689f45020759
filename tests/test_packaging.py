"""What is built is complete: the wheel comes from the sdist, and the root links break neither."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastgen
from fastgen.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastgen"
builders = pytest.importorskip("hatchling.builders.wheel")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str], str]:
    """Names in the sdist, names in the wheel built from it, and the wheel's metadata."""
    from hatchling.builders.sdist import SdistBuilder

    folder = tmp_path_factory.mktemp("dist")
    sdist = Path(next(SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    wheel = Path(next(builders.WheelBuilder(str(unpacked)).build(directory=str(folder), versions=["standard"])))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert len(names) == len(set(names))
    return source, set(names), metadata + scripts


def tracked(folder: Path, pattern: str) -> set[str]:
    return {str(each.relative_to(ROOT)) for each in folder.rglob(pattern) if "__pycache__" not in each.parts}


def test_the_wheel_holds_every_module_and_the_toy_weights(built: tuple[set[str], set[str], str]) -> None:
    source, wheel, metadata = built
    modules = tracked(PACKAGE, "*.py")
    assert {"fastgen/eval/__init__.py", "fastgen/pipelines/__init__.py"} <= modules
    weights = tracked(PACKAGE / "data" / "toy" / "weights", "*.*")
    for names in (source, wheel):
        assert modules - names == set() and weights - names == set() and "fastgen/py.typed" in names
    recipes = {f"fastgen/{each}" for each in tracked(ROOT / "configs", "*.toml")}
    assert recipes and recipes - wheel == set(), "quickstart runs from a wheel"
    outside = {name for name in wheel if not name.startswith(("fastgen/", "fastgen_diffusion-"))}
    assert outside == set(), "importable top-level packages would pollute every environment"
    assert "fastgen = fastgen.cli:main" in metadata and f"Version: {fastgen.__version__}" in metadata


def test_the_sdist_holds_what_a_packager_needs_and_no_links(built: tuple[set[str], set[str], str]) -> None:
    source, _, _ = built
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "Makefile", "tests/test_packaging.py"} <= source
    assert not any(name.split("/")[0] in ("eval", "pipelines", ".venv", "runs") for name in source)


def test_dependencies_are_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for line in [*project["dependencies"], *extras]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+|fastgen-diffusion\[[\w,]+\]", line), f"{line} is pinned or has no floor"


def test_make_and_continuous_integration_parse() -> None:
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert listed.returncode == 0
    for target in ("quickstart", "test", "test-all", "lint", "bench", "build"):
        assert f"make {target} " in listed.stdout
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, timeout=60).returncode == 0
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("an unpacked sdist")
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], timeout=60).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_without_loading_torch(command: str) -> None:
    code = (
        "import sys; from fastgen.cli import main; status = main([sys.argv[1], '--help'])\n"
        "heavy = [each for each in ('torch', 'diffusers', 'transformers', 'matplotlib') if each in sys.modules]\n"
        "sys.exit(f'loaded {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for flag in ("--output", "--seed", "--device", "--offline", "--quiet", "--json"):
        assert flag in done.stdout
