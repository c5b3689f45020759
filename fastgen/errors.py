"""The one exception that means "the user can put this right"."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake of the user's, in one clear sentence: what was wrong, where (file, key, value), what would be right.

    The command line prints it as `error: ...` on standard error, without a traceback, and exits with status 2. Anything else
    that escapes is a fault of ours.
    """
