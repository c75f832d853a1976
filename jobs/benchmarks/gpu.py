"""The same on a GPU: peak, step in both precisions, sparse rule, experts, memory, and whole rows end to end.

Every part takes its device, so that what a GPU is to run is tested on a CPU with small sizes. It needs torch,
pyarrow and the package, neither Ray nor MLflow.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distclust.config import RunConfig, resolve, to_dict
from distclust.corpus.generate import GenerateConfig, generate_corpus
from distclust.corpus.order import Order, OrderConfig
from distclust.corpus.shards import Corpus
from distclust.mixture.experts import AutoencoderExperts
from distclust.mixture.networks import Autoencoder
from distclust.mixture.precision import MixedProducts, Precision, mixed_parts, product_type, products_in
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import SparseRows, dense_error, gram_error, gram_is_cheaper
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.hooks import NoHooks, Position
from distclust.training.world import World
from jobs.benchmarks.compute import CODE, HIDDEN, flops_of_step
from jobs.benchmarks.measure import Row, batch

Mixed = tuple[list[MixedProducts], torch.dtype | None]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the parts are."""

    product: int = 8192
    terms: tuple[int, ...] = (2000, 47236)
    batches: tuple[int, ...] = (1024, 4096, 16384, 65536)
    rule_widths: tuple[int, ...] = (256, 500, 2000)
    rule_batches: tuple[int, ...] = (64, 256, 1024, 4096)
    experts: tuple[int, ...] = (20, 100)
    repetitions: int = 10
    rows: tuple[str, ...] = ("ae-kmeans", "dec", "idec", "dcn", "dkm", "dmae", "damic-text", "damic")
    documents: int = 200_000
    clusters: int = 20
    lanes: int = 8
    rows_per_lane: int = 2048


QUICK = Sizes(batches=(1024, 4096), rule_widths=(500,), rule_batches=(256, 4096), documents=50_000)


def gpu(quick: bool) -> list[Row]:
    """Nothing but a row that says so where there is no GPU. *Written without one at hand.*"""
    if not torch.cuda.is_available():
        return [Row(name="GPU", ours=None, unit="", peer_name="none here", note="skipped: there is no GPU")]
    return list(rows_on(torch.device("cuda"), QUICK if quick else Sizes()))


