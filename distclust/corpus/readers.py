"""File formats: how a file is cut into pieces, and how a piece is read in blocks of bounded size.

Where a file is cut depends on the file alone, never on the machine that reads it.
"""

from __future__ import annotations

import itertools
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from distclust.corpus import synthetic
from distclust.corpus.arrays import Arrays, load_made, load_npz
from distclust.corpus.files import is_packed, open_binary, open_unpacked, unreadable
from distclust.errors import DataError

BLOCK_ROWS = 2048
"""Rows of one block at most."""
SPLIT_ROWS = 16_384
"""Rows of one piece, about."""
SPLIT_BYTES = 16 << 20
"""Bytes of one piece of a JSONL file, about."""
# A row group is decoded from its start for each piece of it, so it is cut into few.
_PIECES_OF_ROW_GROUP = 4
_SAMPLE_LINES = 100
# What libraries raise for a file that breaks off or is damaged; pyarrow's own errors are ValueErrors.
_BROKEN = (OSError, ValueError, KeyError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".npz": "npz",
}
"""Format by ending; ``.jsonl`` and ``.csv`` may be followed by ``.gz`` and whatever else fsspec unpacks."""
MADE = "made"
"""The format of sets that are computed: their path is an address of `synthetic`."""
IMAGE = b"image"
"""Key in a schema's metadata: channels, height and width of rows that are images, as ``1,28,28``."""


class Split(NamedTuple):
    """A piece of a file, small enough to send to any node."""

    path: str
    """A path, an fsspec URL, or the address of a set that is made."""
    format: str
    """One of the values of `FORMATS`, or `MADE`."""
    part: int
    """Row group of a Parquet file, else 0."""
    start: int
    """First row (of the row group, or of the file); for JSONL the first byte."""
    stop: int
    """Row after the last; for JSONL the byte after the last; -1 for the end of the file."""
    first_row: int
    """Row of the file that the piece begins with; -1 where it is not known without reading."""


class Block(NamedTuple):
    """Some consecutive rows as the file has them."""

    columns: pa.RecordBatch
    first: int
    """Row of the file (or of the piece, where ``Split.first_row`` is -1) of the first one."""


def is_made(path: str) -> bool:
    """Whether the path is the address of a set that is computed."""
    return path.startswith(synthetic.SCHEME)


