"""What is done to one part of a collection; `prepare` says to which parts, and where.

Pass 1 reads a piece of the source, counts its terms in a vocabulary of its own and writes three work files:
``part`` (the rows), ``terms`` (document frequency and count of each local term) and ``ids`` (hashes, to find
repeats). The global vocabulary comes from the ``terms`` files; pass 2 cuts the ``part`` files into shards,
without the text. Every function here runs the same in a Ray task and in a plain loop.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from distclust.corpus.files import is_url
from distclust.corpus.shards import RowCounts, shard_name, write_shard
from distclust.corpus.sources import Source
from distclust.corpus.vocabulary import (
    VOCABULARY_FILE,
    Vocabulary,
    VocabularyConfig,
    count_block,
    remap,
    tfidf_scores,
)
from distclust.errors import ClusterError

STAGED = "new"
"""Folder in the work folder where the corpus is put together before it takes its place."""
HOLDER = "holder.json"
"""File in the work folder that says who works there."""
CANDIDATES = "candidates.json"
"""Vocabulary of all terms that pass min_df and max_df, in the work folder while words are ranked by
TF-IDF."""
_MERGE_ROWS = 4_000_000


@dataclass(frozen=True, slots=True)
class Job:
    """What every task of one preparation needs to know; small enough to send with each."""

    source: Source
    work: str
    """The work folder, which every node must see."""
    config: VocabularyConfig | None
    fixed: bool
    """The vocabulary was given, and stands in the staged folder from the beginning."""
    scale: float = 1.0
    """Row scale of input that is not weighed."""
    rows_per_shard: int = 0
    part_rows: tuple[int, ...] = ()
    """Rows of each part; known after pass 1, as are"""
    n_columns: int = 0
    """how many columns sparse input has, and"""
    n_features: int = 0
    """how many the corpus gets."""

    @property
    def weighed(self) -> bool:
        """Whether rows are counts that a vocabulary weighs."""
        return self.source.kind == "text" or self.source.layout.values_are == "counts"

    def path(self, name: str, part: int, ending: str = "arrow") -> str:
        """A work file of a part."""
        return os.path.join(self.work, f"{name}-{part:06d}.{ending}")


def _check_storage(job: Job, files: tuple[str, ...] = ()) -> None:
    for path in (os.path.join(job.work, HOLDER), *files):
        if not is_url(path) and not os.path.exists(path):
            raise ClusterError(
                f"The node {socket.gethostname()} cannot see {path}; expected storage that all nodes share; "
                "put the documents and the corpus folder on such storage, or prepare on one machine."
            )


# ---- pass 1


def count_part(job: Job, part: int) -> dict[str, Any]:
    """Read one piece of the source and write its work files.

    Returns:
        ``rows``, ``max_index`` (sparse; -1 without entries) and ``width`` (dense) of the part.
    """
    split = job.source.splits[part]
    _check_storage(job, (split.path,))
    vocabulary = _vocabulary_of(job) if job.fixed else None
    terms = _LocalTerms(words=job.source.kind == "text")
    rows, max_index, width = 0, -1, 0
    digests: list[bytes] = []
    with _table_writer(job.path("part", part)) as write:
        for table in job.source.read_split(split):
            rows += len(table)
            if not job.source.numbered:
                digests += [hash_id(name) for name in table["id"].to_pylist()]
            if job.source.kind == "dense":
                width = table.schema.field("values").type.list_size
                write(table)
                continue
            if job.source.kind == "text":
                assert job.config is not None
                block = count_block(table["text"], job.config)
                if vocabulary is not None:
                    matrix = remap(*block[:3], vocabulary.places(block.terms), vocabulary.n_features)
                    indptr, indices, values = matrix.indptr, matrix.indices, matrix.data
                else:
                    indptr, indices, values = block.indptr, terms.add_words(block), block.counts
                table = table.drop_columns(["text"])
            else:
                indptr, indices, values = csr_of(table.combine_chunks().to_batches()[0])
                max_index = max(max_index, int(indices.max(initial=-1)))
                if job.weighed and vocabulary is None:
                    terms.add_columns(indices, values)
            table = table.select(["id", "labels", "title"])
            offsets = pa.array(indptr.astype(np.int32))
            table = table.append_column("indices", pa.ListArray.from_arrays(offsets, pa.array(indices)))
            write(table.append_column("values", pa.ListArray.from_arrays(offsets, pa.array(values))))
    if job.weighed and vocabulary is None:
        with _table_writer(job.path("terms", part)) as write:
            write(terms.table())
    if digests:
        np.save(job.path("ids", part, "npy"), np.frombuffer(b"".join(digests), np.uint64))
    return {"part": part, "rows": rows, "max_index": max_index, "width": width}


def hash_id(name: str) -> bytes:
    """8 bytes that stand for an id."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


