"""The example of a method in a package of its own: found by its entry point, explained, set up, trained, sampled."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from fastgen import methods
from fastgen.analytic import Gaussian
from fastgen.process import Flow
from tests.method_fakes import Affine, FakePipeline, batches, train

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plugin as an installer leaves it: the package, and its entry points in a dist-info folder, on the path."""
    shutil.copytree(PLUGIN / "pair_regression", tmp_path / "pair_regression", ignore=shutil.ignore_patterns("__pycache__"))
    points = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "fastgen_pair_regression-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastgen-pair-regression\nVersion: 0.1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in some.items()) for group, some in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pair_regression", raising=False)
    return tmp_path


def test_the_plugin_reaches_the_gaussians_map(installed: Path) -> None:
    """Regression on pairs has the ODE's own map as its optimum: G(z) = m + s z for a flow."""
    assert "pair_regression" in methods.names()
    torch.manual_seed(0)
    method = methods.find("pair_regression")()
    pipeline = FakePipeline(
        Flow(), (1,), "x0", teacher=Gaussian(torch.tensor([1.3]), 0.4, Flow()), networks={"student": Affine}
    )
    method.setup(pipeline)  # type: ignore[arg-type]
    train(method, batches(pipeline, 64, ("0",), pairs=True), 400, 2e-2)
    noise = torch.tensor([[-1.0], [0.0], [2.0]])
    with torch.no_grad():
        x = method.sampler().sample(method.trained, noise, pipeline.encode_prompts(["0"] * 3))
    torch.testing.assert_close(x, 1.3 + 0.4 * noise, rtol=0, atol=0.02)


def test_the_command_line_explains_it(installed: Path) -> None:
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(installed)!r}); from fastgen.cli import main; sys.exit(main(sys.argv[1:]))",
    ]
    done = subprocess.run(
        [*command, "methods", "pair_regression"], capture_output=True, text=True, timeout=120, cwd=PLUGIN.parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert (
        'name = "pair_regression"' in done.stdout and "huber_c = 0.03" in done.stdout and "needs: pairs, prompts" in done.stdout
    )
