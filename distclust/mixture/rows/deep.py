"""What the papers compare with (DEC and its family, DCN, DKM, DEPICT, VaDE), and Aljalbout's method."""

from __future__ import annotations

from dataclasses import replace

from distclust.mixture.method import Method
from distclust.mixture.rows.common import INITIALISE, adam, pretrain
from distclust.mixture.settings import ModelSettings, OptimizerConfig, Phase

ALJALBOUT_PAPER = (
    "Aljalbout, Golkov, Siddiqui, Strobel & Cremers 2018, Clustering with deep learning: taxonomy and new "
    "methods, arXiv 1801.07648"
)

AE_KMEANS = Method(
    name="ae-kmeans",
    paper="A pretrained autoencoder (Hinton & Salakhutdinov 2006), and k-means on its codes",
    summary="the autoencoder alone, then k-means on its codes: what every deep method starts from",
    energy="dissimilarity",
    gate="hard",
    aggregator="NONE",
    readout="kmeans",
    settings=ModelSettings(input_dropout=0.2, dissimilarity="squared_euclidean"),
    phases=(pretrain(10, adam(1e-3)), INITIALISE),
)

# DEC's networks and constants as its Keras replication has them; the target is refreshed every 140 steps of
# 256 rows, and training ends when fewer than 0.1 % of the labels moved between two refreshes.
_DEC_SETTINGS = ModelSettings(hidden=(500, 500, 2000), code_size=10, input_dropout=0.2, alpha=1.0)
_SGD = OptimizerConfig(name="sgd", learning_rate=0.01, momentum=0.9)

DEC = Method(
    name="dec",
    paper="Xie, Girshick & Farhadi 2016, Unsupervised deep embedding for clustering analysis, ICML",
    summary="Student-t assignments of the codes, trained on their own sharpened version; no decoder",
    energy="student",
    gate="tied",
    aggregator="TARGET",
    readout="gate",
    target="q^2 / f, of the model at the last refresh",
    settings=_DEC_SETTINGS,
    phases=(
        pretrain(300, OptimizerConfig(name="sgd", learning_rate=1.0, momentum=0.9)),
        INITIALISE,
        Phase(
            name="joint",
            epochs=75,
            trains=("network", "energy"),
            terms=(("target_teacher", 1.0),),
            refresh_steps=140,
            stop_label_change=0.001,
            statistics=("teacher",),
            optimizer=_SGD,
        ),
    ),
)

IDEC = replace(
    DEC,
    name="idec",
    paper="Guo, Gao, Liu & Yin 2017, Improved deep embedded clustering, IJCAI",
    summary="DEC that keeps its decoder: reconstruction + 0.1 KL",
    reconstruction="x from z",
    phases=(
        *DEC.phases[:2],
        replace(
            DEC.phases[2],
            terms=(("target_teacher", 0.1), ("reconstruction", 1.0)),
            optimizer=adam(1e-3),
        ),
    ),
)

_CONV = ((32, 5, 2, 1), (64, 5, 2, 1), (128, 3, 2, 1))

DCEC = replace(
    IDEC,
    name="dcec",
    paper="Guo, Liu, Zhu & Yin 2017, Deep clustering with convolutional autoencoders, ICONIP",
    summary="IDEC with a convolutional autoencoder (where model.image is set)",
    settings=replace(_DEC_SETTINGS, conv=_CONV, input_dropout=0.0),
    phases=(pretrain(200, adam(1e-3)), *IDEC.phases[1:]),
)

DBC = replace(
    DEC,
    name="dbc",
    paper="Li, Qiao & Zhang 2018, Discriminatively boosted image clustering",
    summary="DEC's loss on a convolutional autoencoder (where model.image is set)",
    settings=replace(_DEC_SETTINGS, conv=_CONV, input_dropout=0.0),
    phases=(pretrain(200, adam(1e-3)), *DEC.phases[1:]),
)

DCN = Method(
    name="dcn",
    paper="Yang, Fu, Sidiropoulos & Hong 2017, Towards k-means-friendly spaces, ICML",
    summary="an autoencoder with k-means in its codes; centroids are running means, never descended",
    energy="dissimilarity",
    gate="hard",
    aggregator="MIN",
    readout="energy",
    reconstruction="x from z",
    # the layers, Adam and lambda = 1 are a choice; its code has layers of its own for each data set
    settings=ModelSettings(hidden=(500, 500, 2000), code_size=10, dissimilarity="squared_euclidean"),
    phases=(
        pretrain(50, adam(1e-3)),
        INITIALISE,
        Phase(
            name="joint",
            epochs=50,
            trains=("network",),
            # ||x - x'||^2 + (lambda / 2) ||z - M s||^2 with lambda = 1
            terms=(("squared_reconstruction", 1.0), ("min", 0.5)),
            statistics=("running_means",),
            optimizer=adam(1e-3),
        ),
    ),
)

DKM = Method(
    name="dkm",
    paper="Fard, Thonet & Gaussier 2020, Deep k-means, Pattern Recognition Letters",
    summary="k-means in the codes made differentiable: softmax of -1000 squared distances",
    energy="dissimilarity",
    gate="tied",
    aggregator="EXP",
    readout="energy",
    reconstruction="x from z",
    settings=ModelSettings(
        hidden=(500, 500, 2000), code_size=10, dissimilarity="squared_euclidean", alpha=1000.0
    ),
    phases=(
        pretrain(50, adam(1e-3)),
        INITIALISE,
        Phase(
            name="joint",
            epochs=100,
            trains=("network", "energy"),
            terms=(("squared_reconstruction", 1.0), ("exp", 1.0)),
            optimizer=adam(1e-3),
        ),
    ),
)

