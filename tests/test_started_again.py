"""A run that is started again after its end: what is made then, what stays, and what is the same run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distclust.progress import Listener
from distclust.run import train_run
from distclust.run_folder import is_finished, nothing_left
from stories import records, snapshot, tiny_run, write_jsonl


def test_baselines_that_were_left_out_are_made_when_they_are_wanted(tmp_path: Path) -> None:
    config, run = tiny_run(write_jsonl(tmp_path / "a.jsonl", records(60))), tmp_path / "run"
    without = train_run(config, run, baselines=False)
    assert without["baselines"] == {} and without["scored"] > 0
    whole = snapshot(run)
    assert nothing_left(run, baselines=False) and not nothing_left(run)
    assert train_run(config, run, baselines=False) == without
    assert snapshot(run) == whole
    trained = snapshot(run / "checkpoints")
    again = train_run(config, run)
    assert {"k-means", "AE (l2) + k-means"} <= again["baselines"].keys()
    assert again["acc"] == without["acc"] and snapshot(run / "checkpoints") == trained
    whole = snapshot(run)
    assert nothing_left(run) and nothing_left(run, baselines=False)
    assert train_run(config, run) == again
    assert train_run(config, run, baselines=False) == again  # what there is stays
    assert snapshot(run) == whole


class StopAt(Listener):
    """Ctrl-C as soon as a part of a stage is told of."""

    def __init__(self, part: str):
        self.part = part

    def advance(self, done: int, total: int, note: str = "") -> None:
        if note == self.part:
            raise KeyboardInterrupt


def test_baselines_that_are_made_late_survive_an_interruption_and_the_loss_of_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = tiny_run(write_jsonl(tmp_path / "a.jsonl", records(60))), tmp_path / "run"
    without = train_run(config, run, baselines=False)
    with pytest.raises(KeyboardInterrupt):
        train_run(config, run, listener=StopAt("gate"))
    assert not is_finished(run) and not nothing_left(run)
    assert "gate after warm start" in train_run(config, run)["baselines"]

    other = tmp_path / "other"
    train_run(config, other, baselines=False)
    shutil.rmtree(other / "checkpoints")
    whole = snapshot(other)
    assert train_run(config, other)["acc"] == without["acc"]  # and it is not trained again for their sake
    assert caplog.text.count("the checkpoints that they need are gone") == 1
    assert snapshot(other) == whole


def test_a_run_from_before_a_setting_was_there_is_the_same_run(tmp_path: Path) -> None:
    config, run = tiny_run(write_jsonl(tmp_path / "a.jsonl", records(60))), tmp_path / "run"
    summary = train_run(config, run)
    stored = json.loads((run / "config.json").read_text())
    for phase in stored["config"]["phases"]:
        del phase["tau_factor"]
    (run / "config.json").write_text(json.dumps(stored))
    assert train_run(config, run) == summary


def test_a_summary_that_was_lost_is_written_again(tmp_path: Path) -> None:
    config, run = tiny_run(write_jsonl(tmp_path / "a.jsonl", records(60))), tmp_path / "run"
    summary = train_run(config, run)
    (run / "summary.json").unlink()
    again = train_run(config, run)
    assert (run / "summary.json").exists()
    assert {key: again[key] for key in ("acc", "n_documents")} == {
        key: summary[key] for key in ("acc", "n_documents")
    }


@pytest.mark.parametrize("method", ["damic-text", "k-means"])
def test_a_run_that_goes_on_with_another_version_replaces_its_own_assignments(
    tmp_path: Path, method: str
) -> None:
    """A setting that is new, or another scikit-learn, makes another model of the same weights."""
    config = tiny_run(write_jsonl(tmp_path / "a.jsonl", records(60)), method=method)
    run = tmp_path / "run"
    summary = train_run(config, run)
    manifest = run / "assignments" / "_manifest.json"
    now = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(now) | {"model": "0" * 64}))
    done = run / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"finished": False}))
    assert train_run(config, run)["acc"] == summary["acc"]
    assert json.loads(manifest.read_text())["model"] == json.loads(now)["model"]
