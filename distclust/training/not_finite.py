"""Where a value that is not finite came from: the step or pass is computed again, and its rows are named."""

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
    from distclust.mixture.model import MixtureModel
    from distclust.mixture.statistics import Statistic, Stats
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
            _, values = trainer.model.loss_terms(trainer.rows(part), phase, trainer.totals, noise)
        for name, value in values.items():
            wrong = (~torch.isfinite(value)).nonzero().flatten().cpu().numpy()
            if wrong.size:
                places = ", ".join(describe_row(trainer.corpus, int(numbers[i])) for i in wrong[:3])
                finding = f"term {name!r} of {wrong.size} rows in lane {lane}, the first: {places}"
                break
    if not finding:
        names = [
            n
            for n, p in trainer.trained.items()
            if p.grad is not None and not torch.isfinite(p.grad.norm())  # as the step itself asks
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


def check_weights(model: MixtureModel, position: Position, phase: Phase) -> None:
    """Look at what a checkpoint would hold: a step's own check is of its gradients, before they are used.

    Raises:
        NonFiniteError: weights or statistics that are not finite, the same on all workers.
    """
    learnt = {name for name, _ in model.named_parameters()}
    wrong = [
        name
        for name, value in model.state_dict().items()
        # a buffer may have infinities to say that a place is empty
        if bool((~torch.isfinite(value) if name in learnt else torch.isnan(value)).any())
    ]
    if wrong:
        raise NonFiniteError(
            f"after step {position.global_step} (phase {phase.name}) {', '.join(wrong[:5])} "
            f"{'is' if len(wrong) == 1 else 'are'} not finite; expected finite weights. Nothing was saved, "
            "and the last checkpoint is finite: lower the learning rate of this phase, or look at its other "
            "settings"
        )


def check_totals(trainer: Trainer, statistic: Statistic, totals: Stats) -> None:
    """Look at the sums of a pass over the data before the model takes them; find the rows that they break at.

    Raises:
        NonFiniteError: on all workers, with the first row that some worker found.
    """
    wrong = [name for name, total in totals.items() if not bool(torch.isfinite(total).all())]
    if not wrong:
        return
    everywhere = [text for text in trainer.world.gather_texts(_breaking(trainer, statistic)) if text]
    p = trainer.position
    raise NonFiniteError(
        f"{', '.join(wrong)} of a pass over the data (phase {trainer.phases[p.phase].name}, epoch {p.epoch}) "
        f"are not finite; the first row that they break at: {everywhere[0] if everywhere else 'none alone'}. "
        "Expected rows whose squares float32 can hold. The model was not changed with it: correct or drop "
        "such documents, or set vocabulary.scale lower"
    )


def _breaking(trainer: Trainer, statistic: Statistic) -> str:
    """The first of this worker's rows whose own sums are not finite; empty where there is none."""

    def whole(numbers: np.ndarray) -> bool:
        sums = trainer.collected(statistic, trainer.stream.gather(numbers))
        return all(bool(torch.isfinite(value).all()) for value in sums.values())

    for batch in trainer.stream.scan():
        numbers = batch.rows.cpu().numpy()
        if not whole(numbers):
            for row in numbers:
                if not whole(np.array([row])):
                    return describe_row(trainer.corpus, int(row))
    return ""