class _LocalTerms:
    """The terms of one part in the order of their first appearance, with document frequencies and counts."""

    def __init__(self, words: bool) -> None:
        self.words = words
        self.places: dict[str, int] = {}
        self.df = np.zeros(0, np.int64)
        self.tf = np.zeros(0, np.int64)

    def _grow(self, size: int) -> None:
        if size > len(self.df):
            size = max(size, 2 * len(self.df))
            self.df = np.concatenate([self.df, np.zeros(size - len(self.df), np.int64)])
            self.tf = np.concatenate([self.tf, np.zeros(size - len(self.tf), np.int64)])

    def add_words(self, block: Any) -> np.ndarray:
        """Take in a block's counts and return its indices in this part's vocabulary; (nnz,) int32."""
        places = self.places
        mapping = np.fromiter(
            (places.setdefault(term, len(places)) for term in block.terms), np.int32, len(block.terms)
        )
        self._grow(len(places))
        size = len(block.terms)
        self.df[mapping] += np.bincount(block.indices, minlength=size)
        # weights are summed in float64, exactly so for whole numbers
        self.tf[mapping] += np.bincount(block.indices, weights=block.counts, minlength=size).astype(np.int64)
        return mapping[block.indices]

    def add_columns(self, indices: np.ndarray, counts: np.ndarray) -> None:
        """Take in rows that came as counts."""
        size = int(indices.max(initial=-1)) + 1
        self._grow(size)
        self.df[:size] += np.bincount(indices, minlength=size)
        self.tf[:size] += np.rint(np.bincount(indices, weights=counts, minlength=size)).astype(np.int64)

    def table(self) -> pa.Table:
        """term (words as large strings, columns as int32), df, tf."""
        if self.words:
            names, used = pa.array(list(self.places), pa.large_string()), np.arange(len(self.places))
        else:
            used = np.flatnonzero(self.df)
            names = pa.array(used.astype(np.int32))
        return pa.table({"term": names, "df": self.df[used], "tf": self.tf[used]})


def merge_terms(job: Job) -> pa.Table:
    """All parts' terms as one table (term, df, tf), sorted by term as Python sorts text."""
    pending: list[pa.Table] = []
    for part in range(len(job.part_rows)):
        pending.append(_read_table(job.path("terms", part)))
        if len(pending) > 1 and sum(map(len, pending)) > _MERGE_ROWS:
            pending = [_summed(pending)]
    # UTF-8 sorts by bytes as text sorts by code points
    return _summed(pending).sort_by("term")


def _summed(tables: list[pa.Table]) -> pa.Table:
    summed = pa.concat_tables(tables).group_by("term").aggregate([("df", "sum"), ("tf", "sum")])
    return summed.select(["term", "df_sum", "tf_sum"]).rename_columns(["term", "df", "tf"])


# ---- between the passes: words ranked by summed TF-IDF


