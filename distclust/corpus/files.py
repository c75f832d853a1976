"""Files by path or URL: opening one, and the error for one that breaks off."""

from __future__ import annotations

import glob
import io
import os
from typing import IO, Any
from zipfile import ZipFile

import fsspec
import fsspec.utils

from distclust.errors import DataError

# What reads an ending only where a package is there; without it the packed bytes would pass for the text.
_PACKAGES = {".zst": "zstandard", ".lz4": "lz4"}


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


def open_binary(path: str) -> IO[bytes]:
    """Open a path or URL for reading bytes."""
    return fsspec.open(path, "rb").open()


def is_packed(path: str) -> bool:
    """Whether `open_unpacked` unpacks the file: its bytes are not those of the file.

    Raises:
        DataError: as `open_unpacked`.
    """
    return _unpacking(path).compression is not None


def open_unpacked(path: str) -> IO[bytes]:
    """Open a path or URL for reading bytes, unpacked where the ending says that it is packed.

    Raises:
        DataError: the package that unpacks it is not installed, or a zip file holds several files.
    """
    opening = _unpacking(path)
    if opening.compression == "zip":  # fsspec would read the first file of it, and no other
        with open_binary(path) as packed:
            names = ZipFile(packed).namelist()
        if len(names) != 1:
            raise DataError(
                f"{path} holds {len(names)} files ({', '.join(names[:3])}{', ...' if names[3:] else ''}); "
                "expected one; unpack it and give its files."
            )
    file = opening.open()
    # zstandard's reader has no lines
    packed_raw = opening.compression is not None and not isinstance(file, io.BufferedIOBase)
    return io.BufferedReader(file) if packed_raw else file


def _unpacking(path: str) -> Any:
    """fsspec's way of opening the file, which knows how it is packed."""
    opening = fsspec.open(path, "rb", compression="infer")
    package = _PACKAGES.get(os.path.splitext(opening.path)[1].lower())
    if package is not None and opening.compression is None:
        raise DataError(
            f"{path} is packed in a way that nothing here can read; expected the package {package}; "
            f"install it (pip install {package}), or unpack the file or pack it with gzip."
        )
    return opening


def without_packing(path: str) -> str:
    """The path without an ending such as ``.gz``, in capitals or not."""
    stem, ending = os.path.splitext(path)
    packed = fsspec.utils.infer_compression(path) is not None or ending.lower() in _PACKAGES
    return stem if packed else path


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
