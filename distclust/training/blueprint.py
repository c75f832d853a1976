"""The model of a run before its workers start: what cannot be built is refused where the run is begun, and
is not taken for a lost worker."""

from __future__ import annotations

import torch

from distclust.config import RunConfig
from distclust.errors import ConfigError
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
