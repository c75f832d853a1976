"""RCV1-v2: which documents and labels the papers take of it, and the counts behind its published weights.

scikit-learn gives the collection as the weights (1 + ln tf) ln(23,149 / df) of its official vectors (Lewis et
al., JMLR 5, 2004), rows of length one, df over the 23,149 training documents. `write_rcv1` stores them with
the counts tf that they come from, so that the whole collection has the columns of the part and everything
after that is one code path.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import sparse

from distclust.errors import DataError

logger = logging.getLogger(__name__)

DOCUMENTS = 804_414
TERMS = 47_236
LABELS = ("root", "topics", "single-root", "rcv1-20")
"""What ``source.label`` may be: the root topic, or all topics, of every document; the DEC recipe; the DCN and
DAMIC recipe. The last two leave documents out."""
ROOTS = ("CCAT", "ECAT", "GCAT", "MCAT")
SECOND_LEVEL = tuple(
    "C11 C12 C13 C14 C15 C16 C17 C18 C21 C22 C23 C24 C31 C32 C33 C34 C41 C42 "
    "E11 E12 E13 E14 E21 E31 E41 E51 E61 E71 "
    "G15 GCRIM GDEF GDIP GDIS GENT GENV GFAS GHEA GJOB GMIL GOBIT GODD GPOL GPRO GREL GSCI GSPO GTOUR GVIO "
    "GVOTE GWEA GWELF "
    "M11 M12 M13 M14".split()
)
"""The 55 topics whose parent is a root in the original hierarchy (LYRL2004 counts 4 + 55 + 43 + 1)."""
PUBLISHED = {"single-root": 685_071, "rcv1-20": 365_968}
"""How many of all documents each recipe keeps, by ClustPy and by DAMIC's paper."""
_TWENTY = 20
_LAST_TRAINING_ID = 26_150
_ROWS_WRITTEN = 20_000
_TOLERANCE = 1e-3
_LARGEST_LEAST_COUNT = 4
_MISFITS = 0.1
_LARGEST_LOG = 20.0


class Recipe(NamedTuple):
    """What a recipe takes of the documents at hand."""

    topics: tuple[str, ...]
    """The labels that are kept, the largest first."""
    sizes: tuple[int, ...]
    """How many documents each has."""


def topics_of(label: str) -> tuple[str, ...] | None:
    """The topics that a choice of label looks at; None for all."""
    return {"topics": None, "rcv1-20": SECOND_LEVEL}.get(label, ROOTS)


def recipe(files: list[str], label: str) -> Recipe:
    """What the recipe ``single-root`` or ``rcv1-20`` takes; reads the column ``topics`` of all rows.

    Of documents with exactly one of the topics that the recipe looks at, ``single-root`` takes all
    (Xie et al., DEC), ``rcv1-20`` those of the second to the 21st largest topic (Yang et al., DCN; Chazan
    et al., DAMIC). Topics of one size go by their name.

    Raises:
        DataError: there are too few topics.
    """
    among = pa.array(topics_of(label))
    sizes: Counter[str] = Counter()
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=["topics"], use_threads=False):
            column = batch.column("topics")
            found = pc.is_in(column.flatten(), value_set=among)
            rows = pc.list_parent_indices(column).filter(found).to_numpy()
            single = pa.array(np.bincount(rows, minlength=len(column))[rows] == 1)
            names = column.flatten().filter(found).filter(single)
            sizes.update({x["values"]: x["counts"] for x in names.value_counts().to_pylist()})
    ranked = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    if label == "rcv1-20":
        if len(ranked) <= _TWENTY:
            raise DataError(
                f"{files[0]}{' and the others' if len(files) > 1 else ''} has documents of {len(ranked)} "
                f"single second-level topics; expected more than {_TWENTY} for source.label=rcv1-20; choose "
                "another label, or more documents."
            )
        ranked = ranked[1 : 1 + _TWENTY]
    return Recipe(*zip(*ranked, strict=True)) if ranked else Recipe((), ())


def check_published(label: str, found: Recipe) -> None:
    """Warn if the whole collection gives another number of documents than was published."""
    if sum(found.sizes) != PUBLISHED[label]:
        logger.warning(
            "source.label=%s keeps %s of the documents of RCV1; the published number is %s: figures of "
            "papers are of other documents. Kept were %s",
            label,
            f"{sum(found.sizes):,}",
            f"{PUBLISHED[label]:,}",
            ", ".join(f"{name} ({size:,})" for name, size in zip(*found, strict=True)),
        )


