"""What a run would need, on paper: memory, bytes over the network, a floor of the time, and what binds.

A small model: parameters are counted exactly (the model is built without memory), operations layer by layer
as the sparse forms do them, bytes from the corpus format. How fast a device works is one number, the floating
point operations that it sustains on such layers, which `python -m jobs.benchmark peak step` measures. The
model is checked against measured steps by `python -m jobs.benchmark estimate`; docs/performance.md states the
error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from distclust.config import RunConfig
from distclust.errors import ConfigError
from distclust.mixture.catalogue import ESTIMATORS
from distclust.mixture.model import MixtureModel
from distclust.mixture.settings import Phase
from distclust.mixture.sparse import gram_is_cheaper
from distclust.mixture.statistics import STATISTICS
from distclust.mixture.terms import TERMS
from distclust.training.blueprint import blueprint

NONZEROS = 77.0
"""Non-zeros of a document unless given: RCV1's mean."""
_SPARSE_SLOWDOWN = 4.0
"""Sparse products run at a quarter of the rate of dense ones: 20 against 80 GFLOP/s on one core."""
_STREAM_ROWS = 1e6
"""Rows/s that one core makes batches of."""
_PROCESS_BYTES = 600e6
"""A worker with torch, pyarrow and Ray, before it has any data."""
_STREAM_BYTES = 100e6
"""Buffers of the stream, whatever the corpus."""
_ON_ROWS = frozenset({"in_weight", "out_weight", "out_bias", "means", "directions"})
"""Parameters that meet the sparse rows, beside the first layer of an encoder or a gate."""
_ASKED = 3.0
"""Experts that a row asks where it does not ask all of them: what warm gates do."""
_ADAM_TRAFFIC = 28
"""Bytes that fused Adam reads and writes for a parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the run would have. The defaults are of one GPU like an H100 in float32, from its data sheet, and
    not measured."""

    devices: int = 1
    """Workers, each with one GPU or one CPU core."""
    gpu: bool = True
    """Whether a device is a GPU."""
    flops: float = 30e12
    """Operations/s that a device sustains on layers of some hundred columns."""
    bandwidth: float = 2e12
    """Bytes/s of the device's memory."""
    memory: float = 80e9
    """Bytes of the device's memory."""
    network: float = 25e9 / 8
    """Bytes/s between two workers, each way."""
    copy: float = 20e9
    """Bytes/s from the host to the device."""

    def __post_init__(self) -> None:
        for name in ("devices", "flops", "bandwidth", "memory", "network", "copy"):
            value = getattr(self, name)
            if not value > 0 or (name != "copy" and math.isinf(value)):  # a host copies nothing to itself
                raise ConfigError(f"{name} is {value}; expected a finite number above 0: correct it")

    @classmethod
    def cpu(cls, devices: int, network: float = 25e9 / 8) -> Machine:
        """Cores of a server: 50 GFLOP/s sustained and 10 GB/s each, as measured where docs/performance.md was
        made."""
        return cls(
            devices=devices, gpu=False, flops=50e9, bandwidth=10e9, memory=4e9, network=network, copy=math.inf
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEstimate:
    """One phase on paper."""

    name: str
    epochs: int
    rows_per_device: int
    """Rows of a step on one device."""
    flops: float
    """Operations of a step on one device."""
    sent: float
    """Bytes that each device sends in a step (and as many that it receives)."""
    step_s: dict[str, float]
    """Seconds of a step that each resource needs: compute, network, input."""
    seconds: float
    """Floor of the phase."""

    @property
    def binds(self) -> str:
        """The resource that needs most time."""
        return max(self.step_s, key=lambda name: self.step_s[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A whole run on paper."""

    documents: int
    parameters: int
    corpus_bytes: float
    """The corpus folder."""
    host_bytes: float
    """Memory of one worker on the host, mapped pages of the corpus not counted."""
    device_bytes: float
    """Memory of one device: weights, gradients, optimiser, activations; without a resident corpus."""
    resident: bool
    """Whether the corpus fits into what is left on the device."""
    phases: tuple[PhaseEstimate, ...]

    @property
    def seconds(self) -> float:
        """Floor of the training; preparing and assigning come on top."""
        return sum(phase.seconds for phase in self.phases)


def estimate(
    config: RunConfig,
    documents: int,
    machine: Machine,
    *,
    nonzeros: float = NONZEROS,
    terms: int | None = None,
) -> Estimate:
    """What training a recipe on so many documents would need.

    Args:
        config: the resolved recipe; its step is divided among the machine's devices.
        documents: N.
        machine: what there would be.
        nonzeros: mean non-zeros of a document.
        terms: D; by default the recipe's `vocabulary.max_features` or `source.n_features`.

    Raises:
        ConfigError: a row without phases, images, no known number of terms, or fewer than one document; or
            settings that rows of so many terms cannot have.
    """
    if config.method in ESTIMATORS:
        raise ConfigError(f"method is {config.method!r}, scikit-learn's; expected a row with phases to train")
    if config.model.image:
        raise ConfigError("the recipe is for images; expected sparse rows: convolutions are not counted here")
    width = terms or config.source.n_features or config.vocabulary.max_features
    if width is None:
        raise ConfigError("the recipe keeps all words, so their number is unknown; expected --terms")
    if documents < 1 or not 0 < nonzeros < math.inf:
        raise ConfigError(
            f"{documents} documents of {nonzeros} non-zeros; expected 1 or more, and a finite number above "
            "0: correct them"
        )
    nonzeros = min(nonzeros, width)
    model = blueprint(config, width)
    in_step = config.order.lanes * config.order.rows_per_lane
    here = replace(machine, devices=min(machine.devices, config.order.lanes))
    rows = -(-in_step // here.devices)
    cost = _Cost(model, width, nonzeros, here.gpu)
    phases = tuple(_phase(phase, cost, documents, in_step, rows, here) for phase in config.phases)
    corpus = documents * (8 * nonzeros + 4 + 24)
    parameters = sum(p.numel() for p in model.parameters())
    trained = max((cost.trained(phase) for phase in config.phases), default=0)
    kept = parameters + sum(b.numel() for b in model.buffers())
    device = 4 * (kept + trained * (4 if here.devices > 1 else 3)) + cost.activation_bytes(rows)
    codes = 4 * min(documents, config.initialise.sample) * model.code_size
    host = _PROCESS_BYTES + _STREAM_BYTES + 2 * codes + (0 if here.gpu else device)
    resident = here.gpu and corpus <= (here.memory - device) / 2
    return Estimate(
        documents=documents,
        parameters=parameters,
        corpus_bytes=corpus,
        host_bytes=host,
        device_bytes=device if here.gpu else 0.0,
        resident=resident,
        phases=phases,
    )


_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def parse_bits(text: str) -> float:
    """Bits a second of `25Gb`, `800Mb`, `100Gbit/s`.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]?)b(?:it)?(?:/s|ps)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]) > 0:
        raise ConfigError(f"the network is {text!r}; expected bits a second, such as 25Gb or 800Mb")
    return float(found[1]) * _PREFIXES[found[2].lower()]


