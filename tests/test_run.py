"""The whole job, in one process: what it leaves, that it goes on after a loss, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from corpora import make_corpus
from distclust import run_folder
from distclust.config import to_dict
from distclust.corpus.generate import GenerateConfig, generate_corpus
from distclust.corpus.shards import Corpus
from distclust.corpus.sources import SourceConfig
from distclust.errors import ConfigError, DataError, NonFiniteError, TrackingError
from distclust.preflight import check_distinct
from distclust.results.assignment import Assignment
from distclust.results.metrics import contingency, scores
from distclust.run import (
    Listener,
    assign_run,
    evaluate_run,
    prepare_run,
    train_run,
)
from distclust.run_folder import corpus_of, is_finished
from stories import records, snapshot, tiny_run, write_jsonl

SCORES = ("nmi_geometric", "nmi_arithmetic", "ari", "acc")


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("stories") / "stories.jsonl", records(90))


@pytest.fixture(scope="module")
def finished(stories, tmp_path_factory):
    """(run folder, summary) of a finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, train_run(tiny_run(stories), folder)


# ---- what it leaves


def test_the_summary_has_what_is_promised(finished):
    folder, summary = finished
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["seed"]) == ("damic-text", 0)
    assert (summary["n_documents"], summary["n_clusters"]) == (90, 3)
    names = ["k-means", "LSA + k-means", "AE + k-means", "AE (l2) + k-means", "gate after warm start"]
    assert list(summary["baselines"]) == names
    for row in (summary, *summary["baselines"].values()):
        assert all(0 <= row[key] <= 1 for key in SCORES if key != "ari")
        assert -1 <= row["ari"] <= 1
    phases = {"prepare", "pretrain", "initialise", "experts", "gate", "joint", "assign", "baselines"}
    assert phases <= set(summary["seconds"])
    for key in ("checkpoint", "assignments", "model", "corpus"):
        assert not Path(summary[key]).is_absolute()
        assert (folder / summary[key]).is_dir()


def test_the_scores_are_those_of_the_assignments(finished):
    folder, summary = finished
    assignment = Assignment.open(folder / "assignments")
    corpus = Corpus.open(folder / "corpus")
    labels = [label for i in range(len(corpus.shard_rows)) for (label,) in corpus.shard(i).labels()]
    truth = np.unique(labels, return_inverse=True)[1]
    expected = scores(contingency(truth, assignment.clusters(), 3, 3)).as_dict()
    assert {key: summary[key] for key in SCORES} == expected
    assert [c["size"] for c in summary["clusters"]] == assignment.sizes.tolist()
    found = evaluate_run(folder, folder / "corpus")
    assert {key: found[key] for key in SCORES} == expected
    assert (found["documents"], found["scored"], found["classes"]) == (90, 90, 3)


def test_every_document_is_assigned_in_the_order_of_the_corpus(finished):
    folder, _ = finished
    ids = [i for table in Assignment.open(folder / "assignments").tables() for i in table["id"].to_pylist()]
    assert ids == [f"s{i}" for i in range(90)]


def test_topics_this_plain_are_found(finished):
    """Labels or rows in a wrong order anywhere would show here; so short a training is not a good one."""
    _, summary = finished
    assert summary["baselines"]["k-means"]["acc"] > 0.9
    assert summary["acc"] > 0.5
    words = {word for c in summary["clusters"] for word in c["terms"]}
    assert {"wheat", "bank", "vessel"} & words


def test_a_finished_run_is_left_alone(finished, stories):
    folder, summary = finished
    before = snapshot(folder)
    stages = []

    class Listening(Listener):
        def stage(self, name):
            stages.append(name)

    assert train_run(tiny_run(stories), folder, listener=Listening()) == summary
    assert (snapshot(folder), stages) == (before, [])


def test_a_listener_hears_every_part(stories, tmp_path):
    heard = []

    class Listening(Listener):
        def stage(self, name):
            heard.append(name)

        def advance(self, done, total, note=""):
            assert 0 <= done <= total
            heard.append(note.split(",")[0])

    train_run(tiny_run(stories), tmp_path / "run", listener=Listening())
    parts = ["prepare", "train", "joint", "assign", "baselines", "report"]
    assert [h for h in dict.fromkeys(heard) if h in parts] == parts


def test_a_corpus_is_shared_between_runs(finished, stories, tmp_path):
    folder, summary = finished
    corpus = tmp_path / "corpus"
    prepare_run(tiny_run(stories), corpus)
    before = snapshot(corpus)
    shared = train_run(tiny_run(stories), tmp_path / "run", corpus_root=corpus)
    assert snapshot(corpus) == before
    assert not (tmp_path / "run" / "corpus").exists()
    assert shared["corpus"] == str(corpus)
    assert {k: shared[k] for k in SCORES} == {k: summary[k] for k in SCORES}


