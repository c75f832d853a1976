"""Dissimilarity mixtures: DMM, AE + DMM, DMAE, their dissimilarities under EXP and LSE, and Bregman's."""

from __future__ import annotations

from dataclasses import replace

from distclust.mixture.method import Method
from distclust.mixture.rows.common import INITIALISE, adam, pretrain
from distclust.mixture.settings import ModelSettings, OptimizerConfig, Phase

DMAE_PAPER = "Lara & Gonzalez 2020, Dissimilarity mixture autoencoder for deep clustering, arXiv 2006.08177"
BREGMAN_PAPER = "Banerjee, Merugu, Dhillon & Ghosh 2005, Clustering with Bregman divergences, JMLR 6"

# DMAE sums its clustering term over a batch of 256 and averages the reconstruction over features and batch,
# with weights lambda_r = 0.01 and lambda_c = 1. As means over rows: clustering 1, reconstruction 0.01 / 256;
# times 256 for the gradient's size, which Adam does not see. We keep the published ratio:
# reconstruction / clustering = 0.01 / 256 = 3.9e-5.
_DMAE_RATIO = 0.01 / 256

DMAE = Method(
    name="dmae",
    paper=DMAE_PAPER,
    summary="one autoencoder, any dissimilarity in its codes; the decoder sees the mixed centroid",
    energy="dissimilarity",
    gate="tied",
    aggregator="MIX",
    readout="gate",
    reconstruction="x from the mixed centroid",
    settings=ModelSettings(hidden=(500, 500, 2000), code_size=10, alpha=1000.0, dissimilarity="euclidean"),
    phases=(
        pretrain(500, OptimizerConfig(name="sgd", learning_rate=1.0, momentum=0.9)),
        INITIALISE,
        Phase(
            name="joint",
            epochs=500,
            trains=("network", "energy", "gate"),
            terms=(("mix", 1.0), ("mixed_reconstruction", _DMAE_RATIO)),
            noise=("augment",),
            optimizer=adam(1e-5),
        ),
    ),
)
# augmented images in both phases, as in its authors' main replication; other rows are not touched by it
DMAE = replace(DMAE, phases=(replace(DMAE.phases[0], noise=("network", "augment")), *DMAE.phases[1:]))

DMM = Method(
    name="dmm",
    paper=DMAE_PAPER,
    summary="the dissimilarity mixture on the rows themselves, without a network",
    network="none",
    energy="dissimilarity",
    gate="tied",
    aggregator="MIX",
    readout="gate",
    settings=ModelSettings(alpha=1000.0, dissimilarity="euclidean"),
    phases=(
        INITIALISE,
        Phase(
            name="joint", epochs=40, trains=("energy", "gate"), terms=(("mix", 1.0),), optimizer=adam(1e-4)
        ),
    ),
)

AE_DMM = replace(
    DMAE,
    name="ae-dmm",
    summary="the dissimilarity mixture on the codes of a pretrained autoencoder, which stays as it is",
    reconstruction="-",
    phases=(
        *DMAE.phases[:2],
        Phase(
            name="joint", epochs=100, trains=("energy", "gate"), terms=(("mix", 1.0),), optimizer=adam(1e-5)
        ),
    ),
)

_DECODER = ("network.decoder", "network.out_weight", "network.out_bias")

DMAE_FOURIER = replace(
    DMAE,
    name="dmae-fourier",
    summary="DMAE whose encoder first learns random Fourier features of the rows: clusters of any shape",
    settings=ModelSettings(
        hidden=(256, 256),
        code_size=100,
        dissimilarity="mahalanobis",
        precision_start="identity",
        alpha=1000.0,
        fourier_gamma=30.0,
    ),
    phases=(
        Phase(
            name="pretrain",
            epochs=250,
            trains=("network.encoder",),
            terms=(("fourier_regression", 1.0),),
            optimizer=adam(1e-4),
        ),
        Phase(
            name="decoder",
            epochs=250,
            trains=_DECODER,
            terms=(("reconstruction", 1.0),),
            optimizer=adam(1e-4),
        ),
        INITIALISE,
        Phase(
            name="joint",
            epochs=100,
            trains=("network", "energy", "gate"),
            # published 1 on a sum over a batch of 32, and .5 on a mean
            terms=(("mix", 1.0), ("mixed_reconstruction", 0.5 / 32)),
            optimizer=adam(1e-4),
        ),
    ),
)

