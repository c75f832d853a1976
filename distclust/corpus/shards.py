"""The corpus folder on disk: writer and verifying reader.

A corpus is a folder of Arrow IPC files, one record batch each and uncompressed, so that a reader maps them
into memory without a copy. ``manifest.json`` is written last: a folder without one is half-written and is
never read as a whole one. The manifest names every shard with its size and sha256, and both are checked
before a shard's first use in a process, with what a step relies on (sorted unique indices in range, finite
values).
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distclust.corpus import cache
from distclust.corpus.files import is_url
from distclust.corpus.manifest import MANIFEST, Manifest, ShardInfo
from distclust.corpus.rows import (
    RowCounts,
    conform,
    corpus_schema,
    dense_array,
    one_batch,
    sparse_arrays,
    validate_batch,
    validate_rows,
)
from distclust.errors import ConfigError, DataError

log = logging.getLogger(__name__)

__all__ = [
    "MANIFEST",
    "Corpus",
    "Manifest",
    "RowCounts",
    "ShardConfig",
    "ShardInfo",
    "ShardRows",
    "ShardWriter",
    "clear_unfinished",
    "conform",
    "corpus_schema",
    "shard_name",
    "validate_rows",
    "write_manifest",
    "write_shard",
]

_UNFINISHED = ".writing-"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """How a corpus is cut into files."""

    rows_per_shard: int = 16384
    """Documents in a file. Smaller files shuffle at a finer grain, larger ones mean fewer files to open."""

    def __post_init__(self) -> None:
        rows = self.rows_per_shard
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ConfigError(
                f"shards.rows_per_shard is {rows!r}; expected a whole number of at least 1: correct it."
            )


def shard_name(number: int) -> str:
    """File name of the shard in place ``number``."""
    return f"shard-{number:05d}.arrow"


def write_shard(
    path: str | os.PathLike[str], table: pa.Table | pa.RecordBatch, n_features: int | None = None
) -> ShardInfo:
    """Write one shard, whole or not at all, and return its manifest entry.

    Args:
        path: a file path or fsspec URL; its last part becomes ``ShardInfo.file``.
        table: rows with the columns of :func:`corpus_schema`; sparse when there is an ``indices`` column.
        n_features: columns of the corpus, to check the indices against.

    Raises:
        DataError: invalid rows, or the file could not be written (a full disk); nothing is left behind.
    """
    where = os.fspath(path)
    kind = "sparse" if "indices" in table.schema.names else "dense"
    return _write_batch(where, one_batch(conform(table, kind, n_features, where), where))


def _write_batch(where: str, batch: pa.RecordBatch) -> ShardInfo:
    with _replacing(where) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
    stored = len(batch.column("values").flatten())
    name = PurePosixPath(where.replace(os.sep, "/")).name
    return ShardInfo(file=name, rows=len(batch), nonzeros=stored, sha256=digest, bytes=size)


def write_manifest(root: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write ``manifest.json``, atomically: from here on the folder is a corpus."""
    where = cache.join(root, MANIFEST)
    manifest.check(where)
    if manifest.n_rows == 0:
        raise DataError(
            f"{root} would have no documents; expected at least one: check what it is prepared from."
        )
    with _replacing(where) as temporary:
        temporary.write_text(manifest.to_json(), encoding="utf-8")


