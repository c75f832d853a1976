"""Tables of results: what a YAML file may say, and cells that resume and fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distclust.config import to_dict
from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError
from distclust.results.evaluate import class_numbers
from jobs._cells import corpus_folder, plan, read_cells
from jobs._tables import PROTOCOLS, load_table, merge_recipes, table_names, trial_names
from jobs.paper_tables import main, prepare_cell, run_cell
from tables import changed, run_all

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


def test_a_method_that_is_no_row_has_its_reason(tiny: Path, tmp_path: Path) -> None:
    changed(tiny, "  - {label: one", "  - {label: merges, method: jule}\n  - {label: one")
    line = plan(load_table(str(tiny)), "cpu", 1, tmp_path)[0]
    assert line.missing is not None and "JULE is no row: merges clusters" in line.missing
