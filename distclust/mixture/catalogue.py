"""What stands beside the table of methods: scikit-learn's estimators, what is left out, and the taxonomy.

Data and pure functions; nothing heavy is imported. The rows of the mixture methods are in methods.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from distclust.mixture.methods import Method, Phase

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


def _one_of(field: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; expected one of: {', '.join(sorted(allowed))}")


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
    covariance: Literal["diagonal", "full"] = "diagonal"
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
        if not self.floor > 0:
            raise ValueError(f"estimator.floor is {self.floor}; expected a variance above 0")
        if self.dissimilarity != "euclidean":
            from distclust.mixture.energies import DISSIMILARITIES, NORMALISERS

            _one_of("estimator.dissimilarity", self.dissimilarity, DISSIMILARITIES)
            _one_of("estimator.normaliser", self.normaliser, NORMALISERS)
        if self.p < 1:
            raise ValueError(f"estimator.p is {self.p}; Minkowski's exponent is at least 1")
        if not self.interval > 0:
            raise ValueError(f"estimator.interval is {self.interval}; expected a length above 0")


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
            "Yang, Parikh & Batra 2016",
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
            "Hsu & Lin 2017",
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
            "fuzzy c-means",
            "Bezdek 1981",
            "its memberships enter the loss to a power m; no aggregator does that",
        ),
    )
}


# ---- the taxonomy


@dataclass(frozen=True, slots=True, kw_only=True)
class Taxonomy:
    """The building blocks of Aljalbout et al. 2018 (arXiv 1801.07648, section 2), of one row."""

    architecture: str
    features: str
    non_clustering_loss: str
    clustering_loss: str
    combination: str
    cluster_update: str
    after_training: str


_CLUSTERING_LOSSES = {
    "MIN": "k-means (hard)",
    "LSE": "mixture likelihood",
    "EXP": "soft k-means (expected energy)",
    "MIX": "soft k-means (mixed centroid)",
    "FREE": "mixture prior in the bound",
    "TARGET": "assignment hardening",
    "NONE": "none",
}
_LOSS_TERMS = {
    "reconstruction": "AE reconstruction",
    "squared_reconstruction": "AE reconstruction",
    "layer_reconstruction": "reconstruction of every layer",
    "mixed_reconstruction": "reconstruction from the mixed centroid",
}
_NO_NETWORK = ("-", "none", "identity", "")


def taxonomy(row: Method | Estimator) -> Taxonomy:
    """The seven building blocks, from the row's slots and phases.

    Cells of published methods agree with the survey where its text says them. They are read off the slots, so
    a new row has them too.
    """
    return Taxonomy(
        architecture=_architecture(row),
        features=_features(row),
        non_clustering_loss=_non_clustering(row),
        clustering_loss=_clustering(row),
        combination=_combination(row),
        cluster_update=_update(row),
        after_training="k-means on the final features" if "k-means" in _words(row.readout) else "no",
    )


def _words(value: object) -> str:
    return str(value).replace("_", "-").replace("kmeans", "k-means").lower()


def _has_network(row: Method | Estimator) -> bool:
    return _words(row.network) not in _NO_NETWORK


def _setting(row: Method | Estimator, name: str) -> str:
    """A setting of the row's slots in words; empty where there is none."""
    return "" if isinstance(row, Estimator) else str(getattr(row.settings, name, "") or "")


def _is_experts(row: Method | Estimator) -> bool:
    return not isinstance(row, Estimator) and "expert" in _words(row.energy)


def _architecture(row: Method | Estimator) -> str:
    parts, network = [], _words(row.network)
    if _has_network(row) and _trains_network(row):
        conv = "conv" in network or _setting(row, "conv") not in ("", "()")
        parts.append("VAE" if "vari" in network or "vae" in network else "CNN" if conv else "MLP")
    if _is_experts(row):
        experts = _setting(row, "experts").replace("_", "-")
        parts.append("K autoencoders" if experts == "autoencoder" else f"K {experts} experts")
    if row.gate in ("network", "expert_codes"):
        parts.append("gate network")
    return " + ".join(parts) or "none (shallow)"


def _trains_network(row: Method | Estimator) -> bool:
    return not isinstance(row, Estimator) and any("network" in phase.trains for phase in row.phases)


def _features(row: Method | Estimator) -> str:
    if isinstance(row, Estimator):
        return row.features
    if _is_experts(row):
        in_codes = _setting(row, "expert_space") == "codes"
        return "encoder output" if in_codes else "input (experts reconstruct it)"
    if row.energy == "none" and row.gate == "network":
        return "input (the gate network sees it)"
    return "encoder output" if _has_network(row) else "input"


class Losses(NamedTuple):
    """What a phase with epochs trains on; regularisers aside."""

    clustering: frozenset[str]
    """Terms that cluster; for a phase whose epochs are passes (EM), its statistics."""
    other: frozenset[str]
    """Reconstructions."""
    warm: bool
    """Whether what clusters are pseudo-labels alone."""


