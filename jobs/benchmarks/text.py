"""Texts to TF-IDF rows: ours, from files to a corpus folder, against scikit-learn's TfidfVectorizer.

    python -m jobs.benchmarks.text ours|peer DOCUMENTS FOLDER

Each runs in a process of its own, so that its peak memory is its own. The abstracts are those of the arXiv
set below DISTCLUST_DATA; without it, generated words stand in.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from jobs.benchmarks.measure import Row, in_a_process, peak_memory

OPTIONS: dict[str, Any] = {"max_features": 2000, "sublinear_tf": True, "stop_words": "english"}


def text(quick: bool) -> list[Row]:
    """Documents/s and peak memory, both to a matrix on disk; and whether it is the same matrix."""
    documents = 40_000 if quick else 400_000
    with tempfile.TemporaryDirectory() as folder:
        files = _files(documents, Path(folder))
        both = {who: in_a_process(__name__, who, folder, *files) for who in ("ours", "peer")}
        same = _same(Path(folder))
    ours, peer = both["ours"], both["peer"]
    what = f"texts to TF-IDF, {ours['documents']:,} abstracts"
    return [
        Row(
            name=f"{what}, one process (CPU time)",
            ours=ours["documents"] / ours["cpu_s"],
            peer=peer["documents"] / peer["cpu_s"],
            ratio=peer["cpu_s"] / ours["cpu_s"],
            unit="docs/s",
            peer_name="scikit-learn TfidfVectorizer",
            note=f"largest difference of the two matrices {same:.1e} of entries of about 10",
        ),
        Row(
            name=f"{what}, wall time",
            ours=ours["documents"] / ours["wall_s"],
            peer=peer["documents"] / peer["wall_s"],
            ratio=peer["wall_s"] / ours["wall_s"],
            unit="docs/s",
            peer_name="scikit-learn TfidfVectorizer",
        ),
        Row(
            name=f"{what}, peak memory",
            ours=ours["peak"] / 1e6,
            peer=peer["peak"] / 1e6,
            ratio=peer["peak"] / ours["peak"],
            unit="MB",
            peer_name="scikit-learn TfidfVectorizer",
            note="with the libraries; ours does not grow with the documents",
        ),
    ]


def _files(documents: int, folder: Path) -> list[str]:
    """Parquet files with `id` and `abstract`, 40,000 documents each."""
    data = os.environ.get("DISTCLUST_DATA")
    there = sorted(Path(data).glob("arxiv/part-*.parquet")) if data else []
    if there:
        return [str(path) for path in there[: documents // 40_000]]
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    words = np.array([f"w{number:x}" for number in range(50_000)])
    paths = []
    for part in range(documents // 40_000):
        drawn = [words[np.minimum(rng.zipf(1.3, 120) - 1, 49_999)] for _ in range(40_000)]
        ids = [f"{part}-{row}" for row in range(40_000)]
        path = folder / f"words-{part}.parquet"
        pq.write_table(pa.table({"id": ids, "abstract": [" ".join(row) for row in drawn]}), path)
        paths.append(str(path))
    return paths


def _ours(folder: Path, files: list[str]) -> int:
    from distclust.corpus.prepare import prepare_local
    from distclust.corpus.shards import ShardConfig
    from distclust.corpus.sources import SourceConfig
    from distclust.corpus.vocabulary import VocabularyConfig

    source = SourceConfig(name="files", files=tuple(files), text="abstract", id="id")
    return prepare_local(source, VocabularyConfig(**OPTIONS), ShardConfig(), folder / "ours").n_rows


def _peer(folder: Path, files: list[str]) -> int:
    import pyarrow.parquet as pq
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts: list[str] = []
    for path in files:
        texts += pq.read_table(path, columns=["abstract"]).column(0).to_pylist()
    matrix = TfidfVectorizer(**OPTIONS, dtype=np.float32).fit_transform(texts)
    sparse.save_npz(folder / "peer.npz", matrix, compressed=False)
    return int(matrix.shape[0])


def _same(folder: Path) -> float:
    """The largest difference of an entry; columns are in alphabetical order in both."""
    from distclust.corpus.shards import Corpus

    peer = sparse.load_npz(folder / "peer.npz")
    corpus, largest, at = Corpus.open(str(folder / "ours")), 0.0, 0
    for number in range(len(corpus.shard_rows)):
        shard = corpus.shard(number)
        shape = (shard.n_rows, corpus.n_features)
        mine = sparse.csr_matrix((shard.values, shard.indices, shard.offsets), shape=shape)
        difference = mine - peer[at : at + shard.n_rows] * corpus.manifest.row_scale
        largest = max(largest, float(np.abs(difference.data).max(initial=0.0)))
        at += shard.n_rows
    return largest


def main(who: str, folder: str, *files: str) -> None:
    """One side of the comparison, in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    documents = {"ours": _ours, "peer": _peer}[who](Path(folder), list(files))
    found = {
        "documents": documents,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak": peak_memory(),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
