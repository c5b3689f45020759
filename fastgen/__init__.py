"""Distil any diffusers pipeline into a student that needs 1 to 4 network calls.

Importing this package is cheap: nothing heavy (torch, diffusers) is loaded until one of its modules is.
"""

from __future__ import annotations

import logging

# Where bitsandbytes is installed, peft imports it, and on some CPUs it asks for a kernel package that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["__version__"]
