"""Assigning: rows/s from mapped shards to clusters, as a share of the encoder's bare forward pass."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from distclust.corpus.generate import GenerateConfig, generate_corpus
from distclust.corpus.shards import Corpus
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.mixture.sparse import SparseRows
from distclust.results.assign import AssignConfig, assign_corpus
from distclust.results.predict import BLOCK_ROWS, export_model
from jobs.benchmarks.measure import Row, interleaved, paired_ratio, spread


def assign(quick: bool) -> list[Row]:
    """One thread, CPU time: reading, blocks, prediction and Parquet against the encoder alone."""
    rows = 8_192 if quick else 32_768
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate_corpus(folder / "corpus", GenerateConfig(rows=rows, terms=2000))
        corpus = Corpus.open(str(folder / "corpus"))
        for method in ("idec", "damic-text"):
            row = METHODS[method]
            settings = replace(row.settings, hidden=(500, 500, 2000), code_size=10)
            model = MixtureModel(replace(row, settings=settings), settings, 2000, 20)
            exported = export_model(
                folder / method, model, None, {"kind": "sparse", "row_scale": corpus.manifest.row_scale}
            )
            count = iter(range(1000))

            def ours(exported: Path = exported, method: str = method, count: object = count) -> None:
                out = folder / f"{method}-{next(count)}"  # type: ignore[call-overload]
                assign_corpus(exported, str(corpus.root), out, AssignConfig())

            def encoder(model: MixtureModel = model) -> None:
                _forward(model, corpus)

            seconds = interleaved({"ours": ours, "peer": encoder}, 3, time.process_time)
            target = "target 0.5" if method == "idec" else "its labels come from the gate, not the encoder"
            found.append(
                Row(
                    name=f"assigning by {method}, 2,000 terms, one core (CPU time)",
                    ours=rows / statistics.median(seconds["ours"]),
                    peer=rows / statistics.median(seconds["peer"]),
                    ratio=paired_ratio(seconds["peer"], seconds["ours"]),
                    unit="rows/s",
                    peer_name="the encoder 2000-500-500-2000-10 alone, blocks of 512",
                    spread=spread(seconds["ours"]),
                    note=target,
                )
            )
    return found


@torch.no_grad()
def _forward(model: MixtureModel, corpus: Corpus) -> None:
    for number in range(len(corpus.shard_rows)):
        shard = corpus.shard(number)
        assert shard.offsets is not None and shard.indices is not None and shard.values is not None
        for start in range(0, shard.n_rows, BLOCK_ROWS):
            bounds = shard.offsets[start : start + BLOCK_ROWS + 1]
            inside = slice(bounds[0], bounds[-1])
            parts = (bounds - bounds[0], shard.indices[inside].copy(), shard.values[inside].copy())
            tensors = [torch.from_numpy(part) for part in parts]
            model.network.encode(SparseRows(tensors[0], tensors[1], tensors[2], corpus.n_features))
