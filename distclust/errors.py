"""What can go wrong for a user, one sentence each.

Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistclustError(Exception):
    """The base of every error that a user can mend; the command line prints it without a trace."""


class ConfigError(DistclustError, ValueError):
    """A recipe or an override that cannot be run."""


class DataError(DistclustError, ValueError):
    """Documents, shards or a vocabulary that cannot be used as they are."""


class CheckpointError(DistclustError, ValueError):
    """A checkpoint that is damaged or belongs to another run."""


class NonFiniteError(DistclustError, FloatingPointError):
    """A loss or gradient became NaN or infinite; nothing was updated with it."""


class ClusterError(DistclustError, RuntimeError):
    """The cluster cannot give what was asked, or its nodes cannot see what they need."""


class TrackingError(DistclustError, RuntimeError):
    """The tracking server cannot be used."""


def nearest(name: str, names: Iterable[str]) -> str:
    """How a message on an unknown name ends: `; did you mean 'x'?` when something is near, else the list."""
    names = sorted(names)
    return near(name, names) or f"; expected one of: {', '.join(names)}"


def near(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` when one of the names is near, else nothing."""
    found = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
