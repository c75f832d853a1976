"""The clustering module and its autoencoder: CM, AE-CM."""

from __future__ import annotations

from dataclasses import replace

from distclust.mixture.method import Method
from distclust.mixture.rows.common import adam, pretrain
from distclust.mixture.settings import ModelSettings, OptimizerConfig, Phase

CM_PAPER = (
    "Boubekki, Kampffmeyer, Brefeld & Jenssen 2021, Joint optimization of an autoencoder for clustering and "
    "embedding, Machine Learning 110, arXiv 2012.03740"
)

# CM's losses are sums over a batch of B rows, and neither its prior nor the orthonormality is multiplied by
# B. As means over rows: prior (alpha - 1) / B, orthonormality lambda / B. Published for MNIST:
# CM alpha 177, B 111; AE-CM beta 5, alpha 230, lambda 1, B 500.
_CM_PRIOR = (177 - 1) / 111
_AE_CM_PRIOR = (230 - 1) / 500
_AE_CM_ORTHONORMALITY = 1 / 500
# Adam's eps of 1e-3 stands beside gradients of those sums, too: as means over rows it is eps / B.
_CM_ADAM = OptimizerConfig(learning_rate=1e-3, eps=1e-3 / 111)
_AE_CM_ADAM = OptimizerConfig(learning_rate=1e-3, eps=1e-3 / 500)
_PINV = Phase(name="initialise", epochs=0, begin=("initialise_clusters", "pinv_gate"))

CM = Method(
    name="cm",
    paper=CM_PAPER,
    summary="a Gaussian mixture as a one-layer autoencoder: linear softmax gate, expected squared distance",
    network="none",
    energy="dissimilarity",
    gate="linear",
    aggregator="EXP",
    readout="gate",
    regulariser="Dirichlet usage prior",
    settings=ModelSettings(dissimilarity="squared_euclidean"),
    phases=(
        _PINV,
        Phase(
            name="joint",
            epochs=151,
            trains=("energy", "gate"),
            terms=(("exp", 1.0), ("usage_prior", _CM_PRIOR)),
            average_last_epoch=True,
            optimizer=_CM_ADAM,
        ),
    ),
)

_E_STEP = replace(_PINV, begin=("initialise_clusters", "e_step_gate"))

CM_E_STEP = replace(
    CM,
    name="cm-e-step",
    paper=CM_PAPER + "; this start of its gate is ours",
    summary="CM whose gate starts as the E-step at k-means' centroids, and so from k-means' own labels",
    phases=(_E_STEP, *CM.phases[1:]),
)

CM_RANDOM = replace(
    CM, name="cm-random", summary="CM from random centroids and a random gate", phases=CM.phases[1:]
)

AE_CM = Method(
    name="ae-cm",
    paper=CM_PAPER,
    summary="an autoencoder with the clustering module on its codes; orthonormal centroids fix their scale",
    energy="dissimilarity",
    gate="linear",
    aggregator="EXP",
    readout="gate",
    reconstruction="x from z",
    regulariser="Dirichlet usage prior, orthonormal centroids",
    settings=ModelSettings(
        hidden=(500, 500, 2000), code_size=10, activation="leaky_relu", dissimilarity="squared_euclidean"
    ),
    phases=(
        pretrain(100, OptimizerConfig(name="sgd", learning_rate=1e-2, momentum=0.9)),
        _PINV,
        Phase(
            name="module",
            epochs=100,
            trains=("energy", "gate"),
            terms=(("exp", 1.0), ("usage_prior", _AE_CM_PRIOR)),
            optimizer=_AE_CM_ADAM,
        ),
        Phase(
            name="joint",
            epochs=1001,
            trains=("network", "energy", "gate"),
            terms=(
                ("squared_reconstruction", 5.0),
                ("exp_orthonormal", 1.0),
                ("usage_prior", _AE_CM_PRIOR),
                ("orthonormality", _AE_CM_ORTHONORMALITY),
            ),
            average_last_epoch=True,
            optimizer=_AE_CM_ADAM,
        ),
    ),
)

AE_CM_RANDOM = replace(
    AE_CM,
    name="ae-cm-random",
    summary="AE-CM from random weights, without pretraining",
    phases=AE_CM.phases[-1:],
)

AE_CM_TEXT = replace(
    AE_CM,
    name="ae-cm-text",
    paper=CM_PAPER + "; settings for text are ours",
    summary="AE-CM for text: a small autoencoder with wide unit codes, few epochs, equal weights",
    settings=ModelSettings(input_dropout=0.2, unit_codes=True, dissimilarity="squared_euclidean"),
    phases=(
        pretrain(10, adam(1e-3)),
        _E_STEP,
        replace(AE_CM.phases[2], epochs=10, optimizer=adam(1e-3)),
        replace(
            AE_CM.phases[3],
            epochs=10,
            terms=(
                ("reconstruction", 1.0),
                ("exp_orthonormal", 1.0),
                ("usage_prior", 0.1),
                ("orthonormality", 0.01),
            ),
            optimizer=adam(1e-3),
        ),
    ),
)

ROWS = (CM, CM_E_STEP, CM_RANDOM, AE_CM, AE_CM_RANDOM, AE_CM_TEXT)