def counts_of_weights(
    weights: sparse.csr_matrix, idf: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The counts tf behind weights c (1 + ln tf) idf with an unknown factor c of each row.

    A row's least w / idf belongs to its smallest count. That is nearly always 1; else it is the least of 1 to
    4 with which nine of ten of the row's counts are whole numbers (a larger one would fit anything, and all
    of ten would let one term with a wrong idf decide).

    Args:
        weights: (n, V).
        idf: (V,) above 0 where a column has weights.

    Returns:
        (nnz,) counts of the stored entries, and (n,) whether they give each weight of a row back to 1e-3;
        where not, they are the nearest whole numbers.
    """
    lengths = np.diff(weights.indptr)
    ratios = weights.data.astype(np.float64) / idf[weights.indices]
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    least = np.ones(len(lengths))
    filled = np.flatnonzero(lengths)
    if len(filled):
        least[filled] = np.minimum.reduceat(ratios, weights.indptr[filled])
    counts = np.ones(len(ratios), np.int32)
    factors = least.copy()
    open_ = np.ones(len(lengths), bool)
    for smallest in range(1, _LARGEST_LEAST_COUNT + 1):
        factor = least / (1.0 + np.log(smallest))
        logs = np.clip(ratios / factor[row_of], 1.0, _LARGEST_LOG)
        tried = np.rint(np.exp(logs - 1.0)).astype(np.int32)
        off = np.abs(1.0 + np.log(tried) - logs) > _TOLERANCE * logs
        fits = open_ & (np.bincount(row_of, weights=off, minlength=len(lengths)) <= _MISFITS * lengths)
        taken = fits | (smallest == 1)  # where none fits, the first one stays
        counts[taken[row_of]] = tried[taken[row_of]]
        factors[taken] = factor[taken]
        open_ &= ~fits
        if not open_.any():
            break
    again = (1.0 + np.log(counts)) * factors[row_of] * idf[weights.indices]
    wrong = np.abs(again - weights.data) > _TOLERANCE
    return counts, np.bincount(row_of, weights=wrong, minlength=len(lengths)) == 0


def training_idf(bunch: Any) -> NDArray[np.float64]:
    """(V,) ln(n / df) over the official training documents; a term that none has is taken as in one."""
    training = np.asarray(bunch.sample_id) <= _LAST_TRAINING_ID
    n = max(int(training.sum()), 2)
    df = np.bincount(bunch.data[np.flatnonzero(training)].indices, minlength=bunch.data.shape[1])
    return np.log(n / np.clip(df, 1, n - 1))


def write_rcv1(bunch: Any, path: Path) -> None:
    """Write what ``sklearn.datasets.fetch_rcv1`` gives as Parquet: doc, indices, tfidf, tf, topics,
    tf_exact."""
    names = np.asarray(bunch.target_names, dtype=object)
    idf = training_idf(bunch)
    inexact = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal inexact
        for start in range(0, bunch.data.shape[0], _ROWS_WRITTEN):
            rows = bunch.data[start : start + _ROWS_WRITTEN].tocsr()
            rows.sort_indices()
            topics = bunch.target[start : start + _ROWS_WRITTEN].tocsr()
            topics.sort_indices()
            counts, exact = counts_of_weights(rows, idf)
            inexact += int((~exact).sum())
            ids = np.asarray(bunch.sample_id[start : start + _ROWS_WRITTEN]).astype(np.int64)
            bounds = pa.array(rows.indptr.astype(np.int32))
            topic_bounds = pa.array(topics.indptr.astype(np.int32))
            yield pa.table(
                {
                    "doc": pa.array(ids),
                    "indices": pa.ListArray.from_arrays(bounds, pa.array(rows.indices.astype(np.int32))),
                    "tfidf": pa.ListArray.from_arrays(bounds, pa.array(rows.data.astype(np.float32))),
                    "tf": pa.ListArray.from_arrays(bounds, pa.array(counts)),
                    "topics": pa.ListArray.from_arrays(
                        topic_bounds, pa.array(names[topics.indices], pa.string())
                    ),
                    "tf_exact": pa.array(exact),
                }
            )

    writer = None
    try:
        for table in tables():
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    if inexact:
        logger.info("The counts of %d documents of RCV1 do not give their weights back to 1e-3", inexact)
