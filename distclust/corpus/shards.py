"""The corpus folder on disk: schema, manifest, writer and verifying reader.

A corpus is a folder of Arrow IPC files, one record batch each and uncompressed, so that a reader maps them into
memory without a copy. ``manifest.json`` is written last: a folder without one is half-written and is never read
as a whole one. The manifest names every shard with its size and sha256, and both are checked before a shard's
first use in a process, together with what a step relies on (sorted unique indices in range, finite values).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distclust.corpus import cache
from distclust.errors import ConfigError, DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
KINDS = ("sparse", "dense")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard as the manifest lists it."""

    file: str
    """Path relative to the corpus folder."""
    rows: int
    nonzeros: int
    """Stored values: non-zeros of a sparse shard, rows x features of a dense one."""
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What ``manifest.json`` says of a corpus."""

    version: int = FORMAT_VERSION
    kind: str
    """"sparse" or "dense"."""
    n_rows: int
    n_features: int
    n_nonzeros: int
    row_scale: float = 1.0
    """The factor that the stored values already contain."""
    shards: tuple[ShardInfo, ...]
    counts: dict[str, int] = field(default_factory=dict)
    """documents, empty, unlabelled, multi_labelled."""
    dtypes: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    """The distinct labels of documents that have exactly one, sorted."""
    source_fingerprint: str = ""
    vocabulary_fingerprint: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what defines the data: two corpora with the same one train the same model."""
        defining = {
            "kind": self.kind,
            "n_features": self.n_features,
            "row_scale": self.row_scale,
            "shards": [[s.sha256, s.rows] for s in self.shards],
            "vocabulary": self.vocabulary_fingerprint,
        }
        return hashlib.sha256(json.dumps(defining, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, root: str | os.PathLike[str]) -> Manifest:
        """Read and check the manifest of the corpus at ``root`` (a folder or an fsspec URL).

        Raises:
            DataError: no corpus there, a half-written one, or a damaged manifest.
        """
        where = _join(root, MANIFEST)
        try:
            text = cache.read_bytes(where)
        except FileNotFoundError:
            raise DataError(_no_manifest(root)) from None
        except OSError as error:
            raise DataError(f"cannot read {where}: {error}. Check that this machine may read it.") from error
        return cls.parse(text, where)

    @classmethod
    def parse(cls, text: bytes | str, where: str = MANIFEST) -> Manifest:
        """The manifest in ``text``; ``where`` is named in errors."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where} is not readable JSON ({error}). {_AGAIN}") from None
        if not isinstance(raw, dict) or raw.get("version") != FORMAT_VERSION:
            found = raw.get("version") if isinstance(raw, dict) else type(raw).__name__
            raise DataError(
                f"{where} has format version {found!r}; expected {FORMAT_VERSION}: "
                "prepare the corpus again with this version of distclust."
            )
        try:
            shards = tuple(ShardInfo(**s) for s in raw.pop("shards"))
            manifest = cls(**{**raw, "shards": shards, "classes": tuple(raw.pop("classes", ()))})
        except (KeyError, TypeError) as error:
            raise DataError(f"{where} lacks a field or has an unknown one ({error}). {_AGAIN}") from None
        manifest._check(where)
        return manifest

    def _check(self, where: str) -> None:
        def refuse(found: str) -> DataError:
            return DataError(f"{where}: {found}. {_AGAIN}")

        if self.kind not in KINDS:
            raise refuse(f"kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        counts = [("n_rows", self.n_rows, 0), ("n_features", self.n_features, 1), ("n_nonzeros", self.n_nonzeros, 0)]
        for shard in self.shards:
            if not isinstance(shard.file, str) or not _stays_inside(shard.file):
                raise refuse(f"the shard path {shard.file!r} leaves the corpus folder; expected a plain relative name")
            counts += [(f"{shard.file}: {f}", getattr(shard, f), 0) for f in ("rows", "nonzeros", "bytes")]
            if not isinstance(shard.sha256, str) or len(shard.sha256) != 64:
                raise refuse(f"{shard.file} has sha256 {shard.sha256!r}; expected 64 hexadecimal digits")
        for name, value, least in counts:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise refuse(f"{name} is {value!r}; expected a whole number of at least {least}")
        if len({s.file for s in self.shards}) != len(self.shards):
            raise refuse("a shard is listed twice; expected each file once")
        for name, total, parts in (
            ("n_rows", self.n_rows, sum(s.rows for s in self.shards)),
            ("n_nonzeros", self.n_nonzeros, sum(s.nonzeros for s in self.shards)),
        ):
            if total != parts:
                raise refuse(f"{name} is {total} but the shards add up to {parts}")


_AGAIN = "The folder is damaged: prepare the corpus again."


def _no_manifest(root: str | os.PathLike[str]) -> str:
    try:
        names = cache.list_names(root)
    except OSError:
        names = None
    if names is None:
        return f"there is no folder {root}; expected a prepared corpus: check the path, or run `distclust prepare`."
    if any(name.endswith(".arrow") for name in names):
        return (
            f"{root} has shards but no {MANIFEST}: preparing it did not finish, and it is not read as a whole one. "
            "Run the same `distclust prepare` again."
        )
    return f"{root} has no {MANIFEST}, so it is no corpus: check the path, or run `distclust prepare`."


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = bool(name) and "\\" not in name and ":" not in name and "\0" not in name
    return plain and not path.is_absolute() and ".." not in path.parts and path.name not in ("", ".")


def _join(root: str | os.PathLike[str], name: str) -> str:
    text = os.fspath(root)
    return f"{text.rstrip('/')}/{name}" if cache.is_url(text) else os.path.join(text, name)


# The rows of a shard ----------------------------------------------------------------------------------------


def corpus_schema(kind: str, n_features: int) -> pa.Schema:
    """The Arrow schema of a shard; ``n_features`` is the width of dense rows."""
    text = [
        pa.field("id", pa.string()),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("title", pa.string()),
    ]
    if kind == "dense":
        return pa.schema([*text, pa.field("values", pa.list_(pa.float32(), n_features))])
    if kind == "sparse":
        numbers = [pa.field("indices", pa.list_(pa.int32())), pa.field("values", pa.list_(pa.float32()))]
        return pa.schema([*text, *numbers])
    raise DataError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}: correct it.")


def validate_rows(
    offsets: NDArray[np.integer[Any]],
    indices: NDArray[np.integer[Any]],
    values: NDArray[np.floating[Any]],
    n_features: int | None,
    where: str,
) -> None:
    """Check CSR rows before anything relies on them.

    Args:
        offsets: (n + 1,) row bounds.
        indices, values: (nnz,).
        n_features: columns; None leaves the upper bound of the indices unchecked.
        where: what the rows are, for the message (a file name).

    Raises:
        DataError: naming the first bad row: unequal lengths, an index out of range, repeated or out of order, or
            a value that is NaN or infinite.
    """

    def row_of(position: int) -> int:
        return int(np.searchsorted(offsets, position, side="right")) - 1

    if len(offsets) == 0 or offsets[0] != 0 or (len(offsets) > 1 and bool((offsets[1:] < offsets[:-1]).any())):
        raise DataError(f"{where}: the list offsets are damaged. Write the file again.")
    if len(indices) != len(values) or offsets[-1] != len(indices):
        raise DataError(
            f"{where}: {len(indices)} indices and {len(values)} values; expected one value for each index: "
            "correct the two columns."
        )
    if len(indices) == 0:
        return
    top = n_features if n_features is not None else 1 << 31
    if indices.min() < 0 or indices.max() >= top:
        at = int(np.flatnonzero((indices < 0) | (indices >= top))[0])
        raise DataError(
            f"{where}: row {row_of(at)} has index {int(indices[at])}; expected 0 to {top - 1} "
            f"for {top} features: correct the row or the number of features."
        )
    rising = indices[1:] > indices[:-1]
    bounds = offsets[1:-1]
    bounds = bounds[(bounds > 0) & (bounds < len(indices))]
    rising[bounds - 1] = True  # a row may start anywhere
    if not rising.all():
        at = int(np.flatnonzero(~rising)[0]) + 1
        repeated = indices[at] == indices[at - 1]
        raise DataError(
            f"{where}: row {row_of(at)} has {'the repeated' if repeated else 'the unsorted'} index "
            f"{int(indices[at])} (after {int(indices[at - 1])}); expected strictly rising indices within a row: "
            f"{'add up the values of equal indices' if repeated else 'sort each row by index'}."
        )
    validate_finite(values, where, row_of)


def validate_finite(values: NDArray[np.floating[Any]], where: str, row_of: Any) -> None:
    """Raise DataError for a NaN or infinite value; ``row_of`` turns a flat position into a row number."""
    if np.isfinite(values).all():
        return
    at = int(np.flatnonzero(~np.isfinite(values))[0])
    raise DataError(
        f"{where}: row {row_of(at)} has the value {float(values[at])}; expected finite numbers: "
        "remove the document or correct the value."
    )


def conform(table: pa.Table | pa.RecordBatch, kind: str, n_features: int | None, where: str = "rows") -> pa.Table:
    """The table in the schema of a shard, checked.

    Integer and floating lists of other widths are converted, as are large lists and strings; absent ``labels``
    and ``title`` columns are filled in. ``n_features=None`` is for sparse rows whose width is not known yet.

    Raises:
        DataError: a column is missing, has another type or holds nulls, or the numbers are not valid rows.
    """
    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    if kind == "dense" and n_features is None:
        n_features = _dense_width(table, where)
    schema = corpus_schema(kind, n_features or 0)
    columns = []
    for wanted in schema:
        if wanted.name in table.column_names:
            column = table.column(wanted.name)
        elif wanted.name == "labels":
            column = pa.chunked_array([pa.array([[]] * len(table), wanted.type)])
        elif wanted.name == "title":
            column = pa.chunked_array([pa.nulls(len(table), wanted.type)])
        else:
            raise DataError(
                f"{where}: no column {wanted.name!r} (columns: {', '.join(table.column_names)}); "
                f"expected one of type {wanted.type}: name the column."
            )
        columns.append(_cast(column, wanted, where))
    out = pa.Table.from_arrays(columns, schema=schema).combine_chunks()
    _validate_batch(one_batch(out, where), kind, n_features, where)
    return out


def one_batch(table: pa.Table, where: str) -> pa.RecordBatch:
    """The table as a single record batch."""
    batches = table.combine_chunks().to_batches()
    if len(batches) > 1:
        raise DataError(f"{where}: too large for one shard; use fewer rows per shard.")
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _dense_width(table: pa.Table, where: str) -> int:
    kind = table.schema.field("values").type if "values" in table.column_names else None
    if kind is None or not pa.types.is_fixed_size_list(kind):
        raise DataError(f"{where}: column 'values' is {kind}; expected a fixed-size list: give the rows one width.")
    return int(kind.list_size)


def _cast(column: pa.ChunkedArray, wanted: pa.Field, where: str) -> pa.ChunkedArray:
    name, found = wanted.name, column.type
    if not _castable(found, wanted.type):
        raise DataError(f"{where}: column {name!r} is {found}; expected {wanted.type}: convert the column.")
    if name == "labels" and column.null_count:
        column = pc.fill_null(column, pa.scalar([], type=found))
    if name != "title" and column.null_count:
        row = pc.index(pc.is_null(column), pa.scalar(True)).as_py()
        raise DataError(f"{where}: row {row} has no {name} (null); expected {wanted.type}: fill in the column.")
    if found == wanted.type:
        return column
    try:
        # A float64 beyond float32's range becomes infinite here and is refused by the check that follows.
        return column.cast(wanted.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{where}: column {name!r} ({found}) does not fit {wanted.type}: {error}") from error


def _castable(found: pa.DataType, wanted: pa.DataType) -> bool:
    def is_list(t: pa.DataType) -> bool:
        return pa.types.is_list(t) or pa.types.is_large_list(t)

    if pa.types.is_fixed_size_list(wanted):
        return (
            pa.types.is_fixed_size_list(found)
            and found.list_size == wanted.list_size
            and _castable(found.value_type, wanted.value_type)
        )
    if is_list(wanted):
        return is_list(found) and _castable(found.value_type, wanted.value_type)
    if pa.types.is_string(wanted):
        return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found)
    if pa.types.is_integer(wanted):
        return pa.types.is_integer(found) or pa.types.is_null(found)
    return pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_null(found)


def _sparse_arrays(
    batch: pa.RecordBatch, where: str
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """(n + 1,) offsets, (nnz,) indices, (nnz,) values: views of the batch's buffers, offsets from 0."""
    indices, values = batch.column("indices"), batch.column("values")
    offsets = _offsets(indices)
    other = _offsets(values)
    if not np.array_equal(offsets - offsets[0], other - other[0]):
        row = int(np.flatnonzero(np.diff(offsets) != np.diff(other))[0])
        raise DataError(
            f"{where}: row {row} has {offsets[row + 1] - offsets[row]} indices and {other[row + 1] - other[row]} "
            "values; expected lists of equal length: correct the two columns."
        )
    flat_indices, flat_values = indices.flatten(), values.flatten()
    for name, flat in (("indices", flat_indices), ("values", flat_values)):
        if flat.null_count:
            raise DataError(f"{where}: a list in {name!r} holds a null; expected numbers: remove it.")
    if offsets[0] != 0:
        offsets = offsets - offsets[0]
    return offsets, _numpy(flat_indices), _numpy(flat_values)


def _offsets(column: pa.ListArray) -> NDArray[np.int32]:
    if len(column) == 0:
        return np.zeros(1, np.int32)
    return _numpy(column.offsets)


def _numpy(array: pa.Array) -> NDArray[Any]:
    return array.to_numpy(zero_copy_only=True)


def _dense_array(batch: pa.RecordBatch, n_features: int, where: str) -> NDArray[np.float32]:
    flat = batch.column("values").flatten()
    if flat.null_count:
        raise DataError(f"{where}: a row holds a null; expected numbers: remove the document or fill it in.")
    return _numpy(flat).reshape(len(batch), n_features)


def _validate_batch(batch: pa.RecordBatch, kind: str, n_features: int | None, where: str) -> None:
    if kind == "sparse":
        validate_rows(*_sparse_arrays(batch, where), n_features, where)
        return
    assert n_features is not None
    dense = _dense_array(batch, n_features, where)
    validate_finite(dense.reshape(-1), where, lambda at: at // n_features)


@dataclass(slots=True)
class RowCounts:
    """Documents of each kind; the sum over shards goes into the manifest's ``counts`` and ``classes``."""

    documents: int = 0
    empty: int = 0
    unlabelled: int = 0
    multi_labelled: int = 0
    classes: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, table: pa.Table | pa.RecordBatch) -> RowCounts:
        """The counts of one table in the schema of a shard."""
        labels = table.column("labels")
        n_labels = np.asarray(pc.fill_null(pc.list_value_length(labels), 0))
        single = labels.filter(pa.array(n_labels == 1))
        classes = set(pc.unique(pc.list_flatten(single)).to_pylist()) - {None}
        values = table.column("values")
        if pa.types.is_fixed_size_list(values.type):
            flat = np.asarray(pc.list_flatten(values)).reshape(len(table), values.type.list_size)
            filled = flat.any(axis=1)
        else:
            filled = np.asarray(pc.list_value_length(values)) > 0
        return cls(
            documents=len(table),
            empty=int((~filled).sum()),
            unlabelled=int((n_labels == 0).sum()),
            multi_labelled=int((n_labels > 1).sum()),
            classes=classes,
        )

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(**{f.name: _plus(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    def as_manifest(self) -> dict[str, Any]:
        """The manifest fields ``counts`` and ``classes``."""
        counts = {k: getattr(self, k) for k in ("documents", "empty", "unlabelled", "multi_labelled")}
        return {"counts": counts, "classes": tuple(sorted(self.classes))}


def _plus(a: Any, b: Any) -> Any:
    return a | b if isinstance(a, set) else a + b


# Writing ----------------------------------------------------------------------------------------------------


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
    table = conform(table, kind, n_features, where)
    batch = one_batch(table, where)
    with _replacing(where) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_batch(batch)
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
    stored = len(batch.column("values").flatten())
    name = PurePosixPath(where.replace(os.sep, "/")).name
    return ShardInfo(file=name, rows=len(batch), nonzeros=stored, sha256=digest, bytes=size)


def write_manifest(root: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write ``manifest.json``, atomically: from here on the folder is a corpus."""
    where = _join(root, MANIFEST)
    manifest._check(where)
    if manifest.n_rows == 0:
        raise DataError(f"{root} would have no documents; expected at least one: check what it is prepared from.")
    with _replacing(where) as temporary:
        temporary.write_text(manifest.to_json(), encoding="utf-8")


@contextmanager
def _replacing(where: str) -> Iterator[Path]:
    """A temporary path whose file takes the place of ``where`` on leaving, synced; removed on an error."""
    remote = cache.is_url(where)
    folder = tempfile.gettempdir() if remote else os.path.dirname(where) or "."
    temporary: Path | None = None
    try:
        os.makedirs(folder, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".writing-", dir=folder)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        if remote:
            cache.upload(temporary, where)
        else:
            os.chmod(temporary, 0o644)
            cache.sync(temporary)
            os.replace(temporary, where)
            cache.sync(folder)
    except OSError as error:
        raise DataError(
            f"cannot write {where}: {error}. Nothing was left there: free some space or choose another folder."
        ) from error
    finally:
        if temporary is not None:
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

    def __init__(self, root: str | os.PathLike[str], kind: str, n_features: int, rows_per_shard: int = 16384) -> None:
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
        shard, rest = rows.slice(0, n_rows).combine_chunks(), rows.slice(n_rows)
        self._pending, self._pending_rows = ([rest] if len(rest) else []), len(rest)
        info = write_shard(_join(self.root, shard_name(len(self.shards))), shard, self.n_features)
        self.shards.append(info)
        self.counts = self.counts + RowCounts.of(shard)


def clear_unfinished(root: str | os.PathLike[str]) -> None:
    """Make ``root`` ready to be written: remove what an unfinished run left, refuse a finished corpus.

    Raises:
        DataError: ``root`` holds a whole corpus.
    """
    try:
        names = cache.list_names(root)
    except FileNotFoundError:
        names = []
    if MANIFEST in names:
        raise DataError(f"{root} already holds a corpus; expected an empty folder: choose another, or remove it.")
    for name in names:
        if name.startswith(".writing-") or (name.startswith("shard-") and name.endswith(".arrow")):
            cache.remove(_join(root, name))


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
            self.offsets, self.indices, self.values = _sparse_arrays(batch, where)
        else:
            self.dense = _dense_array(batch, n_features, where)

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

    def __init__(self, root: str, manifest: Manifest, cache_dir: str | None = None) -> None:
        self.root = root
        self.manifest = manifest
        self.kind = manifest.kind
        self.n_rows = manifest.n_rows
        self.n_features = manifest.n_features
        self.shard_rows: NDArray[np.int64] = np.array([s.rows for s in manifest.shards], dtype=np.int64)
        self.shard_starts: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.shard_rows)])
        self._cache = cache.ShardCache(root, manifest.fingerprint, cache_dir) if cache.is_url(root) else None

    @classmethod
    def open(cls, root: str | os.PathLike[str], *, verify: bool = False, cache_dir: str | None = None) -> Corpus:
        """Open the corpus at ``root``.

        Args:
            root: a folder, or an fsspec URL whose shards are copied to local disk on first use.
            verify: read and check every shard now, not when it is first used.
            cache_dir: where remote shards are kept; default ``$DISTCLUST_CACHE``, else ``~/.cache/distclust``.

        Raises:
            DataError: no corpus, a half-written one, a damaged manifest or shard (named).
        """
        text = os.fspath(root)
        corpus = cls(text, Manifest.load(text), cache_dir)
        if corpus._cache is None:
            for info in corpus.manifest.shards:
                corpus._local_path(info)
        if verify:
            for number in range(len(corpus.shard_rows)):
                corpus.shard(number)
        return corpus

    def shard(self, number: int) -> ShardRows:
        """Map a shard. Its sha256 and rows are checked the first time in this process, its size every time.

        Raises:
            DataError: the file is missing, truncated or changed, or is no shard of this corpus.
        """
        info = self.manifest.shards[number]
        path = self._local_path(info)
        status = os.stat(path)
        _check_shard(path, status.st_mtime_ns, info, self.kind, self.n_features)
        return _read_shard(path, info, self.kind, self.n_features)

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) shard numbers and (n,) places in them of the rows (n,)."""
        shards = np.searchsorted(self.shard_starts, rows, side="right") - 1
        return shards, rows - self.shard_starts[shards]

    def read_file(self, name: str) -> bytes | None:
        """The bytes of a small file of the corpus (``vocabulary.json``), or None where there is none."""
        try:
            return cache.read_bytes(_join(self.root, name))
        except FileNotFoundError:
            return None

    def _local_path(self, info: ShardInfo) -> str:
        """Where the shard lies on this machine, with its size checked."""
        if self._cache is not None:
            return self._cache.path(info.file, info.bytes, info.sha256)
        path = os.path.join(self.root, info.file)
        real = os.path.realpath(path)
        if os.path.commonpath([real, os.path.realpath(self.root)]) != os.path.realpath(self.root):
            raise DataError(
                f"{path} is a link out of the corpus folder (to {real}); expected a file in it: copy the file there."
            )
        try:
            size = os.stat(path).st_size
        except FileNotFoundError:
            raise DataError(
                f"the shard {path} is missing; the manifest lists it: copy the whole folder, or prepare it again."
            ) from None
        if size != info.bytes:
            raise DataError(f"the shard {path} has {size} bytes; expected {info.bytes}: {_DAMAGED}")
        return path


_DAMAGED = "it is truncated or was changed; copy it again, or prepare the corpus again."


@lru_cache(maxsize=1 << 16)
def _check_shard(path: str, mtime_ns: int, info: ShardInfo, kind: str, n_features: int) -> None:
    """Hash the file and check its rows, once for each state of it (an exception is not remembered)."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != info.sha256:
        raise DataError(f"the shard {path} has sha256 {digest}; expected {info.sha256}: {_DAMAGED}")
    batch = _map_batch(path)
    _check_schema(batch.schema, corpus_schema(kind, n_features), path)
    try:
        batch.validate(full=True)  # bounds of every buffer and offset, before anything reads through them
    except pa.ArrowInvalid as error:
        raise DataError(f"the shard {path} is not valid Arrow data ({error}): {_DAMAGED}") from None
    if len(batch) != info.rows:
        raise DataError(f"the shard {path} has {len(batch)} rows; expected {info.rows}: {_DAMAGED}")
    _validate_batch(batch, kind, n_features, path)


def _check_schema(found: pa.Schema, wanted: pa.Schema, path: str) -> None:
    """Exactly the listed columns and types; extension types are refused, known to Arrow or not."""
    marked = any(b"ARROW:extension:name" in (f.metadata or {}) for f in found)
    if marked or not found.equals(wanted):
        columns = ", ".join(f"{f.name}: {f.type}" for f in found)
        expected = ", ".join(f"{f.name}: {f.type}" for f in wanted)
        extension = " (with extension types)" if marked else ""
        raise DataError(f"the shard {path} has columns {columns}{extension}; expected {expected}: prepare it again.")


def _map_batch(path: str) -> pa.RecordBatch:
    try:
        reader = pa.ipc.open_file(pa.memory_map(path, "r"))
        if reader.num_record_batches != 1:
            raise DataError(f"the shard {path} has {reader.num_record_batches} record batches; expected 1.")
        return reader.get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"the shard {path} cannot be read ({error}): {_DAMAGED}") from error


def _read_shard(path: str, info: ShardInfo, kind: str, n_features: int) -> ShardRows:
    return ShardRows(_map_batch(path), kind, n_features, path)
