"""Files by path or URL: opening one, and the error for one that breaks off."""

from __future__ import annotations

import glob
import os
from typing import IO

import fsspec

from distclust.errors import DataError


def unreadable(path: str, format_: str, error: Exception) -> DataError:
    """The error for a file that breaks off or is not what its name says."""
    return DataError(
        f"{path} cannot be read as {format_} "
        f"({str(error).strip().splitlines()[0] if str(error) else repr(error)}); expected a whole file: it "
        "may be truncated, still being written, or of another format; write it again or set source.format."
    )


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether the path names a remote file system ("s3://...", "memory://..."), for fsspec."""
    return "://" in os.fspath(path)


def open_binary(path: str, compression: str | None = None) -> IO[bytes]:
    """Open a path or URL for reading bytes."""
    return fsspec.open(path, "rb", compression=compression).open()


def find_files(patterns: tuple[str, ...]) -> list[str]:
    """The files that paths, patterns and URLs name, in this order, those of a pattern by name.

    Raises:
        DataError: nothing is there, it is a folder, or a file is named twice.
    """
    found: list[str] = []
    for pattern in patterns:
        if is_url(pattern):
            fs, path = fsspec.core.url_to_fs(pattern)
            try:
                matches = (
                    [fs.unstrip_protocol(match) for match in sorted(fs.glob(path))]
                    if "*" in path
                    else ([pattern] if fs.exists(path) else [])
                )
            except OSError as error:
                raise DataError(
                    f"{pattern} cannot be listed ({error}); check the address and the rights."
                ) from error
        else:
            plain = os.path.expanduser(pattern)
            matches = [plain] if os.path.exists(plain) else sorted(glob.glob(plain, recursive=True))
        if not matches:
            raise DataError(
                f"{pattern} was not found (seen from {os.getcwd()}); expected a file or a pattern that "
                "matches files; check source.files."
            )
        for match in matches:
            if os.path.isdir(match):
                raise DataError(
                    f"{match} is a folder; expected files; give a pattern such as "
                    f"{match.rstrip('/')}/*.parquet."
                )
        found += matches
    twice = sorted({file for file in found if found.count(file) > 1}) if len(set(found)) < len(found) else []
    if twice:
        raise DataError(
            f"{twice[0]} is named twice in source.files; expected each file once; drop one of them."
        )
    return found
