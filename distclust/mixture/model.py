"""The mixture model: one forward pass, and the terms of a phase."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distclust.mixture.convolutional import ConvolutionalAutoencoder, augment
from distclust.mixture.energies import CentroidEnergy, DissimilarityOptions, GaussianEnergy, StudentEnergy
from distclust.mixture.experts import AutoencoderExperts, build_experts
from distclust.mixture.gates import HardGate, LinearGate, NetworkGate, PriorGate, TiedGate
from distclust.mixture.layers import Lanes
from distclust.mixture.method import Method
from distclust.mixture.networks import Autoencoder, Directions, Identity, VariationalAutoencoder
from distclust.mixture.noise import Noise
from distclust.mixture.own import build_network, check_members
from distclust.mixture.routing import Routes, asked_by
from distclust.mixture.settings import ModelSettings, Phase
from distclust.mixture.sparse import Rows, n_rows, rows_times
from distclust.mixture.spectral import SpectralMap
from distclust.mixture.terms import AGGREGATOR_TERMS, TERMS, Scene, Stats, View, responsibility

Asks = Literal["all", "own", "gate"]
"""The experts whose energies a pass computes: all, the pseudo-label's, those that the gate names."""
TEACHER = "teacher"
"""The submodule that holds the frozen copies."""
_FOR_TRAINING = (TEACHER, "spectral", "fourier_weight", "fourier_phase")
"""What a model that only predicts does not have."""


