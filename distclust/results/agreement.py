"""How far several runs agree on the same documents: what can be said of a setting, or of a run, without any
label."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distclust.errors import ConfigError, DataError
from distclust.results.evaluate import clusters_of, document_ids
from distclust.results.metrics import contingency, scores


@dataclass(frozen=True, slots=True)
class Agreement:
    """NMI between the clusters of runs, taken in pairs."""

    pairs: NDArray[np.float64]
    """(R, R) NMI (arithmetic) in [0, 1], 1 on the diagonal. With a run of one cluster it is 0, also for two
    such: theirs would be 1, and a setting that collapses the best of all."""
    used: NDArray[np.int64]
    """(R,) clusters that have a document."""

    @property
    def mean(self) -> float:
        """Over all pairs; a high one speaks for a setting, whose clusters do not hang on the seed."""
        return float(self.of_each.mean())

    @property
    def of_each(self) -> NDArray[np.float64]:
        """(R,) mean of each run's NMI to the others."""
        others = len(self.pairs) - 1
        return (self.pairs.sum(axis=1) - self.pairs.diagonal()) / others

    @property
    def nearest(self) -> int:
        """The run that agrees most with the others: the one to take where nothing else tells them apart."""
        return int(self.of_each.argmax())


def agreement(folders: Sequence[str | Path]) -> Agreement:
    """Compare the clusters of two or more runs, documents matched by id.

    Args:
        folders: what `distclust assign` wrote, or Parquet files with the columns ``id`` and ``cluster``;
            held in memory one after the other, with 8 bytes a document and folder.

    Raises:
        ConfigError: fewer than two, or one is given twice.
        DataError: one cannot be read, they are not of the same documents, or there are none.
    """
    if len(folders) < 2:
        raise ConfigError(f"agreement is between runs; found {len(folders)}, expected two or more")
    places = [Path(folder).resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ConfigError(f"{folders[number]} is given twice, and agrees with itself; give each run once")
    ids = document_ids(folders[0])
    found = [clusters_of(folder, ids, f"of {folders[0]}", only=True) for folder in folders]
    if not len(ids):
        raise DataError(f"{folders[0]} has no documents; expected the clusters of some")
    used = np.array([len(np.unique(clusters)) for clusters, _ in found])
    pairs = np.eye(len(found))
    for (i, (one, n_one)), (j, (other, n_other)) in itertools.combinations(enumerate(found), 2):
        if min(used[i], used[j]) > 1:
            pairs[i, j] = pairs[j, i] = scores(contingency(one, other, n_one, n_other)).nmi_arithmetic
    return Agreement(pairs, used)