def rank_part(job: Job, part: int) -> dict[str, Any]:
    """Write the summed TF-IDF of each candidate over one part (``scores``: place, score)."""
    _check_storage(job)
    candidates = _load(os.path.join(job.work, CANDIDATES), _stamp(os.path.join(job.work, CANDIDATES)))
    mapping = _mapping(job, part, candidates)
    assert mapping is not None
    total = np.zeros(candidates.n_features, np.int64)
    for batch in _batches(job.path("part", part)):
        counts = remap(*csr_of(batch), mapping, candidates.n_features)
        total += tfidf_scores(counts, candidates.idf, candidates.config)
    places = np.flatnonzero(total)
    with _table_writer(job.path("scores", part)) as write:
        write(pa.table({"place": places, "score": total[places]}))
    return {"part": part}


def merge_scores(job: Job, n_candidates: int) -> np.ndarray:
    """The scores summed over the parts; (n_candidates,) int64."""
    total = np.zeros(n_candidates, np.int64)
    for part in range(len(job.part_rows)):
        table = _read_table(job.path("scores", part))
        total[table["place"].to_numpy()] += table["score"].to_numpy()
    return total


# ---- pass 2


def write_part_of_corpus(job: Job, number: int) -> dict[str, Any]:
    """Write one shard from the rows of the parts that it covers.

    Returns:
        ``shard`` (the fields of ``ShardInfo``), ``counts`` and ``classes``.
    """
    _check_storage(job)
    start = number * job.rows_per_shard
    bounds = np.concatenate([[0], np.cumsum(job.part_rows)])
    stop = min(start + job.rows_per_shard, int(bounds[-1]))
    vocabulary = _vocabulary_of(job) if job.weighed else None
    tables = []
    for part in np.flatnonzero((bounds[1:] > start) & (bounds[:-1] < stop)).tolist():
        mapping = None if vocabulary is None else _mapping(job, part, vocabulary)
        low, high = max(start - int(bounds[part]), 0), min(stop, int(bounds[part + 1])) - int(bounds[part])
        for batch in _batches(job.path("part", part), low, high):
            tables.append(_finished(job, batch, vocabulary, mapping))
    table = pa.concat_tables(tables)
    # made anew, so that the bytes do not tell where one part ended and the next began
    for place, name in enumerate(("id", "labels", "title")):
        values = table[name].to_pylist()
        if name == "id" and job.source.numbered:
            values = [str(row) for row in range(start, stop)]
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    info = write_shard(os.path.join(job.work, STAGED, shard_name(number)), table, job.n_features)
    counts = RowCounts.of(table)
    return {
        "number": number,
        "shard": asdict(info),
        "counts": {**asdict(counts), "classes": sorted(counts.classes)},
    }


def _finished(
    job: Job, batch: pa.RecordBatch, vocabulary: Vocabulary | None, mapping: np.ndarray | None
) -> pa.Table:
    """Rows of a work file as a shard has them."""
    head = {name: batch.column(name) for name in ("id", "labels", "title")}
    if job.source.kind == "dense":
        values = batch.column("values")
        flat = values.flatten().to_numpy() * np.float32(job.scale)
        return pa.table(head | {"values": pa.FixedSizeListArray.from_arrays(pa.array(flat), job.n_features)})
    if vocabulary is None:
        indptr, indices, numbers = csr_of(batch)
        numbers = numbers.astype(np.float32) * np.float32(job.scale)
    else:
        indptr, indices, numbers = csr_of(batch)
        if mapping is None:
            counts = sparse.csr_matrix((numbers, indices, indptr), shape=(len(batch), vocabulary.n_features))
        else:
            counts = remap(indptr, indices, numbers, mapping, vocabulary.n_features)
        rows = vocabulary.weigh(counts)
        indptr, indices, numbers = rows.indptr, rows.indices, rows.data
    offsets = pa.array(indptr.astype(np.int32))
    lists = {
        "indices": pa.ListArray.from_arrays(offsets, pa.array(indices.astype(np.int32))),
        "values": pa.ListArray.from_arrays(offsets, pa.array(numbers)),
    }
    return pa.table(head | lists)