DMAE_SPECTRAL = replace(
    DMAE_FOURIER,
    name="dmae-spectral",
    paper=DMAE_PAPER + "; the spectral start is ours",
    summary="DMAE whose encoder first learns spectral codes from landmarks: clusters of any shape",
    # without the log-determinant joint training gave half of a moon away on one seed of five
    settings=replace(DMAE_FOURIER.settings, code_size=10, fourier_gamma=1.0, log_det=1.0),
    phases=(
        replace(DMAE_FOURIER.phases[0], begin=("spectral_map",), terms=(("spectral_regression", 1.0),)),
        *DMAE_FOURIER.phases[1:],
    ),
)

_TEXT_PAPER = DMAE_PAPER + "; settings for text are ours"

DMAE_TEXT = Method(
    name="dmae-text",
    paper=_TEXT_PAPER,
    summary="DMAE for text: a small autoencoder, unit codes, equal weights",
    energy="dissimilarity",
    gate="tied",
    aggregator="MIX",
    readout="gate",
    reconstruction="x from the mixed centroid",
    # alpha as the authors' replication of 2021; a softer gate lets MIX put codes between the centroids
    settings=ModelSettings(input_dropout=0.2, unit_codes=True, alpha=100.0, log_det=1.0),
    phases=(
        pretrain(10, adam(1e-3)),
        INITIALISE,
        Phase(
            name="joint",
            epochs=10,
            trains=("network", "energy", "gate"),
            terms=(("mix", 1.0), ("mixed_reconstruction", 1.0)),
            optimizer=adam(1e-4),
        ),
    ),
)

# A decoder of the codes as they are does not notice that all of them move along one direction, where they
# draw together on the unit sphere: every energy falls, and on RCV1 one cluster was left. At 1 the energies
# still win there; 30 is as 10.
_HELD = ("unit_reconstruction", 10.0)

DMAE_UNIT = replace(
    DMAE_TEXT,
    name="dmae-unit",
    summary="DMAE for text whose decoder sees the unit codes too, so that they do not all draw together",
    reconstruction="x from the mixed centroid and from the unit code",
    phases=(
        *DMAE_TEXT.phases[:2],
        replace(DMAE_TEXT.phases[2], terms=(*DMAE_TEXT.phases[2].terms, _HELD)),
    ),
)

DMAE_EXP = replace(
    DMAE_TEXT,
    name="dmae-exp",
    paper=DMAE_PAPER + "; EXP in place of its MIX is ours",
    summary="DMAE's dissimilarities under the expected cost: no reward for codes between the centroids",
    aggregator="EXP",
    reconstruction="x from the unit code",
    phases=(*DMAE_TEXT.phases[:2], replace(DMAE_TEXT.phases[2], terms=(("exp", 1.0), _HELD))),
)

DMAE_LSE = replace(
    DMAE_TEXT,
    name="dmae-lse",
    paper=DMAE_PAPER + "; the mixture likelihood in place of its MIX is ours",
    summary="DMAE's dissimilarities as a mixture likelihood with a prior gate; read out by responsibility",
    gate="prior",
    aggregator="LSE",
    readout="responsibility",
    reconstruction="x from the unit code",
    settings=replace(DMAE_TEXT.settings, tau_spread=0.1),
    phases=(
        *DMAE_TEXT.phases[:2],
        replace(DMAE_TEXT.phases[2], begin=("temperature",), terms=(("lse", 1.0), _HELD)),
    ),
)

BREGMAN = Method(
    name="bregman",
    paper=BREGMAN_PAPER,
    summary="a mixture of exponential families on the rows, by EM with closed-form means",
    network="none",
    energy="dissimilarity",
    gate="prior",
    aggregator="LSE",
    readout="responsibility",
    settings=ModelSettings(dissimilarity="squared_euclidean"),
    phases=(INITIALISE, Phase(name="em", epochs=50, statistics=("em",))),
)

ROWS = (DMM, AE_DMM, DMAE, DMAE_FOURIER, DMAE_SPECTRAL, DMAE_TEXT, DMAE_UNIT, DMAE_EXP, DMAE_LSE, BREGMAN)