def describe(found: Estimate, machine: Machine) -> str:
    """The estimate in words and a table."""
    device = "GPU" if machine.gpu else "core"
    lines = [
        f"{found.documents:,} documents, {found.parameters:,} parameters, {machine.devices} x {device} at "
        f"{machine.flops / 1e12:g} TFLOP/s, network {machine.network * 8 / 1e9:g} Gb/s.",
        f"corpus on disk   {found.corpus_bytes / 1e9:10.2f} GB",
        f"host, a worker   {found.host_bytes / 1e9:10.2f} GB beside mapped pages of the corpus",
    ]
    if machine.gpu:
        where = "the corpus fits beside it" if found.resident else "the corpus does not fit beside it"
        lines.append(f"device           {found.device_bytes / 1e9:10.2f} GB; {where}")
    lines.append(
        f"{'phase':<14}{'epochs':>7}{'rows/step':>11}{'GFLOP/step':>12}{'MB sent':>9}"
        f"{'ms/step':>9}{'binds':>9}{'floor':>11}"
    )
    for p in found.phases:
        milliseconds = max(p.step_s.values()) * 1e3 if p.epochs else 0.0
        lines.append(
            f"{p.name:<14}{p.epochs:>7}{p.rows_per_device:>11,}{p.flops / 1e9:>12.2f}{p.sent / 1e6:>9.1f}"
            f"{milliseconds:>9.2f}{p.binds if p.epochs else '-':>9}{p.seconds:>9.0f} s"
        )
    lines.append(f"floor of the training {found.seconds / 3600:.2f} h, on paper, not measured.")
    lines.append("Preparing and assigning come on top. rows/step and what follows are of one device.")
    return "\n".join(lines)