@pytest.mark.parametrize("how", ["relative", "url"])
def test_a_run_says_where_its_corpus_is(stories, tmp_path, monkeypatch, how):
    """Whatever folder the next command is given in."""
    monkeypatch.chdir(tmp_path)
    prepare_run(tiny_run(stories), tmp_path / "shared")
    root = "shared" if how == "relative" else f"file://{tmp_path}/shared"
    summary = train_run(tiny_run(stories), tmp_path / "run", corpus_root=root, baselines=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = evaluate_run(tmp_path / "run", corpus_of(tmp_path / "run"))
    assert found["ari"] == summary["ari"]


def test_without_labels_nothing_is_scored(tmp_path):
    rows = [{"id": r["id"], "text": r["text"]} for r in records(60)]
    summary = train_run(tiny_run(write_jsonl(tmp_path / "a.jsonl", rows)), tmp_path / "run")
    assert all(summary[key] is None for key in SCORES)
    assert (summary["scored"], summary["unlabelled"], summary["baselines"]) == (0, 60, {})


def test_only_single_labels_are_scored(tmp_path):
    rows = records(60)
    for row in rows:
        row["label"] = [row["label"]]
    rows[0]["label"], rows[1]["label"], rows[2]["text"] = [], ["grain", "money"], None
    summary = train_run(tiny_run(write_jsonl(tmp_path / "a.jsonl", rows)), tmp_path / "run", baselines=False)
    counts = {key: summary[key] for key in ("scored", "unlabelled", "multi_labelled", "empty", "baselines")}
    assert counts == {"scored": 58, "unlabelled": 1, "multi_labelled": 1, "empty": 1, "baselines": {}}
    assert sum(c["size"] for c in summary["clusters"]) == 60


@pytest.mark.parametrize("method", ["damic", "dmae-text"])
def test_other_methods_go_the_same_way(stories, tmp_path, method):
    phases = {"pretrain": {"epochs": 1}, "joint": {"epochs": 1}}
    if method == "damic":
        phases |= {"experts": {"epochs": 1}, "gate": {"epochs": 1}}
    data = to_dict(tiny_run(stories))
    del data["phases"], data["model"]
    small = {"hidden": [8], "code_size": 4, "expert_hidden": [8], "gate_hidden": [8]}
    from distclust.config import resolve

    config = resolve({**data, "method": method, "phases": phases, "model": small})
    summary = train_run(config, tmp_path / "run")
    last = "gate after warm start" if method == "damic" else "before joint training"
    assert list(summary["baselines"])[-1] == last


# ---- what it refuses


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clusters": 4}, "clusters: 3 there, 4 asked"),
        ({"seed": 1}, "seed: 0 there, 1 asked"),
        ({"method": "damic"}, "method: damic-text there, damic asked"),
        ({"vocabulary": {"max_features": 20}}, "vocabulary.max_features: 30 there, 20 asked"),
        ({"source": {"name": "builtin", "files": []}}, "source.name: files there, builtin asked"),
    ],
)
def test_another_configuration_does_not_continue_a_run(finished, stories, changes, said):
    folder, _ = finished
    if changes.get("method") == "damic":
        changes = {"method": "damic", "phases": {"experts": {"epochs": 1}}}
    before = snapshot(folder)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=said):
        train_run(tiny_run(stories, **changes), folder)
    assert snapshot(folder) == before
    assert time.monotonic() - start < 5


