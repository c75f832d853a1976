"""Shuffled CSR batches from memory-mapped shards: ours, a naive window, and Ray Data."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import sparse

from distclust.corpus.generate import GenerateConfig, generate_corpus
from distclust.corpus.order import Order, OrderConfig
from distclust.corpus.shards import Corpus
from distclust.corpus.stream import Stream, StreamConfig
from jobs.benchmarks.measure import Row, interleaved, paired_ratio, spread

BATCH = 1024
WINDOW = 4


def stream(quick: bool) -> list[Row]:
    """Rows/s of one core at 80 non-zeros a row."""
    rows = 65_536 if quick else 262_144
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        generate_corpus(folder, GenerateConfig(rows=rows, nonzeros=80.0))
        corpus = Corpus.open(folder)
        functions = {
            "8 lanes": lambda: _consume_ours(corpus, 8),
            "one lane": lambda: _consume_ours(corpus, 1),
            "peer": lambda: _consume_window(corpus),
        }
        seconds = interleaved(functions, 5, time.process_time)
        found = [
            Row(
                name=f"stream, {name}, 80 non-zeros a row, one core (CPU time)",
                ours=rows / statistics.median(seconds[name]),
                peer=rows / statistics.median(seconds["peer"]),
                ratio=paired_ratio(seconds["peer"], seconds[name]),
                unit="rows/s",
                peer_name="scipy rows of a naive window of 4 shards",
                spread=spread(seconds[name]),
                note="target 1.5 million rows/s",
            )
            for name in ("8 lanes", "one lane")
        ]
        wall = interleaved({"ours": lambda: _consume_ours(corpus, 8)}, 3)["ours"]
        try:
            peer, said = _ray_data(corpus), "Ray Data's iter_torch_batches, local shuffle of 20,000 rows"
        except ImportError:
            peer, said = None, "not installed"
        mine = rows / statistics.median(wall)
        found.append(
            Row(
                name="stream, the same, wall time",
                ours=mine,
                peer=peer,
                ratio=None if peer is None else mine / peer,
                unit="rows/s",
                peer_name=said,
                spread=spread(wall),
            )
        )
    return found


def _consume_ours(corpus: Corpus, lanes: int) -> None:
    order = Order(corpus.shard_rows, OrderConfig(lanes=lanes, rows_per_lane=BATCH // lanes, window=WINDOW), 0)
    config = StreamConfig(resident_bytes=0, prefetch=0)
    for _ in Stream(corpus, order, range(lanes), config=config).epoch(0):
        pass


def _consume_window(corpus: Corpus) -> None:
    for _ in _window_batches(corpus):
        pass


def _window_batches(corpus: Corpus) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What one writes first: four shards as one matrix, its rows permuted, a thousand at a time."""
    rng = np.random.default_rng(0)
    shards = rng.permutation(len(corpus.shard_rows))
    for first in range(0, len(shards), WINDOW):
        opened = [corpus.shard(int(number)) for number in shards[first : first + WINDOW]]
        matrices = [
            sparse.csr_matrix(
                (s.values, s.indices, s.offsets), shape=(s.n_rows, corpus.n_features), copy=False
            )
            for s in opened
        ]
        window = sparse.vstack(matrices, format="csr")
        permuted = rng.permutation(window.shape[0])
        for start in range(0, len(permuted), BATCH):
            part = window[permuted[start : start + BATCH]]
            yield tuple(map(torch.from_numpy, (part.indptr, part.indices, part.data)))  # type: ignore[misc]


def _ray_data(corpus: Corpus) -> float:
    """Rows/s, the first batch not counted."""
    import pyarrow as pa
    import ray
    from ray.data.collate_fn import ArrowBatchCollateFn

    class ToTensors(ArrowBatchCollateFn):  # type: ignore[misc]
        def __call__(self, table: Any) -> dict[str, torch.Tensor]:
            lists = table.column("indices").combine_chunks()
            offsets = lists.offsets.to_numpy()
            values = table.column("values").combine_chunks().flatten().to_numpy()
            parts = {"offsets": offsets - offsets[0], "indices": lists.flatten().to_numpy(), "values": values}
            return {name: torch.from_numpy(np.array(part)) for name, part in parts.items()}

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        tables = []
        for number in range(min(4, len(corpus.shard_rows))):
            with pa.memory_map(f"{corpus.root}/{corpus.manifest.shards[number].file}") as file:
                tables.append(pa.ipc.open_file(file).read_all().select(["indices", "values"]))
        batches = ray.data.from_arrow(tables).iter_torch_batches(
            batch_size=BATCH, collate_fn=ToTensors(), local_shuffle_buffer_size=20_000
        )
        rows, started = 0, 0.0
        for found in batches:
            if not started:
                started = time.perf_counter()
                continue
            rows += len(found["offsets"]) - 1
        return rows / (time.perf_counter() - started)
    finally:
        if started_here:
            ray.shutdown()
