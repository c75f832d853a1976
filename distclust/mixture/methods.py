"""THE TABLE: one row a method, with its paper and its published settings.

A method is a choice in each of nine slots (network, energy, gate, aggregator, target, reconstruction,
regulariser, schedule,
readout). A new combination is a new row; `Method.check` refuses the combinations that do not make sense, and
says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distclust.mixture.energies import DISSIMILARITIES, NORMALISERS
from distclust.mixture.networks import ACTIVATIONS
from distclust.mixture.statistics import STATISTICS
from distclust.mixture.terms import AGGREGATOR_TERMS, TERMS


def _one_of(field_name: str, value: str, allowed: object) -> None:
    names = sorted(allowed)  # type: ignore[call-overload]
    if value not in names:
        raise ValueError(f"{field_name} is {value!r}; expected one of: {', '.join(names)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Sizes, temperatures and choices inside the slots; a row has its own, a recipe may change them."""

    hidden: tuple[int, ...] = (256,)
    """Widths of the autoencoder between the rows and the codes; mirrored in the decoder."""
    code_size: int = 64
    """J, the length of a code."""
    activation: str = "relu"
    """relu, leaky_relu, elu, tanh or sigmoid."""
    norm: Literal["none", "layer"] = "none"
    """Normalisation of the hidden layers."""
    input_dropout: float = 0.0
    """Share of a row's entries that the autoencoder does not see while it is pretrained."""
    unit_codes: bool = False
    """Whether energies and k-means see the codes on the unit sphere."""
    experts: Literal["autoencoder", "constant"] = "autoencoder"
    """What f_k is: an autoencoder, or one vector in input space."""
    expert_hidden: tuple[int, ...] = (256,)
    """Widths of an expert between the rows and its codes."""
    expert_code_size: int = 10
    """Length of an expert's code."""
    gate_hidden: tuple[int, ...] = (256,)
    """Widths of the gate network between the rows and the K logits."""
    gate_dropout: float = 0.0
    """Dropout on the gate's input and hidden layers, in the phases that say so."""
    tau: float = 1.0
    """Temperature of LSE and FREE, in units of the energies."""
    tau_spread: float | None = None
    """When set, tau becomes this factor times the spread of the energies, measured as the joint phase
    begins."""
    alpha: float = 1000.0
    """Inverse temperature of a tied gate."""
    dissimilarity: str = "euclidean"
    """d(z, theta_k): a name of energies.DISSIMILARITIES."""
    p: float = 3.0
    """Minkowski's exponent."""
    interval: float = 2.0
    """Length of the torus in each direction."""
    normaliser: str = "softmax_abs"
    """How Kullback-Leibler puts codes on the simplex."""
    log_det: float = 0.0
    """Weight of the log-determinant of a Mahalanobis precision: 1 makes it a proper Gaussian, 0 is DMAE as
    published."""

    def __post_init__(self) -> None:
        _one_of("model.activation", self.activation, ACTIVATIONS)
        _one_of("model.dissimilarity", self.dissimilarity, DISSIMILARITIES)
        _one_of("model.normaliser", self.normaliser, NORMALISERS)
        for name in ("hidden", "expert_hidden"):
            widths = getattr(self, name)
            if not widths or min(widths) < 1:
                raise ValueError(f"model.{name} is {list(widths)}; expected one or more widths of at least 1")
        if self.gate_hidden and min(self.gate_hidden) < 1:
            raise ValueError(f"model.gate_hidden is {list(self.gate_hidden)}; expected widths of at least 1")
        for name in ("code_size", "expert_code_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("input_dropout", "gate_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; expected a share in [0, 1)")
        for name in ("tau", "alpha", "tau_spread"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"model.{name} is {value}; expected a number above 0")
        if self.p < 1:
            raise ValueError(f"model.p is {self.p}; Minkowski's exponent is at least 1")
        if not self.interval > 0:
            raise ValueError(f"model.interval is {self.interval}; expected a length above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """How a phase descends."""

    name: Literal["adam", "sgd"] = "adam"
    """Fused Adam, or SGD with momentum."""
    learning_rate: float = 1e-3
    """Step size."""
    momentum: float = 0.9
    """SGD's momentum."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """L2 added to the gradient."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One part of a schedule: what is trained on which terms, for how many epochs."""

    name: str
    epochs: int
    """Passes over the data; 0 for a phase that only begins (an initialisation)."""
    trains: tuple[str, ...] = ()
    """Submodules with gradients: network, experts, energy, gate."""
    terms: tuple[tuple[str, float], ...] = ()
    """Terms of the loss and their weights."""
    statistics: tuple[str, ...] = ()
    """Statistics kept while it runs."""
    begin: tuple[str, ...] = ()
    """What happens once as it begins: 'initialise_clusters', or a statistic with when = 'begin'."""
    noise: tuple[str, ...] = ()
    """Submodules whose dropout is on."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"phases.{self.name}.epochs is {self.epochs}; expected 0 or more")
        if self.epochs and not self.terms:
            raise ValueError(f"phase {self.name} has {self.epochs} epochs and no term to train on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row of the table."""

    name: str
    paper: str
    summary: str
    energy: Literal["experts", "dissimilarity", "student"]
    gate: Literal["network", "tied", "prior", "hard"]
    aggregator: Literal["LSE", "EXP", "MIN", "MIX", "FREE", "TARGET", "NONE"]
    readout: Literal["gate", "responsibility", "energy"]
    settings: ModelSettings
    phases: tuple[Phase, ...]
    network: str = "autoencoder"
    target: str = "-"
    reconstruction: str = "-"
    regulariser: str = "-"

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse a row whose slots contradict each other.

        Raises:
            ValueError: with the rule that is broken.
        """
        where = f"method {self.name}"
        if self.aggregator in ("LSE", "FREE") and self.gate not in ("prior", "network"):
            raise ValueError(
                f"{where}: {self.aggregator} needs a prior or network gate, found {self.gate}: "
                "a tied gate already holds the energies, they would count twice"
            )
        if self.gate == "prior" and self.readout == "gate":
            raise ValueError(f"{where}: a prior gate is the same for every row; read out the responsibility")
        if self.aggregator == "MIX" and (self.energy == "experts" or self.gate not in ("tied", "network")):
            raise ValueError(
                f"{where}: MIX needs parameters that can be mixed and a gate; experts cannot be mixed"
            )
        if self.aggregator == "TARGET" and self.gate not in ("tied", "network"):
            raise ValueError(f"{where}: TARGET needs a gate that can be trained, found {self.gate}")
        used: set[str] = set()
        for phase in self.phases:
            for name, _ in phase.terms:
                _one_of(f"{where}, phase {phase.name}: term", name, TERMS)
                used.add(name)
            for name in (*phase.statistics, *phase.begin):
                _one_of(f"{where}, phase {phase.name}: statistic", name, {*STATISTICS, "initialise_clusters"})
        names = AGGREGATOR_TERMS.get(self.aggregator, frozenset())
        if names and self.phases and not used & names:
            raise ValueError(f"{where}: no phase has the term of its aggregator {self.aggregator}")


# ---- the rows

DAMIC_PAPER = (
    "Chazan, Gannot & Goldberger 2019, Deep clustering based on a mixture of autoencoders, arXiv 1812.06535"
)
DMAE_PAPER = "Lara & Gonzalez 2020, Dissimilarity mixture autoencoder for deep clustering, arXiv 2006.08177"


def _adam(rate: float) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=rate)


def _pretrain(epochs: int, optimizer: OptimizerConfig) -> Phase:
    return Phase(
        name="pretrain",
        epochs=epochs,
        trains=("network",),
        terms=(("reconstruction", 1.0),),
        noise=("network",),
        optimizer=optimizer,
    )


# reconstruction is a mean over features, as MSE is; energies are sums over features.
_INITIALISE = Phase(name="initialise", epochs=0, begin=("initialise_clusters", "code_radius"))

DAMIC = Method(
    name="damic",
    paper=DAMIC_PAPER,
    summary="a mixture of autoencoders: K experts reconstruct, a gate network says which is asked",
    energy="experts",
    gate="network",
    aggregator="LSE",
    readout="gate",
    reconstruction="inside E",
    # the paper's layer sizes are not known to us; these are a choice, with the code of 10 of its authors'
    # k-DAE
    settings=ModelSettings(norm="layer", tau=1.0, experts="autoencoder"),
    phases=(
        _pretrain(50, _adam(1e-3)),
        _INITIALISE,
        Phase(
            name="experts",
            epochs=50,
            trains=("experts",),
            terms=(("pseudo_energy", 1.0),),
            optimizer=_adam(1e-3),
        ),
        Phase(
            name="gate",
            epochs=50,
            trains=("gate",),
            terms=(("pseudo_cross_entropy", 1.0),),
            optimizer=_adam(1e-3),
        ),
        Phase(
            name="joint", epochs=50, trains=("experts", "gate"), terms=(("lse", 1.0),), optimizer=_adam(1e-3)
        ),
    ),
)

DAMIC_TEXT = Method(
    name="damic-text",
    paper=DAMIC_PAPER + "; settings for text are ours",
    summary="DAMIC for text: unit codes, vectors as experts, gate dropout, clean teacher, measured tau",
    energy="experts",
    gate="network",
    aggregator="LSE",
    readout="gate",
    reconstruction="inside E",
    settings=ModelSettings(
        input_dropout=0.2, unit_codes=True, experts="constant", gate_dropout=0.5, tau_spread=0.5
    ),
    phases=(
        _pretrain(10, _adam(1e-3)),
        _INITIALISE,
        # constant experts have their optimum in closed form, so no epoch is needed
        Phase(name="experts", epochs=0, begin=("expert_means",)),
        Phase(
            name="gate",
            epochs=5,
            trains=("gate",),
            terms=(("pseudo_cross_entropy", 1.0),),
            noise=("gate",),
            optimizer=_adam(1e-3),
        ),
        Phase(
            name="joint",
            epochs=12,
            trains=("experts", "gate"),
            begin=("temperature",),
            terms=(("lse_clean_teacher", 1.0),),
            noise=("gate",),
            optimizer=_adam(1e-3),
        ),
    ),
)

# DMAE sums its clustering term over a batch of 256 and averages the reconstruction over features and batch,
# with weights
# lambda_r = 0.01 and lambda_c = 1. As means over rows: clustering 1, reconstruction 0.01 / 256; times 256
# for the gradient's
# size, which Adam does not see. We keep the published ratio: reconstruction / clustering = 0.01 / 256 =
# 3.9e-5.
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
        _pretrain(500, OptimizerConfig(name="sgd", learning_rate=1.0, momentum=0.9)),
        _INITIALISE,
        Phase(
            name="joint",
            epochs=500,
            trains=("network", "energy", "gate"),
            terms=(("mix", 1.0), ("mixed_reconstruction", _DMAE_RATIO)),
            optimizer=_adam(1e-5),
        ),
    ),
)

DMAE_TEXT = Method(
    name="dmae-text",
    paper=DMAE_PAPER + "; settings for text are ours",
    summary="DMAE for text: a small autoencoder, unit codes, equal weights",
    energy="dissimilarity",
    gate="tied",
    aggregator="MIX",
    readout="gate",
    reconstruction="x from the mixed centroid",
    # alpha as the authors' replication of 2021; a softer gate lets MIX put codes between the centroids
    settings=ModelSettings(input_dropout=0.2, unit_codes=True, alpha=100.0, log_det=1.0),
    phases=(
        _pretrain(10, _adam(1e-3)),
        _INITIALISE,
        Phase(
            name="joint",
            epochs=10,
            trains=("network", "energy", "gate"),
            terms=(("mix", 1.0), ("mixed_reconstruction", 1.0)),
            optimizer=_adam(1e-4),
        ),
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in (DAMIC, DAMIC_TEXT, DMAE, DMAE_TEXT)}
