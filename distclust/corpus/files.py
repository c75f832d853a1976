"""Files by path or URL: opening one, and the error for one that breaks off."""

from __future__ import annotations

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