@contextmanager
def _replacing(where: str) -> Iterator[Path]:
    """A temporary path whose file takes the place of ``where`` on leaving, synced; removed on an error."""
    remote = is_url(where)
    folder = tempfile.gettempdir() if remote else os.path.dirname(where) or "."
    temporary = Path(folder) / f"{_UNFINISHED}{uuid.uuid4().hex}"
    try:
        os.makedirs(folder, exist_ok=True)
        yield temporary
        if remote:
            cache.upload(temporary, where)
        else:
            cache.sync(temporary)
            os.replace(temporary, where)
            cache.sync(folder)
    except OSError as error:
        raise DataError(
            f"cannot write {where}: {error}. Nothing was left there: "
            "free some space, or choose another folder."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes a corpus folder from tables of any size, one shard at a time.

    Args:
        root: folder or fsspec URL. Shards that an unfinished run left there are removed; a finished corpus is
            refused.
        kind: "sparse" or "dense".
        n_features: columns.
        rows_per_shard: see :class:`ShardConfig`.

    Memory: the rows of one shard and of one table given to :meth:`write`.
    """

    def __init__(
        self, root: str | os.PathLike[str], kind: str, n_features: int, rows_per_shard: int = 16384
    ) -> None:
        self.root = os.fspath(root)
        self.config = ShardConfig(rows_per_shard=rows_per_shard)
        self.schema = corpus_schema(kind, n_features)
        self.kind, self.n_features = kind, n_features
        self.counts = RowCounts()
        self.shards: list[ShardInfo] = []
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._rows_seen = 0
        clear_unfinished(self.root)

    def write(self, table: pa.Table | pa.RecordBatch) -> None:
        """Add rows. A missing ``id`` column becomes the row number in the corpus."""
        if isinstance(table, pa.RecordBatch):
            table = pa.Table.from_batches([table])
        if "id" not in table.column_names:
            numbers = pa.array(range(self._rows_seen, self._rows_seen + len(table))).cast(pa.string())
            table = table.append_column("id", numbers)
        where = f"rows {self._rows_seen} to {self._rows_seen + len(table) - 1}"
        table = conform(table, self.kind, self.n_features, where)
        self._rows_seen += len(table)
        self._pending.append(table)
        self._pending_rows += len(table)
        while self._pending_rows >= self.config.rows_per_shard:
            self._flush(self.config.rows_per_shard)

    def finish(self, manifest_extra: dict[str, Any] | None = None) -> Manifest:
        """Write the last shard and the manifest.

        Args:
            manifest_extra: further fields of :class:`Manifest` (``row_scale``, ``source_fingerprint``, ...).

        Raises:
            DataError: when no rows were written.
        """
        if self._pending_rows:
            self._flush(self._pending_rows)
        manifest = Manifest(
            **{
                "kind": self.kind,
                "n_features": self.n_features,
                "n_rows": sum(s.rows for s in self.shards),
                "n_nonzeros": sum(s.nonzeros for s in self.shards),
                "shards": tuple(self.shards),
                "dtypes": {f.name: str(f.type) for f in self.schema},
                **self.counts.as_manifest(),
                **(manifest_extra or {}),
            }
        )
        write_manifest(self.root, manifest)
        return manifest

    def _flush(self, n_rows: int) -> None:
        rows = pa.concat_tables(self._pending)
        rest = rows.slice(n_rows)
        self._pending, self._pending_rows = ([rest] if len(rest) else []), len(rest)
        where = cache.join(self.root, shard_name(len(self.shards)))
        batch = one_batch(rows.slice(0, n_rows), where)
        self.shards.append(_write_batch(where, batch))
        self.counts = self.counts + RowCounts.of(batch)


def clear_unfinished(root: str | os.PathLike[str]) -> None:
    """Make ``root`` ready to be written: remove what an unfinished run left, refuse a finished corpus.

    Raises:
        DataError: ``root`` holds a whole corpus.
    """
    try:
        names = cache.list_names(root)
    except FileNotFoundError:
        names = []
    except NotADirectoryError as error:
        raise DataError(f"{root} is a file; expected a folder to make: choose another.") from error
    if MANIFEST in names:
        raise DataError(
            f"{root} already holds a corpus; expected an empty folder: choose another, or remove it."
        )
    for name in names:
        if name.startswith(_UNFINISHED) or (name.startswith("shard-") and name.endswith(".arrow")):
            cache.remove(cache.join(root, name))


# Reading ----------------------------------------------------------------------------------------------------


class ShardRows:
    """The rows of one shard, mapped: the arrays are read-only views of the file and keep it open.

    Attributes:
        n_rows: rows.
        offsets: (n + 1,) int32, sparse only, as are
        indices: (nnz,) int32 and
        values: (nnz,) float32.
        dense: (n, n_features) float32, dense only.
    """

    def __init__(self, batch: pa.RecordBatch, kind: str, n_features: int, where: str) -> None:
        self._batch = batch
        self.n_rows = len(batch)
        self.offsets: NDArray[np.int32] | None = None
        self.indices: NDArray[np.int32] | None = None
        self.values: NDArray[np.float32] | None = None
        self.dense: NDArray[np.float32] | None = None
        if kind == "sparse":
            self.offsets, self.indices, self.values = sparse_arrays(batch, where)
        else:
            self.dense = dense_array(batch, n_features, where)

    def ids(self) -> list[str]:
        """(n,) document ids."""
        return self._batch.column("id").to_pylist()

    def labels(self) -> list[list[str]]:
        """(n,) lists of labels; only documents with exactly one are scored."""
        return self._batch.column("labels").to_pylist()

    def titles(self) -> list[str | None]:
        """(n,) first lines of at most 120 characters."""
        return self._batch.column("title").to_pylist()


class Corpus:
    """A prepared corpus, opened for reading. Use :meth:`open`.

    A row number is a document's place in the concatenation of the shards in manifest order.
    """

    def __init__(self, root: str, manifest: Manifest, config: cache.CacheConfig | None = None) -> None:
        self.root = root
        self.manifest = manifest
        self.kind = manifest.kind
        self.n_rows = manifest.n_rows
        self.n_features = manifest.n_features
        self.shard_rows: NDArray[np.int64] = np.array([s.rows for s in manifest.shards], dtype=np.int64)
        self.shard_starts: NDArray[np.int64] = np.concatenate(
            [np.zeros(1, np.int64), np.cumsum(self.shard_rows)]
        )
        self._real_root = os.path.realpath(root)
        self._cache = cache.ShardCache(root, manifest.fingerprint, config) if is_url(root) else None

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str],
        *,
        verify: bool = False,
        cache_config: cache.CacheConfig | None = None,
    ) -> Corpus:
        """Open the corpus at ``root``.

        Args:
            root: a folder, or an fsspec URL whose shards are copied to local disk on first use.
            verify: read and check every shard now, not when it is first used.
            cache_config: where and how remote shards are kept.

        Raises:
            DataError: no corpus, a half-written one, a damaged manifest or shard (named).
        """
        text = os.fspath(root)
        corpus = cls(text, Manifest.load(text), cache_config)
        if corpus._cache is None:
            for info in corpus.manifest.shards:
                corpus._local_path(info)
        if verify:
            for number in range(len(corpus.shard_rows)):
                corpus.shard(number)
        return corpus

    def shard(self, number: int) -> ShardRows:
        """Map a shard. Its sha256 and rows are checked the first time in this process, its size every time.

        A damaged local copy of a remote shard is fetched again, once.

        Raises:
            DataError: the file is missing, truncated or changed, or is no shard of this corpus.
        """
        info = self.manifest.shards[number]
        for first in (True, False):
            # Of a cached copy the open file, then the map that is made of it, holds the lock that keeps it.
            with self._open_file(info) as file:
                try:
                    path, changed = file.name, os.fstat(file.fileno()).st_mtime_ns
                    _check_shard(path, changed, info, self.kind, self.n_features)
                    return ShardRows(_map_batch(file), self.kind, self.n_features, path)
                except DataError as error:
                    if self._cache is None or not first:
                        raise
                    log.warning("the local copy of a shard is damaged and is fetched again: %s", error)
            self._cache.discard(info.file)
        raise AssertionError("the second pass returns or raises")

    @property
    def remote(self) -> bool:
        """Whether shards are copied to this machine before they are mapped."""
        return self._cache is not None

    def fetch(self, number: int) -> None:
        """Make a shard quick to open: copied to this machine, on its way into memory, checked.

        Raises:
            DataError: as :meth:`shard` does.
        """
        info = self.manifest.shards[number]
        with self._open_file(info) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            changed = os.fstat(file.fileno()).st_mtime_ns
            _check_shard(file.name, changed, info, self.kind, self.n_features)

    @property
    def room(self) -> int:
        """How many shards of the largest size fit into the cache of a remote corpus."""
        largest = max((info.bytes for info in self.manifest.shards), default=1)
        return len(self.shard_rows) if self._cache is None else self._cache.config.max_bytes // largest

    def _open_file(self, info: ShardInfo) -> BinaryIO:
        if self._cache is not None:
            return self._cache.open(info.file, info.bytes, info.sha256)
        return open(self._local_path(info), "rb")

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) shard numbers and (n,) places in them of the rows (n,)."""
        shards = np.searchsorted(self.shard_starts, rows, side="right") - 1
        return shards, rows - self.shard_starts[shards]

    def read_file(self, name: str) -> bytes | None:
        """The bytes of a small file of the corpus (``vocabulary.json``), or None where there is none."""
        try:
            return cache.read_bytes(cache.join(self.root, name))
        except FileNotFoundError:
            return None

    def _local_path(self, info: ShardInfo) -> str:
        """Where the shard of a local corpus lies, with its size checked."""
        path = os.path.join(self.root, info.file)
        real = os.path.realpath(path)
        if os.path.commonpath([real, self._real_root]) != self._real_root:
            raise DataError(
                f"{path} is a link out of the corpus folder (to {real}); expected a file in it: "
                "copy the file there."
            )
        try:
            size = os.stat(path).st_size
        except FileNotFoundError:
            raise DataError(
                f"the shard {path} is missing; the manifest lists it: "
                "copy the whole folder, or prepare it again."
            ) from None
        if size != info.bytes:
            raise DataError(f"the shard {path} has {size} bytes; expected {info.bytes}: {_DAMAGED}")
        return path


_DAMAGED = (
    "it is truncated or was changed; copy it again, or prepare the corpus again "
    "(distclust prepare --overwrite)."
)


@lru_cache(maxsize=1 << 16)
def _check_shard(path: str, mtime_ns: int, info: ShardInfo, kind: str, n_features: int) -> None:
    """Hash the file and check its rows, once for each state of it (an exception is not remembered)."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != info.sha256:
            raise DataError(f"the shard {path} has sha256 {digest}; expected {info.sha256}: {_DAMAGED}")
        batch = _map_batch(file)
    _check_schema(batch.schema, corpus_schema(kind, n_features), path)
    try:
        batch.validate(full=True)  # bounds of every buffer and offset, before anything reads through them
    except pa.ArrowInvalid as error:
        raise DataError(f"the shard {path} is not valid Arrow data ({error}): {_DAMAGED}") from None
    if len(batch) != info.rows:
        raise DataError(f"the shard {path} has {len(batch)} rows; expected {info.rows}: {_DAMAGED}")
    if batch.get_total_buffer_size() > info.bytes:
        raise DataError(
            f"the shard {path} is compressed; expected plain buffers, to be mapped: prepare it again."
        )
    validate_batch(batch, kind, n_features, path)
    stored = len(batch.column("values").flatten())
    if stored != info.nonzeros:
        raise DataError(f"the shard {path} has {stored} values; expected {info.nonzeros}: {_DAMAGED}")


def _check_schema(found: pa.Schema, wanted: pa.Schema, path: str) -> None:
    """Exactly the listed columns and types; extension types are refused, known to Arrow or not."""
    marked = any(b"ARROW:extension:name" in (f.metadata or {}) for f in found)
    if marked or not found.equals(wanted):
        columns = ", ".join(f"{f.name}: {f.type}" for f in found)
        expected = ", ".join(f"{f.name}: {f.type}" for f in wanted)
        extension = " (with extension types)" if marked else ""
        raise DataError(
            f"the shard {path} has columns {columns}{extension}; expected {expected}: prepare it again."
        )


def _map_batch(file: BinaryIO) -> pa.RecordBatch:
    """The one record batch of a file, mapped.

    Its rows are read in random order, so the map is filled at once: a file that is not in memory is then read
    from end to end, and not page by page.
    """
    path = file.name
    try:
        if hasattr(mmap, "MAP_POPULATE"):
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            mapping = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
        else:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(mapping))
        batches = [reader.get_batch(i) for i in range(min(2, reader.num_record_batches))]
    except (ValueError, OSError) as error:
        raise DataError(f"the shard {path} cannot be read ({error}): {_DAMAGED}") from error
    if len(batches) != 1:
        raise DataError(
            f"the shard {path} has {reader.num_record_batches} record batches; expected 1: prepare it again."
        )
    return batches[0]
