"""The corpus folder: what is written is read back, bad rows are refused, remote shards fetched once."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from corpora import dense_rows, make_corpus, make_table
from distclust.corpus import cache
from distclust.corpus.shards import (
    Corpus,
    Manifest,
    RowCounts,
    ShardConfig,
    ShardWriter,
    conform,
    corpus_schema,
    validate_rows,
    write_shard,
)
from distclust.errors import ConfigError, DataError

# Writing and reading back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("table_rows", [1, 7, 40])
def test_writer_and_reader_agree(tmp_path: Path, kind: str, table_rows: int) -> None:
    whole = make_table(40, 20, kind)
    writer = ShardWriter(tmp_path / "c", kind, 20, rows_per_shard=16)
    for start in range(0, 40, table_rows):
        writer.write(whole.slice(start, table_rows))
    manifest = writer.finish({"row_scale": 2.5, "source_fingerprint": "abc"})
    corpus = Corpus.open(tmp_path / "c", verify=True)
    assert corpus.manifest == manifest == Manifest.load(tmp_path / "c")
    assert corpus.shard_rows.tolist() == [16, 16, 8]
    assert (corpus.kind, corpus.n_rows, corpus.n_features) == (kind, 40, 20)
    assert manifest.row_scale == 2.5
    shards = [corpus.shard(i) for i in range(3)]
    for column, read in (("id", "ids"), ("labels", "labels"), ("title", "titles")):
        assert [v for s in shards for v in getattr(s, read)()] == whole.column(column).to_pylist()
    if kind == "dense":
        expected = np.array(whole.column("values").to_pylist(), np.float32)
        assert manifest.n_nonzeros == 800
    else:
        expected = np.zeros((40, 20), np.float32)
        lists = zip(whole.column("indices").to_pylist(), whole.column("values").to_pylist(), strict=True)
        for row, (indices, values) in enumerate(lists):
            expected[row, indices] = values
        assert manifest.n_nonzeros == np.count_nonzero(expected)
    np.testing.assert_array_equal(dense_rows(corpus), expected)


def test_counts_and_classes(tmp_path: Path) -> None:
    table = make_table(70)
    labels = table.column("labels").to_pylist()
    manifest = make_corpus(tmp_path, [30, 40]).manifest
    assert manifest.counts == {
        "documents": 70,
        "empty": 10,
        "unlabelled": sum(len(x) == 0 for x in labels),
        "multi_labelled": sum(len(x) > 1 for x in labels),
    }
    assert manifest.classes == ("class-0", "class-1", "class-2")
    # a label that only documents with several labels have is no class
    assert any("extra" in x for x in labels)
    total = RowCounts.of(table.slice(0, 30)) + RowCounts.of(table.slice(30))
    assert total.as_manifest() == {"counts": manifest.counts, "classes": manifest.classes}


def test_shards_are_mapped_without_a_copy(corpus: Corpus) -> None:
    before = pa.total_allocated_bytes()
    shard = corpus.shard(3)
    assert pa.total_allocated_bytes() == before
    for array, dtype in ((shard.offsets, np.int32), (shard.indices, np.int32), (shard.values, np.float32)):
        assert array is not None
        assert array.dtype == dtype
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_missing_columns_are_filled_in(tmp_path: Path) -> None:
    table = pa.table({"indices": [[0, 4], []], "values": [[1.0, 2.0], []]})  # int64 and float64
    writer = ShardWriter(tmp_path / "c", "sparse", 5)
    writer.write(table)
    writer.write(pa.RecordBatch.from_pydict({"indices": [[1]], "values": [[3.0]]}))
    writer.finish()
    shard = Corpus.open(tmp_path / "c").shard(0)
    assert shard.ids() == ["0", "1", "2"]
    assert shard.labels() == [[], [], []]
    assert shard.titles() == [None, None, None]
    assert shard.indices is not None
    assert shard.indices.tolist() == [0, 4, 1]


def test_large_lists_and_null_labels_are_converted() -> None:
    table = pa.table(
        {
            "id": pa.array(["a", "b"], pa.large_string()),
            "labels": pa.array([None, ["x"]], pa.large_list(pa.string())),
            "indices": pa.array([[0], [1]], pa.large_list(pa.uint16())),
            "values": pa.array([[1], [2]], pa.list_(pa.int64())),
        }
    )
    out = conform(table, "sparse", 2)
    assert out.schema == corpus_schema("sparse", 2)
    assert out.column("labels").to_pylist() == [[], ["x"]]


def test_write_shard_alone_is_what_the_writer_writes(tmp_path: Path) -> None:
    table = make_table(12)
    info = write_shard(tmp_path / "new" / "shard-00000.arrow", table, 50)
    writer = ShardWriter(tmp_path / "c", "sparse", 50)
    writer.write(table)
    assert writer.finish().shards == (info,)
    assert info.rows == 12
    assert info.bytes == (tmp_path / "new" / info.file).stat().st_size


def test_fingerprint_follows_the_data_alone(tmp_path: Path) -> None:
    one = make_corpus(tmp_path / "1").manifest
    assert make_corpus(tmp_path / "2").manifest.fingerprint == one.fingerprint
    assert make_corpus(tmp_path / "3", seed=1).manifest.fingerprint != one.fingerprint
    assert make_corpus(tmp_path / "4", n_features=51).manifest.fingerprint != one.fingerprint
    for change in ({"row_scale": 2.0}, {"vocabulary_fingerprint": "v"}, {"shards": one.shards[::-1]}):
        assert dataclasses.replace(one, **change).fingerprint != one.fingerprint
    assert dataclasses.replace(one, options={"a": 1}).fingerprint == one.fingerprint


def test_locate_and_read_file(corpus: Corpus) -> None:
    shards, places = corpus.locate(np.array([0, 9, 10, 11, 24]))
    assert shards.tolist() == [0, 0, 2, 3, 3]
    assert places.tolist() == [0, 9, 0, 0, 13]
    assert corpus.read_file("vocabulary.json") is None
    (Path(corpus.root) / "vocabulary.json").write_text("{}")
    assert corpus.read_file("vocabulary.json") == b"{}"


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_shard_config_is_checked(value: Any) -> None:
    with pytest.raises(ConfigError, match="rows_per_shard"):
        ShardConfig(rows_per_shard=value)


# Rows that are refused --------------------------------------------------------------------------------------


def sparse_table(indices: list[Any], values: list[Any], **columns: Any) -> pa.Table:
    ids = [str(i) for i in range(len(indices))]
    return pa.table({"id": ids, "indices": indices, "values": values, **columns})


BAD_ROWS = {
    "repeated": (sparse_table([[0], [3, 3]], [[1.0], [1.0, 2.0]]), r"row 1 .*repeated index 3"),
    "unsorted": (sparse_table([[], [4, 2]], [[], [1.0, 2.0]]), r"row 1 .*unsorted index 2 \(after 4\)"),
    "too large": (sparse_table([[0], [1, 5]], [[1.0], [1.0, 1.0]]), r"row 1 has index 5; expected 0 to 4"),
    "negative": (sparse_table([[-1]], [[1.0]]), r"row 0 has index -1"),
    "NaN": (sparse_table([[0], [0]], [[1.0], [float("nan")]]), r"row 1 has the value nan"),
    "infinite": (sparse_table([[0], [0]], [[1.0], [float("-inf")]]), r"row 1 has the value -inf"),
    "overflow": (sparse_table([[0]], [[1e300]]), r"row 0 has the value inf"),
    "unequal lengths": (sparse_table([[0], [1, 2]], [[1.0], [1.0]]), r"row 1 has 2 indices and 1 values"),
    "lengths that add up": (sparse_table([[0], [1, 2]], [[1.0, 1.0], [1.0]]), r"row 0 has 1 indices and 2"),
    "null row": (sparse_table([[0], None], [[1.0], [1.0]]), r"row 1 has no indices \(null\)"),
    "null index": (sparse_table([[None]], [[1.0]]), r"'indices' holds a null"),
    "null value": (sparse_table([[0]], [[None]]), r"'values' holds a null"),
    "text": (sparse_table([["a"]], [[1.0]]), r"'indices' is list<.*string>; expected list<.*int32>"),
    "fractions": (sparse_table([[0.0]], [[1.0]]), r"'indices' is list<.*double>"),
    "no list": (sparse_table([0], [[1.0]]), r"'indices' is int64"),
    "beyond 32 bits": (sparse_table([[1 << 40]], [[1.0]]), r"does not fit"),
    "null id": (sparse_table([[0]], [[1.0]]).set_column(0, "id", pa.array([None], pa.string())), "no id"),
    "null label": (sparse_table([[0]], [[1.0]], labels=[["a", None]]), r"'labels' holds a null"),
    "label no list": (sparse_table([[0]], [[1.0]], labels=["a"]), r"'labels' is string; expected list"),
    "no values": (pa.table({"id": ["a"], "indices": [[1]]}), r"no column 'values' \(columns: id, indices\)"),
}


@pytest.mark.parametrize(("table", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows_are_refused(tmp_path: Path, table: pa.Table, message: str) -> None:
    with pytest.raises(DataError, match=message):
        conform(table, "sparse", 5)
    path = tmp_path / "shard-00000.arrow"
    with pytest.raises(DataError, match=message):
        write_shard(path, table, 5)
    assert list(tmp_path.iterdir()) == []


def test_bad_dense_rows_are_refused() -> None:
    def dense(rows: list[Any], width: int = 2) -> pa.Table:
        ids = [str(i) for i in range(len(rows))]
        return pa.table({"id": ids, "values": pa.array(rows, pa.list_(pa.float64(), width))})

    with pytest.raises(DataError, match="row 1 has the value nan"):
        conform(dense([[0, 1], [1, float("nan")]]), "dense", 2)
    with pytest.raises(DataError, match=r"fixed_size_list<.*>\[3\]; expected"):
        conform(dense([[0, 1, 2]], 3), "dense", 2)
    with pytest.raises(DataError, match=r"row 1 has no values \(null\)"):
        conform(dense([[0, 1], None]), "dense", 2)
    with pytest.raises(DataError, match="holds a null"):
        conform(dense([[0, None]]), "dense", 2)
    with pytest.raises(DataError, match="expected a fixed-size list"):
        conform(pa.table({"id": ["a"], "values": [[1.0]]}), "dense", None)


def test_validate_rows_accepts_what_is_right() -> None:
    indices = np.array([3, 4, 0, 9, 9], np.int32)
    values = np.ones(5, np.float32)
    validate_rows(
        np.array([0, 0, 2, 2, 4, 5, 5]), indices, values, 10, "x"
    )  # rows start anywhere, empty ones
    validate_rows(np.array([0, 0, 0]), indices[:0], values[:0], 10, "x")
    validate_rows(np.array([0]), indices[:0], values[:0], 10, "x")
    with pytest.raises(DataError, match="offsets are damaged"):
        validate_rows(np.array([0, 3, 2, 5]), indices, values, 10, "x")
    with pytest.raises(DataError, match="5 indices and 4 values"):
        validate_rows(np.array([0, 5]), indices, values[:4], 10, "x")


# Remote shards ----------------------------------------------------------------------------------------------


def at(folder: Path) -> cache.CacheConfig:
    return cache.CacheConfig(folder=str(folder), backoff_s=0.01)


@pytest.fixture
def bucket() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    yield "memory://bucket/corpus"
    fs.rm("/bucket", recursive=True)


def test_remote_corpora_are_written_and_read(bucket: str, tmp_path: Path) -> None:
    local = make_corpus(tmp_path / "local", [10, 0, 5])
    remote = make_corpus(bucket, [10, 0, 5])
    assert remote.manifest == local.manifest
    cached = Corpus.open(bucket, cache_config=at(tmp_path / "cache"))
    np.testing.assert_array_equal(dense_rows(cached), dense_rows(local))
    assert cached.read_file("vocabulary.json") is None
    with pytest.raises(DataError, match="already holds a corpus"):
        ShardWriter(bucket, "sparse", 50)
    with pytest.raises(DataError, match="no folder memory://bucket/other"):
        Corpus.open("memory://bucket/other")


def test_each_remote_shard_is_fetched_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_corpus(bucket, [4, 4, 4])
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    corpus = Corpus.open(bucket)
    assert corpus._cache is not None
    for number in (2, 0, 2, 0):
        assert corpus.shard(number).n_rows == 4
    assert corpus._cache.fetched == ["shard-00002.arrow", "shard-00000.arrow"]
    again = Corpus.open(bucket)
    assert again._cache is not None
    again.shard(0)
    assert again._cache.fetched == []
    fsspec.filesystem("memory").rm("/bucket/corpus/shard-00000.arrow")
    assert again.shard(0).n_rows == 4


def test_processes_of_one_machine_fetch_a_shard_once(bucket: str, tmp_path: Path) -> None:
    manifest = make_corpus(bucket, [9] * 10).manifest
    caches = [cache.ShardCache(bucket, manifest.fingerprint, at(tmp_path)) for _ in range(6)]
    together = threading.Barrier(6)

    def fetch(one: cache.ShardCache) -> None:
        for info in manifest.shards:
            together.wait()
            one.open(info.file, info.bytes, info.sha256).close()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as if they ran at the same time
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(fetch, caches))
    finally:
        sys.setswitchinterval(interval)
    assert sorted(f for one in caches for f in one.fetched) == [info.file for info in manifest.shards]


def test_a_damaged_copy_is_fetched_again(
    bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = make_corpus(bucket, [6])
    corpus = Corpus.open(bucket, cache_config=at(tmp_path))
    corpus.shard(0)
    (copy,) = tmp_path.rglob("*.arrow")
    content = bytearray(copy.read_bytes())
    content[100] ^= 1
    copy.write_bytes(content)
    os.utime(copy, ns=(1, 1))
    assert corpus.shard(0).n_rows == 6
    assert "fetched again" in caplog.text
    os.truncate(copy, 10)
    assert corpus.shard(0).n_rows == 6


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_damaged_remote_shards_are_named_and_not_kept(bucket: str, tmp_path: Path, damage: str) -> None:
    make_corpus(bucket, [6])
    fs = fsspec.filesystem("memory")
    path = "/bucket/corpus/shard-00000.arrow"
    content = fs.cat_file(path)
    fs.rm(path)
    if damage != "missing":
        fs.pipe_file(path, content[:-1] + b"?" if damage == "changed" else content[:-1])
    corpus = Corpus.open(bucket, cache_config=at(tmp_path))
    expected = "is missing" if damage == "missing" else "expected"
    with pytest.raises(DataError, match=f"memory://bucket/corpus/shard-00000.arrow .*{expected}"):
        corpus.shard(0)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_unknown_protocols_are_a_data_error() -> None:
    with pytest.raises(DataError, match="nosuch://x"):
        Corpus.open("nosuch://x/corpus")
