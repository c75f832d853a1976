"""Cells of a table on disk and in Ray: unlabelled documents, rows of one's own, damaged files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from distclust.config import to_dict
from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError
from distclust.mixture.imports import VARIABLE
from distclust.results.evaluate import class_numbers
from jobs._cells import FAILED, MACHINE, Cell, corpus_folder, plan, read_cell, read_cells
from jobs._tables import load_table
from jobs.paper_tables import _in_task, _left_to_run, main, prepare_cell, run_cell
from tables import changed


def test_directions_of_documents_without_one_label_are_not_scored(tiny: Path, tmp_path: Path) -> None:
    stories = ("grain wheat corn", "bank money rates", "ship port oil")
    labels: list[list[str]] = [[], ["class 0"], ["class 0", "class 1"], ["class 1"]]
    rows = [{"text": f"{stories[n % 3]} word{n % 7}", "label": labels[n % 4]} for n in range(60)]
    documents = tmp_path / "documents.jsonl"
    documents.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    changed(tiny, "{name: builtin, limit: 300}", f"{{name: files, files: [{documents}], text: text}}")
    changed(tiny, "\nrows:\n", "\nsections:\n- lsa: 3\n  rows:\n")
    (cell,) = plan(load_table(str(tiny)), "cpu", 1, tmp_path)[0].cells
    assert cell.documents is not None
    text = corpus_folder(cell.documents, tmp_path)
    assert prepare_cell(to_dict(cell.config), str(cell.corpus), to_dict(cell.documents), str(text)) is None
    words, directions = Corpus.open(text), Corpus.open(cell.corpus)
    assert class_numbers(directions).tolist() == class_numbers(words).tolist()
    assert (class_numbers(directions) >= 0).sum() == 30
    assert directions.manifest.classes == ("0", "1")


# ---- rows of one's own

OWN = """
from dataclasses import replace
from distclust.mixture.methods import METHODS
ROW = replace(METHODS["dmae-text"], name="own", paper="ours", summary="a row of one's own")
"""


@pytest.fixture
def own(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A table with a row of a module that can be imported, and nothing allowed."""
    (tmp_path / "own_row.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delitem(sys.modules, "own_row", raising=False)
    return changed(tiny, "  - {label: one,", '  - {label: own, method: "own_row:ROW"}\n  - {label: one,')


def test_a_row_of_ones_own_is_run_where_its_module_is_allowed(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = plan(load_table(own), "cpu", 1, tmp_path / "runs")[0]
    assert line.missing is None
    (cell,) = line.cells
    assert {phase.epochs for phase in cell.config.phases} == {0, 1}  # the protocol's are for its phases too
    given = (to_dict(cell.config), str(cell.folder), str(cell.corpus), None)
    monkeypatch.setenv(VARIABLE, "")  # a process of Ray's that knows of nothing
    assert "was not allowed here" in str(run_cell(*given))
    assert _in_task(run_cell, ["own_row"], *given) is None
    read_cells([line])
    assert list(line.summaries) == [0]


def test_a_row_of_ones_own_that_is_not_there_is_named(
    own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(Path(own), "own_row:ROW", "own_row:ROWS")
    assert main([own, "--runs", str(tmp_path / "runs"), "--only", "own"]) == 1
    assert (
        "row 'own', protocol cpu: method: 'own_row:ROWS': the module has no 'ROWS'" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_row_of_ones_own_is_run_by_the_command(own: str, tmp_path: Path) -> None:
    import ray

    ray.shutdown()
    ray.init(address="local", log_to_driver=False)  # before the table, so that nothing is allowed in it
    asked = [own, "--runs", str(tmp_path / "runs"), "--seeds", "1", "--only", "own"]
    out = tmp_path / "results.md"
    assert main([*asked, "--out", str(out)]) == 0
    assert "| own | 1 | 0." in out.read_text()


# ---- damaged files


@pytest.fixture
def two(tiny: Path, tmp_path: Path) -> tuple[str, list[Cell]]:
    """A table of k-means with two seeds that are finished."""
    path = changed(tiny, "method: damic-text", "method: k-means")
    cells = plan(load_table(path), "cpu", 2, tmp_path / "runs")[0].cells
    for cell in cells:
        assert run_cell(to_dict(cell.config), str(cell.folder), str(cell.corpus)) is None
    return path, cells


@pytest.mark.parametrize("damage", ["", '{"finished": tr', "[]"])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("done.json", "cpu-one-0 away, and the cell is run again"),
        ("summary.json", "remove that file: a summary is made anew"),
        (MACHINE, "remove that file: "),
    ],
)
def test_a_damaged_file_concerns_its_own_cell_only(
    two: tuple[str, list[Cell]],
    damage: str,
    name: str,
    remedy: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, cells = two
    (cells[0].folder / name).write_text(damage)
    lines = plan(load_table(path), "cpu", 2, tmp_path / "runs")
    read_cells(lines)
    assert list(lines[0].summaries) == [1] and list(lines[0].failures) == [0]
    assert name in lines[0].failures[0] and remedy in lines[0].failures[0]
    waiting, damaged = _left_to_run([*cells, plan(load_table(path), "cpu", 3, tmp_path / "runs")[0].cells[2]])
    assert [cell.seed for cell in waiting] == [2] and list(damaged) == [cells[0].folder]
    asked = [path, "--runs", str(tmp_path / "runs")]
    assert main([*asked, "--list"]) == 0
    assert "one [k-means]: 1 of 2 finished, 1 failed" in capsys.readouterr().out
    assert main(asked) == 1
    shown = capsys.readouterr()
    assert "| one | 1 of 2 (1) | 0." in shown.out
    assert "* one, seed 0: " in shown.out and remedy in shown.err


def test_a_summary_that_is_gone_is_made_anew(
    two: tuple[str, list[Cell]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, (first, other) = two
    before, _ = read_cell(first)
    (first.folder / "summary.json").unlink()
    assert main([path, "--runs", str(tmp_path / "runs"), "--no-run"]) == 0
    assert "* one, seed 0: finished, and its summary.json is gone" in capsys.readouterr().out
    assert _left_to_run([first, other]) == ([first], {})
    assert run_cell(to_dict(first.config), str(first.folder), str(first.corpus)) is None
    again, _ = read_cell(first)
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in before.items() if k != "seconds"
    }


def test_a_damaged_reason_does_not_keep_a_cell_from_being_tried_again(tiny: Path, tmp_path: Path) -> None:
    lines = plan(load_table(str(tiny)), "cpu", 1, tmp_path)
    (cell,) = lines[0].cells
    cell.folder.mkdir(parents=True)
    for damage, said in {"": f"{FAILED} cannot be read", "{}": "not said why"}.items():
        (cell.folder / FAILED).write_text(damage)
        read_cells(lines)
        assert said in lines[0].failures[0]
        assert _left_to_run([cell]) == ([cell], {})


# ---- what the command refuses


def test_rows_that_are_wrong_make_the_command_fail(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(tiny, "  - {label: one,", "  - {label: bad, method: damic-txt}\n  - {label: one,")
    asked = [path, "--runs", str(tmp_path), "--no-run"]
    assert main([*asked, "--list"]) == 1
    assert (
        "bad [damic-txt]: there is no method 'damic-txt'; did you mean 'damic-text'?"
        in capsys.readouterr().out
    )
    assert main(asked) == 1
    assert "tiny, bad: not run: there is no method 'damic-txt'; did you mean" in capsys.readouterr().err
    assert main([*asked, "--only", "one"]) == 0  # that one is right
    changed(tiny, "damic-txt}", "damic-text, recipe: {phases: {joint: {epoch: 3}}}}")
    assert main(asked) == 1
    assert "unknown key 'phases.joint.epoch'; did you mean 'epochs'" in capsys.readouterr().err
    changed(tiny, "{phases: {joint: {epoch: 3}}}", "{source: {name: builtni}}")
    assert main(asked) == 1
    assert "no data set 'builtni'; did you mean 'builtin'" in capsys.readouterr().err
    changed(tiny, "{name: builtni}", "{name: photographs-of-tomorrow}")
    assert main(asked) == 0
    assert "no data set 'photographs-of-tomorrow' yet" in capsys.readouterr().err


def test_epochs_are_for_phases_that_a_row_has(tiny: Path, tmp_path: Path) -> None:
    changed(tiny, '{"*": 1}', "{pretrian: 1}")
    with pytest.raises(
        ConfigError, match="cpu.epochs: no row has a phase 'pretrian'; did you mean 'pretrain'"
    ):
        load_table(str(tiny))
    like = tmp_path / "like.yaml"  # the phases of the other table's rows need not be those of its own
    like.write_text("like: 20news\ntitle: T\nwords: W\nrows: [{label: one, method: bregman}]\n")
    assert load_table(str(like)).protocols["cpu"].epochs == {"pretrain": 10, "*": 5}
    like.write_text(like.read_text() + "protocols: {cpu: {epochs: {jiont: 3}}}\n")
    with pytest.raises(ConfigError, match="no row has a phase 'jiont'"):
        load_table(str(like))


@pytest.mark.parametrize(
    ("table", "given", "said"),
    [
        ("tiny", ["--seeds", "0"], "--seeds is 0; expected at least 1"),
        ("tiny", ["--seeds", "-2"], "--seeds is -2"),
        (
            "tiny",
            ["--out", "nowhere/results.md"],
            "--out nowhere/results.md: expected a Markdown file in a folder",
        ),
        ("tiny", ["--out", "."], "--out .: expected a Markdown file"),
        ("all", ["--only", "DAMICC"], "'DAMICC' is a row of no table; did you mean 'DAMIC'"),
        ("all", ["--only", "DAMIC", "--only", "_"], "'_' is a row of no table; --list names them all"),
    ],
)
def test_options_are_looked_at_before_anything_is_run(
    tiny: Path, tmp_path: Path, table: str, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert main([str(tiny) if table == "tiny" else table, "--runs", str(runs), *given]) == 2
    assert said in capsys.readouterr().err
    assert not runs.exists()
    changed(tiny, "seeds: 2", "seeds: 0")
    with pytest.raises(ConfigError, match="seeds is 0; expected at least 1"):
        load_table(str(tiny))
