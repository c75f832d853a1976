"""THE TABLE: one row a method, with its paper and its published settings.

A method is a choice in each of nine slots (network, energy, gate, aggregator, target, reconstruction,
regulariser, schedule, readout). A new combination is a new row; `Method.check` refuses the combinations that
do not make sense, and says why. A row of your own needs no change here: a recipe names it by an import path.
"""

from __future__ import annotations

from dataclasses import replace

from distclust.mixture.imports import import_object, is_import_path
from distclust.mixture.method import Method
from distclust.mixture.rows import cm, damic, deep, dmae
from distclust.mixture.settings import ModelSettings, OptimizerConfig, Phase

__all__ = ["METHODS", "Method", "ModelSettings", "OptimizerConfig", "Phase", "find_method"]

METHODS: dict[str, Method] = {row.name: row for row in (*damic.ROWS, *dmae.ROWS, *cm.ROWS, *deep.ROWS)}


def find_method(name: str) -> Method:
    """The row of that name, or a user's own by import path; its name is then the path.

    Raises:
        KeyError: no such row.
        ValueError: an import path whose module was not allowed, or that is no row.
    """
    if not is_import_path(name):
        return METHODS[name]
    row = import_object(name)
    if not isinstance(row, Method):
        raise ValueError(f"{name} is a {type(row).__name__}; expected a distclust.mixture.methods.Method")
    return replace(row, name=name)
