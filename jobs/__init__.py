"""Entry points that one submits to a Ray cluster. Each is a command of `distclust`, with the checks that a
cluster needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def submit(command: str, arguments: Sequence[str], needed: Sequence[str], paths: Sequence[str]) -> int:
    """Run a command of the command line and return its exit code.

    Args:
        command: "train", "prepare" or "assign".
        arguments: of the command.
        needed: options that must be given: their defaults lie in the job's own folder, which goes with the
            job.
        paths: options whose value must be an absolute path or a URL.
    """
    given = dict(_options(arguments))
    if "--help" not in arguments:
        for option in (*needed, *paths):
            value = given.get(option)
            if value is None and option not in needed:
                continue
            if value is None or not (os.path.isabs(value) or "://" in value):
                found = "is missing" if value is None else f"is {value!r}"
                sys.stderr.write(
                    f"error: {option} {found}; expected an absolute path on storage that every node sees: a "
                    f"job's own "
                    "folder is lost with the job\n"
                )
                return 2
    from distclust.cli import app

    try:
        app([command, *arguments], prog_name="distclust")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _options(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(option, value) pairs, of `--option value` and `--option=value`."""
    found = []
    for place, word in enumerate(arguments):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            if not equals and place + 1 < len(arguments):
                value = arguments[place + 1]
            found.append((name, value))
    return found
