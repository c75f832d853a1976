"""Assignments against given labels. Only documents with exactly one label are scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distclust.corpus.shards import Corpus
from distclust.errors import DataError
from distclust.results.assignment import MANIFEST, Assignment
from distclust.results.metrics import contingency, scores
from distclust.results.report import SCORE_NAMES


def class_numbers(corpus: Corpus) -> NDArray[np.int64]:
    """(N,) each document's place in `corpus.manifest.classes`; -1 for those without exactly one label."""
    places = {name: place for place, name in enumerate(corpus.manifest.classes)}
    found = np.full(corpus.n_rows, -1, np.int64)
    at = 0
    for number in range(len(corpus.shard_rows)):
        for labels in corpus.shard(number).labels():
            if len(labels) == 1:
                found[at] = places[labels[0]]
            at += 1
    return found


MAX_CLUSTERS = 1 << 20
"""Cluster numbers of a file are below it: the table of classes and clusters is held in memory."""


def score_clusters(
    truth: NDArray[np.int64], clusters: NDArray[np.integer[Any]], n_clusters: int
) -> dict[str, float | None]:
    """The four scores by name over the documents with a class; all None where there is none.

    Args:
        truth: (N,) class numbers, -1 for documents that are not scored.
        clusters: (N,) in [0, n_clusters).
    """
    scored = truth >= 0
    if not scored.any():
        return dict.fromkeys(SCORE_NAMES)
    table = contingency(truth[scored], clusters[scored], int(truth.max()) + 1, n_clusters)
    return dict(scores(table).as_dict())


def read_clusters(folder: str | Path, corpus: Corpus) -> tuple[NDArray[np.int64], int]:
    """The clusters (N,) of the corpus' documents, in its order, and K.

    Args:
        folder: what `distclust assign` wrote, or any Parquet files with the columns ``id`` and ``cluster``
            (whole numbers from 0).
        corpus: the documents, matched by id.

    Raises:
        DataError: files or columns are missing, an id is missing or appears twice.
    """
    ids = pa.chunked_array(
        [pa.array(corpus.shard(i).ids(), pa.string()) for i in range(len(corpus.shard_rows))], pa.string()
    )
    return clusters_of(folder, ids, f"of {corpus.root}")


def document_ids(folder: str | Path) -> pa.ChunkedArray:
    """The ids of assigned documents, in the order of their files.

    Raises:
        DataError: files or columns are missing.
    """
    return pa.concat_tables([_read(file) for file in _files(Path(folder))[0]])["id"]


def clusters_of(
    folder: str | Path, ids: pa.ChunkedArray, whose: str, only: bool = False
) -> tuple[NDArray[np.int64], int]:
    """The clusters (N,) of the documents with these ids, in their order, and K.

    Args:
        folder: as for `read_clusters`.
        ids: (N,) text.
        whose: whose ids they are, for messages.
        only: whether the folder may have no other documents.

    Raises:
        DataError: files or columns are missing, an id is missing, appears twice or is not asked for.
    """
    root = Path(folder)
    files, n_clusters = _files(root)
    table = pa.concat_tables([_read(file) for file in files])
    wanted, found = ids.combine_chunks(), table["id"].combine_chunks()
    if pc.count_distinct(found).as_py() != len(found):
        counts = pc.value_counts(found)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise DataError(f"{root} has the id {twice!r} more than once; expected each document once.")
    if not found.equals(wanted):
        table = table.take(_places(found, wanted, root, whose))
        if only and len(found) != len(wanted):
            raise DataError(
                f"{root} has {len(found):,} documents, {len(found) - len(wanted):,} more than the "
                f"{len(wanted):,} {whose}; expected the same documents: assign the same ones again."
            )
    clusters = table["cluster"].to_numpy().astype(np.int64)
    if clusters.size and not 0 <= clusters.min() <= clusters.max() < MAX_CLUSTERS:
        odd = clusters.min() if clusters.min() < 0 else clusters.max()
        raise DataError(f"{root} has cluster {odd}; expected whole numbers from 0, below {MAX_CLUSTERS:,}.")
    return clusters, max(n_clusters, int(clusters.max(initial=-1)) + 1)


def _files(root: Path) -> tuple[list[Path], int]:
    """The files of assignments, and the clusters that they say there are (0 where they do not say)."""
    if (root / MANIFEST).exists():
        assignment = Assignment.open(root)
        return assignment.files, len(assignment.sizes)
    files = [root] if root.is_file() else sorted(root.glob("*.parquet"))
    if not files:
        raise DataError(
            f"{root} holds no assignments; expected what `distclust assign` wrote, or Parquet files."
        )
    return files, 0


def _read(file: Path) -> pa.Table:
    try:
        table = pq.read_table(file, columns=["id", "cluster"])
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise DataError(
            f"{file} cannot be read ({error}); expected Parquet with the columns id and cluster."
        ) from error
    missing = {"id", "cluster"} - set(table.column_names)
    if missing:
        raise DataError(f"{file} has no column {' and '.join(sorted(missing))}; expected id and cluster.")
    if not pa.types.is_integer(table.schema.field("cluster").type) or table["cluster"].null_count:
        raise DataError(
            f"{file}: column cluster is {table.schema.field('cluster').type}; expected whole numbers, no "
            "nulls."
        )
    if table["id"].null_count:
        raise DataError(f"{file} has {table['id'].null_count} null ids; expected one for each document.")
    try:
        return pa.table({"id": table["id"].cast(pa.string()), "cluster": table["cluster"].cast(pa.int64())})
    except pa.ArrowException as error:
        raise DataError(
            f"{file} cannot be used ({error}); expected ids as text or whole numbers, cluster numbers from 0."
        ) from error


def _places(found: pa.Array, wanted: pa.Array, root: Path, whose: str) -> pa.Array:
    """Where each wanted id stands among those found."""
    places = pc.index_in(wanted, value_set=found)
    if places.null_count:
        missing = wanted.filter(places.is_null())
        raise DataError(
            f"{root} lacks {len(missing):,} of the {len(wanted):,} documents {whose}, the first: "
            f"{missing[0].as_py()!r}; expected one cluster for each. Are they of the same corpus?"
        )
    return places


def evaluate(folder: str | Path, corpus_root: str | Path) -> dict[str, Any]:
    """Score an assignment folder against the labels of a corpus.

    Returns:
        ``documents``, ``scored``, ``unlabelled``, ``multi_labelled``, ``clusters``, ``classes`` and the four
        scores.

    Raises:
        DataError: they do not fit, or no document has exactly one label.
    """
    corpus = Corpus.open(corpus_root)
    truth = class_numbers(corpus)
    if not (truth >= 0).any():
        raise DataError(
            f"none of the {corpus.n_rows:,} documents of {corpus_root} has exactly one label; expected "
            "labels to score against. Prepare it with source.label"
        )
    clusters, n_clusters = read_clusters(folder, corpus)
    counts: Mapping[str, int] = corpus.manifest.counts
    return {
        "documents": corpus.n_rows,
        "scored": int((truth >= 0).sum()),
        "unlabelled": counts["unlabelled"],
        "multi_labelled": counts["multi_labelled"],
        "clusters": n_clusters,
        "classes": len(corpus.manifest.classes),
        **score_clusters(truth, clusters, n_clusters),
    }
