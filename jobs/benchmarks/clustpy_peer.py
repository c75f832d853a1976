"""ClustPy's DEC and DCN against ours: the same rows, network, batch, epochs and step sizes."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from typing import Any

import numpy as np
import torch

from distclust.config import resolve
from distclust.corpus.generate import GenerateConfig, generate_corpus
from distclust.corpus.shards import Corpus
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.world import World
from jobs.benchmarks.measure import Row

TERMS, CLUSTERS, BATCH, HIDDEN, CODE = 2000, 10, 256, [500, 500, 2000], 10


def clustpy(quick: bool) -> list[Row]:
    """Rows/s over the whole of both runs, k-means included; one thread, CPU time."""
    rows, epochs = (1_024, 1) if quick else (4_096, 3)
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        generate_corpus(
            f"{folder}/corpus", GenerateConfig(rows=rows, terms=TERMS, topics=CLUSTERS, rows_per_shard=1024)
        )
        corpus = Corpus.open(f"{folder}/corpus")
        for method in ("dec", "dcn"):
            ours, seconds, said = 0.0, None, f"ClustPy's {method.upper()}"
            for turn in range(2):  # the first one imports, and does not count
                started = time.process_time()
                _ours(method, corpus, f"{folder}/{method}-{turn}", epochs)
                ours = time.process_time() - started
                try:
                    seconds = _theirs(method, corpus, epochs)
                except ImportError:
                    said = "ClustPy: not installed"
            passes = 2 * epochs * rows
            found.append(
                Row(
                    name=f"{method}, {rows:,} rows of {TERMS:,} terms, {epochs} + {epochs} epochs (CPU time)",
                    ours=passes / ours,
                    peer=None if seconds is None else passes / seconds,
                    ratio=None if seconds is None else seconds / ours,
                    unit="rows/s",
                    peer_name=said,
                    note=f"network 2000-500-500-2000-10, batch {BATCH}, one thread",
                )
            )
    return found


def _ours(method: str, corpus: Corpus, folder: str, epochs: int) -> None:
    phases: dict[str, Any] = {
        name: {"epochs": epochs, "optimizer": {"name": "adam", "learning_rate": rate}}
        for name, rate in (("pretrain", 1e-3), ("joint", 1e-4))
    }
    if method == "dec":
        phases["joint"]["stop_label_change"] = 0.0
    config = resolve(
        {
            "method": method,
            "clusters": CLUSTERS,
            "model": {"hidden": HIDDEN, "code_size": CODE, "input_dropout": 0.0},
            "phases": phases,
            "initialise": {"restarts": 1},
            "order": {"lanes": 8, "rows_per_lane": BATCH // 8},
            "tracking": {"enabled": False},
        }
    )
    Trainer(config, corpus, CheckpointStore(folder), World()).run()


def _theirs(method: str, corpus: Corpus, epochs: int) -> float:
    """CPU seconds of ClustPy's `fit` on the rows, which it needs dense.

    Raises:
        ImportError: it is not installed.
    """
    deep = _import_clustpy()
    from clustpy.deep.neural_networks import FeedforwardAutoencoder

    dense = np.zeros((corpus.n_rows, TERMS), np.float32)
    at = 0
    for number in range(len(corpus.shard_rows)):
        shard = corpus.shard(number)
        assert shard.offsets is not None
        dense[np.repeat(np.arange(shard.n_rows), np.diff(shard.offsets)) + at, shard.indices] = shard.values
        at += shard.n_rows
    started = time.process_time()
    net = FeedforwardAutoencoder(layers=[TERMS, *HIDDEN, CODE], activation_fn=torch.nn.ReLU)
    settings: dict[str, Any] = {
        "batch_size": BATCH,
        "pretrain_optimizer_params": {"lr": 1e-3},
        "clustering_optimizer_params": {"lr": 1e-4},
        "pretrain_epochs": epochs,
        "clustering_epochs": epochs,
        "neural_network": net,
        "embedding_size": CODE,
        "initial_clustering_params": {"n_init": 1},
        "device": torch.device("cpu"),
        "random_state": 0,
    }
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        getattr(deep, method.upper())(CLUSTERS, **settings).fit(dense)
    return time.process_time() - started


def _import_clustpy() -> Any:
    """clustpy.deep. It imports torchvision, whose CUDA build does not register its operators beside a torch
    without CUDA; it uses none of them on rows, so their shape rules are left out in that case."""
    register = torch.library.register_fake
    if torch.version.cuda is None:
        torch.library.register_fake = lambda *args, **kw: lambda function: function  # type: ignore[assignment]
    try:
        import clustpy.deep
    finally:
        torch.library.register_fake = register
    return clustpy.deep
