"""A training step never waits for the GPU. *Skipped, so not yet seen to pass, where there is none.*"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corpora import make_corpus
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.world import World
from runs import tiny_config


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's sync debug mode is for CUDA")
@pytest.mark.parametrize("method", ["ae-kmeans", "damic", "dmae", "idec"])
def test_no_host_synchronisation_in_the_step(method: str, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", (64, 64))
    trainer = Trainer(
        tiny_config(method),
        corpus,
        CheckpointStore(str(tmp_path / "run")),
        World(device=torch.device("cuda")),
    )
    phase = trainer.phases[0]
    loss = trainer.wrap(phase, {})
    batches = list(trainer.stream.epoch(0))
    trainer.step(phase, batches[0], loss)  # libraries are loaded, memory is reserved
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(phase, batches[1], loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(torch.stack([v.sum() for v in trainer.sums.values()])).all())
