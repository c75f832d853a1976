"""The same on a GPU, where there is one: rows/s, share of the peak, memory, sparse rule, experts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from distclust.mixture.experts import AutoencoderExperts
from distclust.mixture.networks import Autoencoder
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import SparseRows
from jobs.benchmarks.compute import CODE, HIDDEN, flops_of_step
from jobs.benchmarks.measure import Row, batch


def gpu(quick: bool) -> list[Row]:
    """Nothing but a row that says so where there is no GPU. *Written without one at hand.*"""
    if not torch.cuda.is_available():
        return [Row(name="GPU", ours=None, unit="", peer_name="none here", note="skipped: there is no GPU")]
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    seconds = _timed(lambda: a @ a, 10)
    peak = 2 * 8192**3 / seconds
    found = [Row(name="GPU, matrix product peak", ours=peak / 1e12, unit="TFLOP/s")]
    for terms in (2000, 47236):
        for rows in (1024, 4096) if quick else (1024, 4096, 16384, 65536):
            host = batch(min(rows, 16384), terms)
            parts = (host.offsets, host.indices, host.values)
            x = SparseRows(*(part.to(device) for part in parts), terms)
            net = Autoencoder(terms, ModelSettings(hidden=HIDDEN, code_size=CODE)).to(device)
            optimizer = torch.optim.Adam(net.parameters(), fused=True)
            torch.cuda.reset_peak_memory_stats()

            def step(
                x: SparseRows = x, net: Autoencoder = net, optimizer: torch.optim.Adam = optimizer
            ) -> None:
                optimizer.zero_grad(set_to_none=True)
                (net.recon_error(net.encode(x), x).sum() / x.n_rows).backward()
                optimizer.step()

            seconds = _timed(step, 10)
            found.append(
                Row(
                    name=f"GPU, step, {terms:,} terms, batch {x.n_rows:,}",
                    ours=x.n_rows / seconds,
                    unit="rows/s",
                    note=f"{flops_of_step(terms, x.n_rows, True) / seconds / peak:.2f} of the peak, "
                    f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB",
                )
            )
    host = batch(1024, 2000)
    x = SparseRows(*(part.to(device) for part in (host.offsets, host.indices, host.values)), 2000)
    experts = AutoencoderExperts(2000, 20, (256,), 10).to(device)
    seconds = _timed(lambda: experts.errors(x).sum().backward(), 10)
    found.append(Row(name="GPU, step of 20 experts, batch 1,024", ours=1024 / seconds, unit="rows/s"))
    return found


def _timed(function: Callable[[], object], repetitions: int) -> float:
    """Median seconds, the device waited for."""
    seconds = []
    for repetition in range(repetitions + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        if repetition >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
