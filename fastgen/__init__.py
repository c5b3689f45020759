"""Distil any diffusers pipeline into a student that needs 1 to 4 network calls.

Importing this package is cheap: nothing heavy (torch, diffusers) is loaded until one of its modules is.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]