DKM_ANNEALED = replace(
    DKM,
    name="dkm-annealed",
    summary="DKM from random weights: the inverse temperature grows over 40 values of 5 epochs each",
    phases=(replace(DKM.phases[2], epochs=200, anneal="alpha", anneal_epochs=5),),
)

DEPICT = Method(
    name="depict",
    paper="Dizaji, Herandi, Deng, Cai & Huang 2017, Joint convolutional autoencoder embedding, ICCV",
    summary="a softmax on disturbed codes learns the balanced target of the undisturbed row",
    energy="none",
    gate="linear",
    aggregator="TARGET",
    readout="gate",
    target="p / sqrt(f), of the undisturbed row",
    reconstruction="x and every hidden layer",
    settings=ModelSettings(
        hidden=(500, 500, 2000),
        code_size=10,
        activation="leaky_relu_01",
        conv=((50, 5, 2, 1), (50, 5, 2, 1)),
        input_dropout=0.1,
        hidden_dropout=0.1,
        target_kappa=1.0,
        target_eta=0.5,
    ),
    phases=(
        replace(pretrain(100, adam(1e-4)), terms=(("reconstruction", 1.0), ("layer_reconstruction", 0.1))),
        INITIALISE,
        Phase(
            name="gate",
            epochs=20,
            trains=("gate",),
            terms=(("pseudo_cross_entropy", 1.0),),
            optimizer=adam(1e-3),
        ),
        Phase(
            name="joint",
            epochs=400,
            trains=("network", "gate"),
            terms=(("target_clean", 1.0), ("reconstruction", 1.0), ("layer_reconstruction", 0.1)),
            noise=("network",),
            optimizer=adam(1e-4),
        ),
    ),
)

VADE = Method(
    name="vade",
    paper="Jiang, Zheng, Tan, Tang & Zhou 2017, Variational deep embedding, IJCAI",
    summary="a variational autoencoder whose prior is a Gaussian mixture",
    network="variational",
    energy="gaussian",
    gate="prior",
    aggregator="FREE",
    readout="responsibility",
    reconstruction="likelihood of x from a drawn z",
    regulariser="entropy of the code",
    settings=ModelSettings(hidden=(500, 500, 2000), code_size=10),
    phases=(
        Phase(
            name="pretrain",
            epochs=50,
            trains=("network",),
            terms=(("reconstruction", 1.0),),
            optimizer=adam(1e-3),
        ),
        Phase(name="initialise", epochs=0, begin=("initialise_clusters", "gaussian_start")),
        Phase(
            name="joint",
            epochs=300,
            trains=("network", "energy", "gate"),
            # summed over features, as a likelihood: squared error, or cross-entropy with output: sigmoid
            terms=(("squared_reconstruction", 1.0), ("free", 1.0), ("variational_entropy", 1.0)),
            noise=("network",),
            optimizer=OptimizerConfig(learning_rate=2e-3, eps=1e-4, decay=0.9, decay_epochs=10, floor=2e-4),
        ),
    ),
)

# KL is summed over a batch of 100 and the squared error is a mean: as means over rows, 100 and 1.
_NESTEROV = OptimizerConfig(name="sgd", learning_rate=0.01, momentum=0.9, nesterov=True)

ALJALBOUT = Method(
    name="aljalbout",
    paper=ALJALBOUT_PAPER,
    summary="a convolutional autoencoder, DEC's target once an epoch, and k-means again on the final codes",
    energy="student",
    gate="tied",
    aggregator="TARGET",
    readout="kmeans",
    target="q^2 / f, of the model as the epoch began",
    reconstruction="x from z",
    regulariser="weight decay while pretraining",
    settings=ModelSettings(
        hidden=(500, 500, 2000),
        code_size=120,
        norm="batch",
        # the last convolution of the paper, 120@4x4, spans its whole map: the linear layer to the codes
        conv=((50, 5, 1, 2), (50, 5, 1, 2)),
        conv_padding="valid",
        alpha=1.0,
    ),
    phases=(
        # 5e-5 ||w||^2 has the gradient 1e-4 w; the number of epochs is a choice
        pretrain(100, replace(_NESTEROV, weight_decay=1e-4, decay=0.9999)),
        INITIALISE,
        Phase(
            name="joint",
            epochs=50,
            trains=("network", "energy"),
            terms=(("target_teacher", 100.0), ("reconstruction", 1.0)),
            statistics=("teacher",),
            optimizer=_NESTEROV,
        ),
        Phase(name="recluster", epochs=0, begin=("initialise_clusters",)),
    ),
)

ALJALBOUT_KMEANS = replace(
    ALJALBOUT,
    name="aljalbout-kmeans",
    summary="the k-means loss of the same paper: reconstruction + 0.1 distance to the nearest centroid",
    energy="dissimilarity",
    gate="hard",
    aggregator="MIN",
    target="-",
    settings=replace(ALJALBOUT.settings, dissimilarity="euclidean"),
    phases=(
        *ALJALBOUT.phases[:2],
        Phase(
            name="joint",
            epochs=50,
            trains=("network",),
            terms=(("reconstruction", 1.0), ("min", 0.1)),
            statistics=("recentre",),
            sweep_epochs=10,
            optimizer=_NESTEROV,
        ),
        ALJALBOUT.phases[3],
    ),
)

ROWS = (
    AE_KMEANS,
    DEC,
    IDEC,
    DCEC,
    DBC,
    DCN,
    DKM,
    DKM_ANNEALED,
    DEPICT,
    VADE,
    ALJALBOUT,
    ALJALBOUT_KMEANS,
)
