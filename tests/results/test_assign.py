"""Every document's cluster: the same however the work is cut, whole or absent, gone on with after a loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from assigning import K, files_of, random_model, table_of
from distclust.corpus import readers
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import Corpus, ShardConfig
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import VocabularyConfig
from distclust.errors import CheckpointError, DataError
from distclust.results.assign import AssignConfig, assign_corpus, assign_documents
from distclust.results.assignment import MANIFEST, Assignment, partial_of
from stories import records, snapshot, write_jsonl

ALL = AssignConfig(all_probabilities=True)


# ---- what it gives


def test_ids_clusters_and_probabilities(texts, tmp_path):
    _, corpus, model = texts
    done = assign_corpus(model, corpus, tmp_path / "out", ALL)
    table = table_of(done)
    assert table.schema.types == [pa.string(), pa.int32(), pa.float32(), pa.list_(pa.float32(), K)]
    assert table["id"].to_pylist() == [f"s{i}" for i in range(70)]
    probabilities = np.stack(table["probabilities"].to_numpy(zero_copy_only=False))
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert (probabilities.argmax(1) == table["cluster"].to_numpy()).all()
    assert (probabilities.max(1) == table["probability"].to_numpy()).all()
    assert (done.clusters() == table["cluster"].to_numpy()).all()
    assert done.sizes.tolist() == np.bincount(done.clusters(), minlength=K).tolist()
    assert len(set(done.clusters())) > 2, "a model that gives one cluster to all tests nothing"
    assert (done.n_documents, len(done.files)) == (70, 9)


def test_null_and_empty_texts_are_kept_assigned_and_counted(texts, tmp_path):
    file, corpus, model = texts
    for done in (
        assign_corpus(model, corpus, tmp_path / "a"),
        assign_documents(model, files_of(file), tmp_path / "b"),
    ):
        assert (done.n_documents, done.manifest["empty"]) == (70, 3)
        assert np.isfinite(table_of(done)["probability"].to_numpy()).all()
        assert len(set(done.clusters()[3:6])) == 1


def test_new_documents_from_text_are_as_those_of_the_corpus(texts, tmp_path):
    file, corpus, model = texts
    whole = assign_corpus(model, corpus, tmp_path / "a", ALL)
    new = assign_documents(model, files_of(file), tmp_path / "b", ALL)
    assert table_of(new) == table_of(whole)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_cut_into_parts_changes_nothing(texts, tmp_path, rows):
    file, corpus, model = texts
    whole = table_of(assign_corpus(model, corpus, tmp_path / "a"))
    shards = ShardConfig(rows_per_shard=rows)
    prepare_local(files_of(file), VocabularyConfig(max_features=30), shards, tmp_path / "c")
    other = table_of(assign_corpus(model, tmp_path / "c", tmp_path / "b"))
    assert other.select(["id", "cluster"]) == whole.select(["id", "cluster"])
    # a row's place in a block may turn the last bit of its probability
    assert np.allclose(other["probability"].to_numpy(), whole["probability"].to_numpy(), rtol=1e-6)


def test_empty_shards_have_a_part(texts, tmp_path):
    from corpora import make_corpus

    corpus = make_corpus(tmp_path / "c", shard_rows=(3, 0, 2), n_features=20)
    done = assign_corpus(random_model(corpus, tmp_path / "m"), tmp_path / "c", tmp_path / "out", ALL)
    assert [pq.read_metadata(f).num_rows for f in done.files] == [3, 0, 2]
    assert pq.read_table(tmp_path / "out").num_rows == 5


@pytest.mark.parametrize("kind", ["weights", "counts", "dense"])
def test_documents_that_are_no_text(tmp_path, kind):
    rng = np.random.default_rng(0)
    rows = sparse.random(40, 25, 0.2, format="csr", random_state=rng)
    rows.data = np.ceil(rows.data * 5)
    ids = [f"d{i}" for i in range(40)]
    if kind == "dense":
        dense = rows.toarray().astype(np.float32)
        table = pa.table({"id": ids, "x": pa.FixedSizeListArray.from_arrays(pa.array(dense.reshape(-1)), 25)})
        source, vocabulary = files_of(tmp_path / "a.parquet", dense="x"), VocabularyConfig(scale=2.0)
    else:
        lists = {
            name: pa.ListArray.from_arrays(pa.array(rows.indptr.astype(np.int32)), pa.array(flat))
            for name, flat in (
                ("indices", rows.indices.astype(np.int32)),
                ("values", rows.data.astype(np.float32)),
            )
        }
        table = pa.table({"id": ids, **lists})
        source = files_of(tmp_path / "a.parquet", values_are=kind)
        vocabulary = VocabularyConfig(max_features=15, scale=2.0)
    pq.write_table(table, tmp_path / "a.parquet")
    prepare_local(source, vocabulary, ShardConfig(rows_per_shard=16), tmp_path / "c")
    model = random_model(Corpus.open(tmp_path / "c"), tmp_path / "m")
    whole = assign_corpus(model, tmp_path / "c", tmp_path / "a", ALL)
    new = assign_documents(model, source, tmp_path / "b", ALL)
    assert table_of(new) == table_of(whole)
    assert new.manifest["empty"] == whole.manifest["empty"]


def test_documents_without_ids_are_numbered_through(texts, tmp_path, monkeypatch):
    """Over several files and pieces whose lengths nobody knows before, and past rows that are left out."""
    _, _, model = texts
    monkeypatch.setattr(readers, "SPLIT_BYTES", 1000)
    rows = [{"text": r["text"], "good": i % 3 != 0} for i, r in enumerate(records(50))]
    for name, part in (("a", rows[:20]), ("b", rows[20:])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    source = SourceConfig(name="files", files=(str(tmp_path / "*.jsonl"),), where="good")
    done = assign_documents(model, source, tmp_path / "out")
    assert len(done.files) > 4
    assert table_of(done)["id"].to_pylist() == [str(i) for i in range(33)]


# ---- whole or absent


class Lost(Exception):
    pass


def lose_after(parts: int):
    def progress(done: int, total: int) -> None:
        if done == parts:
            raise Lost

    return progress


def test_an_interrupted_run_leaves_nothing_that_looks_whole_and_goes_on(texts, tmp_path):
    _, corpus, model = texts
    out = tmp_path / "out"
    with pytest.raises(Lost):
        assign_corpus(model, corpus, out, progress=lose_after(4))
    assert not out.exists()
    with pytest.raises(DataError, match="not finished"):
        Assignment.open(out)
    with pytest.raises(DataError, match="holds no assignments"):
        Assignment.open(partial_of(out))
    before = snapshot(partial_of(out))
    assert sum(name.endswith(".parquet") for name in before) == 4
    seen = []
    done = assign_corpus(model, corpus, out, progress=lambda *counts: seen.append(counts))
    assert seen == [(i, 9) for i in range(5, 10)]
    after = snapshot(out)
    assert all(after[name] == before[name] for name in before if name.endswith(".parquet"))
    assert not partial_of(out).exists()
    assert table_of(done) == table_of(assign_corpus(model, corpus, tmp_path / "other"))


def test_a_killed_process_goes_on_too(texts, tmp_path):
    _, corpus, model = texts
    out = tmp_path / "out"
    script = (
        "import os, sys\nfrom distclust.results.assign import assign_corpus\n"
        "assign_corpus(*sys.argv[1:], progress=lambda done, total: os.kill(os.getpid(), 9) if done == 3 "
        "else None)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(model), str(corpus), str(out)], timeout=120)
    assert killed.returncode == -9
    assert not out.exists()
    (partial_of(out) / ".writing-node-1-_manifest.json").write_text("half")
    done = assign_corpus(model, corpus, out)
    assert {p.name for p in out.iterdir()} == {MANIFEST, *(f.name for f in done.files)}


def test_the_same_again_does_nothing(texts, tmp_path):
    _, corpus, model = texts
    assign_corpus(model, corpus, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    assign_corpus(model, corpus, tmp_path / "out", progress=lose_after(1))
    assert snapshot(tmp_path / "out") == before


def test_parts_of_another_model_are_not_gone_on_with(texts, tmp_path):
    _, corpus, model = texts
    with pytest.raises(Lost):
        assign_corpus(model, corpus, tmp_path / "out", progress=lose_after(4))
    other = random_model(Corpus.open(corpus), tmp_path / "other", seed=1)
    done = assign_corpus(other, corpus, tmp_path / "out")
    assert table_of(done) == table_of(assign_corpus(other, corpus, tmp_path / "fresh"))
    assert table_of(done) != table_of(assign_corpus(model, corpus, tmp_path / "first"))


def test_a_damaged_part_is_made_again(texts, tmp_path):
    _, corpus, model = texts
    with pytest.raises(Lost):
        assign_corpus(model, corpus, tmp_path / "out", progress=lose_after(4))
    damaged = sorted(partial_of(tmp_path / "out").glob("*.parquet"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    done = assign_corpus(model, corpus, tmp_path / "out")
    assert done.n_documents == 70


@pytest.mark.parametrize("damage", ["part", "manifest", "missing", "short"])
def test_damage_to_finished_assignments_is_named(texts, tmp_path, damage):
    _, corpus, model = texts
    done = assign_corpus(model, corpus, tmp_path / "out")
    path = done.files[2]
    if damage == "part":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "missing":
        path.unlink()
    elif damage == "short":
        pq.write_table(pq.read_table(path).slice(1), path)
    else:
        path = tmp_path / "out" / MANIFEST
        path.write_text("{")
    with pytest.raises(DataError, match=path.name):
        Assignment.open(tmp_path / "out")


# ---- what it refuses


def test_other_assignments_are_not_overwritten(texts, tmp_path):
    _, corpus, model = texts
    assign_corpus(model, corpus, tmp_path / "out")
    other = random_model(Corpus.open(corpus), tmp_path / "other", seed=1)
    before = snapshot(tmp_path / "out")
    with pytest.raises(DataError, match="another model"):
        assign_corpus(other, corpus, tmp_path / "out")
    with pytest.raises(DataError, match="other columns"):
        assign_corpus(model, corpus, tmp_path / "out", ALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(DataError, match="holds no assignments"):
        assign_corpus(model, corpus, tmp_path / "mine")
    assert snapshot(tmp_path / "out") == before
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "empty").mkdir()
    assert assign_corpus(model, corpus, tmp_path / "empty").n_documents == 70


def test_a_corpus_of_another_vocabulary(texts, tmp_path):
    file, _, model = texts
    options = VocabularyConfig(max_features=30, sublinear_tf=True)
    prepare_local(files_of(file), options, ShardConfig(), tmp_path / "c")
    with pytest.raises(DataError, match="another vocabulary"):
        assign_corpus(model, tmp_path / "c", tmp_path / "out")
    prepare_local(files_of(file), VocabularyConfig(max_features=20), ShardConfig(), tmp_path / "d")
    with pytest.raises(DataError, match="number of features"):
        assign_corpus(model, tmp_path / "d", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_documents_of_another_kind(texts, tmp_path):
    _, _, model = texts
    pq.write_table(pa.table({"indices": [[0, 1]], "values": [[1.0, 2.0]]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the documents are sparse, the model was trained on text"):
        assign_documents(model, files_of(tmp_path / "a.parquet"), tmp_path / "out")


@pytest.mark.parametrize("across", [False, True])
def test_repeated_ids_are_refused_before_any_work(texts, tmp_path, across):
    _, _, model = texts
    rows = records(30)
    rows[22]["id"] = rows[3]["id"]
    write_jsonl(tmp_path / "a.jsonl", rows[: 20 if across else 30])
    write_jsonl(tmp_path / "b.jsonl", rows[20:] if across else records(40)[30:])
    source = SourceConfig(name="files", files=(str(tmp_path / "*.jsonl"),))
    where = r"a\.jsonl and .*b\.jsonl" if across else r"a\.jsonl\)"
    with pytest.raises(DataError, match=f"'s3' appears more than once.*{where}"):
        assign_documents(model, source, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"id": "a", "text": "x"}, {"id": None, "text": "y"}],
            "row 1 has no id",
        ),
        ([{"id": "a", "text": "x", "good": False}], "no rows that are taken"),
        ([{"id": "a", "body": "x"}], "columns"),
    ],
)
def test_documents_that_cannot_be_used(texts, tmp_path, rows, said):
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    where = "good" if "good" in rows[0] else None
    with pytest.raises(DataError, match=said):
        assign_documents(texts[2], files_of(file, where=where), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_damaged_shard_is_named_and_what_was_done_stays(texts, tmp_path):
    file, _, model = texts
    prepare_local(
        files_of(file), VocabularyConfig(max_features=30), ShardConfig(rows_per_shard=8), tmp_path / "c"
    )
    shard = tmp_path / "c" / "shard-00005.arrow"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00005\.arrow"):
        assign_corpus(model, tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(list(partial_of(tmp_path / "out").glob("*.parquet"))) == 5


def test_a_damaged_model_is_named(texts, tmp_path):
    _, corpus, _ = texts
    model = random_model(Corpus.open(corpus), tmp_path / "m")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        assign_corpus(model, corpus, tmp_path / "out")


def test_a_folder_that_cannot_be_written(texts, tmp_path):
    _, corpus, model = texts
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--out"):
        assign_corpus(model, corpus, tmp_path / "file" / "out")


@pytest.mark.parametrize("killed", [False, True])
def test_a_disk_that_is_full_or_a_death_while_writing(texts, tmp_path, killed):
    """It is named, what was done stays, and nothing half-written looks like a part."""
    _, corpus, model = texts
    script = """
