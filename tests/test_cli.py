"""The command line: what it prints, its exit codes, and that a mistake costs seconds and leaves nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from distclust.cli import app
from distclust.corpus.shards import Corpus
from distclust.errors import DataError
from distclust.mixture.catalogue import ESTIMATORS, MISSING
from distclust.mixture.methods import METHODS
from distclust.mixture.taxonomy import taxonomy
from distclust.training.tracking import SPOOL_NAME, Tracker
from stories import records, snapshot, tiny_recipe, write_jsonl

COMMANDS = ("prepare", "train", "assign", "evaluate", "agree", "demo", "methods", "generate", "replay")


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a recipe, its stories and a finished run."""
    folder = tmp_path_factory.mktemp("work")
    file = write_jsonl(folder / "stories.jsonl", records(60))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(file)))
    result = call("train", folder / "tiny.yaml", "--run", folder / "run")
    assert result.exit_code == 0, result.output
    (folder / "train.txt").write_text(result.stdout)
    return folder


# ---- help


def test_help_names_every_command_and_where_to_begin():
    text = plain(call("--help").output)
    assert "distclust demo" in text
    for name in COMMANDS:
        assert name in text
    assert call().exit_code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    result = call(name, "--help")
    assert result.exit_code == 0
    text = plain(result.output)
    assert len(text) > 250
    if name in ("prepare", "train", "assign", "evaluate", "agree", "methods"):
        assert f"Example: distclust {name}" in text or f"Examples: distclust {name}" in text


def test_examples_in_the_help_can_be_read():
    """The recipes and keys that they name exist."""
    from distclust.config import load_recipe

    for name in ("prepare", "train"):
        text = plain(call(name, "--help").output)
        words = (
            text.split(f"Example: distclust {name} ")[1].split(" Options:")[0].split(" Arguments:")[0].split()
        )
        overrides = [w for w in words[1:] if "=" in w]
        load_recipe(words[0], overrides)


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "distclust", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "Usage: distclust" in done.stdout


def test_help_is_quick():
    """It loads neither torch nor Ray."""
    heavy = ("torch", "ray", "mlflow", "sklearn", "pandas")
    code = f"import sys, distclust.cli; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_methods_prints_the_whole_table():
    result = call("methods")
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    text = plain(result.output)
    for row in (*METHODS.values(), *ESTIMATORS.values()):
        for said in (row.name, row.summary, row.paper, *dataclasses.asdict(taxonomy(row)).values()):
            assert plain(said) in text, (row.name, said)
    for missing in MISSING.values():
        assert plain(f"{missing.name} {missing.kind}: {missing.reason}") in text
    for slot in ("network", "energy", "gate", "aggregator", "readout", "reconstruction", "regulariser"):
        assert text.count(f" {slot} ") >= len(METHODS) + len(ESTIMATORS)
    assert text.count("cluster update") == len(METHODS) + len(ESTIMATORS)


def test_methods_in_brief_is_one_line_a_row():
    lines = [line for line in call("methods", "--brief").output.splitlines() if line]
    for name in (*METHODS, *ESTIMATORS, *MISSING):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1, name
    assert len(lines) == len(METHODS) + len(ESTIMATORS) + len(MISSING) + 3
    assert call("methods", "--brief", "dmae").output.startswith("dmae ")


def test_the_documents_count_and_name_every_row():
    root = Path(__file__).parent.parent
    assert f"# {len(METHODS) + len(ESTIMATORS)} methods of" in (root / "README.md").read_text()
    named = (root / "docs" / "rows.md").read_text()
    assert [name for name in (*METHODS, *ESTIMATORS) if f"`{name}`" not in named] == []


def test_methods_of_one_name_is_that_row_in_full():
    text = plain(call("methods", "damic-text").output)
    for said in (
        "phase joint",
        "epochs 12",
        "lse_clean_teacher x 1",
        "tau_spread 0.5",
        "learning_rate 0.001",
    ):
        assert said in text, said
    assert "dmae" not in text
    text = plain(call("methods", "gmm").output)
    assert "covariance diagonal" in text
    assert "max_rows 200000" in text
    assert "neighbours" not in text
    text = plain(call("methods", "spectralnet").output)
    assert text == plain(
        f"SpectralNet outside the slots: {MISSING['SpectralNet'].reason} (Shaham et al. 2018)"
    )


