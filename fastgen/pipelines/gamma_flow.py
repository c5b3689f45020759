"""A pipeline file for what no stock scheduler of diffusers does: gamma sampling (TCD; Zheng et al. 2024, algorithm 4) of flows.

Exports bring it as `pipeline.py`; it needs diffusers alone. Such a folder is read back here without running a line of its file:
where the file is, byte for byte, what is written here for its class and gamma, the class is made from the text of this module.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from fastgen.errors import UserError
from fastgen.pipelines import mean_velocity_file

__all__ = ["FILE", "class_name", "own_class", "source"]

FILE = "pipeline.py"

TEMPLATE = '''"""{stock} with gamma sampling: a step follows the flow below the next noise level, then diffuses back up to it.

After Zheng et al. 2024 (TCD), algorithm 4, for a rectified flow x = (1 - sigma) x0 + sigma noise.
"""

from diffusers import FlowMatchEulerDiscreteScheduler, {stock}
from diffusers.utils.torch_utils import randn_tensor

GAMMA = {gamma!r}


class FlowMatchGammaScheduler(FlowMatchEulerDiscreteScheduler):
    """Goes to (1 - GAMMA) of the next noise level, then adds the noise that is missing."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **unused):
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, upper = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        self._step_index += 1
        lower = upper * (1 - GAMMA)
        moved = sample.float() + (lower - sigma) * model_output.float()
        if upper > 0:
            noise = randn_tensor(moved.shape, generator=generator, device=moved.device, dtype=moved.dtype)
            kept = (1 - upper) / (1 - lower)
            moved = kept * moved + (upper**2 - (kept * lower) ** 2).clamp(min=0).sqrt() * noise
        moved = moved.to(model_output.dtype)
        return (moved,) if not return_dict else {{"prev_sample": moved}}


class {name}({stock}):
    def register_modules(self, **modules):
        if "scheduler" in modules:
            modules["scheduler"] = FlowMatchGammaScheduler.from_config(modules["scheduler"].config)
        super().register_modules(**modules)
'''
PARTS = re.compile(r"import FlowMatchEulerDiscreteScheduler, (\w+)\n.*\nGAMMA = (0\.\d+|\d\.?\d*e-\d+)\n", re.DOTALL)


def class_name(stock: str) -> str:
    """What the pipeline file calls its class, after the stock one."""
    return f"Gamma{stock}"


def source(stock: str, gamma: float) -> str:
    """The pipeline file for a stock pipeline class, by name, and a `gamma` between 0 and 1."""
    return TEMPLATE.format(stock=stock, name=class_name(stock), gamma=gamma)


def own_class(folder: Path, *, as_teacher: bool = True) -> Any:
    """The class of a pipeline folder whose index names its own `pipeline.py`; None for a folder that names none.

    The class loads the folder with `from_pretrained` and no trust in anything that lies there. Raises UserError where the
    file is not one that fastgen writes, and, `as_teacher`, where its network has to be told where a step ends.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    name, path = index["_class_name"], folder / FILE
    if not (isinstance(name, list) and name[:1] == [path.stem]):
        return None
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    if (told := mean_velocity_file.written(text)) is not None and is_stock(told[0]) and name[1:] == [told[1]]:
        if as_teacher:
            raise UserError(f"{folder} is distilled already: its network is told where a step ends as well as where it begins")
        return _made(text, *told)
    found = PARTS.search(text)
    stock, gamma = found.groups() if found else ("", "0")
    if text != source(stock, float(gamma)) or not is_stock(stock) or name[1:] != [class_name(stock)]:
        raise UserError(
            f"{path} is code that comes with the pipeline, not what fastgen writes for samplers of its own, and is not run; "
            "export the run again, or load the folder with diffusers if you trust it"
        )
    return _made(source(stock, float(gamma)), stock, class_name(stock))


def is_stock(name: str) -> bool:
    """Whether diffusers has a pipeline class of this name."""
    import diffusers

    found = getattr(diffusers, name, None)
    return isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)


@cache
def _made(text: str, stock: str, name: str) -> Any:
    names: dict[str, Any] = {"__name__": __name__}
    exec(text, names)  # The text of one of our modules, not of the folder.
    made = names[name]
    plain = made.load_config

    def load_config(*args: Any, **kwargs: Any) -> Any:
        """As if the index named no file, which diffusers would ask to be trusted."""
        answer = plain(*args, **kwargs)
        for each in answer if isinstance(answer, tuple) else (answer,):
            if isinstance(each, dict) and "_class_name" in each:
                each["_class_name"] = stock
        return answer

    made.load_config = staticmethod(load_config)
    return made
