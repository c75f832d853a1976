"""New documents whose columns change on the way, hold nothing, or are not needed."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assigning import files_of, random_model, table_of
from corpora import make_corpus
from distclust.config import resolve
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import Corpus, ShardConfig
from distclust.corpus.sources import open_source
from distclust.corpus.vocabulary import VocabularyConfig
from distclust.errors import DataError
from distclust.results import blocks
from distclust.results.assign import AssignConfig, assign_corpus, assign_documents
from distclust.results.assignment import Assignment
from distclust.results.predict import Predictor
from distclust.run import train_run
from stories import records, write_jsonl


def test_where_may_be_missing_for_a_whole_block(texts, tmp_path):
    rows = [{"id": f"d{i}", "text": "wheat corn bank"} for i in range(5000)]
    rows[:2100] = [row | {"keep": True} for row in rows[:2100]]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    done = assign_documents(texts[2], files_of(file, where="keep"), tmp_path / "out")
    assert done.n_documents == 2100


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ({"keep": "yes"}, "column 'keep' holds string; expected true or false"),
        ({"id": {"a": 1}}, "column 'id' holds struct"),
        ({"id": None}, "row 0 has no id"),
    ],
)
def test_a_column_that_changes_late(texts, tmp_path, late, said):
    rows = [{"id": f"d{i}", "text": "wheat corn bank", "keep": True} for i in range(2048)]
    file = write_jsonl(tmp_path / "a.jsonl", [*rows, *(row | late for row in rows[:20])])
    with pytest.raises(DataError, match=rf"a\.jsonl, counting from row 2048: {said}"):
        assign_documents(texts[2], files_of(file, where="keep"), tmp_path / "out")


def test_a_dictionary_of_ids_that_holds_a_null(texts, tmp_path):
    ids = pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array(["x", None]))
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        table = pa.table({"id": ids, "text": ["wheat", "corn"]})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    source = files_of(tmp_path / "a.arrow")
    for refusing in (
        lambda: assign_documents(texts[2], source, tmp_path / "out"),
        lambda: prepare_local(source, None, ShardConfig(), tmp_path / "c"),
    ):
        with pytest.raises(DataError, match=r"a\.arrow, counting from row 0: row 1 has no id"):
            refusing()


# ---- labels and titles, which decide nothing


@pytest.mark.parametrize("name", ["label", "title", "topic"])
@pytest.mark.parametrize("kind", ["no label", "structs", "missing"])
def test_columns_that_no_cluster_depends_on(texts, tmp_path, name, kind):
    rows = records(20)
    plain = pa.table({"id": [row["id"] for row in rows], "text": [row["text"] for row in rows]})
    odd = {"no label": [-1, *range(19)], "structs": [{"a": 1}] * 20}
    table = plain if kind == "missing" else plain.append_column(name, pa.array(odd[kind]))
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(plain, tmp_path / "b.parquet")
    options = {"title": name} if name == "title" else {"label": name}
    source = files_of(tmp_path / "a.parquet", **options)
    found = assign_documents(texts[2], source, tmp_path / "out")
    assert table_of(found) == table_of(
        assign_documents(texts[2], files_of(tmp_path / "b.parquet"), tmp_path / "b")
    )
    with pytest.raises(DataError, match="label|title|topic"):
        prepare_local(source, None, ShardConfig(), tmp_path / "c")


def test_unread_labels_leave_the_fingerprint(tmp_path):
    """So that assignments of the same files stay those that they were."""
    source = files_of(write_jsonl(tmp_path / "a.jsonl", records(5)))
    assert open_source(source, labels=False).fingerprint == open_source(source).fingerprint
    assert open_source(source, labels=False).layout.columns == ["text", "id"]


# ---- numbers in place of ids


@pytest.mark.parametrize("named", [False, True])
def test_numbers_among_chosen_documents_are_warned_of(tmp_path, caplog, named):
    rows = [row | {"keep": i % 2 == 1} for i, row in enumerate(records(6))]
    if not named:
        rows = [{name: value for name, value in row.items() if name != "id"} for row in rows]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        prepare_local(files_of(file, where="keep"), None, ShardConfig(), tmp_path / "c")
    assert Corpus.open(tmp_path / "c").shard(0).ids() == (["s1", "s3", "s5"] if named else ["0", "1", "2"])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (0 if named else 1)
    assert named or "numbered from 0 among those where 'keep' is true" in told[0]


# ---- the folder of the assignments


@pytest.mark.parametrize("absolute", [False, True])
def test_the_current_folder_is_no_place_for_assignments(texts, tmp_path, monkeypatch, absolute):
    """Its place is taken by the finished one: the shell would stand in a folder that is gone."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    out = tmp_path / "here" if absolute else Path(".")
    with pytest.raises(DataError, match="the folder that the command was given in; expected .* with --out"):
        assign_corpus(texts[2], texts[1], out)
    with pytest.raises(DataError, match="holds no assignments"):
        Assignment.open(out)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_finished_assignments_are_opened_from_inside(texts, tmp_path, monkeypatch):
    assign_corpus(texts[2], texts[1], tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    assert assign_corpus(texts[2], texts[1], ".").n_documents == 70
    with pytest.raises(DataError, match="the folder that the command was given in"):
        assign_corpus(texts[2], texts[1], ".", AssignConfig(all_probabilities=True, replace=True))
    assert Assignment.open(".").n_documents == 70


# ---- rows that the model refuses


@pytest.mark.parametrize("at", [0, 13, 39])
@pytest.mark.parametrize("kind", ["dense", "weights"])
def test_a_document_whose_row_overflows_is_named(tmp_path, at, kind):
    """Finite in its file, and no more so with the row scale of the model."""
    rows = np.random.default_rng(0).random((40, 6), np.float32)
    sound = columns_of(rows, kind)
    pq.write_table(sound, tmp_path / "a.parquet")
    source = files_of(tmp_path / "a.parquet")
    prepare_local(source, VocabularyConfig(scale=1e3), ShardConfig(), tmp_path / "c")
    model = random_model(Corpus.open(tmp_path / "c"), tmp_path / "m")
    rows[at:, 2] = 1e38
    pq.write_table(columns_of(rows, kind), tmp_path / "b.parquet")
    said = rf"b\.parquet, the document 'd{at}': a row holds NaN or infinity"
    with pytest.raises(DataError, match=said), pytest.warns(RuntimeWarning, match="overflow"):
        assign_documents(model, files_of(tmp_path / "b.parquet"), tmp_path / "out")


def columns_of(rows, kind):
    n, width = rows.shape
    ids = [f"d{i}" for i in range(n)]
    if kind == "dense":
        return pa.table(
            {"id": ids, "x": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), width)}
        )
    return pa.table({"id": ids, "indices": [list(range(width))] * n, "values": list(rows)})


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_document_of_a_corpus_is_named_with_its_shard(tmp_path, monkeypatch, kind):
    corpus = make_corpus(tmp_path / "c", (10, 10, 10), kind=kind)
    model = random_model(corpus, tmp_path / "m")
    monkeypatch.setattr(blocks, "_ROWS", 4)  # the document is in the second block of its shard
    name = "predict_dense" if kind == "dense" else "predict_rows"
    usual, shard = getattr(Predictor, name), corpus.shard(1)
    values = shard.dense[7] if kind == "dense" else shard.values[shard.offsets[7] : shard.offsets[8]]
    assert len(values)

    def predict(self, *arrays):
        if np.isin(values, arrays[-1]).all():
            raise DataError("row 3 of those given has no finite score; expected one")
        return usual(self, *arrays)

    monkeypatch.setattr(Predictor, name, predict)
    said = r"shard-00001\.arrow, the document 'doc-17': row 3 of those given has no finite score"
    with pytest.raises(DataError, match=said):
        assign_corpus(model, tmp_path / "c", tmp_path / "out")


