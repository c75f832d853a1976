"""What a row of the table is made of: settings of its slots, optimisers, and phases of a schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from distclust.errors import near
from distclust.mixture.energies import DISSIMILARITIES, NORMALISERS
from distclust.mixture.imports import is_import_path
from distclust.mixture.layers import ACTIVATIONS


def one_of(field_name: str, value: str, allowed: object) -> None:
    """Raises ValueError with the names that may be used, and the nearest of them."""
    names = sorted(allowed)  # type: ignore[call-overload]
    if value not in names:
        said = f"{field_name} is {value!r}; expected one of: {', '.join(names)}"
        raise ValueError(said + near(value, names))


Rule = tuple[Callable[[float], bool], str]
"""Which finite numbers a setting may be, and in words."""
ANY: Rule = (lambda v: True, "a finite number")
ABOVE_0: Rule = (lambda v: v > 0, "a finite number above 0")
FROM_0: Rule = (lambda v: v >= 0, "a finite number, 0 or more")
FROM_1: Rule = (lambda v: v >= 1, "a finite number of at least 1")
SHARE: Rule = (lambda v: 0 <= v < 1, "a share in [0, 1)")
FACTOR: Rule = (lambda v: 0 < v <= 1, "a factor above 0, and 1 at most")


def check_number(field_name: str, value: float | None, rule: Rule) -> None:
    """Raises ValueError for a number that is not finite or that the rule refuses; None is no number.

    A NaN is not below any bound, so a comparison alone lets it pass, or not, by the way it is written.
    """
    fits, expected = rule
    if value is not None and not (math.isfinite(value) and fits(value)):
        raise ValueError(f"{field_name} is {value}; expected {expected}")


_MODEL_NUMBERS: dict[Rule, tuple[str, ...]] = {
    SHARE: ("input_dropout", "hidden_dropout", "gate_dropout", "expert_threshold"),
    ABOVE_0: (
        *("tau", "tau_spread", "sharpen", "target_kappa", "alpha", "interval", "degrees"),
        *("fourier_gamma", "spectral_gamma"),
    ),
    FROM_0: ("balance", "target_eta", "usage_floor", "log_det", "rotation", "shift"),
    FROM_1: ("p",),
}
"""Every number of `ModelSettings` that is not whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Sizes, temperatures and choices inside the slots; a row has its own, a recipe may change them."""

    hidden: tuple[int, ...] = (256,)
    """Widths of the autoencoder between the rows and the codes; mirrored in the decoder."""
    code_size: int = 64
    """J, the length of a code; of no use where the row has no network."""
    activation: str = "relu"
    """relu, leaky_relu (0.2), leaky_relu_01 (0.01), elu, tanh or sigmoid."""
    norm: Literal["none", "layer", "batch"] = "none"
    """Normalisation of the hidden layers; batch normalises each lane by itself."""
    input_dropout: float = 0.0
    """Share of a row's entries that the autoencoder does not see while it is pretrained."""
    hidden_dropout: float = 0.0
    """Dropout after each hidden layer of the encoder, in the phases that say so (DEPICT's noise)."""
    output: Literal["linear", "sigmoid"] = "linear"
    """The decoder's output: linear with squared error, or sigmoid with cross-entropy (rows in [0, 1])."""
    unit_codes: bool = False
    """Whether energies and k-means see the codes on the unit sphere."""
    image: tuple[int, ...] = ()
    """(channels, height, width) of rows that are images, channels first; empty for other rows."""
    conv: tuple[tuple[int, int, int, int], ...] = ()
    """Convolutional layers (channels, kernel, stride, pooling) of the autoencoder, used where `image` is
    set."""
    conv_padding: Literal["same", "valid"] = "same"
    """Padding of the convolutions."""
    experts: Literal["autoencoder", "constant", "low_rank", "convolutional"] = "autoencoder"
    """What f_k is: an autoencoder, one vector, an affine subspace, or a convolutional autoencoder."""
    expert_space: Literal["rows", "codes"] = "rows"
    """What the experts reconstruct: the rows, or the codes of the pretrained autoencoder."""
    expert_hidden: tuple[int, ...] = (256,)
    """Widths of an expert between its input and its codes."""
    expert_code_size: int = 10
    """Length of an expert's code; the rank of a low-rank expert."""
    expert_conv: tuple[tuple[int, int, int, int], ...] = ((16, 5, 2, 1), (32, 5, 2, 1))
    """Layers of a convolutional expert."""
    expert_threshold: float = 0.0
    """Top-m experts: a row asks only the experts whose gate probability is above this, and the most probable
    one. Another objective than DAMIC's, never below it; 0 asks all."""
    expert_limit: int = 0
    """At most this many experts a row, with `expert_threshold`; 0: no limit."""
    expert_check_steps: int = 100
    """With `expert_threshold`, the exact loss is computed on one batch in so many, for the log."""
    gate_hidden: tuple[int, ...] = (256,)
    """Widths of the gate network between its input and the K logits."""
    gate_conv: tuple[tuple[int, int, int, int], ...] = ()
    """Convolutional layers of the gate, before `gate_hidden`; used where `image` is set."""
    gate_dropout: float = 0.0
    """Dropout on the gate's input and hidden layers, in the phases that say so."""
    tau: float = 1.0
    """Temperature of LSE and FREE, in units of the energies."""
    tau_spread: float | None = None
    """When set, tau becomes this factor times the spread of the energies, measured as the joint phase
    begins."""
    balance: float = 0.0
    """eta in t ~ w^kappa / f^eta, t what a clean teacher teaches and w its responsibilities: 1 pulls towards
    equal clusters, 0 with sharpen 1 is the likelihood."""
    sharpen: float = 1.0
    """kappa in t ~ w^kappa / f^eta: above 1 the teacher is surer than the likelihood says."""
    target_kappa: float = 2.0
    """kappa of the target t ~ p^kappa / f^eta (DEC: 2)."""
    target_eta: float = 1.0
    """eta of the target t ~ p^kappa / f^eta (DEC: 1, DEPICT: 1/2)."""
    usage_floor: float = 0.0
    """f_k of a target counts as at least this share of an equal cluster's. A target is of the gate as it is,
    f of the last count: without, a cluster that almost died may draw every row before it is counted again."""
    alpha: float = 1000.0
    """Inverse temperature of a tied gate."""
    dissimilarity: str = "euclidean"
    """d(z, theta_k): a name of energies.DISSIMILARITIES, or a function of your own as module:name."""
    p: float = 3.0
    """Minkowski's exponent."""
    interval: float = 2.0
    """Length of the torus in each direction."""
    normaliser: str = "softmax_abs"
    """How Kullback-Leibler puts codes on the simplex."""
    degrees: float = 1.0
    """Degrees of freedom of the heavy-tailed energy (DEC: 1)."""
    log_det: float = 0.0
    """Weight of the log-determinant of a Mahalanobis precision P, on the scale of the temperature that the
    gate has (tau under a prior gate, else 1 / alpha): 1 makes it a proper Gaussian, of the precision
    2 P / temperature; 0 is DMAE as published."""
    precision_start: Literal["covariance", "identity"] = "covariance"
    """How Mahalanobis precisions start: from the k-means clusters' covariances, or as identities."""
    fourier_gamma: float = 1.0
    """Width of the Gaussian kernel exp(-gamma ||x - y||^2) whose random features an encoder learns first."""
    landmarks: int = 500
    """Rows M whose affinities give an encoder's spectral codes: M^2 numbers once, and M D in the model while
    it is trained, so in its checkpoints."""
    spectral_gamma: float | None = None
    """gamma in the affinity exp(-gamma ||x - y||^2) of spectral codes; measured on landmarks when not set."""
    rotation: float = 0.0
    """Largest rotation of an image, in radians, in the phases whose noise names augment (DMAE: 0.3)."""
    shift: float = 0.0
    """Largest shift of an image in each direction, in pixels (DMAE: 2)."""
    network: str = ""
    """A network of your own as module:name, in place of the row's."""

    def __post_init__(self) -> None:
        one_of("model.activation", self.activation, ACTIVATIONS)
        if not is_import_path(self.dissimilarity):
            one_of("model.dissimilarity", self.dissimilarity, DISSIMILARITIES)
        if self.network and not is_import_path(self.network):
            raise ValueError(f"model.network is {self.network!r}; expected an import path module:name")
        one_of("model.normaliser", self.normaliser, NORMALISERS)
        for name in ("hidden", "expert_hidden"):
            widths = getattr(self, name)
            if not widths or min(widths) < 1:
                raise ValueError(f"model.{name} is {list(widths)}; expected one or more widths of at least 1")
        if self.gate_hidden and min(self.gate_hidden) < 1:
            raise ValueError(f"model.gate_hidden is {list(self.gate_hidden)}; expected widths of at least 1")
        for name in ("code_size", "expert_code_size", "landmarks"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; expected at least 1")
        for rule, names in _MODEL_NUMBERS.items():
            for name in names:
                check_number(f"model.{name}", getattr(self, name), rule)
        self._check_top_experts()
        self._check_images()

    def _check_top_experts(self) -> None:
        if self.expert_limit < 0 or self.expert_check_steps < 1:
            raise ValueError(
                f"model.expert_limit is {self.expert_limit} and model.expert_check_steps "
                f"{self.expert_check_steps}; expected 0 or more, and at least 1"
            )
        if self.expert_limit and not self.expert_threshold:
            raise ValueError(
                f"model.expert_limit is {self.expert_limit} and model.expert_threshold is 0, which asks all "
                "experts; set model.expert_threshold above 0 (1e-6 for the limit alone)"
            )
        if self.expert_threshold and self.experts != "autoencoder":
            raise ValueError(
                f"model.expert_threshold is {self.expert_threshold} and model.experts is {self.experts}; "
                "only experts: autoencoder can be left out"
            )

    def _check_images(self) -> None:
        if self.image and (len(self.image) != 3 or min(self.image) < 1):
            raise ValueError(
                f"model.image is {list(self.image)}; expected [channels, height, width], channels first"
            )
        for name in ("conv", "expert_conv", "gate_conv"):
            for layer in getattr(self, name):
                if min(layer) < 1:
                    raise ValueError(
                        f"model.{name} has the layer {list(layer)}; expected [channels, kernel, stride, "
                        "pooling], each at least 1"
                    )
        for name in ("rotation", "shift"):
            if getattr(self, name) and not self.image:
                raise ValueError(f"model.{name} is set and model.image is not: only images are augmented")
        if self.experts == "convolutional" and not (self.image and self.expert_space == "rows"):
            raise ValueError("model.experts is convolutional: it needs model.image, and rows to reconstruct")


_OPTIMIZER_NUMBERS: dict[Rule, tuple[str, ...]] = {
    ABOVE_0: ("learning_rate", "eps"),
    SHARE: ("momentum",),
    FROM_0: ("weight_decay", "floor"),
    FACTOR: ("decay",),
}
"""Every number of `OptimizerConfig` that is not whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """How a phase descends."""

    name: Literal["adam", "sgd"] = "adam"
    """Fused Adam, or SGD with momentum."""
    learning_rate: float = 1e-3
    """Step size."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = False
    """Whether SGD's momentum is Nesterov's."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """L2 added to the gradient."""
    decay: float = 1.0
    """The step size is multiplied by this every `decay_epochs`."""
    decay_epochs: int = 1
    """Epochs between two decays."""
    floor: float = 0.0
    """The step size does not decay below this."""

    def __post_init__(self) -> None:
        for rule, names in _OPTIMIZER_NUMBERS.items():
            for name in names:
                check_number(name, getattr(self, name), rule)
        if self.floor > self.learning_rate:
            raise ValueError(
                f"floor is {self.floor} and learning_rate {self.learning_rate}; expected a floor that is not "
                "above the step size that decays to it: set floor as well"
            )
        if self.decay_epochs < 1:
            raise ValueError(f"decay_epochs is {self.decay_epochs}; expected at least 1")
        if self.nesterov and self.momentum <= 0:
            raise ValueError("nesterov is set and momentum is 0; Nesterov's step needs a momentum")

    def rate(self, epoch: int) -> float:
        """The step size in an epoch of the phase, from 0."""
        return max(self.learning_rate * self.decay ** (epoch // self.decay_epochs), self.floor)


FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What a phase and a checkpoint may be called: a checkpoint's folder has its phase's name in it."""
_LONGEST_NAME = 100
"""Characters of a phase's name: file systems take 255, and the folder has more in its name."""
PARTS = ("network", "experts", "energy", "gate")
"""What a phase may train, or parts of them."""
NOISY = ("network", "gate", "augment")
"""What a phase's noise may name: see MixtureModel.disturbed, MixtureModel.view."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One part of a schedule: what is trained on which terms, for how many epochs."""

    name: str
    epochs: int
    """Passes over the data; 0 for a phase that only begins (an initialisation)."""
    trains: tuple[str, ...] = ()
    """Submodules with gradients: network, experts, energy, gate, or a part as network.encoder. None: the
    epochs are passes of its statistics (EM)."""
    terms: tuple[tuple[str, float], ...] = ()
    """Terms of the loss and their weights."""
    statistics: tuple[str, ...] = ()
    """Statistics kept while it runs."""
    begin: tuple[str, ...] = ()
    """What happens once as it begins: 'initialise_clusters', another start, 'spectral_map', or a statistic
    with when = 'begin'."""
    noise: tuple[str, ...] = ()
    """Submodules whose dropout is on, network or gate; 'augment' disturbs images."""
    sweep_epochs: int = 1
    """Epochs between two passes of the statistics with when = 'epoch' (closed-form centroids)."""
    refresh_steps: int = 0
    """Steps between two refreshes of the teacher's target; 0: once an epoch."""
    stop_label_change: float = 0.0
    """Ends the phase when fewer than this share of the labels moved between two refreshes; 0: never."""
    anneal: Literal["none", "alpha", "tau"] = "none"
    """alpha: DKM's growing inverse temperature; tau: from anneal_from times the temperature down to it."""
    anneal_epochs: int = 5
    """Epochs at each value of DKM's schedule."""
    anneal_from: float = 8.0
    """Where tau starts, as a multiple of where it ends."""
    tau_factor: float = 1.0
    """Tau of this phase, as a multiple of the temperature that is set or was measured. That of the last
    phase stays with the model, where a readout by responsibility or energy uses it."""
    average_last_epoch: bool = False
    """Whether the weights become their mean over the steps of the last epoch (AE-CM)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        where = f"phases.{self.name}"
        if not FILE_NAME.fullmatch(self.name) or len(self.name) > _LONGEST_NAME:
            raise ValueError(
                f"a phase is called {self.name!r}, and its checkpoint after it; expected a letter or digit "
                f"and then letters, digits, '-', '_' and '.' only, {_LONGEST_NAME} at most: rename it"
            )
        if self.epochs < 0:
            raise ValueError(f"{where}.epochs is {self.epochs}; expected 0 or more")
        if self.epochs and self.trains and not self.terms:
            raise ValueError(f"phase {self.name} has {self.epochs} epochs and no term to train on")
        if self.epochs and not self.trains and not self.statistics:
            raise ValueError(f"phase {self.name} has {self.epochs} epochs and nothing that they change")
        for part in self.trains:
            one_of(f"{where}.trains", part.split(".")[0], PARTS)
        for part in self.noise:
            one_of(f"{where}.noise", part, NOISY)
        if self.refresh_steps < 0:
            raise ValueError(f"{where}.refresh_steps is {self.refresh_steps}; expected 0 or more")
        for term, weight in self.terms:
            check_number(f"{where}.terms: the weight of {term}", weight, ANY)
        check_number(f"{where}.stop_label_change", self.stop_label_change, SHARE)
        check_number(f"{where}.anneal_from", self.anneal_from, ABOVE_0)
        check_number(f"{where}.tau_factor", self.tau_factor, ABOVE_0)
        if self.stop_label_change and "teacher" not in self.statistics:
            raise ValueError(
                f"phase {self.name} stops by label changes, which its teacher counts; expected the "
                "statistic 'teacher'"
            )
        if self.sweep_epochs < 1:
            raise ValueError(f"{where}.sweep_epochs is {self.sweep_epochs}; expected at least 1")
        if self.anneal_epochs < 1:
            raise ValueError(f"{where}.anneal_epochs is {self.anneal_epochs}; expected at least 1")

    @property
    def trains_network(self) -> bool:
        """Whether the network learns, and its batches are normalised by themselves."""
        return any(part.split(".")[0] == "network" for part in self.trains)

    @property
    def by_sweeps(self) -> bool:
        """Whether an epoch is one pass of the phase's statistics and no step of an optimiser."""
        return self.epochs > 0 and not self.trains
