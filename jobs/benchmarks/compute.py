"""The matrix-product peak, one training step, and DAMIC's experts: torch alone, no stream."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from distclust.mixture.experts import AutoencoderExperts
from distclust.mixture.networks import Autoencoder
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import SparseRows, squared_error
from jobs.benchmarks.measure import Row, batch, interleaved, paired_ratio, spread, step_clock

HIDDEN = (500, 500, 2000)
CODE = 10
NONZEROS = 77


def matrix_product_peak(threads: int, size: int = 1536, repetitions: int = 9) -> float:
    """FLOP/s of a float32 matrix product: the best of some, by the clock of `step_clock`."""
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = interleaved({"product": lambda: a @ b}, repetitions, step_clock(threads))["product"]
    return 2 * size**3 / min(seconds)


def peak(quick: bool) -> list[Row]:
    """The matrix-product peak of this run."""
    rows = []
    for threads in (1, 2):
        found = matrix_product_peak(threads, 1024 if quick else 1536)
        note = "CPU time" if threads == 1 else "wall time"
        rows.append(
            Row(name=f"matrix product peak, {threads} thread", ours=found / 1e9, unit="GFLOP/s", note=note)
        )
    return rows


# ---- one training step


def flops_of_step(terms: int, rows: int, gram: bool) -> float:
    """Floating-point operations of a step (forward, backward) of the autoencoder, ours or dense.

    A layer of P weights takes 2 P a row forward and 4 P backward; the first one 2 P backward, since the rows
    need no gradient. Ours: the first layer 4 N H for N non-zeros; the last one by the Gram form
    4 D H^2 + rows (4 H^2 + 4 N H).
    """
    widths = [terms, *HIDDEN, CODE]
    inner = 2 * sum(a * b for a, b in zip(widths[1:-1], widths[2:], strict=True))
    h = HIDDEN[0]
    if not gram:
        return float(rows * (6 * inner + 4 * terms * h + 6 * terms * h))
    return float(rows * (6 * inner + 4 * NONZEROS * h + 4 * h * h + 4 * NONZEROS * h) + 4 * terms * h * h)


def bare_dense_step(x: torch.Tensor, fused: bool = True) -> Callable[[], None]:
    """One step of the same net as anyone would write it in torch, on rows that are dense already."""
    widths = [x.shape[1], *HIDDEN, CODE]
    widths += widths[-2::-1]
    layers: list[nn.Module] = []
    for place, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layers.append(nn.Linear(a, b))
        if place not in (len(HIDDEN), len(widths) - 2):
            layers.append(nn.ReLU())
    net = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), fused=fused)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(net(x), x, reduction="sum") / x.shape[0]
        loss.backward()
        optimizer.step()

    return step


def sparse_step(x: SparseRows) -> Callable[[], None]:
    """One step of ours: a new batch, so that its non-zeros are ordered by column anew each time."""
    net = Autoencoder(x.n_features, ModelSettings(hidden=HIDDEN, code_size=CODE))
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> None:
        rows = SparseRows(x.offsets, x.indices, x.values, x.n_features)
        optimizer.zero_grad(set_to_none=True)
        loss = net.recon_error(net.encode(rows), rows).sum() / x.n_rows
        loss.backward()
        optimizer.step()

    return step


def step(quick: bool) -> list[Row]:
    """Ours against the bare dense loop, which gets its rows made dense for nothing."""
    cases = [(2000, 1024, 5, 1.15), (2000, 4096, 3, 1.25)]
    if not quick:
        cases = [(2000, 1024, 7, 1.15), (2000, 4096, 3, 1.25), (47236, 4096, 1, 6.0)]
    found = []
    for threads in (1, 2):
        top = matrix_product_peak(threads, 1024, 5)
        for terms, rows, repetitions, target in cases:
            x = batch(rows, terms)
            torch.set_num_threads(threads)
            functions = {"ours": sparse_step(x), "peer": bare_dense_step(x.to_dense())}
            seconds = interleaved(functions, repetitions, step_clock(threads))
            possible = flops_of_step(terms, rows, False) / flops_of_step(terms, rows, True)
            ours, peer = (statistics.median(seconds[key]) for key in ("ours", "peer"))
            share = flops_of_step(terms, rows, True) / ours / top
            clock = "CPU time" if threads == 1 else "wall time"
            found.append(
                Row(
                    name=f"step, {terms:,} terms, batch {rows:,}, {threads} thread ({clock})",
                    ours=rows / ours,
                    peer=rows / peer,
                    ratio=paired_ratio(seconds["peer"], seconds["ours"]),
                    unit="rows/s",
                    peer_name="bare dense torch loop",
                    spread=spread(seconds["ours"]),
                    note=f"target {target:g}x; operations allow {possible:.2f}x; {share:.2f} of the peak",
                )
            )
            del functions
    return found


# ---- DAMIC's experts


def experts(quick: bool) -> list[Row]:
    """A step of K experts, batched against a loop over them, and its cost against K. One thread, CPU time."""
    torch.set_num_threads(1)
    terms, rows = 2000, 256 if quick else 1024
    x = batch(rows, terms)
    found, per_row = [], {}
    for k in (5, 10, 20) if quick else (5, 20, 50):
        module = AutoencoderExperts(terms, k, (256,), 10)

        def batched(module: AutoencoderExperts = module) -> None:
            module.zero_grad(set_to_none=True)
            module.errors(x).sum().backward()

        def loop(module: AutoencoderExperts = module, k: int = k) -> None:
            module.zero_grad(set_to_none=True)
            errors = [_one_expert(module, x, one) for one in range(k)]
            torch.stack(errors, 1).sum().backward()

        seconds = interleaved({"ours": batched, "peer": loop}, 3, time.thread_time)
        ours, peer = (statistics.median(seconds[key]) for key in ("ours", "peer"))
        per_row[k] = ours / rows
        found.append(
            Row(
                name=f"step of {k} experts 2000-256-10, batch {rows:,}, 1 thread (CPU time)",
                ours=rows / ours,
                peer=rows / peer,
                ratio=paired_ratio(seconds["peer"], seconds["ours"]),
                unit="rows/s",
                peer_name="a loop over the experts",
                spread=spread(seconds["ours"]),
                note=f"{1e6 * ours / rows / k:.1f} us a row and expert",
            )
        )
    return found


def _one_expert(module: AutoencoderExperts, x: SparseRows, k: int) -> torch.Tensor:
    h = module._activate(x.matmul(module.in_weight[:, k]) + module.in_bias[k])
    for place, (weight, bias) in enumerate(zip(module.weights, module.biases, strict=True)):
        h = torch.addmm(bias[k], h, weight[k])
        if place != module._code_layer:
            h = module._activate(h)
    return squared_error(x, h, module.out_weight[:, k], module.out_bias[:, k])