def schema_of(path: str, format_: str, named: Sequence[str] = ()) -> pa.Schema:
    """Column names and types; those of CSV are all text, those of JSONL are guessed from some of its lines.

    Args:
        path: of the file.
        format_: one of the values of `FORMATS`.
        named: columns that somebody asked for: in JSONL, whose lines may leave one out, they are looked for
            to the end of the file, others in its first 16 MB.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        if format_ == "parquet":
            with open_binary(path) as file:
                return pq.ParquetFile(file).schema_arrow
        if format_ == "arrow":
            with open_binary(path) as file:
                return _arrow_reader(file).schema
        if format_ == "csv":
            with open_unpacked(path) as file:
                names = pa.csv.open_csv(file, parse_options=_CSV_PARSE).schema.names
                return pa.schema([(name, pa.string()) for name in names])
        if format_ in _ARRAYS:
            arrays = _ARRAYS[format_](path)
            schema = _npz_block(arrays, 0, 0).schema
            if arrays.image is None:
                return schema
            return schema.with_metadata({IMAGE: ",".join(map(str, arrays.image)).encode()})
        return _batch_of_records(_json_sample(path, named), None, path).schema
    except DataError:
        raise
    except _BROKEN as error:
        raise unreadable(path, format_, error) from error


def plan(path: str, format_: str, limit: int | None = None) -> tuple[list[Split], int | None]:
    """Cut a file into pieces.

    Args:
        path: of the file.
        format_: one of the values of `FORMATS`.
        limit: leave out the rows after the first ``limit``.

    Returns:
        The pieces, and how many rows they have, or ``None`` where that is not known without reading (JSONL
        and CSV without a limit).
    """
    try:
        if format_ == "parquet":
            return _plan_parquet(path, limit)
        if format_ == "jsonl":
            return _plan_jsonl(path, limit)
        if format_ == "csv":
            rows = None if limit is None else sum(1 for _ in itertools.islice(_csv_rows(path), limit))
            return [Split(path, format_, 0, 0, -1 if rows is None else rows, 0)], rows
        rows = _arrow_rows(path) if format_ == "arrow" else _ARRAYS[format_](path).n_rows
    except DataError:
        raise
    except _BROKEN as error:
        raise unreadable(path, format_, error) from error
    rows = rows if limit is None else min(rows, limit)
    return [Split(path, format_, 0, a, b, a) for a, b in _ranges(rows, -(-rows // SPLIT_ROWS))], rows


def read(split: Split, columns: Sequence[str]) -> Iterator[Block]:
    """The rows of a piece, in order, in blocks of at most `BLOCK_ROWS`, with these columns.

    Raises:
        DataError: the file breaks off or a line cannot be parsed; the message names it.
    """
    readers = {
        "parquet": _read_parquet,
        "jsonl": _read_jsonl,
        "csv": _read_csv,
        "arrow": _read_arrow,
        "npz": _read_npz,
        MADE: _read_npz,
    }
    try:
        yield from readers[split.format](split, list(columns))
    except DataError:
        raise
    except _BROKEN as error:
        raise unreadable(split.path, split.format, error) from error


def _ranges(rows: int, pieces: int) -> list[tuple[int, int]]:
    edges = [rows * i // max(pieces, 1) for i in range(max(pieces, 1) + 1)]
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]


def _clipped(batches: Iterator[pa.RecordBatch], start: int, stop: int, base: int) -> Iterator[Block]:
    """Rows [start, stop) of consecutive batches, the first of which begins at row 0."""
    at = 0
    for batch in batches:
        if stop >= 0 and at >= stop:
            return
        low = max(start - at, 0)
        high = batch.num_rows if stop < 0 else min(batch.num_rows, stop - at)
        for row in range(low, high, BLOCK_ROWS):
            yield Block(batch.slice(row, min(BLOCK_ROWS, high - row)), base + at + row)
        at += batch.num_rows


# ---- Parquet


def _plan_parquet(path: str, limit: int | None) -> tuple[list[Split], int]:
    with open_binary(path) as file:
        metadata = pq.ParquetFile(file).metadata
    splits, rows = [], 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        size = size if limit is None else min(size, limit - rows)
        for a, b in _ranges(size, min(-(-size // SPLIT_ROWS), _PIECES_OF_ROW_GROUP)):
            splits.append(Split(path, "parquet", group, a, b, rows + a))
        rows += size
    return splits, rows


def _read_parquet(split: Split, columns: list[str]) -> Iterator[Block]:
    with open_binary(split.path) as file:
        # one thread: the pieces are what runs side by side
        batches = pq.ParquetFile(file).iter_batches(
            BLOCK_ROWS, row_groups=[split.part], columns=columns, use_threads=False
        )
        try:
            yield from _clipped(batches, split.start, split.stop, split.first_row - split.start)
        except pa.ArrowInvalid as error:
            if "Expected all lists to be of size" not in str(error):
                raise
            raise DataError(  # Arrow reads no null there, and cannot say which row it is
                f"{split.path}: among the rows from {split.first_row} on, one has no list (null) in a column "
                "of fixed-size lists; expected numbers in each row; fill it in, or leave the row out."
            ) from error


# ---- Arrow IPC, as a file or as a stream


def _arrow_reader(file: IO[bytes]) -> Any:
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_stream(file)


def _arrow_batches(file: IO[bytes]) -> Iterator[pa.RecordBatch]:
    reader = _arrow_reader(file)
    if isinstance(reader, pa.RecordBatchFileReader):
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(reader)


def _arrow_rows(path: str) -> int:
    with open_binary(path) as file:
        return sum(batch.num_rows for batch in _arrow_batches(file))


def _read_arrow(split: Split, columns: list[str]) -> Iterator[Block]:
    with open_binary(split.path) as file:
        batches = (batch.select(columns) for batch in _arrow_batches(file))
        yield from _clipped(batches, split.start, split.stop, 0)


# ---- CSV

_CSV_PARSE = pa.csv.ParseOptions(newlines_in_values=True)


def _csv_batches(path: str, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    with open_unpacked(path) as file:
        names = pa.csv.open_csv(file, parse_options=_CSV_PARSE).schema.names
    with open_unpacked(path) as file:
        yield from pa.csv.open_csv(
            file,
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=SPLIT_BYTES),
            parse_options=_CSV_PARSE,
            convert_options=pa.csv.ConvertOptions(
                include_columns=columns or names[:1],
                column_types={name: pa.string() for name in names},
                null_values=[""],
                strings_can_be_null=True,
            ),
        )


def _csv_rows(path: str) -> Iterator[None]:
    for batch in _csv_batches(path, None):
        yield from [None] * batch.num_rows


def _read_csv(split: Split, columns: list[str]) -> Iterator[Block]:
    return _clipped(_csv_batches(split.path, columns), 0, split.stop, 0)


# ---- JSONL


def _json_lines(file: IO[bytes], path: str, start: int, stop: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Records of the lines that begin in [start, stop), and the byte after each."""
    if start:
        file.seek(start - 1)
        file.readline()  # the rest of a line that began in the piece before
    at = file.tell() if start else 0
    for line in file:
        if 0 <= stop <= at:
            return
        at += len(line)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: the line before byte {at} is not JSON ({error}); expected one JSON object a line; "
                "mend or drop the line."
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path}: the line before byte {at} holds a {type(record).__name__}; expected one JSON "
                "object a line, "
                'such as {"text": ...}; write it so.'
            )
        yield record, at


