"""The survey's building blocks of any row, read off its slots and phases; and the table as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from distclust.mixture.catalogue import ESTIMATORS, MISSING, SLOTS, Estimator, EstimatorConfig
from distclust.mixture.terms import AGGREGATOR_TERMS

if TYPE_CHECKING:
    from distclust.mixture.methods import Method, Phase

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
    "unit_reconstruction": "AE reconstruction",
    "fourier_regression": "regression on random Fourier features",
    "spectral_regression": "regression on spectral codes",
}
_NO_NETWORK = ("-", "none", "identity", "")


def taxonomy(row: Method | Estimator) -> Taxonomy:
    """The seven building blocks, from the row's slots and phases.

    Cells of published methods agree with the survey where its text says them, but for the pretraining of
    DEPICT and VaDE, which it does not count, and DEPICT's update, which it calls alternating. They are read
    off the slots, so a new row has them too.
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
    if _words(row.network) == "directions":
        parts.append("linear projection (SVD)")
    elif _has_network(row) and _trains_network(row):
        conv = "conv" in network or _setting(row, "conv") not in ("", "()")
        parts.append("VAE" if "vari" in network or "vae" in network else "CNN" if conv else "MLP")
    if _is_experts(row):
        experts = _setting(row, "experts").replace("_", "-")
        parts.append("K autoencoders" if experts == "autoencoder" else f"K {experts} experts")
    if row.gate in ("network", "expert_codes"):
        parts.append("gate network")
    return " + ".join(parts) or "none (shallow)"


def _trains_network(row: Method | Estimator) -> bool:
    return not isinstance(row, Estimator) and any(phase.trains_network for phase in row.phases)


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
    """Reconstructions, and regressions on first codes."""
    warm: bool
    """Whether what clusters are pseudo-labels alone."""


def losses(phase: Phase) -> Losses:
    """The terms of a phase by what they are to the survey; none of either for a phase without epochs."""
    if not phase.epochs:
        return Losses(frozenset(), frozenset(), False)
    if not phase.trains:
        return Losses(frozenset(phase.statistics), frozenset(), False)
    names = frozenset(name for name, _ in phase.terms)
    other = frozenset(name for name in names if "reconstruction" in name or "regression" in name)
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
    sharpened = "lse_clean_teacher" in _term_names(row) and row.settings.sharpen > 1.0
    if row.aggregator != "TARGET" and (sharpened or _term_names(row) & AGGREGATOR_TERMS["TARGET"]):
        words.append(_CLUSTERING_LOSSES["TARGET"])
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
    targets = _term_names(row) & AGGREGATOR_TERMS["TARGET"]
    return words + ("; target refreshed from the whole set" if targets else "")


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
