"""Where a value that is not finite came from: the step is computed again, and its term and rows are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from distclust.corpus.shards import Corpus
from distclust.corpus.stream import Batch
from distclust.errors import NonFiniteError
from distclust.mixture.noise import Noise
from distclust.mixture.settings import Phase

if TYPE_CHECKING:
    from distclust.training.engine import Trainer
    from distclust.training.hooks import Position


def describe_row(corpus: Corpus, row: int) -> str:
    """A global row number as shard file and document id, for messages."""
    shards, places = corpus.locate(np.array([row]))
    shard, place = int(shards[0]), int(places[0])
    return f"{corpus.manifest.shards[shard].file} row {place} (document {corpus.shard(shard).ids()[place]!r})"


def explain(trainer: Trainer, batch: Batch, position: Position, phase: Phase) -> NoReturn:
    """Replay the offending step, which the order makes exact, lane by lane; name term, shard and rows."""
    finding = ""
    start = 0
    for lane, count in zip(batch.lanes, batch.lane_rows, strict=True):
        numbers = batch.rows[start : start + count].cpu().numpy()
        start += count
        if finding or not count:
            continue
        part = trainer.stream.gather(numbers)
        noise = Noise(trainer.config.seed, position.global_step, [lane], [count], trainer.world.device)
        with torch.no_grad():
            scene = trainer.model.scene(trainer.rows(part), phase, trainer.totals, noise)
            values = trainer.model.term_values(scene, phase)
        for name, value in values.items():
            wrong = (~torch.isfinite(value)).nonzero().flatten().cpu().numpy()
            if wrong.size:
                places = ", ".join(describe_row(trainer.corpus, int(numbers[i])) for i in wrong[:3])
                finding = f"term {name!r} of {wrong.size} rows in lane {lane}, the first: {places}"
                break
    if not finding:
        names = [
            n for n, p in trainer.trained.items() if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        finding = f"gradient of {', '.join(names[:5]) or 'another worker'}"
    everywhere = [text for text in trainer.world.gather_texts(finding) if "another worker" not in text]
    terms = [text for text in everywhere if text.startswith("term")] or everywhere
    raise NonFiniteError(
        f"a value that is not finite at step {position.global_step} (phase {phase.name}, "
        f"epoch {position.epoch}, step {position.step} of the epoch): "
        f"{terms[0] if terms else 'not found again'}. The update was not made; the last checkpoint is "
        "finite. Lower the learning rate of this phase, or look at these documents"
    )
