"""What a tired user does: a mistyped folder, the wrong file, changed data, a damaged shard, no GPU."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from distclust.cli import app
from distclust.config import resolve
from distclust.corpus.generate import GenerateConfig, generate_corpus
from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError, DataError, TrackingError
from distclust.run import train_run
from distclust.training.tracking import replay
from stories import records, tiny_recipe, tiny_run, write_jsonl


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    "content",
    [b"my notes\n", b"", b'{"text": "a"}\n', b'{"type": "news"}\n', b"PAR1\x00\x01\n\xff\n", b"[1]\n"],
)
def test_replay_takes_nothing_but_a_spool(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(TrackingError, match=r"notes\.txt is no spool.*expected"):
        replay(file, f"sqlite:///{tmp_path}/mlflow.db")
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_a_mistyped_corpus_is_no_place_for_a_new_one(tmp_path: Path) -> None:
    result = call("train", "smoke", "--run", tmp_path / "run", "--corpus", tmp_path / "typo")
    assert result.exit_code == 2
    assert "where there is no prepared corpus" in plain(result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_generated_corpus_is_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "made"
    generate_corpus(root, GenerateConfig(rows=120, terms=200, nonzeros=20))
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    config = tiny_run(write_jsonl(tmp_path / "unused.jsonl", records(3)))
    summary = train_run(config, tmp_path / "run", corpus_root=root)
    assert summary["n_documents"] == 120
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before
    assert train_run(config, tmp_path / "run", corpus_root=root) == summary


def test_overwrite_mends_a_shard_that_kept_its_size(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(write_jsonl(tmp_path / "a.jsonl", records(60)))))
    command = ("prepare", recipe, "--out", tmp_path / "c")
    assert call(*command).exit_code == 0
    shard = tmp_path / "c" / "shard-00000.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1500] + b"ABCD" + whole[1504:])
    with pytest.raises(DataError, match="distclust prepare --overwrite"):
        Corpus.open(tmp_path / "c").shard(0)
    assert call(*command, "--overwrite").exit_code == 0
    assert shard.read_bytes() == whole


def test_a_finished_run_sees_that_its_documents_changed(tmp_path: Path) -> None:
    file, run = write_jsonl(tmp_path / "a.jsonl", records(60)), tmp_path / "run"
    summary = train_run(tiny_run(file), run)
    assert train_run(tiny_run(file), run) == summary
    write_jsonl(file, records(60, seed=1))
    with pytest.raises(DataError, match="no longer those of this finished run.*expected"):
        train_run(tiny_run(file), run)
    file.unlink()
    assert train_run(tiny_run(file), run) == summary, "what is gone cannot be compared"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed_before_any_work(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", records(60))
    config = tiny_run(file, cluster={"workers": 0, "gpus_per_worker": 1})
    with pytest.raises(ConfigError, match=r"gpus_per_worker is 1 .*torch sees no GPU"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cpus_per_worker", -3),
        ("cpus_per_worker", 0),
        ("gpus_per_worker", -1),
        ("max_failures", -1),
        ("memory_per_worker_gb", -1.0),
        ("memory_per_worker_gb", float("nan")),
        ("start_timeout_s", 0.0),
    ],
)
def test_impossible_clusters_are_refused_as_they_are_read(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"cluster\.{setting}"):
        resolve({"method": "damic", "clusters": 3, "cluster": {setting: value}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phases": {"joint": {"optimizer": 3}}}, r"phases\.joint\.optimizer is 3; expected keys and values"),
        ({"seed": datetime.date(2024, 1, 1)}, "seed"),
        ({"model": {"hidden": {1, 2}}}, "hidden"),
    ],
)
def test_odd_values_of_a_recipe_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve({"method": "damic", "clusters": 3} | changes)


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("method: damic\n".encode("utf-16"))
    result = call("train", tmp_path / "a.yaml", "--run", tmp_path / "run")
    assert result.exit_code == 2
    assert "expected YAML as UTF-8 text" in plain(result.stderr)


@pytest.mark.parametrize("command", [("estimate", "damic-text"), ("generate", "made")])
def test_counts_are_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for number in ("inf", "2.5"):
        result = call(*command, "--documents", number)
        assert result.exit_code == 2
        assert "expected a whole number" in plain(result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_is_meant(tmp_path: Path) -> None:
    stories, file = write_jsonl(tmp_path / "a.jsonl", records(60)), tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"file (is a file|cannot be made)"):
        train_run(tiny_run(stories), file)
    with pytest.raises(DataError, match="file is a file; expected a folder"):
        generate_corpus(file, GenerateConfig(rows=120, terms=200, nonzeros=20))
    assert file.read_text() == "mine"


def test_a_summary_that_was_lost_is_written_again(tmp_path: Path) -> None:
    config, run = tiny_run(write_jsonl(tmp_path / "a.jsonl", records(60))), tmp_path / "run"
    summary = train_run(config, run)
    (run / "summary.json").unlink()
    again = train_run(config, run)
    assert (run / "summary.json").exists()
    assert {key: again[key] for key in ("acc", "n_documents")} == {
        key: summary[key] for key in ("acc", "n_documents")
    }


def test_methods_prints_a_row_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_row.py").write_text("from distclust.mixture.rows.damic import DAMIC as ROW\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = call("methods", "mine_row:ROW")
    assert result.exit_code == 0, result.output
    assert "Chazan" in result.stdout
