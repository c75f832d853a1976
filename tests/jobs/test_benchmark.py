"""The benchmark's table, its parts' arithmetic, and what it says of peers that are not there."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distclust.mixture.methods import METHODS
from jobs import benchmark
from jobs.benchmarks import clustpy_peer, compute, memory
from jobs.benchmarks.gpu import Sizes, rows_on
from jobs.benchmarks.measure import Row, batch, interleaved, paired_ratio, peak_memory, spread


def test_a_part_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main(["stepp"])
    assert end.value.code == 2
    assert "no part named stepp; expected some of: peak, step" in capsys.readouterr().err


def test_every_part_is_there() -> None:
    for place in benchmark.PARTS.values():
        module, function = place.split(":")
        assert (
            f"def {function}(quick: bool) -> list[Row]:" in Path(f"jobs/benchmarks/{module}.py").read_text()
        )


def test_rows_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    threads = torch.get_num_threads()
    try:
        assert benchmark.main(["peak", "gpu", "--quick", "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(file.read_text())
    assert {"name", "ours", "peer", "ratio", "unit"} <= set(rows[0])
    assert rows[0]["ours"] > 0
    said = capsys.readouterr().out
    assert "matrix product peak, 1 thread" in said
    if not torch.cuda.is_available():
        assert "there is no GPU" in said


def test_what_a_gpu_is_to_run_runs_on_a_cpu() -> None:
    sizes = Sizes(
        product=16,
        terms=(300,),
        batches=(64,),
        rule_widths=(8, 500),
        rule_batches=(64,),
        experts=(2,),
        repetitions=1,
        rows=("dcn", "damic-text"),
        documents=200,
        clusters=2,
        lanes=2,
        rows_per_lane=50,
    )
    rows = {row.name: row for row in rows_on(torch.device("cpu"), sizes)}
    assert all(row.ours is not None and row.ours > 0 for row in rows.values())
    half = rows["step, 300 terms, batch 64, bfloat16"]
    assert half.peer == rows["step, 300 terms, batch 64, float32"].ours
    assert rows["last layer, 300 terms, width 8, batch 64"].note == "the rule takes Gram"
    assert rows["last layer, 300 terms, width 500, batch 64"].note == "the rule takes dense"
    assert rows["2 experts 300-256-10, batch 64"].peer_name == "a loop over autoencoders"
    phases = [name.split(", ")[1] for name in rows if name.startswith("damic-text")]
    assert phases == ["phase pretrain", "phase gate", "phase joint"]
    assert "waiting 0." in rows["dcn, phase joint, 100 rows a step"].note


def test_a_part_that_fails_does_not_take_the_others_along(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(benchmark.PARTS, "step", "compute:nothing")
    assert benchmark.main(["step", "gpu", "--quick"]) == 1
    said = capsys.readouterr().out
    assert "step failed: AttributeError" in said
    assert "GPU" in said


def test_turns_are_taken_and_the_first_round_does_not_count() -> None:
    seen: list[str] = []
    found = interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert seen == ["a", "b"] * 4
    assert [len(found["a"]), len(found["b"])] == [3, 3]
    slow = interleaved({"a": lambda: time.sleep(0.01)}, 2, time.thread_time)["a"]
    assert max(slow) < 0.005  # sleeping takes no CPU time


def test_ratios_are_of_the_same_round() -> None:
    # twice the load in the second round falls on both
    assert paired_ratio([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == 2.0
    assert spread([1.0, 1.0, 1.0]) == 0.0
    assert spread([1.0, 2.0, 3.0]) == pytest.approx(0.25)


@pytest.mark.parametrize("gram", [True, False])
def test_the_operations_of_a_step_are_those_that_torch_counts(gram: bool) -> None:
    x = batch(512, 700)
    step = compute.sparse_step(x) if gram else compute.bare_dense_step(x.to_dense())
    with FlopCounterMode(display=False) as counter:
        step()
    said = compute.flops_of_step(700, 512, gram)
    if gram:  # torch does not count the sparse products
        said -= 512 * 8 * compute.NONZEROS * compute.HIDDEN[0]
    assert counter.get_total_flops() == pytest.approx(said, rel=0.01)


def test_both_nets_are_the_same_size() -> None:
    # the dense net's rows are given to it dense already: the comparison is in its favour
    x = batch(8, 300)
    assert x.n_rows == 8
    assert 60 < x.values.numel() / x.n_rows < 95 or x.n_rows < 30
    torch.testing.assert_close(x.square_norms(), torch.full((8,), 2000.0), rtol=1e-4, atol=1e-2)


def test_a_peer_that_is_not_installed_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clustpy", None)
    before = torch.library.register_fake
    with pytest.raises(ImportError):
        clustpy_peer._import_clustpy()
    assert torch.library.register_fake is before


def test_a_row_without_a_peer_says_why() -> None:
    row = Row(name="dec", ours=1234.5, unit="rows/s", peer_name="ClustPy: not installed")
    said = benchmark.line(row)
    assert "1,234" in said or "1,235" in said
    assert said.split()[2] == "-"
    assert "not installed" in said


def test_peak_memory_is_this_process_own() -> None:
    assert peak_memory() > 50e6


@pytest.mark.parametrize("method", memory.RUNS)
def test_the_memory_runs_have_every_phase_of_their_row(method: str) -> None:
    settings = memory.config(method, 1)
    row = METHODS[method]
    assert [(p.name, p.epochs) for p in settings.phases] == [(p.name, min(p.epochs, 1)) for p in row.phases]
    assert settings.clusters == 20
    assert settings.cluster.workers == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", ["step", "experts", "topm", "kmeans", "assign", "clustpy", "growth", "estimate"]
)
def test_quick_parts(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([part, "--quick"]) == 0, capsys.readouterr().out