def test_other_documents_do_not_continue_a_run(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", records(60))
    folder = tmp_path / "run"
    stop_after(folder, tiny_run(file), "assign")
    write_jsonl(file, records(60, seed=1))
    before = snapshot(folder)
    with pytest.raises(DataError, match="content of the source's files"):
        train_run(tiny_run(file), folder)
    assert snapshot(folder) == before


def test_another_corpus_folder_does_not_continue_a_run(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", records(60))
    folder, other = tmp_path / "run", tmp_path / "other"
    stop_after(folder, tiny_run(file), "assign")
    write_jsonl(file, records(60, seed=1))
    prepare_run(tiny_run(file), other)
    before = snapshot(folder)
    with pytest.raises(ConfigError, match="corpus: [0-9a-f]+ there, [0-9a-f]+ asked"):
        train_run(tiny_run(file), folder, corpus_root=other)
    assert snapshot(folder) == before


def test_more_clusters_than_distinct_documents(tmp_path):
    rows = [{**row, "text": "wheat corn" if i % 2 else "bank rate"} for i, row in enumerate(records(40))]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        DataError,
        match=r"clusters is 3, but the 40 documents .* only 2 distinct "
        "rows.*clusters=2",
    ):
        train_run(tiny_run(file), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"corpus"}, "a whole corpus may stay"
    assert train_run(tiny_run(file, clusters=2), tmp_path / "run")["n_clusters"] == 2


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_distinct_rows_are_counted_no_further_than_needed(tmp_path, kind):
    corpus = make_corpus(tmp_path, shard_rows=(10, 0, 10), kind=kind)
    check_distinct(corpus, 5)
    check_distinct(corpus, 18)  # every seventh row is empty: two are repeats
    with pytest.raises(DataError, match="only 19 distinct rows"):
        check_distinct(corpus, 20)
    (tmp_path / "shard-00002.arrow").unlink()
    check_distinct(corpus, 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "was not found"), ("", "no documents"), ('{"id": "a", "body": "x"}\n', "columns"), ("{", "JSON")],
)
def test_documents_that_cannot_be_used_leave_nothing(tmp_path, text, said):
    file = tmp_path / "a.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=said):
        train_run(tiny_run(file), tmp_path / "runs" / "run")
    assert not (tmp_path / "runs" / "run").exists()


def test_two_runs_on_one_folder(stories, tmp_path):
    folder = tmp_path / "run"
    with run_folder.hold(folder), pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        train_run(tiny_run(stories), folder)


