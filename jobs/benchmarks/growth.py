"""How the cost grows with documents, terms, clusters: one thread, CPU time. Workers: see `workers`."""

from __future__ import annotations

import statistics
import tempfile
import time

import torch

from distclust.corpus.generate import GenerateConfig, generate_corpus
from distclust.corpus.order import Order, OrderConfig
from distclust.corpus.shards import Corpus
from distclust.corpus.stream import Stream, StreamConfig
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from jobs.benchmarks.compute import sparse_step
from jobs.benchmarks.measure import Row, batch, interleaved, spread


def growth(quick: bool) -> list[Row]:
    """Three tables: the unit is what a document costs, which should not change where it need not."""
    torch.set_num_threads(1)
    return [*_documents(quick), *_terms(quick), *_clusters(quick)]


def _documents(quick: bool) -> list[Row]:
    """A pass of the stream over corpora of several sizes."""
    found = []
    for rows in (16_384, 65_536) if quick else (16_384, 65_536, 262_144):
        with tempfile.TemporaryDirectory() as folder:
            generate_corpus(folder, GenerateConfig(rows=rows, terms=2000, rows_per_shard=4096))
            corpus = Corpus.open(folder)
            order = Order(corpus.shard_rows, OrderConfig(lanes=8, rows_per_lane=128), 0)
            stream = Stream(corpus, order, range(8), config=StreamConfig(resident_bytes=0, prefetch=0))

            def epoch(stream: Stream = stream) -> None:
                for _ in stream.epoch(0):
                    pass

            seconds = interleaved({"ours": epoch}, 3, time.process_time)["ours"]
        found.append(
            Row(
                name=f"growth with documents: stream over {rows:,}",
                ours=1e6 * statistics.median(seconds) / rows,
                unit="us/row",
                spread=spread(seconds),
            )
        )
    return found


def _terms(quick: bool) -> list[Row]:
    """A step of the autoencoder, 77 non-zeros a row whatever the vocabulary."""
    found = []
    for terms in (1000, 2000, 8000) if quick else (1000, 2000, 8000, 47236):
        rows = 1024
        seconds = interleaved({"ours": sparse_step(batch(rows, terms))}, 3, time.thread_time)["ours"]
        found.append(
            Row(
                name=f"growth with terms: step of 1,024 rows, {terms:,} terms",
                ours=1e6 * statistics.median(seconds) / rows,
                unit="us/row",
                spread=spread(seconds),
            )
        )
    return found


def _clusters(quick: bool) -> list[Row]:
    """A step of a method with centroids, and of one with experts."""
    found = []
    x = batch(256, 2000)
    for method in ("idec", "damic"):
        for clusters in (5, 20) if quick else (5, 20, 100) if method == "idec" else (5, 20, 60):
            row = METHODS[method]
            model = MixtureModel(row, row.settings, 2000, clusters)
            optimizer = torch.optim.Adam(model.parameters(), fused=True)

            def step(model: MixtureModel = model, optimizer: torch.optim.Adam = optimizer) -> None:
                optimizer.zero_grad(set_to_none=True)
                view = model.view(x, ("codes", "energies", "gate"))
                assert view.energies is not None and view.log_p is not None and view.z is not None
                loss = -torch.logsumexp(view.log_p - view.energies, 1).sum()
                if method == "idec":  # noqa: B023  called before the loop goes on
                    loss = loss + model.network.recon_error(view.z, x).sum()
                (loss / x.n_rows).backward()
                optimizer.step()

            seconds = interleaved({"ours": step}, 3, time.thread_time)["ours"]
            found.append(
                Row(
                    name=f"growth with clusters: step of {method}, batch 256, K {clusters}",
                    ours=1e6 * statistics.median(seconds) / x.n_rows,
                    unit="us/row",
                    spread=spread(seconds),
                )
            )
    return found
