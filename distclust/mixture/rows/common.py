"""Phases that many rows share."""

from __future__ import annotations

from distclust.mixture.settings import OptimizerConfig, Phase


def adam(rate: float, **more: float) -> OptimizerConfig:
    """Adam with that step size."""
    return OptimizerConfig(learning_rate=rate, **more)  # type: ignore[arg-type]


def pretrain(epochs: int, optimizer: OptimizerConfig) -> Phase:
    """The autoencoder alone, on what its dropout leaves of a row. `reconstruction` is a mean over features,
    as MSE is."""
    return Phase(
        name="pretrain",
        epochs=epochs,
        trains=("network",),
        terms=(("reconstruction", 1.0),),
        noise=("network",),
        optimizer=optimizer,
    )


INITIALISE = Phase(name="initialise", epochs=0, begin=("initialise_clusters", "code_radius"))
"""k-means on the codes: pseudo-labels and centroids."""
