"""What a person reads after a run: clusters with words and documents, scores beside the baselines.

A cluster is described by the corpus alone: its size, the words that set it apart, and the document nearest to
its mean row. Labels play no part.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from scipy import sparse

from distclust.errors import DataError

if TYPE_CHECKING:
    from distclust.corpus.shards import Corpus

SCORE_NAMES = {"nmi_geometric": "NMI geom.", "nmi_arithmetic": "NMI arith.", "ari": "ARI", "acc": "ACC"}
"""The four scores in the order of the table, with their headings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSummary:
    """What is said about one cluster."""

    cluster: int
    size: int
    """Documents."""
    share: float
    """Of all documents."""
    terms: tuple[str, ...] = ()
    """The words that set it apart, best first; empty where the columns have no names."""
    nearest_id: str | None = None
    """The document nearest to the cluster's mean row; None for a cluster without a filled row."""
    nearest_title: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as summary files hold it."""
        return asdict(self) | {"terms": list(self.terms)}


def describe_clusters(
    corpus: Corpus,
    clusters: NDArray[np.integer[Any]],
    n_clusters: int,
    *,
    terms: Sequence[str] | None = None,
    n_terms: int = 8,
) -> list[ClusterSummary]:
    """Describe each cluster, in two passes over the shards.

    A word's weight in cluster k is ``m_k log(m_k / m)``, with its mean value m_k in the cluster and m over
    all documents: its part of the divergence between the two, so that a word must be both frequent here and
    rarer elsewhere. The nearest document has the largest cosine with the cluster's mean row; the first of
    equals.

    Args:
        corpus: the rows.
        clusters: (N,) the cluster of each row of the corpus, in its order.
        n_clusters: K.
        terms: (D,) names of the columns.
        n_terms: words for each cluster.

    Returns:
        K summaries, by cluster number; empty clusters included.

    Raises:
        DataError: when there is not one cluster in [0, K) for each row.
    """
    labels = np.asarray(clusters)
    if labels.shape != (corpus.n_rows,):
        raise DataError(
            f"{labels.size} clusters for the {corpus.n_rows} documents of {corpus.root}; expected one each: "
            "assign this corpus again"
        )
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < n_clusters:
        raise DataError(f"clusters run from {labels.min()} to {labels.max()}; expected 0 to {n_clusters - 1}")
    sizes = np.bincount(labels, minlength=n_clusters)
    sums = sparse.csr_matrix((n_clusters, corpus.n_features), dtype=np.float64)
    for rows, own in _shards(corpus, labels):
        member = sparse.csr_matrix(
            (np.ones(len(own)), (own, np.arange(len(own)))), shape=(n_clusters, len(own))
        )
        sums = sums + sparse.csr_matrix(member @ rows)
    words = _top_terms(sums, sizes, terms, n_terms) if terms is not None else [()] * n_clusters
    nearest = _nearest(corpus, labels, sums)
    total = max(int(sizes.sum()), 1)
    return [
        ClusterSummary(
            cluster=k,
            size=int(sizes[k]),
            share=float(sizes[k]) / total,
            terms=words[k],
            nearest_id=nearest[k][0],
            nearest_title=nearest[k][1],
        )
        for k in range(n_clusters)
    ]


def _shards(corpus: Corpus, labels: NDArray[Any]) -> Iterator[tuple[Any, NDArray[Any]]]:
    """Each shard's rows (n, D), sparse or dense, in float64, and their clusters (n,)."""
    at = 0
    for number in range(len(corpus.shard_rows)):
        shard = corpus.shard(number)
        own = labels[at : at + shard.n_rows]
        at += shard.n_rows
        if not shard.n_rows:
            continue
        if shard.dense is not None:
            yield shard.dense.astype(np.float64), own
        else:
            shape = (shard.n_rows, corpus.n_features)
            yield (
                sparse.csr_matrix(
                    (shard.values, shard.indices, shard.offsets), shape=shape, dtype=np.float64
                ),
                own,
            )


def _top_terms(
    sums: sparse.csr_matrix, sizes: NDArray[Any], terms: Sequence[str], n_terms: int
) -> list[tuple[str, ...]]:
    overall = np.asarray(sums.sum(axis=0)).ravel() / max(int(sizes.sum()), 1)
    found = []
    for k in range(sums.shape[0]):
        row = sums.getrow(k)
        positive = row.data > 0
        columns, mean = row.indices[positive], row.data[positive] / max(int(sizes[k]), 1)
        weight = mean * np.log(mean / overall[columns])
        # ties by column, so that the words do not depend on the order of the sums
        best = np.lexsort((columns, -weight))[:n_terms]
        found.append(tuple(terms[columns[i]] for i in best if weight[i] > 0))
    return found


