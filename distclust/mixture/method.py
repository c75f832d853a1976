"""A row of the table: a choice in each slot, and the rules that choices must keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distclust.mixture.energies import find_dissimilarity
from distclust.mixture.settings import ModelSettings, Phase, one_of
from distclust.mixture.statistics import STATISTICS
from distclust.mixture.terms import AGGREGATOR_TERMS, TERMS

KMEANS = "initialise_clusters"
"""The start of all clusters: k-means on the codes."""

_FROM_KMEANS = ("pinv_gate", "e_step_gate", "gaussian_start")
"""Starts that take up what k-means has found."""

DIRECTIONS = "singular_directions"
"""The start of a network that is the rows' singular directions."""

STARTS = frozenset({KMEANS, DIRECTIONS, *_FROM_KMEANS})
"""Starts that a phase may begin with: see training/initialise.py."""

SPECTRAL_MAP = "spectral_map"
"""What a phase may begin with beside those and a statistic: the landmarks of its encoder's target."""

_CENTROIDS: dict[str, tuple[str, ...]] = {"energy": ("dissimilarity", "student")}
_NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "mix": _CENTROIDS | {"gate": ("tied",)},
    "mixed_reconstruction": _CENTROIDS,
    "exp_orthonormal": _CENTROIDS,
    "orthonormality": _CENTROIDS,
    "layer_reconstruction": {"network": ("autoencoder",)},
    "running_means": _CENTROIDS,
    "recentre": _CENTROIDS,
    "em": _CENTROIDS | {"gate": ("prior",)},
    "pinv_gate": {"gate": ("linear",)},
    "e_step_gate": {"gate": ("linear",)},
    "gaussian_start": {"energy": ("gaussian",), "gate": ("prior",)},
    DIRECTIONS: {"network": ("directions",)},
}
"""What a slot has to hold for a term, a statistic or a start; beside these, energies where they read them."""


_CENTROID_ENERGIES = ("dissimilarity", "student", "gaussian")
"""Energies whose parameters stand in the codes, where k-means can start them."""