def test_assign_needs_a_finished_model(tmp_path, finished):
    with pytest.raises(DataError, match="holds no model"):
        assign_run(tmp_path, SourceConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- going on after a loss


class Stop(Exception):
    pass


def stop_after(folder, config, stage):
    """Run until the stage begins, then lose everything that is in memory."""

    class Stopping(Listener):
        def stage(self, name):
            if name == stage:
                raise Stop

    with pytest.raises(Stop):
        train_run(config, folder, listener=Stopping())


@pytest.mark.parametrize("stage", ["train", "assign", "baselines", "report"])
def test_a_run_that_stopped_goes_on(finished, stories, tmp_path, stage):
    _, expected = finished
    folder = tmp_path / "run"
    stop_after(folder, tiny_run(stories), stage)
    assert not (folder / "summary.json").exists()
    before = snapshot(folder)
    summary = train_run(tiny_run(stories), folder)
    ignore = ("seconds",)
    assert {k: v for k, v in summary.items() if k not in ignore} == {
        k: v for k, v in expected.items() if k not in ignore
    }
    after = snapshot(folder)
    kept = {
        "train": "corpus/",
        "assign": "checkpoints/",
        "baselines": "assignments/",
        "report": "assignments/",
    }[stage]
    assert {k: v for k, v in before.items() if k.startswith(kept)} == {
        k: v for k, v in after.items() if k.startswith(kept)
    }


def test_baselines_are_made_once(stories, tmp_path):
    folder = tmp_path / "run"
    stop_after(folder, tiny_run(stories), "report")
    done = json.loads((folder / "done.json").read_text())
    done["baselines"]["rows"]["k-means"]["ari"] = 0.125  # a mark
    (folder / "done.json").write_text(json.dumps(done))
    assert train_run(tiny_run(stories), folder)["baselines"]["k-means"]["ari"] == 0.125


def test_a_damaged_checkpoint_of_pretraining_costs_its_baselines_only(finished, stories, tmp_path, caplog):
    _, expected = finished
    folder = tmp_path / "run"
    stop_after(folder, tiny_run(stories), "baselines")
    weights = next((folder / "checkpoints").glob("*-after-pretrain")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    summary = train_run(tiny_run(stories), folder)
    assert "goes without the baselines of its codes" in caplog.text
    assert "is damaged" in caplog.text
    lost = {"AE + k-means", "AE (l2) + k-means"}
    assert summary["baselines"] == {k: v for k, v in expected["baselines"].items() if k not in lost}
    assert summary["ari"] == expected["ari"]
    assert is_finished(folder)


# ---- MLflow, and the ends that a run can come to


def tracked(stories, folder, **changes):
    tracking = {"enabled": True, "uri": f"sqlite:///{folder}/mlflow.db", "log_every": 1}
    return tiny_run(stories, tracking=tracking, **changes)


def mlflow_runs(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("distclust")
    return client, client.search_runs([experiment.experiment_id])


def test_mlflow_has_the_run(stories, tmp_path):
    config = tracked(stories, tmp_path)
    summary = train_run(config, tmp_path / "run")
    client, (run,) = mlflow_runs(tmp_path)
    assert (run.info.run_id, run.info.status) == (summary["mlflow_run_id"], "FINISHED")
    assert run.data.params["clusters"] == "3"
    assert run.data.metrics["nmi_geometric"] == summary["nmi_geometric"]
    assert run.data.metrics["baseline/k-means/acc"] == summary["baselines"]["k-means"]["acc"]
    assert run.inputs.dataset_inputs
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["pictures", "summary.json"]
    assert summary["model_uri"].startswith("models:/")
    assert f"sqlite:///{tmp_path}/mlflow.db" in summary["how_to_open"]
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == sorted(set(steps))
    assert steps
    assert train_run(config, tmp_path / "run") == summary
    assert len(mlflow_runs(tmp_path)[1]) == 1


def test_a_run_that_fails_ends_failed(stories, tmp_path):
    hot = {"pretrain": {"epochs": 3, "optimizer": {"learning_rate": 1e38}}}
    with pytest.raises(NonFiniteError):
        train_run(tracked(stories, tmp_path, phases=hot), tmp_path / "run")
    assert mlflow_runs(tmp_path)[1][0].info.status == "FAILED"
    assert not (tmp_path / "run" / "lock").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_server_that_does_not_answer_is_found_out_first(stories, tmp_path):
    nobody = {"enabled": True, "uri": "http://127.0.0.1:9"}
    start = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer.*on_unreachable=spool"):
        train_run(tiny_run(stories, tracking=nobody), tmp_path / "run")
    assert time.monotonic() - start < 10
    assert list(tmp_path.iterdir()) == []
    summary = train_run(tiny_run(stories, tracking={**nobody, "on_unreachable": "spool"}), tmp_path / "run")
    assert summary["mlflow_run_id"] is None
    assert (tmp_path / "run" / "metrics-unsent.jsonl").stat().st_size > 1000


def command(folder: Path, config) -> list[str]:
    """`distclust train` on this configuration."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_dict(config)))
    return [sys.executable, "-m", "distclust", "train", str(recipe), "--run", str(folder / "run")]


def wait_for_step(folder: Path, step: int) -> None:
    path = folder / "run" / "training" / "progress.json"
    deadline = time.monotonic() + 180
    while not path.exists() or json.loads(path.read_text())["global_step"] < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [
        (signal.SIGTERM, 143, 0),
        pytest.param(signal.SIGINT, 130, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_in_order_and_it_goes_on(stories, tmp_path, number, code, workers):
    config = tracked(stories, tmp_path, phases={"pretrain": {"epochs": 50}}, cluster={"workers": workers})
    process = subprocess.Popen(command(tmp_path, config), stderr=subprocess.PIPE)
    wait_for_step(tmp_path, 5)
    process.send_signal(number)
    assert process.wait(60) == code, process.stderr.read()
    _, (run,) = mlflow_runs(tmp_path)
    assert run.info.status == "KILLED"
    assert not (tmp_path / "run" / "lock").exists()
    done = subprocess.run(process.args, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    client, (again,) = mlflow_runs(tmp_path)
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
    assert len(steps) == len(set(steps)) > 300


@pytest.mark.slow
def test_a_driver_that_is_killed_again_and_again(finished, stories, tmp_path):
    """SIGKILL wherever it happens to be, ten times at most; the end is that of a run that was left alone."""
    _, expected = finished
    config = tracked(stories, tmp_path)
    arguments = command(tmp_path, config)
    kills, wait = 0, 2.0
    rng = np.random.default_rng(0)
    while True:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=wait + rng.uniform(0, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            wait += 0.7
            continue
        assert process.returncode == 0, err.decode()
        break
    assert kills > 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for key in (*SCORES, "baselines", "clusters", "global_steps"):
        assert summary[key] == expected[key]
    client, (run,) = mlflow_runs(tmp_path)
    assert run.info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
    assert len(steps) == len(set(steps))


def test_parquet_readers_see_the_assignments_as_a_table(finished):
    folder, _ = finished
    table = pq.read_table(folder / "assignments")
    assert (table.num_rows, table.column_names) == (90, ["id", "cluster", "probability"])


def test_a_file_where_a_folder_is_meant(tmp_path: Path) -> None:
    stories, file = write_jsonl(tmp_path / "a.jsonl", records(60)), tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"file (is a file|cannot be made)"):
        train_run(tiny_run(stories), file)
    with pytest.raises(DataError, match="file is a file; expected a folder"):
        generate_corpus(file, GenerateConfig(rows=120, terms=200, nonzeros=20))
    with pytest.raises(ConfigError, match="file is a file; expected a run folder"):
        is_finished(file)
    assert file.read_text() == "mine"