def _nearest(
    corpus: Corpus, labels: NDArray[Any], sums: sparse.csr_matrix
) -> list[tuple[str | None, str | None]]:
    """Id and title of the row with the largest cosine with its cluster's mean, for each cluster."""
    n_clusters = sums.shape[0]
    best = np.full(n_clusters, -np.inf)
    place = np.full(n_clusters, -1, np.int64)
    at = 0
    for rows, own in _shards(corpus, labels):
        squares = rows.multiply(rows).sum(axis=1) if sparse.issparse(rows) else (rows * rows).sum(axis=1)
        norms = np.sqrt(np.asarray(squares).ravel())
        for k in np.unique(own):
            members = np.flatnonzero((own == k) & (norms > 0))
            if not members.size:
                continue
            centre = sums.getrow(int(k)).toarray().ravel()
            likeness = np.asarray(rows[members] @ centre).ravel() / norms[members]
            first = int(likeness.argmax())
            if likeness[first] > best[k]:
                best[k], place[k] = likeness[first], at + members[first]
        at += len(own)
    found: list[tuple[str | None, str | None]] = [(None, None)] * n_clusters
    shards, places = corpus.locate(np.maximum(place, 0))
    for number in np.unique(shards[place >= 0]):
        shard = corpus.shard(int(number))
        ids, titles = shard.ids(), shard.titles()
        for k in np.flatnonzero((place >= 0) & (shards == number)):
            found[k] = ids[places[k]], titles[places[k]]
    return found


# ---- tables


def clean(text: str) -> str:
    """One line that is safe on a terminal: no control or formatting characters, runs of blanks as one."""
    kept = "".join(
        " " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C"
    )
    return " ".join(kept.split())


def cluster_table(summaries: Sequence[ClusterSummary], width: int = 80) -> Table:
    """The clusters, largest first, one or two lines each; `width` is the terminal's."""
    named = any(s.terms for s in summaries)
    table = Table(
        title="Clusters", title_justify="left", expand=False, pad_edge=False, box=None, padding=(0, 1)
    )
    table.add_column("", justify="right", style="bold", no_wrap=True)
    table.add_column("documents", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    room = max(width - 24, 30)
    if named:
        words = max(room * 11 // 20, 16)
        table.add_column("top terms", width=words, overflow="fold")
        room -= words + 2
    table.add_column("nearest document", width=max(room, 12), no_wrap=True, overflow="ellipsis")
    for s in sorted(summaries, key=lambda s: (-s.size, s.cluster)):
        share = f"{100 * s.share:.1f} %"
        title = Text(clean(s.nearest_title or "") or (f"id {clean(s.nearest_id)}" if s.nearest_id else "-"))
        words_cell = [_fitted(s.terms, words)] if named else []
        table.add_row(str(s.cluster), f"{s.size:,}", share, *words_cell, title)
    return table


def _fitted(terms: Sequence[str], width: int) -> Text:
    """As many whole words as one line holds, and at least one."""
    line = ""
    for term in terms:
        longer = f"{line} {clean(term)}".strip()
        if line and len(longer) > width:
            break
        line = longer
    return Text(line or "-")


def score_table(
    method: str,
    scores: Mapping[str, float | None],
    baselines: Mapping[str, Mapping[str, float | None]],
) -> Table:
    """The method's four scores above those of the baselines; the best of each column is bold.

    Args:
        method: its name, the first row.
        scores: the four by name.
        baselines: name -> the four.
    """
    table = Table(
        title="Agreement with the given labels",
        title_justify="left",
        pad_edge=False,
        box=None,
        padding=(0, 1),
    )
    table.add_column("")
    for heading in SCORE_NAMES.values():
        table.add_column(heading, justify="right", no_wrap=True)
    rows = {method: scores, **baselines}
    best = {
        key: max((v for r in rows.values() if (v := r[key]) is not None), default=None) for key in SCORE_NAMES
    }
    for name, row in rows.items():
        cells = []
        for key in SCORE_NAMES:
            value = row.get(key)
            text = "-" if value is None else f"{value:.3f}"
            cells.append(Text(text, style="bold" if value is not None and value == best[key] else ""))
        table.add_row(Text(clean(name), style="bold cyan" if name == method else ""), *cells)
    return table


def as_text(*renderables: RenderableType, width: int = 80) -> str:
    """The same as plain text, without colours, lines of at most `width` characters."""
    console = Console(
        file=io.StringIO(), width=width, color_system=None, force_terminal=False, highlight=False
    )
    for renderable in renderables:
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"
