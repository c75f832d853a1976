"""Local copies of remote shards, and the few file operations that work on paths and fsspec URLs alike.

The cache folder may be shared by all processes of a machine. Its rules, all held by ``flock`` and so by the
kernel, which lets go of a lock when its holder dies:

* a shard appears under its name only when it is whole and its sha256 is right;
* a lock for each shard lets one process fetch it while the others wait;
* a shard that is mapped holds a shared lock on its file, and only files that nobody holds are removed;
* room is reserved before a fetch, under one lock for the folder, so the limit holds for all together.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec

from distclust.corpus.files import is_url
from distclust.errors import ConfigError, DataError

T = TypeVar("T")
log = logging.getLogger(__name__)
CACHE_VARIABLE = "DISTCLUST_CACHE"
_RESERVED = ".fetching-"
_PART, _LOCK = ".part", ".lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Local copies of a remote corpus, and how failures of the network are met. No field changes a result."""

    folder: str = ""
    """Where copies are kept; empty is ``$DISTCLUST_CACHE``, else ``~/.cache/distclust``."""
    max_bytes: int = 64 << 30
    """Bytes that all copies in the folder may take, of all corpora and processes together. It must hold what
    the workers of a machine have open at a time, lanes x windows of ``order.window`` shards, and should hold
    twice that, so that the next shards are fetched while these are read."""
    attempts: int = 5
    """How often a file is asked for before a failure that may pass (a 503, a cut transfer) is final."""
    backoff_s: float = 0.5
    """Seconds before the second attempt; doubled each time, and shortened by up to half at random."""
    max_backoff_s: float = 30.0
    """The longest of these waits."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "attempts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"cache.{name} is {value!r}; expected a whole number of at least 1: correct it."
                )
        for name in ("backoff_s", "max_backoff_s"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"cache.{name} is {value!r}; expected seconds, 0 or more: correct it.")

    @property
    def place(self) -> str:
        """The folder that holds the copies."""
        home = os.path.join(Path.home(), ".cache", "distclust")
        return os.path.join(self.folder or os.environ.get(CACHE_VARIABLE) or home, "shards")


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
    """The whole of a small file.

    Raises:
        FileNotFoundError: there is none.
        OSError: a local file cannot be read.
        DataError: a URL cannot be read: access is denied, or several attempts failed.
    """
    text = os.fspath(where)
    if not is_url(text):
        return Path(text).read_bytes()
    fs, path = _open_fs(text)
    found: bytes = retrying(lambda: fs.cat_file(path), text, CacheConfig())
    return found


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
    """Copy a local file to a URL.

    Raises:
        DataError: access is denied, or several attempts failed.
    """
    fs, path = _open_fs(url)

    def put() -> None:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        fs.put_file(str(local), path)

    retrying(put, url, CacheConfig())


def sync(path: str | os.PathLike[str]) -> None:
    """Force a file or folder to disk, so that a rename after it survives a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Failures that pass and failures that stay ------------------------------------------------------------------


def retrying(action: Callable[[], T], url: str, config: CacheConfig) -> T:
    """What ``action`` returns, tried again while its failure may pass.

    Raises:
        FileNotFoundError: as it comes: the file is not there.
        DataError: access is denied or the local disk is full (at once), or the last attempt failed.
    """
    for attempt in range(1, config.attempts + 1):
        try:
            return action()
        except (FileNotFoundError, DataError):
            raise
        except Exception as error:  # every file system has exceptions of its own
            reason = f"{type(error).__name__}: {error}"
            if _denied(error):
                raise DataError(
                    f"access to {url} is denied ({reason}); expected to be allowed to read it: check the "
                    "credentials that this machine uses (for s3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                    "a profile or the machine's role), that they may read objects and list the bucket, and "
                    "the endpoint."
                ) from error
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise DataError(
                    f"cannot copy {url}: {reason}. Free some space, lower cache.max_bytes, or choose another "
                    "cache.folder."
                ) from error
            if attempt == config.attempts:
                raise DataError(
                    f"cannot copy {url}: attempt {attempt} of {config.attempts} failed ({reason}). Check the "
                    "network and the server, then start again: what was fetched is kept."
                ) from error
            wait = min(config.backoff_s * 2 ** (attempt - 1), config.max_backoff_s) * random.uniform(0.5, 1)
            log.warning(
                "attempt %d of %d for %s failed; again in %.2f s: %s",
                attempt,
                config.attempts,
                url,
                wait,
                reason,
            )
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int:
    """The HTTP status that an error of a file system speaks of, 0 where it speaks of none."""
    for link in _chain(error):
        response = getattr(link, "response", None)  # botocore
        if isinstance(response, dict):
            code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(code, int):
                return code
        for name in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs
            code = getattr(link, name, None)
            if isinstance(code, int) and 100 <= code < 600:
                return code
    return 0


def _denied(error: BaseException) -> bool:
    no_key = any("Credential" in type(link).__name__ for link in _chain(error))
    return isinstance(error, PermissionError) or no_key or _status(error) in (401, 403)


# The cache --------------------------------------------------------------------------------------------------


class _Copy(NamedTuple):
    used_ns: int
    bytes: int
    path: str


