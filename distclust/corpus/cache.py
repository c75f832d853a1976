"""Local copies of remote shards, and the few file operations that work on paths and fsspec URLs alike."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from distclust.errors import DataError

log = logging.getLogger(__name__)
CACHE_VARIABLE = "DISTCLUST_CACHE"


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a remote file system ("s3://...", "memory://...")."""
    return "://" in os.fspath(path)


def join(root: str | os.PathLike[str], name: str) -> str:
    """The path or URL of ``name`` in ``root``."""
    text = os.fspath(root)
    return f"{text.rstrip('/')}/{name}" if is_url(text) else os.path.join(text, name)


def _open_fs(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"cannot reach {url}: {error}. Install the fsspec package for it or correct the URL."
        ) from None


def read_bytes(where: str | os.PathLike[str]) -> bytes:
    """The whole of a small file. Raises FileNotFoundError and other OSErrors as they come."""
    text = os.fspath(where)
    if not is_url(text):
        return Path(text).read_bytes()
    fs, path = _open_fs(text)
    return fs.cat_file(path)


def list_names(root: str | os.PathLike[str]) -> list[str]:
    """Names of the entries of a folder. Raises FileNotFoundError when there is none."""
    text = os.fspath(root)
    if not is_url(text):
        return os.listdir(text)
    fs, path = _open_fs(text)
    return [os.path.basename(entry.rstrip("/")) for entry in fs.ls(path, detail=False)]


def remove(where: str) -> None:
    """Remove one file."""
    if not is_url(where):
        os.unlink(where)
        return
    fs, path = _open_fs(where)
    fs.rm_file(path)


def upload(local: Path, url: str) -> None:
    """Copy a local file to a URL."""
    fs, path = _open_fs(url)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.put_file(str(local), path)


def sync(path: str | os.PathLike[str]) -> None:
    """Force a file or folder to disk, so that a rename after it survives a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ShardCache:
    """Copies of the shards of one remote corpus on local disk, in a folder named by the corpus fingerprint.

    A copy appears under its name only when it is whole and its sha256 is right. Several processes of one
    machine may share the folder: a lock for each shard lets one of them fetch it while the others wait.
    """

    def __init__(self, root: str, fingerprint: str, cache_dir: str | None = None) -> None:
        base = cache_dir or os.environ.get(CACHE_VARIABLE) or os.path.join(Path.home(), ".cache", "distclust")
        self.root = root.rstrip("/")
        self.folder = os.path.join(base, fingerprint[:32])
        self.fetched: list[str] = []
        """Files that this object has copied, in order."""

    def path(self, file: str, size: int, sha256: str) -> str:
        """Local path of a shard, fetched if it is not there yet.

        Raises:
            DataError: it cannot be fetched, or what arrives is not what the manifest lists.
        """
        path = os.path.join(self.folder, file)
        if _has_size(path, size):
            return path
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _lock(path + ".lock"):
            if not _has_size(path, size):
                self._fetch(f"{self.root}/{file}", path, size, sha256)
                self.fetched.append(file)
        return path

    def discard(self, file: str) -> None:
        """Forget a copy that proved damaged."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder, file))

    def _fetch(self, url: str, path: str, size: int, sha256: str) -> None:
        fs, remote = _open_fs(url)
        handle, temporary = tempfile.mkstemp(prefix=".fetching-", dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "wb") as local, fs.open(remote, "rb") as source:
                shutil.copyfileobj(source, local, 1 << 20)
            with open(temporary, "rb") as local_again:
                digest = hashlib.file_digest(local_again, "sha256").hexdigest()
            found = os.stat(temporary).st_size
            if found != size or digest != sha256:
                raise DataError(
                    f"the shard {url} arrived with {found} bytes and sha256 {digest}; expected {size} and "
                    f"{sha256}: it is truncated or was changed; upload it again, or prepare the corpus again."
                )
            os.replace(temporary, path)
        except FileNotFoundError as error:
            raise DataError(
                f"the shard {url} is missing; the manifest lists it: "
                "upload the whole folder, or prepare it again."
            ) from error
        except DataError:
            raise
        except Exception as error:  # every file system has exceptions of its own
            raise DataError(
                f"cannot copy the shard {url} to {path}: {error}. Check access to both, and the free space."
            ) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _has_size(path: str, size: int) -> bool:
    try:
        return os.stat(path).st_size == size
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    import fcntl  # not on Windows, which can still read local corpora

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
