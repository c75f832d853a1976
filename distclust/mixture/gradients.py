"""Whether the terms of each phase reach the parts that it trains, said before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distclust.mixture.noise import Noise
from distclust.mixture.own import two_rows
from distclust.mixture.settings import PARTS, Phase
from distclust.mixture.sparse import Rows, n_rows
from distclust.mixture.statistics import STATISTICS
from distclust.mixture.terms import Scene, Stats

if TYPE_CHECKING:
    from distclust.mixture.model import MixtureModel


def check_gradients(model: MixtureModel, *, sparse: bool) -> None:
    """Refuse a phase that trains a part in which none of its terms has a gradient.

    One forward pass a phase, on two rows; gradients are looked for and not computed.

    Args:
        model: to be thrown away: a network may count the rows that it sees. A small one of the same parts
            says as much as a large one.
        sparse: whether the rows are.

    Raises:
        ValueError: naming the phase, the part and the terms; or terms that cannot be computed.
    """
    x = two_rows(model.n_features, sparse)
    for phase in model.method.phases:
        if phase.epochs and phase.trains:
            _check_phase(model, phase, x)


def _check_phase(model: MixtureModel, phase: Phase, x: Rows) -> None:
    where = f"method {model.method.name}, phase {phase.name}"
    terms = ", ".join(_weighted(phase)) or "none with a weight"
    try:
        reached = reached_in(model, phase, x)
    except Exception as error:  # whatever a user's code raises
        said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise ValueError(
            f"{where}: its terms ({terms}) failed on two rows of zeros ({said}); expected numbers: "
            "mend what is your own of the model, or change settings that do not go together"
        ) from error
    for part in phase.trains:
        if reached.isdisjoint(model.trained_in(replace(phase, trains=(part,)))):
            there = [name for name in PARTS if any(found.startswith(f"{name}.") for found in reached)]
            raise ValueError(
                f"{where}: it trains {part}, which has no gradient from its terms ({terms}); expected parts "
                f"that they reach ({', '.join(there) or 'none'}): set phases.{phase.name}.trains, or add a "
                f"term that reaches {part}"
            )


def reached_in(model: MixtureModel, phase: Phase, x: Rows) -> set[str]:
    """The parameters that the terms of a phase have gradients in, by name."""
    noise = Noise(0, 0, [0], [n_rows(x)], "cpu")
    _, values = model.loss_terms(x, phase, _totals(model, phase, x), noise)
    leaves = {leaf for name in _weighted(phase) for leaf in _leaves(values[name])}
    return {name for name, parameter in model.named_parameters() if id(parameter) in leaves}


def _weighted(phase: Phase) -> list[str]:
    return [name for name, weight in phase.terms if weight]


@torch.no_grad()
def _totals(model: MixtureModel, phase: Phase, x: Rows) -> Stats:
    """The statistics that the phase's terms read, of these rows."""
    totals: Stats = {}
    for name in model.method.statistics_of(phase):
        statistic = STATISTICS[name]
        if statistic.when in ("refresh", "before_step"):
            totals |= statistic.collect(Scene(model, x, model.view(x, statistic.needs), totals))
    return totals


def _leaves(value: Tensor) -> set[int]:
    """The ids of the parameters that the graph of a value ends in."""
    found: set[int] = set()
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [inner for inner, _ in node.next_functions]
    return found