class MixtureModel(nn.Module):
    """A method's parts, built from its row of the table.

    Args:
        method: the row.
        settings: sizes and temperatures, the row's own or a recipe's.
        n_features: D, features of a row.
        n_clusters: K.
        for_training: whether it has what only training needs: a frozen teacher, what an encoder learns first.

    Raises:
        ValueError: settings that these rows cannot have: an image of another size, orthonormal centroids or
            spectral codes in codes of fewer numbers than clusters, a phase that trains what is not there; a
            network or a dissimilarity of a user's own that is none.
    """

    tau: Tensor
    base_tau: Tensor
    code_radius: Tensor
    pseudo_centroids: Tensor
    cluster_counts: Tensor
    fourier_weight: Tensor
    fourier_phase: Tensor
    spectral: SpectralMap
    # networks differ in what they offer beside `encode`; a term asks only for what its row has
    network: Any
    experts: Any
    energy: CentroidEnergy | GaussianEnergy | None

    def __init__(
        self,
        method: Method,
        settings: ModelSettings,
        n_features: int,
        n_clusters: int,
        *,
        for_training: bool = True,
    ):
        super().__init__()
        self.method, self.settings = method, settings
        self.n_features, self.n_clusters = n_features, n_clusters
        self.lanes = Lanes()
        self._check_image()
        self.network = self._build_network()
        self.code_size: int = self.network.code_size
        self.experts = None
        if method.energy == "experts":
            self.experts = build_experts(self.n_expert_inputs, n_clusters, settings)
        self.energy = self._build_energy()
        self.gate = self._build_gate()
        self.register_buffer("tau", torch.tensor(float(settings.tau)))
        self.register_buffer("base_tau", torch.tensor(float(settings.tau)))
        self.register_buffer("code_radius", torch.tensor(1.0))
        self.register_buffer("pseudo_centroids", torch.zeros(n_clusters, self.code_size))
        # DCN's counts start at 100, as its authors' code has them
        self.register_buffer("cluster_counts", torch.full((n_clusters,), 100.0, dtype=torch.float64))
        if for_training:
            self._build_for_training()

    # ---- the parts

    def _check_image(self) -> None:
        image = self.settings.image
        if image and image[0] * image[1] * image[2] != self.n_features:
            raise ValueError(
                f"model.image is {list(image)}, which is {image[0] * image[1] * image[2]} numbers, and a row "
                f"has {self.n_features}; expected channels x height x width to be the length of a row"
            )

    def _build_for_training(self) -> None:
        """What an encoder learns first, and the frozen teacher."""
        method, s = self.method, self.settings
        if s.network:
            check_members(self.network, method, s.network)
        self._check_trains()
        if "orthonormality" in method.terms:
            self._check_code_size("orthonormal centroids for")
        if "fourier_regression" in method.terms:
            # exp(-gamma ||x - y||^2) as an inner product of cosines (Rahimi & Recht 2007)
            deviation = (2.0 * s.fourier_gamma) ** 0.5
            self.register_buffer("fourier_weight", deviation * torch.randn(self.n_features, self.code_size))
            self.register_buffer("fourier_phase", 2.0 * torch.pi * torch.rand(self.code_size))
        if "spectral_regression" in method.terms:
            self._check_code_size("spectral codes of")
            self.spectral = SpectralMap(s.landmarks, self.n_features, self.n_clusters, s.spectral_gamma)
        if method.has_teacher:
            self.teacher = nn.ModuleDict()
            for name, part in self._answering().items():
                self.teacher[name] = _frozen_twin(self, name, part)

    def _check_code_size(self, what: str) -> None:
        if self.code_size < self.n_clusters:
            raise ValueError(
                f"codes of {self.code_size} numbers hold no {what} {self.n_clusters} clusters: set "
                f"model.code_size to at least {self.n_clusters}"
            )

    def _build_network(self) -> nn.Module:
        s = self.settings
        if s.network:
            return build_network(self.n_features, s)
        match self.method.network:
            case "none":
                return Identity(self.n_features)
            case "directions":
                return Directions(self.n_features, s)
            case "variational":
                return VariationalAutoencoder(self.n_features, s, self.lanes)
            case _:
                if s.image and s.conv:
                    return ConvolutionalAutoencoder(s, self.lanes)
                return Autoencoder(self.n_features, s, self.lanes)

    def _build_energy(self) -> CentroidEnergy | GaussianEnergy | None:
        s, k = self.settings, self.n_clusters
        match self.method.energy:
            case "student":
                return StudentEnergy(k, self.code_size, s.degrees)
            case "gaussian":
                return GaussianEnergy(k, self.code_size)
            case "dissimilarity":
                options = DissimilarityOptions(p=s.p, interval=s.interval, normaliser=s.normaliser)
                return CentroidEnergy(k, self.code_size, s.dissimilarity, options, s.log_det)
            case _:
                return None

    def _build_gate(self) -> nn.Module:
        s, k = self.settings, self.n_clusters
        match self.method.gate:
            case "network":
                return NetworkGate(self.n_features, k, s)
            case "expert_codes":
                return NetworkGate(k * s.expert_code_size, k, s)
            case "linear":
                return LinearGate(self.code_size, k)
            case "tied":
                return TiedGate(k, s.alpha)
            case "prior":
                return PriorGate(k)
            case _:
                return HardGate()

    @property
    def nat(self) -> Tensor | float:
        """One nat in units of the distances: what a gate divides them by. Under a prior gate that is tau, as
        it was set, measured or annealed; else 1 / alpha."""
        if isinstance(self.gate, TiedGate):  # it is a PriorGate too
            return 1.0 / self.gate.alpha
        return self.tau if isinstance(self.gate, PriorGate) else 1.0 / self.settings.alpha

    @property
    def n_expert_inputs(self) -> int:
        """Length of what the experts reconstruct."""
        return self.n_features if self.settings.expert_space == "rows" else self.code_size

    @property
    def reads_sigmoid(self) -> bool:
        """Whether rows are compared with a sigmoid output, by cross-entropy; a network of a user's own is not
        asked."""
        s = self.settings
        by_experts = self.method.energy == "experts" and s.experts == "convolutional"
        by_network = not s.network and any("reconstruction" in name for name in self.method.terms)
        return s.output == "sigmoid" and (by_experts or by_network)

    def trained_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """`named_modules` without the frozen teacher."""
        return ((n, m) for n, m in self.named_modules() if n.split(".")[0] != TEACHER)

    def trained_in(self, phase: Phase) -> dict[str, nn.Parameter]:
        """The parameters that have a gradient in a phase, by name."""
        parts = [name for part in phase.trains for name in self._called(part)]
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if any(name == part or name.startswith(part + ".") for part in parts)
        }

    def _called(self, part: str) -> tuple[str, ...]:
        """The names of a part that a phase trains: those of `network.decoder` depend on the network."""
        inner = part.removeprefix("network.")
        if isinstance(self.network, ConvolutionalAutoencoder) and inner in self.network.parts:
            return tuple(f"network.{name}" for name in self.network.parts[inner])
        return (part,)

    def _check_trains(self) -> None:
        """Each part that a phase trains has to be in this model."""
        for phase in self.method.phases:
            for part in phase.trains:
                if not self.trained_in(replace(phase, trains=(part,))):
                    raise ValueError(
                        f"method {self.method.name}, phase {phase.name}: it trains {part}, and no parameter "
                        f"of this model is called so; expected some of {', '.join(self._trainable())}: set "
                        f"phases.{phase.name}.trains, or call the parts of a network of your own so"
                    )

    def _trainable(self) -> list[str]:
        """The parts that a phase may train: submodules, and what is in them."""
        names = [name.split(".") for name, _ in self.named_parameters()]
        found = {".".join(name[:depth]) for name in names for depth in (1, 2) if name[0] != TEACHER}
        if isinstance(self.network, ConvolutionalAutoencoder):
            found |= {f"network.{part}" for part in self.network.parts}
        return sorted(found)

    def prediction_state(self) -> dict[str, Tensor]:
        """`state_dict` without what only training needs."""
        return without_training(self.state_dict())

    # ---- the frozen teacher

    def _answering(self) -> dict[str, nn.Module]:
        """The submodules whose weights the gate's answer depends on."""
        parts = {"network": self.network, "experts": self.experts, "energy": self.energy, "gate": self.gate}
        return {name: part for name, part in parts.items() if part is not None}

    @torch.no_grad()
    def freeze_teacher(self) -> None:
        """Copy the present weights into the teacher."""
        for name, part in self._answering().items():
            self.teacher[name].load_state_dict(part.state_dict())

    @torch.no_grad()
    def _teacher_log_p(self, x: Rows) -> Tensor:
        """The gate (B, K) of the frozen teacher on undisturbed rows."""
        own = self._answering()
        try:
            for name in own:
                self._modules[name] = self.teacher[name]
            with self._normalised(None):  # what is frozen has running values
                log_p = self.view(x, ("gate",)).log_p
        finally:
            self._modules.update(own)
        assert log_p is not None
        return log_p

    # ---- the pieces of a forward pass

    def energy_codes(self, z: Tensor) -> Tensor:
        """The codes (B, J) as the energies and k-means see them: on the unit sphere where the settings say
        so."""
        return F.normalize(z, dim=1) if self.settings.unit_codes else z

    def codes(self, x: Rows) -> Tensor:
        """`energy_codes` of undisturbed rows, (B, J)."""
        return self.energy_codes(self.network.encode(x))

    def fourier_features(self, x: Rows) -> Tensor:
        """Random features (B, J) of a Gaussian kernel, `sqrt(2 / J) cos(x W + b)`."""
        return (2.0 / self.code_size) ** 0.5 * (rows_times(x, self.fourier_weight) + self.fourier_phase).cos()

    def spectral_codes(self, x: Rows) -> Tensor:
        """The K spectral codes of the rows, and zeros after them: (B, J)."""
        return F.pad(self.spectral(x), (0, self.code_size - self.n_clusters))

    def expert_inputs(self, x: Rows) -> Rows:
        """What the experts reconstruct: the rows, or their codes with entries of about 1."""
        if self.settings.expert_space == "rows":
            return x
        codes = self.codes(x).detach()
        return codes * self.code_size**0.5 if self.settings.unit_codes else codes

    def energies(self, x: Rows, z: Tensor | None, variance: Tensor | None = None) -> Tensor:
        """E (B, K). Experts: 0.5 ||x - f_k(x)||^2 (DAMIC); else the codes' dissimilarity to the centroids, or
        their Gaussian negative log-likelihood."""
        if self.experts is not None:
            return 0.5 * self.experts.errors(self.expert_inputs(x))
        assert self.energy is not None
        assert z is not None
        if isinstance(self.energy, GaussianEnergy):
            return self.energy.pairwise(self.energy_codes(z), variance)
        return self.energy.pairwise(self.energy_codes(z), self.nat)

    def energies_of(self, x: Rows, routes: Routes) -> Tensor:
        """E (B, K) of the experts that are asked, `LEFT_OUT` for the others."""
        return routes.table(0.5 * self.experts.errors_of(self.expert_inputs(x), routes), n_rows(x))

    def asks(self, phase: Phase, device: str | None = None) -> Asks:
        """Which experts the terms of a phase look at, on the model's device or on that type of device: all,
        those that the gate names, the row's own."""
        if not isinstance(self.experts, AutoencoderExperts):
            return "all"
        names = {name for name, _ in phase.terms if "energies" in TERMS[name].needs}
        # on a GPU the host would have to wait for the sizes
        if names == {"pseudo_energy"} and (device or self.tau.device.type) == "cpu":
            return "own"
        return "gate" if self.settings.expert_threshold and names & AGGREGATOR_TERMS["LSE"] else "all"

    def log_gate(self, x: Rows, z: Tensor | None, energies: Tensor | None, noise: Noise | None) -> Tensor:
        """log p (B, K); x is what a gate network reads: rows, or the experts' codes one after the other."""
        gate = self.gate
        if isinstance(gate, NetworkGate):
            return gate.log_p(x, noise)
        if isinstance(gate, LinearGate):
            assert z is not None
            return gate.log_p(self.energy_codes(z))
        if isinstance(gate, TiedGate):
            assert energies is not None
            return gate.log_p_of(energies)
        if isinstance(gate, PriorGate):
            return gate.log_prior().expand(n_rows(x), -1)
        assert energies is not None
        hard = F.one_hot(energies.argmin(1), self.n_clusters).to(energies.dtype)
        return hard.clamp_min(torch.finfo(energies.dtype).tiny).log()

    @torch.no_grad()
    def pseudo_labels(self, x: Rows) -> Tensor:
        """The k-means cluster (B,) of the rows' codes, by the frozen pretrained encoder (DAMIC)."""
        with self._normalised(None):
            return self._from_pseudo_centroids(x).argmin(1)

    def _from_pseudo_centroids(self, x: Rows) -> Tensor:
        """Distances (B, K) of the rows' codes, by differences: by inner products they would depend on the
        size of the batch, and lose their digits far from 0."""
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(self.codes(x), self.pseudo_centroids, compute_mode=exact)

    def view(
        self,
        x: Rows,
        needs: Iterable[str],
        noise: Noise | None = None,
        noisy: Iterable[str] = (),
        asks: Asks = "all",
    ) -> View:
        """One forward pass, computing only what is needed. `noisy` names the submodules that see the noise,
        `asks` the experts whose energies are computed."""
        needs, noisy = self._with_what_they_need(needs), frozenset(noisy)
        z, layers = None, {}
        network_noise = noise if "network" in noisy else None
        if "codes" in needs:
            z, layers = self.network.encode_with_layers(x, network_noise)
        clean_z = z
        if network_noise is not None and needs & {"clean_layers", "clean_gate"}:
            with torch.no_grad():
                clean_z, clean_layers = self.network.encode_with_layers(x)
            layers = clean_layers if "clean_layers" in needs else layers
        energies: Tensor | None = None
        log_q: Tensor | None = None
        expert_codes: Tensor | None = None
        if "energies" in needs and self.method.gate == "expert_codes":
            expert_codes, errors = self.experts.codes_and_errors(self.expert_inputs(x))
            energies = 0.5 * errors
        elif "energies" in needs and asks == "all":
            mean, variance = z, None
            if "log_variance" in layers and network_noise is not None:
                mean, variance = layers["mean"], layers["log_variance"].exp()
            energies = self.energies(x, mean, variance)
        gate_noise = noise if "gate" in noisy else None
        read = x if expert_codes is None else expert_codes.flatten(1)
        log_p = self.log_gate(read, z, energies, gate_noise) if "gate" in needs else None
        if "own_q" in needs:
            assert log_p is not None
            # q(c | x) is the mixture's posterior at the drawn code (VaDE)
            log_q = responsibility(log_p, self.energies(x, z), self.tau)
        clean = None
        if "clean_gate" in needs:
            with torch.no_grad():
                other = network_noise is not None and energies is not None and self.experts is None
                clean_energies = self.energies(x, clean_z) if other else energies
                clean = self.log_gate(read, clean_z, clean_energies, None)
        asked: Tensor | None = None
        labels = self.pseudo_labels(x) if "pseudo_labels" in needs else None
        if "energies" in needs and asks == "own":
            assert labels is not None
            energies = self.energies_of(x, Routes.to_own(labels, self.n_clusters))
        elif "energies" in needs and asks == "gate":
            answer = log_p if clean is None else clean
            assert answer is not None
            s = self.settings
            asked = asked_by(answer.detach(), s.expert_threshold, s.expert_limit)
            energies = self.energies_of(x, Routes.of(asked))
        teacher = self._teacher_log_p(x) if "teacher" in needs else None
        return View(z, energies, asked, log_p, clean, labels, log_q, teacher, layers)

    def _with_what_they_need(self, needs: Iterable[str]) -> frozenset[str]:
        """The needs, and what has to be computed for them."""
        found = set(needs)
        if found & {"gate", "clean_gate"} and self.method.gate in ("tied", "hard", "expert_codes"):
            found.add("energies")
        if found & {"gate", "clean_gate"} and self.method.gate == "linear":
            found.add("codes")
        if "own_q" in found or ("energies" in found and self.experts is None):
            found.add("codes")
        return frozenset(found)

    # ---- what the loop calls

    def scene(self, x: Rows, phase: Phase, totals: Stats, noise: Noise | None) -> Scene:
        """A forward pass with everything that the phase's terms need."""
        needs = frozenset().union(*(TERMS[name].needs for name, _ in phase.terms))
        return self.disturbed(x, phase, totals, noise, needs)

    def loss_terms(
        self, x: Rows, phase: Phase, totals: Stats, noise: Noise | None
    ) -> tuple[Scene, dict[str, Tensor]]:
        """`scene` and its `term_values`; a decoder's batches are normalised by lanes like its encoder's."""
        with self._normalised(_lane_rows(phase, noise)):
            scene = self.scene(x, phase, totals, noise)
            return scene, self.term_values(scene, phase)

    @contextmanager
    def _normalised(self, counts: tuple[int, ...] | None) -> Iterator[None]:
        """Batches normalised by lanes of so many rows, or with running values."""
        before, self.lanes.counts = self.lanes.counts, counts
        try:
            yield
        finally:
            self.lanes.counts = before

    def disturbed(
        self, x: Rows, phase: Phase, totals: Stats, noise: Noise | None, needs: Iterable[str]
    ) -> Scene:
        """A forward pass with the phase's noise: augmentation, dropout, and batches normalised by lanes."""
        s = self.settings
        if noise is not None and "augment" in phase.noise and (s.rotation or s.shift):
            x = augment(x, s.image, s.rotation, s.shift, noise)
        with self._normalised(_lane_rows(phase, noise)):
            return Scene(self, x, self.view(x, needs, noise, phase.noise, self.asks(phase)), totals)

    def term_values(self, scene: Scene, phase: Phase) -> dict[str, Tensor]:
        """Each term's value (B,), unweighted."""
        return {name: TERMS[name].function(scene) for name, _ in phase.terms}

    def log_scores(self, x: Rows) -> Tensor:
        """The method's readout as log-probabilities (B, K); the label is their argmax."""
        readout = self.method.readout
        if readout == "kmeans":
            return torch.log_softmax(-self._from_pseudo_centroids(x).square(), dim=1)
        needs = {"gate": ("gate",), "responsibility": ("gate", "energies"), "energy": ("energies",)}[readout]
        view = self.view(x, needs)
        if readout == "energy":
            assert view.energies is not None
            return torch.log_softmax(-view.energies / self.tau, dim=1)
        assert view.log_p is not None
        if readout == "gate":
            return view.log_p
        assert view.energies is not None
        return responsibility(view.log_p, view.energies, self.tau)

    @torch.no_grad()
    def predict(self, x: Rows) -> Tensor:
        """`log_scores` without gradient."""
        return self.log_scores(x)


def _lane_rows(phase: Phase, noise: Noise | None) -> tuple[int, ...] | None:
    """The lanes of a step's batch; None for a network that does not learn: it keeps its running values."""
    return noise.lane_rows if noise is not None and phase.trains_network else None


def _frozen_twin(model: MixtureModel, name: str, part: nn.Module) -> nn.Module:
    """A second module of the same kind with the same weights, without gradients."""
    builders: dict[str, Any] = {
        "network": model._build_network,
        "energy": model._build_energy,
        "gate": model._build_gate,
        "experts": lambda: build_experts(model.n_expert_inputs, model.n_clusters, model.settings),
    }
    with torch.random.fork_rng(devices=[]):  # the twin's own draws must not move the model's
        twin: nn.Module = builders[name]()
    twin.load_state_dict(part.state_dict())
    return twin.requires_grad_(False)


def without_training(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state without what only training needs."""
    return {name: tensor for name, tensor in state.items() if name.split(".")[0] not in _FOR_TRAINING}