def test_methods_as_json():
    table = json.loads(call("methods", "--json").output)
    assert [row["name"] for row in table["methods"]] == list(METHODS)
    assert [row["name"] for row in table["estimators"]] == list(ESTIMATORS)
    assert [row["name"] for row in table["missing"]] == list(MISSING)
    row = next(row for row in table["methods"] if row["name"] == "dmae")
    assert row["settings"]["alpha"] == 1000.0
    assert row["slots"]["aggregator"] == "MIX"
    assert row["phases"][-1]["terms"][0] == ["mix", 1.0]
    assert row["taxonomy"]["combination"] == "pretrain, then joint"
    assert json.loads(call("methods", "dmae", "--json").output) == row
    assert json.loads(call("methods", "JULE", "--json").output) == dataclasses.asdict(MISSING["JULE"])


# ---- the way


def test_train_prints_clusters_scores_and_places(work):
    text = (work / "train.txt").read_text()
    assert max(map(len, text.splitlines()[:14])) <= 80
    for part in ("Clusters", "top terms", "nearest document", "NMI geom.", "NMI arith.", "ARI", "ACC"):
        assert part in text
    for name in ("k-means", "LSA + k-means", "AE + k-means", "AE (l2) + k-means", "gate after warm start"):
        assert name in text
    assert "60 of 60 documents scored" in text
    assert f"{work}/run/summary.json" in text


def test_training_again_prints_the_same_tables_and_does_nothing(work):
    before = snapshot(work / "run")
    again = call("train", work / "tiny.yaml", "--run", work / "run")
    assert again.exit_code == 0
    assert again.stdout.splitlines()[:-1] == (work / "train.txt").read_text().splitlines()[:-1]
    assert "nothing was done" in again.stdout
    assert snapshot(work / "run") == before


def test_a_run_that_gets_its_baselines_later_says_so(work, tmp_path):
    run = tmp_path / "run"
    assert "AE + k-means" not in call("train", work / "tiny.yaml", "--run", run, "--no-baselines").stdout
    later = call("train", work / "tiny.yaml", "--run", run).stdout
    assert "AE + k-means" in later and "This took" in later and "nothing was done" not in later


def test_progress_goes_to_the_standard_error(work, tmp_path):
    result = call("train", work / "tiny.yaml", "--run", tmp_path / "run")
    assert "pretrain" in result.stderr
    assert "assigning documents" in result.stderr
    assert "pretrain" not in result.stdout


def test_prepare_and_a_run_on_it(work, tmp_path):
    result = call("prepare", work / "tiny.yaml", "--out", tmp_path / "corpus")
    assert result.exit_code == 0
    assert "60 documents in 3 shards, 30 features" in plain(result.stdout)
    again = call("prepare", work / "tiny.yaml", "--out", tmp_path / "corpus")
    assert again.stdout == result.stdout
    done = call(
        "train",
        work / "tiny.yaml",
        "--run",
        tmp_path / "run",
        "--corpus",
        tmp_path / "corpus",
        "--no-baselines",
    )
    assert done.exit_code == 0
    assert "k-means" not in done.stdout


def test_overrides_reach_the_run(work, tmp_path):
    done = call("train", work / "tiny.yaml", "seed=5", "phases.joint.epochs=1", "--run", tmp_path / "run")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["seed"], config["phases"][-1]["epochs"]) == (5, 1)


