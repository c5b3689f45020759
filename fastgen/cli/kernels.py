"""`--attention`: the kernel that a command's network samples with."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from fastgen.cli.options import say
from fastgen.config import Attention, DataConfig
from fastgen.errors import UserError
from fastgen.schema import nearest

if TYPE_CHECKING:
    from torch import nn

FLAG = "--attention"


def add_attention(parser: argparse.ArgumentParser) -> None:
    about = "kernel of attention: auto, xformers, flash, sage, ...; default: native, torch's own"
    parser.add_argument(FLAG, default="native", metavar="NAME", help=about)


def set_attention(args: argparse.Namespace, networks: Iterable[nn.Module]) -> None:
    """Give each network the kernel that is asked for. Raises UserError where it cannot be had."""
    if args.attention not in get_args(Attention):
        raise UserError(f"{FLAG} {args.attention}: there is no such kernel{nearest(args.attention, get_args(Attention))}")
    if args.attention == "native":
        return
    from fastgen.attention.inference import settle_at_first_call

    cache = DataConfig().cache
    for network in {id(each): each for each in networks}.values():
        settle_at_first_call(
            network,
            args.attention,
            where=f"{FLAG} {args.attention}",
            cache=None if cache is None else Path(cache),
            say=lambda line: say(args, line),
        )
