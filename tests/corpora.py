"""Small random corpora for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distclust.corpus.shards import (
    Corpus,
    Manifest,
    RowCounts,
    corpus_schema,
    shard_name,
    write_manifest,
    write_shard,
)


def make_table(
    n_rows: int, n_features: int = 50, kind: str = "sparse", seed: int = 0, first: int = 0
) -> pa.Table:
    """Random rows: every seventh is empty, some have no label or two; ids are "doc-<row>"."""
    rng = np.random.default_rng([seed, first])
    numbers = range(first, first + n_rows)
    columns: dict[str, Any] = {
        "id": [f"doc-{r}" for r in numbers],
        "labels": [
            [] if r % 5 == 4 else [f"class-{r % 3}"] + (["extra"] if r % 11 == 10 else []) for r in numbers
        ],
        "title": [None if r % 13 == 12 else f"title {r}" for r in numbers],
    }
    if kind == "dense":
        dense = rng.standard_normal((n_rows, n_features)).astype(np.float32)
        dense[[i for i, r in enumerate(numbers) if r % 7 == 6]] = 0
        columns["values"] = list(dense)
    else:
        sizes = [0 if r % 7 == 6 else int(rng.integers(1, min(9, n_features))) for r in numbers]
        columns["indices"] = [
            np.sort(rng.choice(n_features, size, replace=False)).astype(np.int32) for size in sizes
        ]
        columns["values"] = [rng.random(size, dtype=np.float32) + 0.5 for size in sizes]
    return pa.table(columns, schema=corpus_schema(kind, n_features))


def make_corpus(
    root: str | Path,
    shard_rows: Sequence[int] = (10, 10, 10),
    n_features: int = 50,
    kind: str = "sparse",
    seed: int = 0,
) -> Corpus:
    """A random corpus with shards of exactly these sizes (0 allowed); see :func:`make_table`."""
    infos, counts, first = [], RowCounts(), 0
    for number, n_rows in enumerate(shard_rows):
        table = make_table(n_rows, n_features, kind, seed, first)
        infos.append(write_shard(f"{root}/{shard_name(number)}", table, n_features))
        counts += RowCounts.of(table)
        first += n_rows
    schema = corpus_schema(kind, n_features)
    manifest = Manifest(
        kind=kind,
        n_rows=first,
        n_features=n_features,
        n_nonzeros=sum(info.nonzeros for info in infos),
        shards=tuple(infos),
        dtypes={field.name: str(field.type) for field in schema},
        source_fingerprint=f"random-{seed}",
        **counts.as_manifest(),
    )
    write_manifest(str(root), manifest)
    return Corpus.open(str(root))


def dense_rows(corpus: Corpus) -> np.ndarray:
    """(n_rows, n_features) float32: the whole corpus as one array."""
    out = np.zeros((corpus.n_rows, corpus.n_features), np.float32)
    row = 0
    for number in range(len(corpus.shard_rows)):
        shard = corpus.shard(number)
        if shard.dense is not None:
            out[row : row + shard.n_rows] = shard.dense
            row += shard.n_rows
            continue
        for place in range(shard.n_rows):
            span = slice(shard.offsets[place], shard.offsets[place + 1])
            out[row, shard.indices[span]] = shard.values[span]
            row += 1
    return out