def rows_on(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """All parts on a device."""
    peak = {}
    for precision in PRECISIONS:
        a = torch.randn(sizes.product, sizes.product, device=device).to(getattr(torch, precision))
        peak[precision] = 2 * sizes.product**3 / _timed(partial(torch.matmul, a, a), sizes.repetitions)
        yield Row(name=f"matrix product peak, {precision}", ours=peak[precision] / 1e12, unit="TFLOP/s")
    for terms in sizes.terms:
        for rows in sizes.batches:
            yield from _steps(device, sizes, batch(rows, terms), peak)
    yield from _sparse_rule(device, sizes)
    yield from _experts(device, sizes)
    with tempfile.TemporaryDirectory() as folder:
        generate_corpus(f"{folder}/corpus", GenerateConfig(rows=sizes.documents, terms=sizes.terms[0]))
        corpus = Corpus.open(f"{folder}/corpus")
        for method in sizes.rows:
            yield from _whole_row(device, sizes, method, corpus, folder)


def _on(device: torch.device, x: SparseRows) -> SparseRows:
    parts = (part.to(device) for part in (x.offsets, x.indices, x.values))
    return SparseRows(*parts, x.n_features)


def _steps(
    device: torch.device, sizes: Sizes, host: SparseRows, peak: dict[Precision, float]
) -> Iterator[Row]:
    """One step of the autoencoder; the peer of bfloat16 is float32."""
    x = _on(device, host)
    seconds: dict[Precision, float] = {}
    for precision in PRECISIONS:
        net = Autoencoder(x.n_features, ModelSettings(hidden=HIDDEN, code_size=CODE)).to(device)
        optimizer = torch.optim.Adam(net.parameters(), fused=True)

        step = partial(_step, net, optimizer, x, (mixed_parts(net), product_type(precision, device)))
        _forget_peak(device)
        seconds[precision] = _timed(step, sizes.repetitions)
        share = flops_of_step(x.n_features, x.n_rows, True) / seconds[precision] / peak[precision]
        first = seconds["float32"]
        yield Row(
            name=f"step, {x.n_features:,} terms, batch {x.n_rows:,}, {precision}",
            ours=x.n_rows / seconds[precision],
            peer=None if precision == "float32" else x.n_rows / first,
            ratio=None if precision == "float32" else first / seconds[precision],
            peer_name="" if precision == "float32" else "float32",
            unit="rows/s",
            note=f"{share:.2f} of its peak{_peak_memory(device)}",
        )


def _step(net: Autoencoder, optimizer: torch.optim.Adam, x: SparseRows, mixed: Mixed) -> None:
    parts, kind = mixed
    optimizer.zero_grad(set_to_none=True)
    with products_in(parts, kind):
        loss = net.recon_error(net.encode(x), x).sum() / x.n_rows
    loss.backward()
    optimizer.step()


def _sparse_rule(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """The last layer's error by the Gram form against the dense form, and what the rule would take."""
    for terms, width, rows in itertools.product(sizes.terms, sizes.rule_widths, sizes.rule_batches):
        x = _on(device, batch(rows, terms))
        shapes = ((rows, width), (terms, width), (terms,))
        parts = [torch.randn(*shape, device=device, requires_grad=True) for shape in shapes]
        gram = _timed(partial(_backward, gram_error, x, *parts), sizes.repetitions)
        dense = _timed(partial(_backward, dense_error, x, *parts), sizes.repetitions)
        rule = "Gram" if gram_is_cheaper(rows, width, terms) else "dense"
        yield Row(
            name=f"last layer, {terms:,} terms, width {width}, batch {rows:,}",
            ours=rows / gram,
            peer=rows / dense,
            ratio=dense / gram,
            peer_name="dense form",
            unit="rows/s",
            note=f"the rule takes {rule}",
        )


def _experts(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """DAMIC's experts in one batched product a layer against K autoencoders one after the other."""
    x = _on(device, batch(sizes.batches[0], sizes.terms[0]))
    settings = ModelSettings(hidden=(256,), code_size=10)
    for k in sizes.experts:
        batched = AutoencoderExperts(x.n_features, k, (256,), 10).to(device)
        loop = [Autoencoder(x.n_features, settings).to(device) for _ in range(k)]
        together = _timed(partial(_backward, batched.errors, x), sizes.repetitions)
        apart = _timed(partial(_one_by_one, loop, x), sizes.repetitions)
        yield Row(
            name=f"{k} experts {x.n_features}-256-10, batch {x.n_rows:,}",
            ours=x.n_rows / together,
            peer=x.n_rows / apart,
            ratio=apart / together,
            peer_name="a loop over autoencoders",
            unit="rows/s",
        )


def _one_by_one(loop: list[Autoencoder], x: SparseRows) -> None:
    for net in loop:
        net.recon_error(net.encode(x), x).sum().backward()


class _Speeds(NoHooks):
    """The last speed and share of waiting of each phase."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}

    def log(self, position: Position, phase: str, metrics: dict[str, float]) -> None:
        self.phases[phase] = metrics


def _whole_row(device: torch.device, sizes: Sizes, method: str, corpus: Corpus, folder: str) -> Iterator[Row]:
    """A row through the engine, stream and checkpoints included: its speed in the last line of each phase."""
    order = OrderConfig(lanes=sizes.lanes, rows_per_lane=sizes.rows_per_lane)
    data: dict[str, Any] = {
        "method": method,
        "clusters": sizes.clusters,
        "order": to_dict(order),
        "checkpoint": {"every_steps": 10**9},
        # a line an epoch: the last one is of the second epoch alone
        "tracking": {"enabled": False, "log_every": Order(corpus.shard_rows, order, 0).steps_per_epoch},
        "cluster": {"workers": 0},
    }
    phases = {phase.name: {"epochs": 2} for phase in resolve(data).phases if phase.epochs}
    config: RunConfig = resolve(data | {"phases": phases})
    speeds, store = _Speeds(), CheckpointStore(f"{folder}/{method}")
    _forget_peak(device)
    Trainer(config, corpus, store, World(device=device), speeds).run()
    for phase, metrics in speeds.phases.items():
        yield Row(
            name=f"{method}, phase {phase}, {sizes.lanes * sizes.rows_per_lane:,} rows a step",
            ours=metrics["docs_per_second"],
            unit="documents/s",
            note=f"waiting {metrics['waiting_share']:.2f} of the time{_peak_memory(device)}",
        )


def _backward(error: Callable[..., Tensor], *arguments: Any) -> None:
    error(*arguments).sum().backward()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> str:
    return f", {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB" if device.type == "cuda" else ""


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(function: Callable[[], object], repetitions: int) -> float:
    """Median seconds, the device waited for."""
    seconds = []
    for repetition in range(repetitions + 2):
        _wait()
        started = time.perf_counter()
        function()
        _wait()
        if repetition >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