def test_images_of_another_shape_are_refused(tmp_path):
    """Seven by eleven pixels are as many as eleven by seven, in other places."""
    images = np.random.default_rng(0).integers(0, 256, (40, 7, 11)).astype(np.uint8)
    for name, x in (("a", images), ("b", images.transpose(0, 2, 1)), ("flat", images.reshape(40, 77))):
        np.savez(tmp_path / f"{name}.npz", x=x)
        prepare_local(files_of(tmp_path / f"{name}.npz"), VocabularyConfig(), ShardConfig(), tmp_path / name)
    source = {"name": "files", "files": [str(tmp_path / "a.npz")]}
    config = resolve({"method": "dmm", "clusters": 3, "cluster": {"workers": 0}, "source": source})
    train_run(config, tmp_path / "run", corpus_root=tmp_path / "a")
    model = tmp_path / "run" / "model"
    said = r"images of \[1, 11, 7\] .*trained on images of \[1, 7, 11\]"
    with pytest.raises(DataError, match=said):
        assign_documents(model, files_of(tmp_path / "b.npz"), tmp_path / "out")
    with pytest.raises(DataError, match=said):
        assign_corpus(model, tmp_path / "b", tmp_path / "out")
    same = assign_documents(model, files_of(tmp_path / "a.npz"), tmp_path / "same")
    flat = assign_documents(model, files_of(tmp_path / "flat.npz"), tmp_path / "flat-out")
    # no shape is known: taken as they are
    assert table_of(same)["cluster"] == table_of(flat)["cluster"]
