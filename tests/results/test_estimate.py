"""The estimate on paper counts what the model really does."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from distclust.cli import app
from distclust.config import RunConfig, resolve
from distclust.errors import ConfigError
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.mixture.sparse import SparseRows
from distclust.results.estimate import Estimate, Machine, estimate, parse_bits

TERMS, ROWS = 300, 64


def config(method: str = "ae-kmeans", **more: Any) -> RunConfig:
    model = {"hidden": [32, 48], "code_size": 8, "expert_hidden": [16], "expert_code_size": 4}
    data: dict[str, Any] = {
        "method": method,
        "clusters": 6,
        "model": model | more.pop("model", {}),
        "vocabulary": {"max_features": TERMS},
        "order": {"lanes": 8, "rows_per_lane": ROWS // 8},
    }
    return resolve(data | more)


def on_paper(method: str = "ae-kmeans", documents: int = 64_000, **machine: Any) -> Estimate:
    return estimate(config(method), documents, Machine(**machine))


def test_parameters_are_those_of_the_model() -> None:
    for method in METHODS:
        c = config(method)
        real = MixtureModel(c.row, c.model, TERMS, c.clusters)
        paper = on_paper(method, devices=2)
        assert paper.parameters == sum(p.numel() for p in real.parameters())
        for phase, said in zip(c.phases, paper.phases, strict=True):
            trained = sum(p.numel() for p in real.trained_in(phase).values())
            assert said.sent == 4 * trained, (method, phase.name)  # two devices send what each has once


def test_what_a_row_decodes_and_compares_with_is_counted() -> None:
    flops = {m: {p.name: p.flops for p in on_paper(m).phases} for m in ("dmae-text", "dmae-unit")}
    assert flops["dmae-unit"]["pretrain"] == flops["dmae-text"]["pretrain"]
    assert flops["dmae-unit"]["joint"] > 1.3 * flops["dmae-text"]["joint"]  # it decodes twice
    few, many = (
        estimate(
            config("dmae-spectral", model={"landmarks": n, "hidden": [48], "code_size": 16}),
            64_000,
            Machine(),
        )
        for n in (50, 5000)
    )
    assert many.phases[0].flops > few.phases[0].flops
    assert many.device_bytes - few.device_bytes == pytest.approx(4 * TERMS * 4950, rel=0.05)


@pytest.mark.parametrize(("method", "phase"), [("ae-kmeans", "pretrain"), ("damic", "experts")])
def test_dense_operations_of_a_step_are_those_that_torch_counts(method: str, phase: str) -> None:
    c = config(method)
    model = MixtureModel(c.row, c.model, TERMS, c.clusters)
    offsets = torch.arange(ROWS + 1, dtype=torch.int32)
    x = SparseRows(offsets, torch.arange(ROWS, dtype=torch.int32), torch.ones(ROWS), TERMS)
    counter = FlopCounterMode(display=False)
    with counter:
        if method == "damic":
            model.experts.errors(x).sum().backward()
        else:
            model.network.recon_error(model.network.encode(x), x).sum().backward()
    paper = estimate(c, 1000, Machine(), nonzeros=1e-6)
    said = next(p for p in paper.phases if p.name == phase).flops
    if method == "damic":  # its labels come from the frozen encoder, which was not run here
        said -= 2 * ROWS * (32 * 48 + 48 * 8)
    assert said == pytest.approx(counter.get_total_flops(), rel=0.06)  # products with vectors are left out


def test_rows_that_ask_some_experts_cost_less() -> None:
    flops = {}
    for method in ("damic", "damic-topm"):
        paper = estimate(config(method), 64_000, Machine.cpu(1))
        flops[method] = {p.name: p.flops for p in paper.phases}
    every = estimate(config("damic"), 64_000, Machine(devices=1))
    on_gpu = {p.name: p.flops for p in every.phases}
    assert flops["damic"]["experts"] < 0.5 * on_gpu["experts"]  # on a CPU a row's own expert alone
    assert flops["damic"]["joint"] == on_gpu["joint"]
    assert flops["damic-topm"]["joint"] < 0.8 * flops["damic"]["joint"]


def test_time_grows_with_documents_and_bytes_with_workers() -> None:
    assert on_paper(documents=128_000).seconds == pytest.approx(2 * on_paper().seconds, rel=0.01)
    trained = 4 * sum(
        p.numel() for p in MixtureModel(config().row, config().model, TERMS, 6).network.parameters()
    )
    for devices, factor in ((1, 0.0), (2, 1.0), (8, 1.75)):
        assert on_paper(devices=devices).phases[0].sent == pytest.approx(factor * trained)
    assert on_paper(devices=100).phases[0].sent == on_paper(devices=8).phases[0].sent  # there are 8 lanes


def test_what_binds_follows_the_machine() -> None:
    assert on_paper(devices=8, network=1e6).phases[0].binds == "network"
    assert on_paper(devices=8, network=1e15, flops=1e9).phases[0].binds == "compute"
    assert on_paper(devices=1, flops=1e15, bandwidth=1e15).phases[0].binds == "input"


def test_terms_that_equal_an_inner_width_are_not_confused() -> None:
    wide = config(model={"hidden": [32, TERMS]})
    thin = config(model={"hidden": [32, TERMS - 1]})
    a, b = (estimate(c, 1000, Machine()).phases[0].flops for c in (wide, thin))
    assert a == pytest.approx(b, rel=0.02)


def test_memory() -> None:
    small, large = on_paper(documents=1000), on_paper(documents=10**9)
    assert large.device_bytes == small.device_bytes
    assert large.corpus_bytes == pytest.approx(1e6 * small.corpus_bytes)
    assert small.resident
    assert not large.resident
    assert large.host_bytes < 2e9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "k-means"}, "scikit-learn's"),
        ({"vocabulary": {"max_features": None}}, "--terms"),
    ],
)
def test_what_cannot_be_estimated(change: dict[str, Any], said: str) -> None:
    c = resolve({"method": "ae-kmeans", "clusters": 3} | change)
    with pytest.raises(ConfigError, match=said):
        estimate(c, 10, Machine())
    with pytest.raises(ConfigError, match="0 documents"):
        estimate(config(), 0, Machine())
    for value in (0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="flops is .*expected a finite number"):
            replace(Machine(), flops=value)
    for nonzeros in (0.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="10 documents of .* non-zeros; .* a finite number above 0"):
            estimate(config(), 10, Machine(), nonzeros=nonzeros)


def test_networks_by_name() -> None:
    assert parse_bits("25Gb") == 25e9
    assert parse_bits("800 Mbit/s") == 8e8
    for wrong in ("25", "fast", "0Gb", "25GB/h"):
        with pytest.raises(ConfigError, match="expected bits a second"):
            parse_bits(wrong)


def test_the_command() -> None:
    asked = ["estimate", "damic-text", "--documents", "100e6", "--gpus", "8", "--network", "25Gb"]
    said = CliRunner().invoke(app, asked)
    assert said.exit_code == 0, said.output
    assert "100,000,000 documents" in said.output
    assert "not measured" in said.output
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).output)
    assert found["documents"] == 10**8
    assert {p["name"] for p in found["phases"]} >= {"pretrain", "joint"}
    assert found["phases"][0]["binds"] == "network"
    cpu = CliRunner().invoke(app, ["estimate", "damic-text", "--gpus", "0"])
    assert "1 x core" in cpu.output