import resource, signal, sys
from distclust.results.assign import assign_corpus
signal.signal(signal.SIGXFSZ, signal.SIG_DFL if sys.argv.pop() == "True" else signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
def shrink(done, total):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    assign_corpus(*sys.argv[1:], progress=shrink)
except Exception as error:
    print(type(error).__name__, error)
"""
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", script, str(model), str(corpus), str(out), str(killed)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    if killed:
        assert done.returncode == -signal.SIGXFSZ
    else:
        assert done.stdout.startswith("DataError")
        assert "File too large" in done.stdout
    names = {p.name for p in partial_of(out).iterdir() if not p.name.startswith(".writing-")}
    assert names == {"_plan.json", "part-00000.parquet"}
    assert assign_corpus(model, corpus, out).n_documents == 70
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]


# ---- by Ray Data


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(texts, tmp_path, workers):
    file, corpus, model = texts
    whole = table_of(assign_corpus(model, corpus, tmp_path / "a", ALL))
    config = AssignConfig(workers=workers, all_probabilities=True)
    assert table_of(assign_corpus(model, corpus, tmp_path / "b", config)) == whole
    assert table_of(assign_documents(model, files_of(file), tmp_path / "c", config)) == whole


@pytest.mark.slow
def test_errors_of_a_worker_are_those_of_a_loop(texts, tmp_path):
    file, _, model = texts
    prepare_local(
        files_of(file), VocabularyConfig(max_features=30), ShardConfig(rows_per_shard=8), tmp_path / "c"
    )
    shard = tmp_path / "c" / "shard-00005.arrow"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00005\.arrow"):
        assign_corpus(model, tmp_path / "c", tmp_path / "out", AssignConfig(workers=2))
    assert not (tmp_path / "out").exists()


def test_the_manifest_says_what_it_was_made_from(texts, tmp_path):
    _, corpus, model = texts
    assign_corpus(model, corpus, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["data"] == Corpus.open(corpus).manifest.fingerprint
    assert len(manifest["model"]) == 64
    assert os.listdir(tmp_path) == ["out"]


def workers_below(root: int) -> list[int]:
    """The processes that do tasks of this very process' Ray."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def below(pid: int) -> bool:
        return pid == root or (pid in parents and below(parents[pid]))

    return [int(pid) for pid, _, what in rows if what.startswith("ray::Map(") and below(int(pid))]


@pytest.mark.slow
def test_the_parts_of_a_lost_worker_are_made_again(texts, tmp_path):
    _, corpus, model = texts
    killed = []

    def kill(done: int, total: int) -> None:
        if not killed:  # between two tasks there may be none
            for pid in workers_below(os.getpid()):
                os.kill(pid, 9)
                killed.append(pid)

    config = AssignConfig(workers=1)
    done = assign_corpus(model, corpus, tmp_path / "out", config, progress=kill)
    assert killed
    assert table_of(done) == table_of(assign_corpus(model, corpus, tmp_path / "other"))
