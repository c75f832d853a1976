"""The Markdown of a table: its figures, and the rows and seeds that a file has already."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError
from distclust.results.agreement import agreement
from distclust.results.assignment import Assignment
from jobs._cells import Line, plan, read_cells
from jobs._markdown import Asked, Kept, markdown, read_kept, write_between
from jobs._tables import Table, load_table
from jobs.paper_tables import main
from tables import changed, run_all


def summary(nmi: float, seconds: float, reference: float | None = None) -> dict[str, Any]:
    scores = {"nmi_geometric": nmi + 0.01, "nmi_arithmetic": nmi, "ari": nmi / 2, "acc": nmi + 0.1}
    baselines = {}
    if reference is not None:
        baselines["AE (l2) + k-means"] = dict.fromkeys(scores, reference)
    sizes = {"n_documents": 7160, "scored": 7000, "n_clusters": 9}
    return scores | sizes | {"baselines": baselines, "seconds": {"train": seconds, "start": 1.0}}


def written(table: Table, protocol: str, tmp_path: Path) -> str:
    one, baseline = plan(table, protocol, 2, tmp_path)
    one.summaries = {0: summary(0.5, 10.0, 0.45), 1: summary(0.6, 20.0, 0.61)}
    one.machines = {"2026-01-02 on 2 cores (x86_64), no GPU"}
    baseline.summaries = {0: {**summary(0.4, 0.0), "seconds": {}}}
    baseline.failures = {1: "a | reason\nof two lines"}
    return markdown(Asked(table, protocol, 2, "tiny"), [one, baseline])


TEXT = """\
Stories of the built-in corpus.

Measured on 7,160 rows, 7,000 scored, K = 9.

| method | seeds | NMI (geometric) | NMI (arithmetic) | ARI | ACC | seconds | published NMI (geometric) | published ARI | published ACC |
|---|---|---|---|---|---|---|---|---|---|
| one | 2 | 0.560 ± 0.050 | 0.550 ± 0.050 | 0.275 ± 0.025 | 0.650 ± 0.050 | 15 | 0.50 |  | 0.60 |
| AE (l2) + k-means | 1 of 2 | 0.410 | 0.400 | 0.200 | 0.500 |  |  |  |  |

| method | less, in NMI (arithmetic) | per seed | mean |
|---|---|---|---|
| one | AE (l2) + k-means, of its own network | +0.050 -0.010 | +0.020 |