def _phase(
    phase: Phase, cost: _Cost, documents: int, in_step: int, rows: int, machine: Machine
) -> PhaseEstimate:
    steps = -(-documents // in_step) * phase.epochs
    trained = cost.trained(phase)
    flops = cost.step(phase, rows)
    n = machine.devices
    sent = 2 * (n - 1) / n * 4 * trained
    update = _ADAM_TRAFFIC * trained / machine.bandwidth
    batch_bytes = rows * (8 * cost.nonzeros + 4)
    feeding = max(rows / _STREAM_ROWS, batch_bytes / machine.copy)
    needed = {
        "compute": flops / machine.flops + update + (0.0 if machine.gpu else feeding),
        "network": sent / machine.network,
        "input": feeding if machine.gpu else 0.0,
    }
    # passes without a gradient: statistics at the phase's beginning, of each epoch and of each refresh
    refreshes = phase.epochs if not phase.refresh_steps else -(-steps // phase.refresh_steps)
    when = [STATISTICS[name].when for name in cost.model.method.statistics_of(phase)]
    passes = when.count("epoch") * phase.epochs + when.count("refresh") * refreshes
    passes += sum(name in STATISTICS for name in phase.begin)
    sweeps = passes * cost.forward(documents / n) / machine.flops
    return PhaseEstimate(
        name=phase.name,
        epochs=phase.epochs,
        rows_per_device=rows,
        flops=flops,
        sent=sent,
        step_s=needed,
        seconds=steps * max(needed.values()) + sweeps,
    )


class _Cost:
    """Operations of a model's parts, layer by layer."""

    def __init__(self, model: MixtureModel, terms: int, nonzeros: float, gpu: bool):
        self.model, self.terms, self.nonzeros = model, terms, nonzeros
        self.device = "cuda" if gpu else "cpu"

    def trained(self, phase: Phase) -> int:
        """Parameters with gradients."""
        return sum(p.numel() for p in self.model.trained_in(phase).values())

    def step(self, phase: Phase, rows: int) -> float:
        """Operations of one step of so many rows."""
        if not phase.epochs or not phase.terms:
            return 0.0
        needs = self.model._with_what_they_need(
            frozenset().union(*(TERMS[name].needs for name, _ in phase.terms))
        )
        decodes = sum("reconstruction" in name for name, _ in phase.terms)
        total = 0.0
        if "codes" in needs or decodes:
            encoding = self._module(self.model.network, rows, phase.trains_network, decodes=False)
            decoding = self._module(self.model.network, rows, phase.trains_network) - encoding
            total += encoding + decodes * decoding
        if "spectral_regression" in dict(phase.terms):
            total += 2 * rows * self.nonzeros * len(self.model.spectral.bias) * _SPARSE_SLOWDOWN
        if "energies" in needs and self.model.experts is not None:
            asked = {"all": self.model.n_clusters, "own": 1.0, "gate": _ASKED}
            share = min(1.0, asked[self.model.asks(phase, self.device)] / self.model.n_clusters)
            total += self._module(self.model.experts, rows * share, "experts" in phase.trains)
        if needs & {"gate", "clean_gate"}:
            total += self._module(self.model.gate, rows, "gate" in phase.trains)
        if "pseudo_labels" in needs:  # by the frozen encoder
            total += self.forward(rows)
        if "teacher" in needs:  # the frozen copy answers too
            total += self.forward(rows) + self._module(self.model.gate, rows, False)
        if "clean_gate" in needs and phase.noise:  # the gate's answer to the undisturbed row
            of_gate = self.model.method.gate == "network"
            total += self._module(self.model.gate, rows, False) if of_gate else self.forward(rows)
        return total

    def forward(self, rows: float) -> float:
        """Operations of one encoding without a gradient."""
        return self._module(self.model.network, rows, False, decodes=False)

    def activation_bytes(self, rows: int) -> float:
        """What a step keeps for its backward pass: each layer's output, before and after its activation."""
        widths = sum(
            math.prod(p.shape[1:]) if p.shape[0] == self.terms else p.numel() // p.shape[-2]
            for name, p in self.model.named_parameters()
            if p.dim() > 1 and "bias" not in name and not name.startswith("teacher")
        )
        return 4.0 * rows * 3 * widths

    def _module(self, module: nn.Module, rows: float, trained: bool, decodes: bool = True) -> float:
        return sum(self._layers(module, rows, trained, decodes))

    def _layers(self, module: nn.Module, rows: float, trained: bool, decodes: bool) -> Iterator[float]:
        for name, p in module.named_parameters():
            decoder = name.startswith(("decoder", "out_"))
            is_bias = "bias" in name and name != "out_bias"
            if p.dim() < 2 or is_bias or (decoder and not decodes):
                continue
            # an inner layer may happen to have as many columns as there are terms
            reads_rows = name.endswith("layers.0.weight") or name in _ON_ROWS
            if decoder and not name.startswith("out_") or not reads_rows or self.terms not in p.shape[:2]:
                yield (6 if trained else 2) * rows * p.numel()
                continue
            width = p.numel() / self.terms  # columns, of all experts together
            twice = 2 if trained else 1
            yield twice * 2 * rows * self.nonzeros * width * _SPARSE_SLOWDOWN
            if name == "out_weight":
                h = p.shape[-1]
                if gram_is_cheaper(int(rows), h, int(width / h) * self.terms):
                    yield twice * 2 * h * width * (self.terms + rows)
                else:
                    yield (6 if trained else 2) * rows * p.numel()