class ShardCache:
    """Copies of the shards of one remote corpus on local disk, in a folder named by the corpus fingerprint.

    Args:
        root: URL of the corpus.
        fingerprint: of its manifest.
        config: folder, limit and retries.
    """

    def __init__(self, root: str, fingerprint: str, config: CacheConfig | None = None) -> None:
        self.config = config or CacheConfig()
        self.root = root.rstrip("/")
        self.base = self.config.place
        self.folder = os.path.join(self.base, fingerprint[:32])
        self._folder_lock = os.path.join(self.base, "folder" + _LOCK)
        self.fetched: list[str] = []
        """Files that this object has copied, in order."""

    def open(self, file: str, size: int, sha256: str) -> BinaryIO:
        """The local copy of a shard, fetched if it is not there yet.

        The file holds a shared lock, as does every map that is made of it: while one of them is open the copy
        is not removed.

        Raises:
            DataError: it cannot be fetched, what arrives is not what the manifest lists, or there is no room.
        """
        path = os.path.join(self.folder, file)
        if (found := _open_copy(path, size)) is not None:
            return found
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _lock(path + _LOCK):
            if (found := _open_copy(path, size)) is not None:
                return found
            fetched = self._fetch(f"{self.root}/{file}", path, size, sha256)
            self.fetched.append(file)
            return fetched

    def discard(self, file: str) -> None:
        """Forget a copy that proved damaged."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder, file))

    def _fetch(self, url: str, path: str, size: int, sha256: str) -> BinaryIO:
        fs, remote = _open_fs(url)
        digests: set[str] = set()
        with self._reserved(url, os.path.dirname(path), size) as part:

            def get() -> None:
                fs.get_file(remote, part)
                with open(part, "rb") as local:
                    digest = hashlib.file_digest(local, "sha256").hexdigest()
                found = os.stat(part).st_size
                if found == size and digest == sha256:
                    return
                fs.invalidate_cache()
                # Whole, and wrong: the source is another file. Else the transfer was cut, and is made again.
                if fs.size(remote) != size or (found == size and digest in digests):
                    raise DataError(
                        f"the shard {url} arrived with {found} bytes and sha256 {digest}; expected {size} "
                        f"and {sha256}: it is truncated or was changed; upload it again, or prepare the "
                        "corpus again."
                    )
                digests.add(digest)
                raise OSError(f"{found} bytes with sha256 {digest} arrived; expected {size} and {sha256}")

            try:
                retrying(get, url, self.config)
            except FileNotFoundError as error:
                raise DataError(
                    f"the shard {url} is missing; the manifest lists it: "
                    "upload the whole folder, or prepare it again."
                ) from error
            held = _open_copy(part, size)  # or it might be removed between getting its name and its use
            # Under the folder's lock: who counts meanwhile finds the reservation or the copy, never neither.
            with _lock(self._folder_lock):
                os.replace(part, path)
                _remove(part.removesuffix(_PART))
            copy = _open_copy(path, size)
        assert held is not None and copy is not None, f"{path} is held, and yet was removed"
        held.close()
        return copy

    @contextlib.contextmanager
    def _reserved(self, url: str, folder: str, size: int) -> Iterator[str]:
        """A path for a file of ``size`` bytes that is being fetched, with room made for it."""
        import fcntl

        mark = os.path.join(folder, f"{_RESERVED}{size}-{uuid.uuid4().hex}")
        with contextlib.ExitStack() as stack:
            with _lock(self._folder_lock):
                self._make_room(url, size)
                handle = stack.enter_context(open(mark, "wb"))
                fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                yield mark + _PART
            finally:
                _remove(mark + _PART)
                _remove(mark)

    def _make_room(self, url: str, size: int) -> None:
        """Remove the copies used longest ago until ``size`` bytes fit. The folder is locked."""
        copies, taken = _survey(self.base)
        over = taken + size - self.config.max_bytes
        for copy in sorted(copies):
            if over <= 0:
                return
            if _remove_unused(copy.path):
                log.info("removed %s from the cache, to make room for %s", copy.path, url)
                over -= copy.bytes
        if over > 0:
            most, used = self.config.max_bytes, self.config.max_bytes + over - size
            raise DataError(
                f"no room for {url} ({size} bytes) in the cache {self.base}: of its {most} bytes {used} are "
                f"in use by this or another process; expected {size} that are free or unused: set "
                f"cache.max_bytes to at least {most + over}, or lower order.window or shards.rows_per_shard."
            )


def _survey(base: str) -> tuple[list[_Copy], int]:
    """The copies in the cache, and the bytes that they and unfinished fetches take; dead ones are removed."""
    copies: list[_Copy] = []
    taken = 0
    for folder, _, names in os.walk(base):
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith((_LOCK, _PART)):
                continue
            if name.startswith(_RESERVED):
                if _remove_unused(path):  # nobody holds it: its process is dead
                    _remove(path + _PART)
                else:
                    taken += int(name[len(_RESERVED) :].split("-")[0])
                continue
            with contextlib.suppress(FileNotFoundError):
                state = os.stat(path)
                copies.append(_Copy(state.st_atime_ns, state.st_size, path))
                taken += state.st_size
    return copies, taken


def _open_copy(path: str, size: int) -> BinaryIO | None:
    """The file with a shared lock, marked as used now; None when it is not there, or not whole."""
    import fcntl  # not on Windows, which can still read local corpora

    try:
        file = open(path, "rb")  # noqa: SIM115  the caller closes it
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    state = os.fstat(file.fileno())
    if state.st_nlink == 0 or state.st_size != size:  # removed between the two calls above, or damaged
        file.close()
        return None
    with contextlib.suppress(OSError):  # the time of use alone: the time of change says that it was checked
        os.utime(path, ns=(time.time_ns(), state.st_mtime_ns))
    return file


def _remove_unused(path: str) -> bool:
    """Remove a file that nobody holds a lock on; whether it is gone."""
    import fcntl

    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:  # in use, or another user's
        return False
    return True


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