* Protocol `paper`: two in pretraining.
* `python -m jobs.paper_tables tiny --protocol paper --seeds 2`, measured 2026-01-02 on 2 cores (x86_64), no GPU; mean ± \
population standard deviation over seeds, every labelled row scored after the last epoch; seconds: training with all its \
phases, median, one core a run.
* Published: a paper.
* AE (l2) + k-means, seed 1: a \\| reason of two lines"""  # noqa: E501


def test_the_text_of_a_table(tiny: Path, tmp_path: Path) -> None:
    assert written(load_table(str(tiny)), "paper", tmp_path) == TEXT


def test_published_figures_stand_only_beside_their_own_protocol(tiny: Path, tmp_path: Path) -> None:
    assert "| 15 |  |  |  |" in written(load_table(str(tiny)), "cpu", tmp_path)


def test_a_row_that_was_not_run_has_hours_and_no_figure(tiny: Path, tmp_path: Path) -> None:
    table = load_table(str(tiny))
    text = markdown(Asked(table, "cpu", 2, "tiny"), plan(table, "cpu", 2, tmp_path))
    assert "| one | 0 | not run (about 0.5 h) |  |  |  |  |  |  |  |" in text
    assert "| AE (l2) + k-means | 0 | not run (comes with one) |" in text
    assert "nothing of it is run yet" in text
    assert "* Hours of what was not run are for one seed: a guess." in text
    assert "±" not in text.split("* Protocol")[0]


def test_differences_are_taken_to_a_row_where_a_run_has_no_such_baseline(tiny: Path, tmp_path: Path) -> None:
    table = load_table(str(tiny))
    one, other = plan(table, "cpu", 3, tmp_path)
    one.summaries = {0: summary(0.5, 1.0), 2: summary(0.7, 1.0)}
    other.summaries = {0: summary(0.4, 1.0), 1: summary(0.1, 1.0), 2: summary(0.3, 1.0)}
    text = markdown(Asked(table, "cpu", 3, "tiny"), [one, other])
    assert "| one | AE (l2) + k-means | +0.100 +0.400 | +0.250 |" in text


def test_a_column_says_how_far_the_seeds_agree_without_labels(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(tiny, "\nseeds: 2", "\nagreement: true\nseeds: 2")
    runs = tmp_path / "runs"
    lines = plan(load_table(path), "cpu", 2, runs)
    assert set(run_all(lines).values()) == {None}
    corpus = Corpus.open(lines[0].cells[0].corpus)
    one, other = (Assignment.open(cell.folder / "assignments").clusters() for cell in lines[0].cells)
    by_sklearn = normalized_mutual_info_score(one, other)
    assert 0 < by_sklearn < 1 and corpus.n_rows == len(one)
    found = agreement([cell.folder / "assignments" for cell in lines[0].cells])
    assert found.mean == pytest.approx(by_sklearn, abs=1e-12)

    asked = [path, "--runs", str(runs), "--no-run"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert "| seconds | agreement of seeds | NMI of the seed nearest to the others | published NMI" in text
    row = next(line for line in text.splitlines() if line.startswith("| one | 2 |"))
    assert row.split(" | ")[7:9] == [f"{by_sklearn:.3f}", ""]  # of two, neither is nearer
    baseline = next(line for line in text.splitlines() if line.startswith("| AE (l2) + k-means | 2 |"))
    assert baseline.split(" | ")[7] == ""
    assert "between the clusters of every two runs of a row, without any label" in text
    assert main([*asked, "--seeds", "1"]) == 0  # one run agrees with nobody
    alone = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| one | 1 |"))
    assert alone.split(" | ")[7] == ""

    three = plan(load_table(path), "cpu", 3, runs)
    run_all(three)
    read_cells(three)
    places = [cell.folder / "assignments" for cell in three[0].cells]
    of_each = [
        sum(normalized_mutual_info_score(a, b) for j, b in enumerate(clusters) if j != i)
        for clusters in [[Assignment.open(place).clusters() for place in places]]
        for i, a in enumerate(clusters)
    ]
    nearest = three[0].summaries[of_each.index(max(of_each))]["nmi_arithmetic"]
    assert main([*asked, "--seeds", "3"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| one | 3 |"))
    assert row.split(" | ")[8] == f"{nearest:.3f}"

    shutil.rmtree(lines[0].cells[0].folder / "assignments")
    assert main(asked) == 0
    kept = capsys.readouterr()
    assert "| one | 2 | 0." in kept.out and "one: no agreement of seeds: " in kept.err
    changed(tiny, "agreement: true", "agreement: true\ndata_by_seed: true")
    assert main([path]) == 2
    assert "data_by_seed makes others" in capsys.readouterr().err


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    path.write_text("# Results\n\nBefore.\n")
    write_between(path, "a cpu", "first", "A")
    write_between(path, "b cpu", "second", "B")
    write_between(path, "a cpu", "third", "A")
    assert path.read_text() == (
        "# Results\n\nBefore.\n\n## A\n\n<!-- table a cpu -->\nthird\n<!-- end a cpu -->\n"
        "\n## B\n\n<!-- table b cpu -->\nsecond\n<!-- end b cpu -->\n"
    )
    path.write_text("<!-- table a cpu -->\nno end")
    with pytest.raises(ConfigError, match="without"):
        write_between(path, "a cpu", "fourth", "A")
    assert path.read_text() == "<!-- table a cpu -->\nno end"


def in_a_file(tiny: Path, tmp_path: Path, seeds: int) -> tuple[Path, Asked, list[Line], Kept]:
    """The table of two seeds in a file; then as it is asked for with so many, and what is kept of it."""
    table, out = load_table(str(tiny)), tmp_path / "results.md"
    write_between(out, "tiny paper", written(table, "paper", tmp_path), "Tiny")
    asked = Asked(table, "paper", seeds, "tiny")
    return out, asked, plan(table, "paper", seeds, tmp_path), read_kept(out, asked.name)


def test_rows_with_more_seeds_in_the_file_than_here_may_be_kept(tiny: Path, tmp_path: Path) -> None:
    out, asked, (one, baseline), kept = in_a_file(tiny, tmp_path, seeds=2)
    table = asked.table
    lines = TEXT.splitlines()
    # nothing is here: all stands, and the notes that go with it
    text = markdown(asked, [one, baseline], kept)
    assert text.splitlines()[:-1] == lines[:-1], "the failures of a row are not kept"
    assert text.splitlines()[-1].startswith("* 2 rows have seeds whose runs are not here any more")
    # of more seeds that are asked now
    text = markdown(Asked(table, "paper", 5, "tiny"), [one, baseline], kept)
    assert "| one | 2 of 5 | 0.560" in text and "| AE (l2) + k-means | 1 of 5 | 0.410" in text
    # as many seeds here: they are written, and the other row stands beside them
    one.summaries = {0: summary(0.7, 3.0, 0.45), 1: summary(0.7, 3.0, 0.61)}
    one.machines = {"2026-02-03 on 4 cores (x86_64), no GPU"}
    text = markdown(asked, [one, baseline], kept)
    assert "| one | 2 | 0.710 ± 0.000 |" in text and "+0.250 +0.090" in text and "+0.050 -0.010" not in text
    assert "| AE (l2) + k-means | 1 of 2 | 0.410 |" in text
    assert "measured 2026-01-02 on 2 cores (x86_64), no GPU; 2026-02-03 on 4 cores" in text
    assert text.splitlines()[-1].startswith("* 1 row has seeds whose runs")
    # a file without the table, or none, keeps nothing
    for name, path in (("tiny cpu", out), ("tiny paper", tmp_path / "none.md")):
        assert read_kept(path, name).rows == {}
    assert markdown(asked, [one, baseline], read_kept(out, "tiny cpu")) == markdown(asked, [one, baseline])


def test_later_seeds_are_added_to_those_of_the_file(tiny: Path, tmp_path: Path) -> None:
    out, asked, (one, baseline), kept = in_a_file(tiny, tmp_path, seeds=4)
    assert kept.seeds(asked, one) == {0, 1} and kept.seeds(asked, baseline) == {0}
    # of the file 0 and 1 (NMI .5 and .6), of here 3; its seed 1 is not counted twice
    one.summaries = {1: summary(0.9, 3.0, 0.1), 3: summary(0.7, 90.0, 0.45)}
    one.machines = {"2026-02-03 on 4 cores (x86_64), no GPU"}
    baseline.summaries = {1: {**summary(0.6, 0.0), "seconds": {}}}
    text = markdown(asked, [one, baseline], kept)
    nmi = np.array([0.5, 0.6, 0.7])
    mean, spread = f"{nmi.mean():.3f}", f"{nmi.std():.3f}"
    assert (
        f"| one | 3 of 4 (0, 1, 3) | {nmi.mean() + 0.01:.3f} ± {spread} | {mean} ± {spread} | 0.300 ± 0.041 |"
        in text
    )
    assert "| 0.700 ± 0.082 | 15 | 0.50 |  | 0.60 |" in text, "15, 15 and 90 seconds"
    assert "| AE (l2) + k-means | 2 of 4 | 0.510 ± 0.100 | 0.500 ± 0.100 |" in text
    assert "| +0.050 -0.010 +0.250 | +0.097 |" in text and "1 of 4" not in text
    assert "2026-01-02 on 2 cores (x86_64), no GPU; 2026-02-03 on 4 cores" in text
    # what was written is read back with its seeds, and nothing is added to it that it has
    write_between(out, "tiny paper", text, "Tiny")
    kept = read_kept(out, "tiny paper")
    assert kept.seeds(asked, one) == {0, 1, 3} and kept.seeds(asked, baseline) == {0, 1}
    assert markdown(asked, [one, baseline], kept).splitlines()[:-4] == text.splitlines()[:-4]
    one.summaries[2] = summary(0.8, 30.0, 0.45)
    text = markdown(asked, [one, baseline], kept)
    assert "| one | 4 | 0.660 ± 0.112 |" in text and "+0.050 -0.010 +0.350 +0.250 |" in text
    # where seeds are compared with each other they all have to be here
    changed(tiny, "rows:", "agreement: true\nrows:")
    asked = Asked(load_table(str(tiny)), "paper", 4, "tiny")
    lines = plan(asked.table, "paper", 4, tmp_path)
    lines[0].summaries = {0: summary(0.5, 10.0), 1: summary(0.6, 20.0)}
    write_between(out, "tiny paper", markdown(asked, lines), "Tiny")
    kept = read_kept(out, "tiny paper")
    lines[0].summaries = {3: summary(0.7, 90.0)}
    assert kept.seeds(asked, lines[0]) == frozenset()
    assert "| one | 2 of 4 | 0.560 ± 0.050 |" in markdown(asked, lines, kept)


def test_what_keeps_rows_says_from_where(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny), "--no-run", "--keep"]) == 2
    assert "name it with --out" in capsys.readouterr().err


def test_a_table_given_by_its_path_has_a_command_that_runs(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--no-run", "--runs", str(tmp_path / "none")]
    assert main([str(tiny), *options]) == 0
    assert f"`python -m jobs.paper_tables {tiny.name} --protocol cpu --seeds 2`" in capsys.readouterr().out
    given = os.path.relpath(tiny)
    assert main([given, *options]) == 0
    assert f"`python -m jobs.paper_tables {given} --protocol cpu --seeds 2`" in capsys.readouterr().out


def test_a_marker_without_its_end_is_found_before_anything_is_run(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.md"
    out.write_text("<!-- table tiny cpu -->\nno end")
    assert main([str(tiny), "--runs", str(tmp_path / "runs"), "--out", str(out)]) == 2
    assert "put the second back" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_seeds_of_the_file_that_cannot_be_read_are_named_before_anything_is_run(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _, _, _ = in_a_file(tiny, tmp_path, seeds=2)
    out.write_text(out.read_text().replace("| one | 2 |", "| one | two |"))
    before = out.read_text()
    command = [str(tiny), "--protocol", "paper", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert main([*command, "--keep"]) == 2
    assert "has 'two' as its seeds; expected '5', '2 of 5' or '2 of 5 (0, 3)'" in capsys.readouterr().err
    assert out.read_text() == before and not (tmp_path / "runs").exists()