def losses(phase: Phase) -> Losses:
    """The terms of a phase by what they are to the survey; none of either for a phase without epochs."""
    from distclust.mixture.terms import AGGREGATOR_TERMS

    if not phase.epochs:
        return Losses(frozenset(), frozenset(), False)
    if not phase.trains:
        return Losses(frozenset(phase.statistics), frozenset(), False)
    names = frozenset(name for name, _ in phase.terms)
    other = frozenset(name for name in names if "reconstruction" in name)
    pseudo = frozenset(name for name in names if name.startswith("pseudo"))
    joint = names & frozenset[str]().union(*AGGREGATOR_TERMS.values()) - other
    return Losses(joint | pseudo, other, bool(pseudo) and not joint)


def _trained(row: Method | Estimator) -> list[Losses]:
    """Of each phase with epochs."""
    return [] if isinstance(row, Estimator) else [losses(phase) for phase in row.phases if phase.epochs]


def _non_clustering(row: Method | Estimator) -> str:
    if isinstance(row, Estimator):
        return "none" if row.reconstruction == "-" else row.reconstruction
    names = frozenset[str]().union(*(kinds.other for kinds in _trained(row)))
    ordered = [n for n in _LOSS_TERMS if n in names] + sorted(names - _LOSS_TERMS.keys())
    words = [_LOSS_TERMS.get(name, name.replace("_", " ")) for name in ordered]
    if "variational_entropy" in _term_names(row):
        words.append("variational bound (ELBO)")
    return "; ".join(dict.fromkeys(words)) or "none"


def _clustering(row: Method | Estimator) -> str:
    words = [_CLUSTERING_LOSSES.get(row.aggregator, row.aggregator)]
    if isinstance(row, Estimator):
        return "normalised cut, relaxed" if row.readout == "k-means" else words[0]
    if any(name.startswith("pseudo") for name in _term_names(row)):
        alone = row.aggregator == "NONE"
        words = ["cluster classification"] if alone else [*words, "cluster classification (warm start)"]
    balances = bool(_term_names(row) & {"usage_prior", "batch_entropy"})
    # a target that is not sharpened can only balance: DEPICT's, p / f^eta
    if row.aggregator == "TARGET" and float(_setting(row, "target_kappa") or 2) <= 1:
        balances = True
    return " + ".join([*words, "balanced assignments"] if balances else words)


def _term_names(row: Method) -> frozenset[str]:
    return frozenset(name for phase in row.phases if phase.epochs for name, _ in phase.terms)


def _combination(row: Method | Estimator) -> str:
    if isinstance(row, Estimator):
        return "one after the other" if row.reconstruction != "-" else "clustering only"
    phases = _trained(row)
    first = next((i for i, kinds in enumerate(phases) if kinds.clustering), None)
    if first is None:
        return "non-clustering loss, then clustering" if phases else "clustering only"
    pretrained = any(kinds.other for kinds in phases[:first])
    joint = any(kinds.clustering and kinds.other for kinds in phases)
    if pretrained:
        return "pretrain, then joint" if joint else "pretrain, then fine-tune"
    return "joint" if joint else "clustering only"


def _update(row: Method | Estimator) -> str:
    if isinstance(row, Estimator):
        updates = {"hard": "alternating, hard", "prior": "alternating (EM), soft"}
        return updates.get(row.gate, "once, at the end")
    if row.aggregator == "NONE":
        return "once, by k-means on the codes"
    trained = {part for phase in row.phases for part in phase.trains}
    hard = row.gate == "hard"
    if not trained & {"energy", "experts", "gate"}:
        return "alternating, hard" if hard else "alternating (EM), soft"
    if hard and not trained & {"energy", "experts"}:
        return "alternating, hard"
    words = "jointly, by back-propagation, " + ("hard" if hard else "soft")
    return words + ("; target refreshed from the whole set" if row.aggregator == "TARGET" else "")


# ---- as plain data


def row_data(row: Method | Estimator) -> dict[str, Any]:
    """A row as plain data: name, kind, summary, paper, slots, taxonomy, phases and settings."""
    if isinstance(row, Estimator):
        defaults = asdict(EstimatorConfig())
        phases: list[Any] = [{"name": name} for name in row.phases]
        settings = {name: defaults[name] for name in row.uses}
    else:
        phases, settings = [asdict(phase) for phase in row.phases], asdict(row.settings)
    return {
        "name": row.name,
        "kind": "estimator" if isinstance(row, Estimator) else "mixture",
        "summary": row.summary,
        "paper": row.paper,
        "slots": {slot: getattr(row, slot) for slot in SLOTS},
        "taxonomy": asdict(taxonomy(row)),
        "phases": phases,
        "settings": settings,
    }


def table_data(methods: Iterable[Method]) -> dict[str, list[dict[str, Any]]]:
    """The whole table as plain data: methods, estimators, and what is not in it."""
    return {
        "methods": [row_data(row) for row in methods],
        "estimators": [row_data(row) for row in ESTIMATORS.values()],
        "missing": [asdict(row) for row in MISSING.values()],
    }
