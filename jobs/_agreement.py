"""How far the runs of a row agree with each other: what can be said of a setting without any label."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from distclust.corpus.shards import Corpus
from distclust.results.evaluate import read_clusters
from distclust.results.metrics import contingency, scores
from distclust.run import ASSIGNMENTS


def agreement(folders: Sequence[Path], corpus_root: Path) -> float | None:
    """Mean NMI (arithmetic) between the clusters of every two runs; 1 where all find the same.

    Args:
        folders: finished runs on the corpus, one a seed.
        corpus_root: the prepared documents, the same for all of them.

    Returns:
        In [0, 1], or None for fewer than two runs.

    Raises:
        DataError: the corpus is not there, or a run's assignments are not of its documents.
    """
    if len(folders) < 2:
        return None
    corpus = Corpus.open(str(corpus_root))
    found = [read_clusters(folder / ASSIGNMENTS, corpus) for folder in folders]
    return statistics.mean(
        scores(contingency(one, other, n_one, n_other)).nmi_arithmetic
        for (one, n_one), (other, n_other) in itertools.combinations(found, 2)
    )