def _json_sample(path: str, named: Sequence[str]) -> list[dict[str, Any]]:
    """The first records, and of those behind them what has a column that none before it had."""
    sample: list[dict[str, Any]] = []
    seen: set[str] = set()
    with open_unpacked(path) as file:
        for number, (record, at) in enumerate(_json_lines(file, path, 0, -1)):
            if number < _SAMPLE_LINES or not record.keys() <= seen:
                sample.append(record)
                seen |= record.keys()
            if number >= _SAMPLE_LINES and at > SPLIT_BYTES and seen.issuperset(named):
                break
    return sample


def _plan_jsonl(path: str, limit: int | None) -> tuple[list[Split], int | None]:
    # one piece: its size says nothing of the text's, and each piece would unpack it from the start
    packed = is_packed(path)
    if limit is not None:
        splits, row, first, at, end = [], 0, 0, 0, 0
        with open_unpacked(path) as file:
            for row, (_, end) in enumerate(itertools.islice(_json_lines(file, path, 0, -1), limit), 1):
                if row - first == SPLIT_ROWS and not packed:
                    splits.append(Split(path, "jsonl", 0, at, end, first))
                    first, at = row, end
        return splits + ([Split(path, "jsonl", 0, at, end, first)] if row > first else []), row
    if packed:
        return [Split(path, "jsonl", 0, 0, -1, 0)], None
    with open_binary(path) as file:
        size = file.seek(0, 2)
    return [
        Split(path, "jsonl", 0, a, b, -1 if a else 0) for a, b in _ranges(size, -(-size // SPLIT_BYTES))
    ], None


def _batch_of_records(records: list[dict[str, Any]], columns: list[str] | None, path: str) -> pa.RecordBatch:
    names = columns if columns is not None else sorted({name for record in records for name in record})
    arrays = []
    for name in names:
        values = [record.get(name) for record in records]
        try:
            try:
                arrays.append(pa.array(values))
            except UnicodeEncodeError:
                arrays.append(pa.array([_encodable(value) for value in values]))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(
                f"{path}: column {name!r} does not hold one type ({str(error).splitlines()[0]}); expected "
                "the same type in each line; make them all text, or all numbers, or all lists."
            ) from error
    return pa.RecordBatch.from_arrays(arrays, names=names)


def _encodable(value: Any) -> Any:
    """What JSON may hold and UTF-8 may not, half of a sign beyond 16 bits, becomes "?", as in texts that are
    served: it separates words as any other sign does."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_encodable(name): _encodable(item) for name, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list) else value


def _read_jsonl(split: Split, columns: list[str]) -> Iterator[Block]:
    with open_unpacked(split.path) as file:
        records: list[dict[str, Any]] = []
        first = max(split.first_row, 0)
        for record, _ in _json_lines(file, split.path, split.start, split.stop):
            records.append(record)
            if len(records) == BLOCK_ROWS:
                yield Block(_batch_of_records(records, columns, split.path), first)
                first, records = first + len(records), []
        if records:
            yield Block(_batch_of_records(records, columns, split.path), first)


# ---- NumPy archives, and rows that are made

_ARRAYS: dict[str, Callable[[str], Arrays]] = {"npz": load_npz, MADE: load_made}


def _npz_block(arrays: Arrays, start: int, stop: int) -> pa.RecordBatch:
    columns: dict[str, pa.Array] = {}
    if arrays.csr is not None:
        indptr, indices, data = arrays.csr
        low, high = indptr[start], indptr[stop]
        offsets = pa.array((indptr[start : stop + 1] - low).astype(np.int32))
        columns["indices"] = pa.ListArray.from_arrays(offsets, pa.array(indices[low:high]))
        columns["values"] = pa.ListArray.from_arrays(offsets, pa.array(data[low:high]))
    elif arrays.dense is not None:
        rows = np.ascontiguousarray(arrays.dense[start:stop]).reshape(-1)
        columns["x"] = pa.FixedSizeListArray.from_arrays(pa.array(rows), arrays.n_features)
    if arrays.labels is not None:
        columns["y"] = pa.array(arrays.labels[start:stop])
    return pa.RecordBatch.from_pydict(columns)


def _read_npz(split: Split, columns: list[str]) -> Iterator[Block]:
    arrays = _ARRAYS[split.format](split.path)
    for row in range(split.start, split.stop, BLOCK_ROWS):
        yield Block(_npz_block(arrays, row, min(row + BLOCK_ROWS, split.stop)).select(columns), row)
