"""The mixture model: one forward pass, and the terms of a phase."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distclust.mixture.energies import CentroidEnergy, DissimilarityOptions, StudentEnergy
from distclust.mixture.gates import HardGate, NetworkGate, PriorGate, TiedGate
from distclust.mixture.methods import Method, ModelSettings, Phase
from distclust.mixture.networks import Autoencoder, AutoencoderExperts, ConstantExperts
from distclust.mixture.noise import Noise
from distclust.mixture.sparse import Rows, n_rows
from distclust.mixture.terms import TERMS, Scene, Stats, View, responsibility


class MixtureModel(nn.Module):
    """A method's parts, built from its row of the table.

    Args:
        method: the row.
        settings: sizes and temperatures, the row's own or a recipe's.
        n_features: D, features of a row.
        n_clusters: K.
    """

    tau: Tensor
    code_radius: Tensor
    pseudo_centroids: Tensor

    def __init__(self, method: Method, settings: ModelSettings, n_features: int, n_clusters: int):
        super().__init__()
        self.method, self.settings = method, settings
        self.n_features, self.n_clusters = n_features, n_clusters
        s, k = settings, n_clusters
        self.network = Autoencoder(
            n_features,
            s.hidden,
            s.code_size,
            activation=s.activation,
            norm=s.norm,
            input_dropout=s.input_dropout,
        )
        self.experts: ConstantExperts | AutoencoderExperts | None = None
        self.energy: CentroidEnergy | None = None
        if method.energy == "experts":
            self.experts = (
                ConstantExperts(n_features, k)
                if s.experts == "constant"
                else AutoencoderExperts(
                    n_features, k, s.expert_hidden, s.expert_code_size, activation=s.activation, norm=s.norm
                )
            )
        elif method.energy == "student":
            self.energy = StudentEnergy(k, s.code_size)
        elif method.energy == "dissimilarity":
            options = DissimilarityOptions(p=s.p, interval=s.interval, normaliser=s.normaliser)
            # the log-determinant joins the distance on the scale of 1 / alpha
            self.energy = CentroidEnergy(k, s.code_size, s.dissimilarity, options, s.log_det / s.alpha)
        self.gate = self._build_gate()
        self.register_buffer("tau", torch.tensor(float(s.tau)))
        self.register_buffer("code_radius", torch.tensor(1.0))
        self.register_buffer("pseudo_centroids", torch.zeros(k, s.code_size))

    def _build_gate(self) -> nn.Module:
        s, k = self.settings, self.n_clusters
        match self.method.gate:
            case "network":
                return NetworkGate(
                    self.n_features,
                    s.gate_hidden,
                    k,
                    activation=s.activation,
                    norm=s.norm,
                    dropout=s.gate_dropout,
                )
            case "tied":
                return TiedGate(k, s.alpha)
            case "prior":
                return PriorGate(k)
            case _:
                return HardGate()

    # ---- the pieces of a forward pass

    def energy_codes(self, z: Tensor) -> Tensor:
        """The codes (B, J) as the energies and k-means see them: on the unit sphere where the settings say
        so."""
        return F.normalize(z, dim=1) if self.settings.unit_codes else z

    def codes(self, x: Rows) -> Tensor:
        """`energy_codes` of undisturbed rows, (B, J)."""
        return self.energy_codes(self.network.encode(x))

    def energies(self, x: Rows, z: Tensor | None) -> Tensor:
        """E (B, K). Experts: 0.5 ||x - f_k(x)||^2 (DAMIC); centroids: their dissimilarity to the codes."""
        if self.experts is not None:
            return 0.5 * self.experts.errors(x)
        assert self.energy is not None
        assert z is not None
        return self.energy.pairwise(self.energy_codes(z))

    def log_gate(self, x: Rows, energies: Tensor | None, noise: Noise | None) -> Tensor:
        """log p (B, K)."""
        if isinstance(self.gate, NetworkGate):
            return self.gate.log_p(x, noise)
        if isinstance(self.gate, TiedGate):
            assert energies is not None
            return self.gate.log_p_of(energies)
        if isinstance(self.gate, PriorGate):
            return self.gate.log_prior().expand(n_rows(x), -1)
        assert energies is not None
        hard = F.one_hot(energies.argmin(1), self.n_clusters).to(energies.dtype)
        return hard.clamp_min(torch.finfo(energies.dtype).tiny).log()

    @torch.no_grad()
    def pseudo_labels(self, x: Rows) -> Tensor:
        """The k-means cluster (B,) of the rows' codes: DAMIC's pseudo-labels, from the frozen pretrained
        encoder."""
        return torch.cdist(self.codes(x), self.pseudo_centroids).argmin(1)

    def view(
        self, x: Rows, needs: Iterable[str], noise: Noise | None = None, noisy: Iterable[str] = ()
    ) -> View:
        """One forward pass, computing only what is needed. `noisy` names the submodules that see the
        noise."""
        needs, noisy = frozenset(needs), frozenset(noisy)
        with_codes = "codes" in needs or ("energies" in needs and self.experts is None)
        z = self.network.encode(x, noise if "network" in noisy else None) if with_codes else None
        energies = self.energies(x, z) if "energies" in needs else None
        gate_noise = noise if "gate" in noisy else None
        log_p = self.log_gate(x, energies, gate_noise) if "gate" in needs else None
        clean = None
        if "clean_gate" in needs:
            with torch.no_grad():
                clean = self.log_gate(x, energies, None)
        labels = self.pseudo_labels(x) if "teacher" in needs else None
        return View(z, energies, log_p, clean, labels)

    # ---- what the loop calls

    def scene(self, x: Rows, phase: Phase, totals: Stats, noise: Noise | None) -> Scene:
        """A forward pass with everything that the phase's terms need."""
        needs = frozenset().union(*(TERMS[name].needs for name, _ in phase.terms))
        return Scene(self, x, self.view(x, needs, noise, phase.noise), totals)

    def term_values(self, scene: Scene, phase: Phase) -> dict[str, Tensor]:
        """Each term's value (B,), unweighted."""
        return {name: TERMS[name].function(scene) for name, _ in phase.terms}

    def log_scores(self, x: Rows) -> Tensor:
        """The method's readout as log-probabilities (B, K); the label is their argmax."""
        readout = self.method.readout
        needs = {"gate": {"gate"}, "responsibility": {"gate", "energies"}, "energy": {"energies"}}[readout]
        if self.method.gate in ("tied", "hard"):
            needs = needs | {"energies"}
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


def diagnostics(scene: Scene, n_clusters: int) -> Stats:
    """Sums over the batch for the log: hard usage counts (K,), rows, and KL(w || p) where there are both."""
    view = scene.view
    log_p = view.clean_log_p if view.clean_log_p is not None else view.log_p
    sums: Stats = {}
    if log_p is not None:
        labels = log_p.detach().argmax(1)
        sums["usage"] = torch.zeros(n_clusters, device=log_p.device).index_add_(
            0, labels, torch.ones_like(labels, dtype=torch.float32)
        )
        if view.energies is not None and scene.model.method.aggregator in ("LSE", "FREE"):
            log_p = log_p.detach()
            log_w = responsibility(log_p, view.energies.detach(), scene.model.tau)
            sums["kl_w_p"] = (log_w.exp() * (log_w - log_p)).sum()
    return sums