def _reads_kmeans(name: str) -> bool:
    """Whether a term, a statistic or a start reads the centroids of k-means, or the pseudo-labels by them."""
    of = TERMS.get(name) or STATISTICS.get(name)
    return name in _FROM_KMEANS or (of is not None and "pseudo_labels" in of.needs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row of the table."""

    name: str
    paper: str
    summary: str
    network: Literal["autoencoder", "variational", "directions", "none"] = "autoencoder"
    energy: Literal["experts", "dissimilarity", "student", "gaussian", "none"]
    gate: Literal["network", "expert_codes", "linear", "tied", "prior", "hard"]
    aggregator: Literal["LSE", "EXP", "MIN", "MIX", "FREE", "TARGET", "NONE"]
    readout: Literal["gate", "responsibility", "energy", "kmeans"]
    settings: ModelSettings
    phases: tuple[Phase, ...]
    target: str = "-"
    reconstruction: str = "-"
    regulariser: str = "-"

    def __post_init__(self) -> None:
        self.check()

    @property
    def terms(self) -> frozenset[str]:
        """Every term of every phase."""
        return frozenset(name for phase in self.phases for name, _ in phase.terms)

    @property
    def has_teacher(self) -> bool:
        """Whether a frozen copy of the model is kept."""
        return any("teacher" in self.statistics_of(phase) for phase in self.phases)

    def statistics_of(self, phase: Phase) -> tuple[str, ...]:
        """The statistics that a phase keeps: its own, those its terms need, batch normalisation's sums."""
        names = dict.fromkeys(phase.statistics)
        for term, _ in phase.terms:
            names |= dict.fromkeys(sorted(TERMS[term].statistics))
        if self.settings.balance and "lse_clean_teacher" in dict(phase.terms):
            names["gate_usage"] = None
        if "teacher" in names:  # it has the frequencies too
            names.pop("gate_usage", None)
        if self.settings.norm == "batch" and phase.trains_network:
            names["batch_norm"] = None
        return tuple(names)

    def check(self) -> None:
        """Refuse a row whose slots contradict each other.

        Raises:
            ValueError: with the rule that is broken.
        """
        where = f"method {self.name}"
        self._check_slots(where)
        names = [phase.name for phase in self.phases]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(
                f"{where}: {names.count(twice[0])} of its phases are called {twice[0]}; expected a name for "
                "each, by which settings and checkpoints are found: rename the others"
            )
        used: set[str] = set()
        for phase in self.phases:
            for name, _ in phase.terms:
                one_of(f"{where}, phase {phase.name}: term", name, TERMS)
                used.add(name)
            for name in phase.statistics:
                one_of(f"{where}, phase {phase.name}: statistic", name, STATISTICS)
            for name in phase.begin:
                known = {*STATISTICS, *STARTS, SPECTRAL_MAP}
                one_of(f"{where}, phase {phase.name}: begin", name, known)
            self._check_needs(f"{where}, phase {phase.name}", phase)
        expected = AGGREGATOR_TERMS.get(self.aggregator, frozenset())
        by_em = any("em" in phase.statistics for phase in self.phases)
        if expected and self.phases and not used & expected and not by_em:
            raise ValueError(f"{where}: no phase has the term of its aggregator {self.aggregator}")
        if by_em and not find_dissimilarity(self.settings.dissimilarity).is_bregman:
            raise ValueError(
                f"{where}: the weighted mean is the best centroid of a Bregman divergence only; expected "
                "squared_euclidean, mahalanobis, kullback_leibler, itakura_saito or i_divergence, found "
                f"{self.settings.dissimilarity}: use dmae-lse or dmae-exp, which descend by gradient"
            )
        if by_em and self.settings.dissimilarity == "kullback_leibler":
            one_of(f"{where}: model.normaliser", self.settings.normaliser, ("none", "plain", "abs", "relu"))
        if self.settings.expert_threshold:
            self._check_top_experts(where)

    def check_training(self, n_clusters: int, published: Method | None = None) -> None:
        """Refuse settings that only a phase would use, where no phase does, and phases that lack what they
        need.

        Not part of `check`: a trained model keeps its settings and not its phases.

        Args:
            n_clusters: K.
            published: the row before its phases were changed; where its centroids start from k-means, those
                of this row have to.

        Raises:
            ValueError: naming the setting, and what to say in its place.
        """
        where = f"method {self.name}"
        changed = self.settings.balance or self.settings.sharpen != 1.0
        if changed and self.phases and "lse_clean_teacher" not in self.terms:
            raise ValueError(
                f"{where}: model.balance and model.sharpen change the teacher of the term lse_clean_teacher, "
                "which no phase has; use damic-text, or leave model.balance at 0 and model.sharpen at 1"
            )
        counts = any({"gate_usage", "teacher"} & {*self.statistics_of(phase)} for phase in self.phases)
        if self.settings.usage_floor and self.phases and not counts:
            raise ValueError(
                f"{where}: model.usage_floor is {self.settings.usage_floor}, and no phase counts how much of "
                "the data each cluster has, so nothing would come of it; leave it at 0"
            )
        if "unit_reconstruction" in self.terms and not self.settings.unit_codes:
            raise ValueError(
                f"{where}: unit_reconstruction rebuilds rows from codes of length 1, and model.unit_codes is "
                "false; say reconstruction in its place, or set model.unit_codes to true"
            )
        self._check_first_codes(where, n_clusters)
        self._check_directions(where)
        self._check_starts(where, published or self)
        measured = any("temperature" in phase.begin for phase in self.phases)
        if self.settings.tau_spread is not None and self.phases and not measured:
            raise ValueError(
                f"{where}: model.tau_spread is {self.settings.tau_spread}, and no phase begins by measuring "
                "the energies' spread, so nothing would come of it; say phases.joint.begin=[temperature] as "
                "well (or the phase whose loss has tau), or set model.tau"
            )

    def _check_needs(self, where: str, phase: Phase) -> None:
        """Refuse what a phase computes from a slot that this row fills otherwise."""
        reading = [name for name, _ in phase.terms if "energies" in TERMS[name].needs]
        kept = (*phase.statistics, *phase.begin)
        reading += [name for name in kept if name in STATISTICS and "energies" in STATISTICS[name].needs]
        if reading and self.energy == "none":
            raise ValueError(
                f"{where}: {reading[0]} reads energies, and this row has none; leave it out, or use a row "
                "that has energies (distclust methods lists them)"
            )
        for name in (*(name for name, _ in phase.terms), *kept):
            for slot, allowed in _NEEDED.get(name, {}).items():
                found = getattr(self, slot)
                if found not in allowed:
                    raise ValueError(
                        f"{where}: {name} needs the {slot} {' or '.join(allowed)}, and that of this row is "
                        f"{found}; leave {name} out, or use a row that has it (distclust methods lists them)"
                    )
        if phase.anneal == "alpha" and self.gate != "tied":
            raise ValueError(
                f"{where}: anneal is alpha, the inverse temperature of a tied gate, and the gate of this row "
                f"is {self.gate}; set phases.{phase.name}.anneal=none, or use a row with a tied gate (dkm)"
            )

    def _check_starts(self, where: str, published: Method) -> None:
        """What k-means finds has to be there before it is read: until then pseudo-labels are all one, and
        centroids are where nobody wanted them."""
        example = next((p for p in published.phases if KMEANS in p.begin), None)
        said = f"expected {KMEANS} in what this phase or an earlier one begins with"
        if example is not None:
            said += f": {published.name} has phases.{example.name}.begin=[{', '.join(example.begin)}]"
        centroids = example is not None and self.energy in _CENTROID_ENERGIES
        started = False
        for phase in self.phases:
            during = (*(name for name, _ in phase.terms), *phase.statistics) if phase.epochs else ()
            for name in (*phase.begin, *during):
                started = started or name == KMEANS
                if not started and (_reads_kmeans(name) or (centroids and self._reads_energies(name))):
                    raise ValueError(
                        f"{where}, phase {phase.name}: {name} reads clusters that k-means has to find first, "
                        f"and nothing has; {said}"
                    )
        if self.phases and not started and (centroids or self.readout == "kmeans"):
            raise ValueError(
                f"{where}: its labels are read from clusters that start from k-means, and after phase "
                f"{self.phases[-1].name} nothing has found them; {said}"
            )

    def _check_directions(self, where: str) -> None:
        """Singular directions have to be found before anything asks for codes."""
        if self.network != "directions" or self.settings.network or not self.phases:
            return
        first = self.phases[0]
        if first.begin[:1] != (DIRECTIONS,):
            expected = ", ".join((DIRECTIONS, *(name for name in first.begin if name != DIRECTIONS)))
            raise ValueError(
                f"{where}: its codes are the rows' singular directions, which have to be found before "
                f"anything else; say phases.{first.name}.begin=[{expected}]"
            )

    @property
    def starts_from_kmeans(self) -> bool:
        """Whether a phase begins with k-means."""
        return any(KMEANS in phase.begin for phase in self.phases)

    def _reads_energies(self, name: str) -> bool:
        """Whether a term, a statistic or a start needs the parameters of the energies."""
        of = TERMS.get(name) or STATISTICS.get(name)
        reading = {"energies"} | ({"gate"} if self.gate in ("tied", "hard") else set())
        return (of is not None and bool(of.needs & reading)) or "energy" in _NEEDED.get(name, {})

    def _check_first_codes(self, where: str, n_clusters: int) -> None:
        """Spectral codes have to be found before they are learnt, and be learnt when they are found."""
        s, plain = self.settings, ModelSettings()
        learns = [i for i, phase in enumerate(self.phases) if "spectral_regression" in dict(phase.terms)]
        finds = [i for i, phase in enumerate(self.phases) if SPECTRAL_MAP in phase.begin]
        if learns and not any(i <= learns[0] for i in finds):
            name = self.phases[learns[0]].name
            raise ValueError(
                f"{where}, phase {name}: spectral_regression learns codes that no phase has found; say "
                f"phases.{name}.begin=[{SPECTRAL_MAP}] as well"
            )
        if finds and not any(i >= finds[-1] for i in learns):
            name = self.phases[finds[-1]].name
            raise ValueError(
                f"{where}, phase {name} begins by finding spectral codes, and no phase from there on learns "
                f"them; add the term spectral_regression, or leave {SPECTRAL_MAP} out"
            )
        for name in ("landmarks", "spectral_gamma", "fourier_gamma"):
            term = "fourier_regression" if name == "fourier_gamma" else "spectral_regression"
            if self.phases and getattr(s, name) != getattr(plain, name) and term not in self.terms:
                raise ValueError(
                    f"{where}: model.{name} is {getattr(s, name)}, and no phase has the term {term}, so "
                    "nothing would come of it; leave it out"
                )
        if learns and s.landmarks < n_clusters:
            raise ValueError(
                f"{where}: model.landmarks is {s.landmarks}, and the spectral codes of {n_clusters} clusters "
                f"need as many: set it to at least {n_clusters}, better to fifty a cluster"
            )

    def _check_top_experts(self, where: str) -> None:
        found = f"{where}: model.expert_threshold is {self.settings.expert_threshold}"
        likelihood = AGGREGATOR_TERMS["LSE"]
        if self.gate != "network" or not self.terms & likelihood:
            raise ValueError(
                f"{found}, and leaving experts out is for the likelihood of a mixture with a gate network; "
                "use damic-topm, or leave it at 0"
            )
        for phase in self.phases:
            used = {name for name, _ in phase.terms if "energies" in TERMS[name].needs}
            if used & likelihood and (others := used - likelihood):
                raise ValueError(
                    f"{found}, so phase {phase.name} computes the energies of some experts only, and has a "
                    f"term beside the likelihood that reads them all; leave out {', '.join(sorted(others))}"
                )

    def _check_slots(self, where: str) -> None:
        without = self.energy == "none"
        if self.aggregator in ("LSE", "FREE") and self.gate in ("tied", "hard"):
            raise ValueError(
                f"{where}: {self.aggregator} needs a prior or network gate, found {self.gate}: "
                "a tied gate already holds the energies, they would count twice"
            )
        if self.gate == "prior" and self.readout != "responsibility":
            raise ValueError(f"{where}: a prior gate is the same for every row; read out the responsibility")
        if self.aggregator == "MIX" and (self.energy != "dissimilarity" or self.gate != "tied"):
            raise ValueError(
                f"{where}: MIX needs parameters that can be mixed and a tied gate; experts cannot be mixed"
            )
        if self.aggregator == "TARGET" and self.gate not in ("tied", "network", "linear", "expert_codes"):
            raise ValueError(f"{where}: TARGET needs a gate that can be trained, found {self.gate}")
        if "target_responsibility" in self.terms and (without or self.gate in ("tied", "hard", "prior")):
            raise ValueError(
                f"{where}: target_responsibility needs energies and a gate of its own beside them, found "
                f"energy {self.energy} and gate {self.gate}; use target_clean"
            )
        if self.gate == "expert_codes" and (self.energy != "experts" or self.settings.experts == "constant"):
            raise ValueError(f"{where}: a gate on the experts' codes needs experts that have codes")
        if self.gate == "expert_codes" and self.settings.image and self.settings.gate_conv:
            raise ValueError(
                f"{where}: model.gate_conv is set, and the gate of this row reads the experts' codes, which "
                "are no images; set model.gate_conv=[], and its widths as model.gate_hidden"
            )
        if without and (self.aggregator not in ("TARGET", "NONE") or self.gate in ("tied", "hard")):
            raise ValueError(f"{where}: without energies only a gate of its own and TARGET can be trained")
        if without and self.readout in ("energy", "responsibility"):
            raise ValueError(f"{where}: without energies there is no {self.readout} to read out")
        if self.network == "none" and any("reconstruction" in name for name in self.terms):
            raise ValueError(f"{where}: without a network there is nothing to reconstruct")
        if self.network != "variational" and "variational_entropy" in self.terms:
            raise ValueError(f"{where}: variational_entropy needs a variational network")
