"""What stands beside the table of methods: scikit-learn's estimators, and what is left out.

Data. The rows of the mixture methods are in methods.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distclust.mixture.energies import DISSIMILARITIES, NORMALISERS
from distclust.mixture.settings import ABOVE_0, FROM_1, check_number, one_of

SLOTS = (
    "network",
    "energy",
    "gate",
    "aggregator",
    "target",
    "reconstruction",
    "regulariser",
    "readout",
)
"""The slots of a row, in the order in which they are printed; the ninth, the schedule, is its phases."""


# ---- scikit-learn's estimators


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorConfig:
    """Settings of scikit-learn's estimators; a row uses some of them (`Estimator.uses`)."""

    restarts: int = 10
    """Starts (k-means++), of which the best is kept."""
    components: int | None = None
    """Directions that rows are reduced to first. Empty: 50 for lsa-kmeans and nmf-kmeans, and for gmm and
    spectral where rows are sparse, while their dense rows stay as they are. 0: rows stay as they are."""
    unit_rows: bool = True
    """Whether reduced rows are scaled to length 1, as suits texts."""
    covariance: Literal["spherical", "diagonal", "full"] = "diagonal"
    """Covariance of each Gaussian."""
    floor: float = 1e-6
    """Added to the variances of each Gaussian."""
    neighbours: int = 10
    """Rows that a row is joined to in the neighbour graph, itself included."""
    dissimilarity: str = "euclidean"
    """What is near in the neighbour graph: a name of energies.DISSIMILARITIES."""
    p: float = 3.0
    """Minkowski's exponent."""
    interval: float = 2.0
    """Length of the torus in each direction."""
    normaliser: str = "softmax_abs"
    """How Kullback-Leibler puts rows on the simplex."""
    iterations: int = 300
    """Iterations of a start at most; of NMF's factors too."""
    max_rows: int = 200_000
    """Documents fitted on at most: above, an evenly drawn sample is fitted and all documents are assigned."""
    spectral_rows: int = 10_000
    """Documents that spectral takes at most: it cannot assign a document that it was not fitted on."""

    def __post_init__(self) -> None:
        for name in ("restarts", "iterations", "max_rows", "spectral_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"estimator.{name} is {getattr(self, name)}; expected at least 1")
        if self.neighbours < 2:
            raise ValueError(f"estimator.neighbours is {self.neighbours}; expected at least 2: itself counts")
        if self.components is not None and self.components < 0:
            raise ValueError(f"estimator.components is {self.components}; expected 0 or more")
        for name, rule in (("floor", ABOVE_0), ("interval", ABOVE_0), ("p", FROM_1)):
            check_number(f"estimator.{name}", getattr(self, name), rule)
        one_of("estimator.dissimilarity", self.dissimilarity, DISSIMILARITIES)
        one_of("estimator.normaliser", self.normaliser, NORMALISERS)


DIRECTIONS = 50
"""Directions of LSA and NMF where the recipe does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """One of scikit-learn's estimators, as a row: `kind: estimator`, outside the training ladder."""

    name: str
    paper: str
    summary: str
    features: str
    """What is clustered."""
    uses: tuple[str, ...]
    """The fields of `EstimatorConfig` that it reads."""
    phases: tuple[str, ...]
    """What is done, in order."""
    energy: str = "-"
    gate: str = "-"
    aggregator: str = "NONE"
    readout: str = "-"
    network: str = "-"
    target: str = "-"
    reconstruction: str = "-"
    regulariser: str = "-"


_REDUCED = ("components", "unit_rows")

ESTIMATORS: dict[str, Estimator] = {
    row.name: row
    for row in (
        Estimator(
            name="k-means",
            paper="Lloyd 1957/1982; k-means++ starts: Arthur & Vassilvitskii 2007",
            summary="the nearest of K means, on the rows as they are",
            features="rows",
            uses=("restarts", "iterations", "max_rows"),
            phases=("fit",),
            energy="squared_euclidean",
            gate="hard",
            aggregator="MIN",
            readout="energy",
        ),
        Estimator(
            name="gmm",
            paper="Dempster, Laird & Rubin 1977, Maximum likelihood from incomplete data via EM",
            summary="a mixture of K Gaussians by EM, diagonal or full",
            features="rows, or their singular directions where they are sparse",
            uses=("covariance", "floor", "restarts", "iterations", *_REDUCED, "max_rows"),
            phases=("reduce", "fit"),
            energy="Gaussian",
            gate="prior",
            aggregator="LSE",
            readout="responsibility",
        ),
        Estimator(
            name="spectral",
            paper="Shi & Malik 2000; Ng, Jordan & Weiss 2001; with any dissimilarity: arXiv 2006.08177",
            summary="k-means on the leading eigenvectors of a nearest-neighbour graph, of any dissimilarity",
            features="eigenvectors of the neighbour graph",
            uses=(
                "dissimilarity",
                "neighbours",
                "p",
                "interval",
                "normaliser",
                "restarts",
                *_REDUCED,
                "spectral_rows",
            ),
            phases=("reduce", "fit"),
            readout="k-means",
        ),
        Estimator(
            name="lsa-kmeans",
            paper="Deerwester et al. 1990, Indexing by latent semantic analysis",
            summary="k-means on the leading singular directions of the rows",
            features="singular directions",
            uses=("components", "unit_rows", "restarts", "max_rows"),
            phases=("reduce", "fit"),
            energy="squared_euclidean",
            gate="hard",
            aggregator="MIN",
            reconstruction="x from its singular directions",
            readout="energy",
        ),
        Estimator(
            name="nmf-kmeans",
            paper="Lee & Seung 1999, Learning the parts of objects by non-negative matrix factorization",
            summary="k-means on the weights of a non-negative factorisation of the rows",
            features="weights of non-negative parts",
            uses=("components", "unit_rows", "restarts", "iterations", "max_rows"),
            phases=("reduce", "fit"),
            energy="squared_euclidean",
            gate="hard",
            aggregator="MIN",
            reconstruction="x from its non-negative parts",
            readout="energy",
        ),
    )
}


# ---- what is not in the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A method that the papers mention and that has no row."""

    name: str
    paper: str
    kind: Literal["outside the slots", "left out"]
    """Whether the slots cannot express it, or they could, with parts that are not here."""
    reason: str


def _outside(name: str, paper: str, reason: str) -> Missing:
    return Missing(name=name, paper=paper, kind="outside the slots", reason=reason)


def _left_out(name: str, paper: str, reason: str) -> Missing:
    return Missing(name=name, paper=paper, kind="left out", reason=reason)


MISSING: dict[str, Missing] = {
    row.name: row
    for row in (
        _outside(
            "JULE",
            "Yang, Parikh & Batra 2016, quoted as CNN-RC too",
            "merges clusters by affinities between pairs of samples; no cluster has an energy for one sample",
        ),
        _outside(
            "SpectralNet",
            "Shaham et al. 2018",
            "its loss sums over pairs of samples: a network learns eigenvectors of an affinity matrix",
        ),
        _outside(
            "DEN",
            "Huang et al. 2014",
            "its locality-preserving loss sums over pairs of neighbours, beside a group-sparsity loss",
        ),
        _outside(
            "DGG",
            "Yang et al. 2019",
            "adds a loss over pairs of similar samples, from a graph, to a Gaussian-mixture VAE",
        ),
        _outside(
            "ClusterGAN",
            "Ghasedi et al. 2019; Mukherjee et al. 2019",
            "generator, discriminator and clusterer are trained against each other; there is no single loss",
        ),
        _outside(
            "agglomerative clustering",
            "Ward 1963 and others",
            "merges the nearest pair of clusters, from distances between all samples; no per-cluster energy",
        ),
        _outside(
            "UMMC",
            "Chen et al. 2017",
            "its locality-preserving loss sums over pairs; its network is a deep belief network",
        ),
        _outside(
            "NMMC",
            "Chen 2015",
            "a maximum-margin loss and a deep belief network; the number of clusters is inferred, not given",
        ),
        _outside(
            "Neural Clustering",
            "Saito & Tan 2017",
            "clusters the concatenated outputs of several layers; an energy here sees one layer",
        ),
        _left_out(
            "IMSAT",
            "Hu et al. 2017",
            "mutual information with virtual adversarial perturbations: there is no adversarial second pass",
        ),
        _left_out(
            "CCNN",
            "Hsu & Lin 2017, quoted as CNN-FD too",
            "an image classifier without a decoder, on labels that k-means renews with every batch",
        ),
        _left_out(
            "SCCNN",
            "Lukic et al. 2016",
            "its network is trained with the labels of speakers; labels train nothing here",
        ),
        _left_out(
            "UGTAC",
            "Premachandran & Yuille 2016",
            "k-means++ on features of a GAN's discriminator; there is no adversarial training",
        ),
        _left_out(
            "IEC",
            "Liu et al. 2016",
            "the consensus of many partitions; one run here makes one partition",
        ),
        _left_out(
            "DECCA",
            "Diallo et al. 2021",
            "DEC on a contractive autoencoder: the penalty on the encoder's Jacobian is not among the terms",
        ),
        _left_out(
            "SDEC",
            "Ren et al. 2019",
            "semi-supervised: needs pairs that must or must not share a cluster; labels train nothing here",
        ),
        _left_out(
            "DDC",
            "Ren et al. 2020",
            "density-based clustering of a t-SNE of the codes; the number of clusters is found",
        ),
        _left_out(
            "ConvDEC",
            "Guo et al. 2018",
            "DEC on images that are augmented in both phases: dcec with noise=[augment] there is near",
        ),
        _left_out(
            "DEKM",
            "Guo, Lin & Ye 2021",
            "turns codes by eigenvectors of the within-cluster scatter and trains one direction at a time",
        ),
        _left_out(
            "fuzzy c-means",
            "Bezdek 1981",
            "its memberships enter the loss to a power m; no aggregator does that",
        ),
    )
}