def test_assign_new_documents(work, tmp_path):
    write_jsonl(
        tmp_path / "new.jsonl", [{"number": 7, "body": "wheat corn harvest"}, {"number": 9, "body": None}]
    )
    out = tmp_path / "out"
    source = ("--source", "text=body", "--source", "id=number")
    result = call("assign", work / "run", tmp_path / "*.jsonl", *source, "--probabilities", "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 documents" in result.stdout
    assert "1 had nothing" in plain(result.stdout)
    table = pq.read_table(out)
    assert table["id"].to_pylist() == ["7", "9"]
    assert table.column_names == ["id", "cluster", "probability", "probabilities"]


def test_assign_a_corpus_gives_what_training_gave(work, tmp_path):
    result = call(
        "assign", work / "run" / "model", "--corpus", work / "run" / "corpus", "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    assert pq.read_table(tmp_path / "out") == pq.read_table(work / "run" / "assignments")


def test_evaluate_a_run(work):
    summary = json.loads((work / "run" / "summary.json").read_text())
    for arguments in (["run"], ["run/assignments"]):
        found = json.loads(call("evaluate", work / arguments[0], "--json").stdout)
        assert found["ari"] == summary["ari"]
    text = call("evaluate", work / "run" / "assignments", "--corpus", work / "run" / "corpus").stdout
    assert f"{summary['acc']:.3f}" in text
    assert "60 of 60 documents scored" in text


def test_runs_agree(work, tmp_path):
    ids = pq.read_table(work / "run" / "assignments")["id"]
    for name, clusters in (("a", [0, 1] * 30), ("b", [1, 0] * 30), ("c", [0] * 59 + [1])):
        pq.write_table(pa.table({"id": ids, "cluster": clusters}), tmp_path / f"{name}.parquet")
    files = [tmp_path / f"{name}.parquet" for name in "cab"]
    text = call("agree", *files).stdout
    assert f"{files[1]} agrees most with the others." in text
    found = json.loads(call("agree", *files, "--json").stdout)
    assert found["nearest"] == str(files[1])
    assert found["pairs"][str(files[1])][str(files[2])] == pytest.approx(1.0)
    two = call("agree", files[1], files[2]).stdout
    assert "1.000  on average" in two and "agrees most" not in two
    itself = call("agree", work / "run", work / "run" / "assignments")
    assert itself.exit_code == 2 and "is given twice" in plain(itself.stderr)
    assert call("agree", work / "run", files[0]).exit_code == 0  # a run and a file


def test_a_run_of_an_estimator(work, tmp_path):
    run = tmp_path / "run"
    result = call("train", work / "tiny.yaml", "method=gmm", "--run", run)
    assert result.exit_code == 0, result.output
    assert "gmm, seed 0" in result.stdout
    assert f"{run}/assignments" in result.stdout
    assert "model" not in result.stdout
    assert "model and phases of the recipe: left out, since gmm is scikit-learn's" in plain(result.stderr)
    found = json.loads(call("evaluate", run, "--json").stdout)
    assert found["ari"] == json.loads((run / "summary.json").read_text())["ari"]
    refused = call("assign", run, tmp_path / "new.jsonl", "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "is a run of gmm, which is scikit-learn's and keeps no model" in plain(refused.stderr)
    again = call("train", work / "tiny.yaml", "method=gmm", "--run", run)
    assert "nothing was done" in again.stdout


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "dmo"], 2, "did you mean 'demo'?"),
        (["train", "nothing.yaml"], 2, "no recipe file nothing.yaml"),
        (["train", "smoke", "clutsers=3"], 2, "did you mean 'clusters'?"),
        (["train", "smoke", "method=dmic"], 2, "did you mean 'damic'?"),
        (["train", "smoke", "clusters"], 2, "key=value"),
        (["train", "smoke", "model.tau=["], 2, "not YAML"),
        (["train", "smoke", "method=gmn"], 2, "did you mean 'gmm'?"),
        (["train", "smoke", "method=gmm", "estimator.covarance=full"], 2, "did you mean 'covariance'?"),
        (["methods", "idek"], 2, "did you mean 'idec'?"),
        (["methods", "k-mean"], 2, "did you mean 'k-means'?"),
        (["prepare", "smoke", "source.name=files", "source.files=[none.csv]"], 2, "none.csv was not found"),
        (["assign", "nowhere", "a.csv"], 2, "nowhere holds no model"),
        (["assign", "nowhere"], 2, "no documents are given"),
        (["assign", "nowhere", "a.csv", "--corpus", "c"], 2, "both files and --corpus"),
        (["assign", "nowhere", "a.csv", "--source", "txt=body"], 2, "did you mean 'text'?"),
        (["evaluate", "nowhere"], 2, "expected --corpus"),
        (["agree", "nowhere"], 2, "found 1, expected two or more"),
        (["agree", "nowhere", "elsewhere"], 2, "nowhere holds no assignments"),
        (["evaluate", "nowhere", "--corpus", "c"], 2, "there is no folder c"),
        (["train"], 2, "Missing argument 'RECIPE'"),
        (["trian"], 2, "No such command 'trian'"),
    ],
)
def test_mistakes_are_explained_in_one_paragraph(tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in plain(result.stderr)
    assert "Traceback" not in result.stderr
    if result.stderr.startswith("error: "):
        assert result.stderr.count("\n") == 1
    assert time.monotonic() - start < 10
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("train", "smoke", "clutsers=3", "--debug")
    assert "clutsers" in str(result.exception)
    assert result.exit_code == 1


def test_a_run_that_is_held_names_its_holder(work, tmp_path):
    from distclust.run_folder import hold

    with hold(tmp_path / "run"):
        result = call("train", work / "tiny.yaml", "--run", tmp_path / "run")
    assert result.exit_code == 2
    assert "is held by process" in plain(result.stderr)


def test_what_happens_in_training_is_code_1(work, tmp_path):
    hot = "phases.pretrain.optimizer.learning_rate=1e38"
    result = call("train", work / "tiny.yaml", hot, "--run", tmp_path / "run")
    assert result.exit_code == 1
    assert "not finite" in plain(result.stderr)
    assert result.stderr.count("error: ") == 1


def test_resuming_with_another_vocabulary_lists_the_difference(work):
    before = snapshot(work / "run")
    result = call(
        "train", work / "tiny.yaml", "vocabulary.max_features=20", "clusters=4", "--run", work / "run"
    )
    assert result.exit_code == 2
    assert "clusters: 3 there, 4 asked; vocabulary.max_features: 30 there, 20 asked" in plain(result.stderr)
    assert snapshot(work / "run") == before


@pytest.mark.slow
def test_the_demo_from_the_command_line(tmp_path):
    """The whole way with two workers, on the clock of the promise: 6 minutes on 2 cores."""
    start = time.monotonic()
    arguments = [sys.executable, "-m", "distclust", "demo", "--run", str(tmp_path / "demo")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 360
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert (summary["n_documents"], summary["n_clusters"], summary["scored"]) == (7160, 9, 7160)
    assert summary["nmi_geometric"] > 0.5
    assert len(summary["baselines"]) == 5
    assert summary["model_uri"]
    for key in ("checkpoint", "assignments", "model"):
        assert (tmp_path / "demo" / summary[key]).exists()
    again = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert again.stdout.splitlines()[:-1] == done.stdout.splitlines()[:-1]


# ---- generate and replay


def test_generate_writes_a_corpus_that_can_be_trained_on(tmp_path):
    folder = tmp_path / "made"
    result = call(
        "generate", folder, "--documents", "3e2", "--terms", "60", "--topics", "3", "--nonzeros", "9"
    )
    assert result.exit_code == 0, result.output
    assert "300 documents of 60 terms" in plain(result.output)
    corpus = Corpus.open(folder)
    assert (corpus.n_rows, corpus.n_features) == (300, 60)
    assert {label for n in range(len(corpus.manifest.shards)) for (label,) in corpus.shard(n).labels()} == {
        f"topic-{n:04}" for n in range(3)
    }
    assert call("generate", folder, "--documents", "300", "--terms", "1").exit_code == 2


def test_replay_sends_what_a_server_did_not_take(tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    run = tmp_path / "run"
    run.mkdir()
    with Tracker(store, run, None, None) as tracker:  # no client: the server is away
        tracker.log_final({"final/nmi": 0.5})
    assert (run / SPOOL_NAME).exists()
    result = call("replay", run, store)
    assert result.exit_code == 0, result.output
    run_id = re.search(r"The MLflow run (\w+) has everything", plain(result.output))[1]
    assert MlflowClient(store).get_run(run_id).data.metrics["final/nmi"] == 0.5
    assert not (run / SPOOL_NAME).exists()
    again = call("replay", run, store)
    assert again.exit_code == 1
    assert "does not exist" in plain(again.output)


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


def test_methods_prints_a_row_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_row.py").write_text("from distclust.mixture.rows.damic import DAMIC as ROW\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = call("methods", "mine_row:ROW")
    assert result.exit_code == 0, result.output
    assert "Chazan" in result.stdout


def test_a_mistyped_corpus_is_no_place_for_a_new_one(tmp_path: Path) -> None:
    result = call("train", "smoke", "--run", tmp_path / "run", "--corpus", tmp_path / "typo")
    assert result.exit_code == 2
    assert "where there is no prepared corpus" in plain(result.stderr)
    assert list(tmp_path.iterdir()) == []
