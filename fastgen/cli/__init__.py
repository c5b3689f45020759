"""The command `fastgen`: one module per subcommand, imported only when it is the one that runs.

Exit status: 0 done; 2 a mistake of the user's, said in one line; 130 and 143 after SIGINT and SIGTERM; 1 a fault of ours.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from fastgen import __version__
from fastgen.errors import UserError
from fastgen.schema import nearest

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "quickstart":    "the whole story on a laptop CPU: distil the shipped teacher, export, evaluate, report",
    "distill":       "train a few-step student as a TOML file describes",
    "plan":          "memory of a run, role by role and at its peak, before any weight is read",
    "sample":        "pictures from a run or an export",
    "export":        "turn a run into a folder, LoRA or checkpoint that other programs load",
    "eval":          "measure a run, an export or a teacher",
    "sweep":         "step-quality curves of students and teacher, with an HTML report",
    "compare":       "is one model better than another: paired by prompt and seed, with its significance",
    "viz":           "what a model predicts at each step; the teacher's first steps for diversity",
    "methods":       "the distillation methods; one of them explained, with a starter config",
    "pipelines":     "the model families; what fastgen sees in one pipeline",
    "doctor":        "what this machine can do, and what is wrong with its installation",
    "train-teacher": "train the teacher of the toy world anew",
}
NOT_OURS = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG)
EVAL_EXTRA = ("matplotlib", "open_clip", "torch_fidelity", "torchvision")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def parser(chosen: str | None) -> Parser:
    """The parser with the arguments of the chosen command only, so that no other command's module is imported."""
    about = "Distil any diffusers pipeline into a student that needs 1 to 4 steps."
    root = Parser(prog="fastgen", description=about, allow_abbrev=False)
    root.add_argument("--version", action="version", version=f"fastgen {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, line in COMMANDS.items():
        sub = commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".", allow_abbrev=False)
        if name == chosen:
            command_module(name).add_arguments(sub)
    return root


def command_module(name: str):  # type: ignore[no-untyped-def]  # a module with add_arguments(parser) and run(args) -> int
    return importlib.import_module(f"fastgen.cli.{name.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, terminated)
        status = guarded(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `fastgen methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)


def guarded(argv: list[str]) -> int:
    """`dispatch`, with what it raises told in words and turned into an exit status."""
    try:
        return dispatch(argv)
    except UserError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except SystemExit as stop:  # --help, --version, SIGTERM
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        users = users_mistake(error)
        if users:
            return complain(users)
        traceback.print_exc()
        print("error: this is a fault of fastgen's, not yours; please report it with the lines above", file=sys.stderr)
        return 1


def dispatch(argv: list[str]) -> int:
    chosen = next((each for each in argv if not each.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        raise UserError(f"there is no command '{chosen}'{nearest(chosen, COMMANDS)}")
    root = parser(chosen)
    args, unknown = root.parse_known_args(argv)
    if "overrides" in args:  # argparse takes one run of positionals; those after an option are left
        args.overrides += [each for each in unknown if not each.startswith("-")]
        unknown = [each for each in unknown if each.startswith("-")]
    if unknown:
        options = root._subparsers._group_actions[0].choices[chosen]._option_string_actions if chosen else {}  # type: ignore
        raise UserError(f"unknown argument '{unknown[0]}'{nearest(unknown[0].split('=')[0], options)}")
    if args.command is None:
        root.print_help()
        return 0
    if args.offline:  # read when the hub's clients are imported, which no module has done yet
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    if args.quiet:
        os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return command_module(args.command).run(args)


def terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)


def complain(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def users_mistake(error: Exception) -> str | None:
    """One sentence for exceptions that are nobody's bug: a full or forbidden disk, memory that ran out."""
    if isinstance(error, OSError) and error.errno in NOT_OURS:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name in EVAL_EXTRA:
        return f"{error.name} is not installed, which this command needs; pip install 'fastgen-diffusion[eval]'"
    if type(error).__name__ == "OutOfMemoryError":
        return "the device ran out of memory; a lower batch, more micro_batches, or LoRA need less"
    return None
