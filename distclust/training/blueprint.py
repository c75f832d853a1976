"""The model of a run before its workers start: what cannot be built is refused where the run is begun, and
is not taken for a lost worker."""

from __future__ import annotations

from dataclasses import replace

import torch

from distclust.config import RunConfig
from distclust.errors import ConfigError
from distclust.mixture.imports import is_import_path
from distclust.mixture.model import MixtureModel


def blueprint(config: RunConfig, n_features: int) -> MixtureModel:
    """The model for rows of that length, without memory for its numbers.

    With a network of a user's own they are there, since not every module can do without.

    Raises:
        ConfigError: settings that these rows cannot have, or parts of a user's own that do not fit.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu" if config.model.network else "meta"):
            return MixtureModel(config.row, config.model, n_features, config.clusters)
    except ValueError as error:
        raise ConfigError(str(error)) from error


_FEW = 2
"""Units of a layer, codes and clusters of a miniature."""


def miniature(config: RunConfig, model: MixtureModel) -> MixtureModel:
    """A model of the same parts as the blueprint `model`, so small that calling it costs nothing: its layers
    have two units, and its rows four features.

    Parameters have the same names, and each number is computed from the same ones. Images stay as large as
    they are, since kernels have to fit. A network of a user's own is made for its sizes: then it is the
    blueprint itself. A dissimilarity of their own may be, too, and has one of the table in its place.
    """
    s = config.model
    if s.network:
        return model
    widths = {name: (_FEW,) * len(getattr(s, name)) for name in ("hidden", "expert_hidden", "gate_hidden")}
    sizes = dict.fromkeys(("code_size", "expert_code_size", "landmarks"), _FEW)
    own = is_import_path(s.dissimilarity)
    kind = "squared_euclidean" if own else s.dissimilarity
    small = replace(s, dissimilarity=kind, **widths, **sizes)  # type: ignore[arg-type]
    row = replace(config.row, settings=small)
    with torch.random.fork_rng(devices=[]):
        return MixtureModel(row, small, model.n_features if s.image else 2 * _FEW, _FEW)
