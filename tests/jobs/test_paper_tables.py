"""Tables of results: what a YAML file may say, cells that resume and fail, and the Markdown."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from distclust.config import to_dict
from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError
from distclust.results.agreement import agreement
from distclust.results.assignment import Assignment
from distclust.results.evaluate import class_numbers
from jobs._cells import Line, corpus_folder, plan, read_cells
from jobs._markdown import Asked, markdown, read_kept, write_between
from jobs._tables import PROTOCOLS, Table, load_table, merge_recipes, table_names, trial_names
from jobs.paper_tables import main, prepare_cell, run_cell
from tables import changed

# ---- what a table may say


def test_recipes_are_laid_over_each_other_key_by_key() -> None:
    below = {"model": {"hidden": [1, 2], "tau": 1.0}, "clusters": 3}
    above = {"model": {"hidden": [4]}, "source": {"name": "mnist"}}
    merged = merge_recipes(below, above)
    assert merged == {"model": {"hidden": [4], "tau": 1.0}, "clusters": 3, "source": {"name": "mnist"}}
    assert below == {"model": {"hidden": [1, 2], "tau": 1.0}, "clusters": 3}


def test_a_protocol_gives_its_epochs_to_the_phases_that_train(tiny: Path, tmp_path: Path) -> None:
    table = load_table(str(tiny))
    epochs = {}
    for protocol in PROTOCOLS:
        config = plan(table, protocol, 1, tmp_path)[0].cells[0].config
        epochs[protocol] = {phase.name: phase.epochs for phase in config.phases}
        assert config.clusters == (3 if protocol == "cpu" else 4)
        assert config.tracking.experiment == "tiny" and config.cluster.workers == 0
    assert epochs["cpu"] == {"pretrain": 1, "initialise": 0, "experts": 0, "gate": 1, "joint": 1}
    assert epochs["paper"] == {"pretrain": 2, "initialise": 0, "experts": 0, "gate": 5, "joint": 12}


def test_a_row_wins_over_the_protocol_and_documents_follow_the_seed(tiny: Path, tmp_path: Path) -> None:
    changed(
        tiny,
        "method: damic-text,",
        "method: damic-text, per_protocol: {cpu: {phases: {joint: {epochs: 7}}}},",
    )
    cells = plan(load_table(str(tiny)), "cpu", 2, tmp_path)[0].cells
    assert [phase.epochs for phase in cells[0].config.phases if phase.name == "joint"] == [7]
    assert [cell.config.seed for cell in cells] == [0, 1]
    assert cells[0].corpus == cells[1].corpus and cells[0].folder != cells[1].folder


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title:", "titel:", "unknown key 'titel'; did you mean 'title'"),
        ("hours: {cpu", "hour: {cpu", "rows one: unknown key 'hour'; did you mean 'hours'"),
        ("{nmi: 0.5", "{nmj: 0.5", "rows one.published: unknown key 'nmj'; did you mean 'nmi'"),
        (
            "hours_from: a guess., epochs: {pre",
            "hour_from: a, epochs: {pre",
            "protocol paper: unknown key 'hour_from'",
        ),
        ("hours: {cpu", "hours: {cpi", "protocol 'cpi'; did you mean 'cpu'"),
        ("{row: one", "{row: onee", "baseline_of.row is 'onee'; did you mean 'one'"),
        ("method: damic-text, ", "", "needs a method or baseline_of"),
        ("label: AE (l2) + k-means, baseline_of", "label: One, baseline_of", "rename one"),
        ("seeds: 2", "seeds: many", "seeds"),
    ],
)
def test_what_a_table_may_not_say(tiny: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_table(changed(tiny, old, new))
    assert said in str(error.value)


def test_a_wrong_recipe_and_a_method_that_is_not_there_are_told_apart(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(tiny, "method: damic-text", "method: of-tomorrow")
    assert main([path, "--list", "--runs", str(tmp_path)]) == 0
    assert "one [of-tomorrow]: no method 'of-tomorrow' yet" in capsys.readouterr().out
    assert main([path, "--runs", str(tmp_path)]) == 0
    assert "| one | 0 | not run (no method 'of-tomorrow' yet) |" in capsys.readouterr().out
    changed(tiny, "method: of-tomorrow", "method: damic-text")
    path = changed(tiny, "model: {hidden", "model: {hiden")
    assert main([path, "--list", "--runs", str(tmp_path)]) == 1
    assert "unknown key 'model.hiden'; did you mean 'hidden'" in capsys.readouterr().out


def test_a_table_or_row_that_is_not_there_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["builtim"]) == 2
    assert "no table 'builtim'; did you mean 'builtin'" in capsys.readouterr().err
    assert main([str(tiny), "--only", "ones", "--no-run"]) == 2
    assert "--only 'ones' is no row of tiny" in capsys.readouterr().err


def test_a_table_like_another_has_its_documents_and_protocols_with_rows_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "like: builtin\ntitle: Mine\nwords: W.\nseeds: 2\nrows: [{label: one, method: damic-text}]\n"
    )
    mine, other = load_table(str(path)), load_table("builtin")
    assert (mine.title, mine.seeds, [row.label for _, row in mine.rows()]) == ("Mine", 2, ["one"])
    assert (mine.recipe, mine.protocols, mine.paired_with) == (
        other.recipe,
        other.protocols,
        other.paired_with,
    )
    (line,) = plan(mine, "cpu", 1, tmp_path)
    first = next(line for line in plan(other, "cpu", 1, tmp_path) if line.row.method == "damic-text")
    assert line.cells[0].corpus == first.cells[0].corpus


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("like: builtim\ntitle: T\nwords: W.", "no table 'builtim'; did you mean 'builtin'"),
        ("like: builtin\ntitle: T", "is like another; give it words of its own"),
        ("like: trials/builtin\ntitle: T\nwords: W.", "itself like builtin; name that one"),
    ],
)
def test_what_a_table_may_be_like(head: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{head}\nrows: [{{label: one, method: damic-text}}]\n")
    with pytest.raises(ConfigError, match=said):
        load_table(str(path))


@pytest.mark.parametrize("name", [*table_names(), *trial_names()])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_table_resolves_for_the_methods_and_documents_that_exist(
    name: str, protocol: str, tmp_path: Path
) -> None:
    table = load_table(name)
    for line in plan(table, protocol, 1, tmp_path):
        assert line.missing is None or line.missing.startswith(("no method", "no data set")), line.missing
        assert line.row.baseline_of is not None or line.missing is not None or len(line.cells) == 1
        assert line.row.method is None or protocol in line.row.hours, f"{line.row.label} says no hours"


# ---- cells


def run_all(lines: list[Line]) -> dict[tuple[str, int], str | None]:
    return {
        (line.row.label, cell.seed): run_cell(to_dict(cell.config), str(cell.folder), str(cell.corpus))
        for line in lines
        for cell in line.cells
    }


def stamps(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [root, *sorted(root.rglob("*"))]}


def test_finished_cells_stay_failed_ones_are_named_and_tried_again(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = tmp_path / "late.jsonl"
    late = f"- {{label: late, method: damic-text, recipe: {{source: {{name: files, files: [{documents}]}}}}}}"
    path = changed(tiny, "  - {label: one", f"  {late}\n  - {{label: one")
    runs = tmp_path / "runs"
    lines = plan(load_table(path), "cpu", 1, runs)
    reasons = run_all(lines)
    assert reasons["one", 0] is None
    assert "late.jsonl was not found" in str(reasons["late", 0])

    read_cells(lines)
    first, second, third = lines
    assert first.summaries == {} and "late.jsonl was not found" in first.failures[0]
    assert second.failures == {} and 0 <= second.summaries[0]["nmi_geometric"] <= 1
    assert "AE + k-means" in second.summaries[0]["baselines"]  # of its own network
    assert "k-means" not in second.summaries[0]["baselines"]  # of the rows: the same in every cell
    assert third.summaries[0]["acc"] == second.summaries[0]["baselines"]["AE (l2) + k-means"]["acc"]
    assert main([path, "--seeds", "1", "--runs", str(runs), "--no-run"]) == 0
    shown = capsys.readouterr().out
    assert "| late | 0 | failed: DataError:" in shown and str(tmp_path) not in shown

    stories = ("grain wheat corn", "bank money rates", "ship port oil")
    rows = [{"text": f"{stories[n % 3]} word{n}", "label": f"class {n % 3}"} for n in range(60)]
    documents.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    before = stamps(second.cells[0].folder)
    (cell,) = first.cells
    assert run_cell(to_dict(cell.config), str(cell.folder), str(cell.corpus)) is None
    read_cells(lines)
    assert first.failures == {} and first.summaries[0]["n_documents"] == 60
    # every cell is finished: the command only reads
    assert main([path, "--seeds", "1", "--runs", str(runs)]) == 0
    assert stamps(second.cells[0].folder) == before

    # a finished cell of other settings is neither shown nor run again
    changed(tiny, "hidden: [16]", "hidden: [17]")
    lines = plan(load_table(path), "cpu", 1, runs)
    read_cells(lines)
    assert lines[1].summaries == {}
    assert "finished with other settings (model.hidden[0]: 16 there, 17 asked)" in lines[1].failures[0]
    assert main([path, "--seeds", "1", "--runs", str(runs)]) == 1, "asked for, and not there"
    assert stamps(second.cells[0].folder) == before


def test_rows_may_be_singular_directions_of_the_documents(tiny: Path, tmp_path: Path) -> None:
    changed(tiny, "\nrows:\n", "\nsections:\n- lsa: 3\n  rows:\n")
    line, _ = plan(load_table(str(tiny)), "cpu", 1, tmp_path)
    (cell,) = line.cells
    assert cell.documents is not None and cell.documents.source.name == "builtin"
    text = corpus_folder(cell.documents, tmp_path)
    assert prepare_cell(to_dict(cell.config), str(cell.corpus), to_dict(cell.documents), str(text)) is None
    corpus = Corpus.open(cell.corpus)
    assert (corpus.kind, corpus.n_rows, corpus.n_features) == ("dense", 300, 3)
    rows = np.concatenate([corpus.shard(n).dense for n in range(len(corpus.shard_rows))])
    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(lengths[lengths > 0], 1, rtol=1e-5)
    # the same classes as those of the documents, by another name
    truth, dense = class_numbers(Corpus.open(text)), class_numbers(corpus)
    assert len(set(zip(truth.tolist(), dense.tolist(), strict=True))) == len(set(truth.tolist())) > 1


@pytest.mark.slow
def test_the_command_runs_rows_and_seeds_as_tasks_and_goes_on_after_a_failure(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(tiny, "  tracking: {enabled: false}\n", "")
    recipe = "{clusters: 299, source: {limit: 200}, initialise: {sample: 14950}}"
    broken = f"- {{label: broken, method: damic-text, recipe: {recipe}}}"
    path = changed(tiny, "  - {label: one", f"  {broken}\n  - {{label: one")
    runs, out = tmp_path / "runs", tmp_path / "results.md"
    asked = [path, "--runs", str(runs), "--out", str(out)]
    assert main(asked) == 1
    text = out.read_text()
    assert "| one | 2 | 0." in text
    assert "| broken | 0 | failed: DataError: " in text
    before = stamps(runs / "tiny" / "cpu-one-0") | stamps(runs / "tiny" / "cpu-one-1")
    assert len(list((runs / "corpora").iterdir())) == 2

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{runs / 'tiny' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    names = {run.info.run_name for run in client.search_runs([experiment.experiment_id])}
    assert {"cpu-one-0", "cpu-one-1"} <= names

    assert main([*asked, "--only", "one"]) == 0
    assert out.read_text() == text
    # a seed that the file has is not run again, wherever its run is
    gone = runs / "tiny" / "cpu-one-0"
    gone.rename(tmp_path / "gone")
    capsys.readouterr()
    assert main([*asked, "--only", "one", "--keep", "--list"]) == 0
    assert "one [damic-text]: 1 of 2 finished, 2 in the file" in capsys.readouterr().out
    assert main([*asked, "--only", "one", "--keep"]) == 0
    assert not gone.exists()
    rows = {line for line in text.splitlines() if line.startswith("| one |")}
    assert len(rows) == 2 and rows <= set(out.read_text().splitlines())
    (tmp_path / "gone").rename(gone)
    assert main(asked) == 1
    assert stamps(runs / "tiny" / "cpu-one-0") | stamps(runs / "tiny" / "cpu-one-1") == before


# ---- Markdown


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


def test_rows_with_more_seeds_in_the_file_than_here_may_be_kept(tiny: Path, tmp_path: Path) -> None:
    table, out = load_table(str(tiny)), tmp_path / "results.md"
    write_between(out, "tiny paper", written(table, "paper", tmp_path), "Tiny")
    asked = Asked(table, "paper", 2, "tiny")
    one, baseline = plan(table, "paper", 2, tmp_path)
    kept = read_kept(out, "tiny paper")
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
    table, out = load_table(str(tiny)), tmp_path / "results.md"
    write_between(out, "tiny paper", written(table, "paper", tmp_path), "Tiny")
    asked = Asked(table, "paper", 4, "tiny")
    one, baseline = plan(table, "paper", 4, tmp_path)
    kept = read_kept(out, "tiny paper")
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


def test_a_method_that_is_no_row_has_its_reason(tiny: Path, tmp_path: Path) -> None:
    changed(tiny, "  - {label: one", "  - {label: merges, method: jule}\n  - {label: one")
    line = plan(load_table(str(tiny)), "cpu", 1, tmp_path)[0]
    assert line.missing is not None and "JULE is no row: merges clusters" in line.missing