def _vocabulary_of(job: Job) -> Vocabulary:
    path = os.path.join(job.work, STAGED, VOCABULARY_FILE)
    return _load(path, _stamp(path))


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns


@functools.lru_cache(maxsize=2)
def _load(path: str, stamp: tuple[int, int]) -> Vocabulary:
    return Vocabulary.load(path)


def _mapping(job: Job, part: int, vocabulary: Vocabulary) -> np.ndarray | None:
    """Place in the vocabulary for each index of a part's rows, -1 for none; None where they are places
    already."""
    if job.source.kind == "text":
        return None if job.fixed else vocabulary.places(_read_table(job.path("terms", part))["term"])
    columns = np.array([int(term) for term in vocabulary.terms], np.int64)
    mapping = np.full(max(job.n_columns, int(columns.max(initial=-1)) + 1), -1, np.int32)
    mapping[columns] = np.arange(len(columns), dtype=np.int32)
    return mapping


# ---- work files


@contextmanager
def _table_writer(path: str) -> Iterator[Any]:
    """A function that appends tables to an Arrow IPC file, which is there only if all went well."""
    partial = f"{path}.{os.getpid()}.part"
    writer: Any = None

    def write(table: pa.Table) -> None:
        nonlocal writer
        if writer is None:
            writer = pa.ipc.new_file(partial, table.schema)
        writer.write_table(table.combine_chunks())

    try:
        yield write
        if writer is not None:
            writer.close()
            os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _batches(path: str, start: int = 0, stop: int | None = None) -> Iterator[pa.RecordBatch]:
    """Rows [start, stop) of a work file, mapped into memory; none where the part had no rows."""
    if not os.path.exists(path):
        return
    with pa.memory_map(path) as file:
        reader = pa.ipc.open_file(file)
        at = 0
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            low, high = max(start - at, 0), batch.num_rows if stop is None else min(stop - at, batch.num_rows)
            if high > low:
                yield batch.slice(low, high - low)
            at += batch.num_rows


def _read_table(path: str) -> pa.Table:
    with pa.memory_map(path) as file:
        return pa.ipc.open_file(file).read_all()


def csr_of(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n + 1,) row bounds from 0, (nnz,) indices and values of the list columns, sliced or not."""
    lists = batch.column("indices")
    offsets = lists.offsets.to_numpy() if len(lists) else np.zeros(1, np.int32)
    return offsets - offsets[0], lists.flatten().to_numpy(), batch.column("values").flatten().to_numpy()


def find_repeats(job: Job) -> tuple[str, list[str], int] | None:
    """An id that several documents have, the files they are in, and how many ids are repeated; None if there
    is none."""
    hashes = [np.load(path) for path in _id_files(job)]
    if not hashes:
        return None
    merged = np.sort(np.concatenate(hashes))
    suspects = {value.tobytes() for value in np.unique(merged[1:][merged[1:] == merged[:-1]])}
    del merged, hashes
    if not suspects:
        return None
    seen: dict[str, list[str]] = {}
    for part, split in enumerate(job.source.splits):
        for batch in _batches(job.path("part", part)):
            for name in batch.column("id").to_pylist():
                if hash_id(name) in suspects:
                    seen.setdefault(name, []).append(split.path)
    repeated = [name for name, files in seen.items() if len(files) > 1]  # two ids may share a hash
    return (repeated[0], seen[repeated[0]], len(repeated)) if repeated else None


def _id_files(job: Job) -> Iterator[str]:
    for part in range(len(job.source.splits)):
        path = job.path("ids", part, "npy")
        if os.path.exists(path):
            yield path


def unique_terms(column: pa.ChunkedArray) -> tuple[str, ...]:
    """A column of terms, words or column numbers, as text."""
    return tuple(pc.cast(column, pa.large_string()).to_pylist())
