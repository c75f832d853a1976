"""What a model says of documents, a block at a time: of the rows of a shard, or of new documents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse

from distclust.corpus import passes
from distclust.corpus.shards import Corpus, shard_name
from distclust.corpus.sources import Source
from distclust.errors import DataError
from distclust.results.predict import Prediction, Predictor

_ROWS = 16_384


def of_shard(predictor: Predictor, corpus: Corpus, number: int) -> Iterator[tuple[pa.Array, Prediction, int]]:
    """Ids (n,), what the model says of them and how many rows are all zeros, for each block of a shard.

    Raises:
        DataError: the shard is damaged, or the model refuses a row; the message names it.
    """
    shard = corpus.shard(number)
    ids = pa.array(shard.ids(), pa.string())

    def predict(start: int, stop: int) -> tuple[Prediction, int]:
        if shard.dense is not None:
            rows = shard.dense[start:stop]
            return predictor.predict_dense(rows), _all_zero(rows)
        assert shard.offsets is not None
        assert shard.indices is not None
        assert shard.values is not None
        bounds = shard.offsets[start : stop + 1]
        span = slice(bounds[0], bounds[-1])
        found = predictor.predict_rows(bounds - bounds[0], shard.indices[span], shard.values[span].copy())
        return found, int((np.diff(bounds) == 0).sum())

    for at in range(0, shard.n_rows, _ROWS):
        rows = (at, min(at + _ROWS, shard.n_rows))
        found, zero = _naming_documents(predict, rows, ids, f"{corpus.root}/{shard_name(number)}")
        yield ids[slice(*rows)], found, zero


def of_new_documents(
    predictor: Predictor, source: Source, part: int, first_row: int
) -> Iterator[tuple[pa.Array, Prediction, int]]:
    """As `of_shard`, of a piece of a source; where documents are numbered, from ``first_row`` on."""
    split = source.splits[part]
    for table in source.read_split(split):
        batch = table.combine_chunks().to_batches()[0]
        ids = batch.column("id")
        if source.numbered:
            ids = pa.array(np.arange(first_row, first_row + len(batch))).cast(pa.string())
            first_row += len(batch)
        predict = functools.partial(_predict_new, predictor, batch)
        yield ids, *_naming_documents(predict, (0, len(batch)), ids, split.path)


def _naming_documents(
    predict: Callable[[int, int], tuple[Prediction, int]], rows: tuple[int, int], ids: pa.Array, place: str
) -> tuple[Prediction, int]:
    """`predict` of the rows [start, stop); what it refuses is said of the first document that it is due to.

    Args:
        predict: takes the first row and the one after the last.
        rows: both.
        ids: of all rows that `predict` knows.
        place: the file or shard that they are in.

    Raises:
        DataError: as `predict`, with the place and the document in front.
    """
    try:
        return predict(*rows)
    except DataError as error:
        low, high = rows
        while high - low > 1:  # none before `low` is at fault, one before `high` is
            middle = (low + high) // 2
            try:
                predict(low, middle)
                low = middle
            except DataError:
                high = middle
        raise DataError(f"{place}, the document {ids[low].as_py()!r}: {error}") from error


def _predict_new(
    predictor: Predictor, batch: pa.RecordBatch, start: int, stop: int
) -> tuple[Prediction, int]:
    """Documents [start, stop) as their files have them, through the vocabulary and the row scale of the
    model."""
    batch = batch.slice(start, stop - start)
    if predictor.input == "text":
        assert predictor.vocabulary is not None
        rows = predictor.vocabulary.transform(batch.column("text"))
        found = predictor.predict_rows(rows.indptr, rows.indices, rows.data)
        return found, int((np.diff(rows.indptr) == 0).sum())
    if predictor.input == "dense":
        column = batch.column("values")
        dense = column.flatten().to_numpy().reshape(len(batch), column.type.list_size)
        return predictor.predict_matrix(dense), _all_zero(dense)
    bounds, indices, values = passes.csr_of(batch)
    width = max(predictor.model.n_features, int(indices.max(initial=-1)) + 1)
    matrix = sparse.csr_matrix((values, indices, bounds), shape=(len(batch), width))
    lengths = np.diff(bounds)
    if predictor.vocabulary is not None:  # it chose some of the columns
        known = predictor.vocabulary.places(map(str, range(width)))[indices] >= 0
        lengths = np.diff(np.concatenate([[0], np.cumsum(known)])[bounds])
    return predictor.predict_matrix(matrix), int((lengths == 0).sum())


def _all_zero(rows: NDArray[Any]) -> int:
    return int((~rows.any(axis=1)).sum())
