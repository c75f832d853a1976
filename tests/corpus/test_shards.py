"""The corpus folder: what is written is read back, and nothing damaged is read at all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
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
    clear_unfinished,
    conform,
    corpus_schema,
    validate_rows,
    write_manifest,
    write_shard,
)
from distclust.errors import ConfigError, DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus", [10, 0, 1, 14])


def rewrite_manifest(root: str | Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = Path(root) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def vouch(root: str | Path, number: int) -> None:
    """Make the manifest agree with a changed file, so that only its content can give it away."""
    path = Path(root) / f"shard-{number:05d}.arrow"
    content = path.read_bytes()

    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"][number]["sha256"] = hashlib.sha256(content).hexdigest()
        manifest["shards"][number]["bytes"] = len(content)

    rewrite_manifest(root, change)


def replace_shard(
    root: str | Path, number: int, table: pa.Table, options: Any = None, batches: int = 1
) -> None:
    path = Path(root) / f"shard-{number:05d}.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        for batch in table.to_batches(max_chunksize=max(1, len(table) // batches)):
            writer.write_batch(batch)
    vouch(root, number)


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


# Half-written folders ---------------------------------------------------------------------------------------


def test_a_folder_without_manifest_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no manifest.json, so it is no corpus"):
        Corpus.open(tmp_path)
    writer = ShardWriter(tmp_path / "c", "sparse", 50, rows_per_shard=4)
    writer.write(make_table(10))
    with pytest.raises(DataError, match="did not finish"):
        Corpus.open(tmp_path / "c")
    writer.finish()
    assert Corpus.open(tmp_path / "c").n_rows == 10


def test_what_an_unfinished_run_left_is_cleared_and_a_corpus_is_not(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path, "sparse", 50, rows_per_shard=2)
    first.write(make_table(10))
    (tmp_path / ".writing-abc").write_text("torn")
    (tmp_path / "notes.txt").write_text("mine")
    second = ShardWriter(tmp_path, "sparse", 50, rows_per_shard=16)
    second.write(make_table(10))
    second.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "notes.txt", "shard-00000.arrow"]
    with pytest.raises(DataError, match="already holds a corpus"):
        ShardWriter(tmp_path, "sparse", 50)
    with pytest.raises(DataError, match="already holds a corpus"):
        clear_unfinished(tmp_path)
    assert Corpus.open(tmp_path, verify=True).n_rows == 10


def test_no_documents_make_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        ShardWriter(tmp_path, "sparse", 50).finish()
    assert not (tmp_path / "manifest.json").exists()


@contextlib.contextmanager
def small_files_only() -> Iterator[None]:
    """Files of at most 2,000 bytes: what a full disk does to a writer, done by the kernel.

    Around the call alone: pytest's own report may go to a file that is longer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    table = make_table(200)
    refused = pytest.raises(DataError, match=r"cannot write .*shard-00000.arrow.*free some space")
    with refused, small_files_only():
        write_shard(tmp_path / "shard-00000.arrow", table, 50)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_fails_leaves_no_corpus(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c", [1] * 20)
    with pytest.raises(DataError, match=r"cannot write .*manifest.json"), small_files_only():
        write_manifest(tmp_path / "d", corpus.manifest)
    assert list((tmp_path / "d").iterdir()) == []


# Damage -----------------------------------------------------------------------------------------------------


def test_a_truncated_shard_is_named_at_once(corpus: Corpus) -> None:
    path = Path(corpus.root) / "shard-00003.arrow"
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(DataError, match=r"shard-00003.arrow has \d+ bytes; expected \d+.*truncated"):
        Corpus.open(corpus.root)
    with pytest.raises(DataError, match="shard-00003.arrow"):
        corpus.shard(3)


def test_a_missing_shard_is_named_at_once(corpus: Corpus) -> None:
    (Path(corpus.root) / "shard-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"shard-00001.arrow is missing"):
        Corpus.open(corpus.root)


def test_every_damaged_byte_is_found(corpus: Corpus) -> None:
    path = Path(corpus.root) / "shard-00000.arrow"
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        reopened = Corpus.open(corpus.root)
        with pytest.raises(DataError, match=r"shard-00000.arrow has sha256"):
            reopened.shard(0)
        assert reopened.shard(3).n_rows == 14
        with pytest.raises(DataError, match=r"shard-00000.arrow"):
            Corpus.open(corpus.root, verify=True)


def test_a_shard_changed_after_its_first_use_is_found(corpus: Corpus) -> None:
    corpus.shard(0)
    path = Path(corpus.root) / "shard-00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="sha256"):
        corpus.shard(0)


def with_column(table: pa.Table, name: str, column: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def marked_as_extension(table: pa.Table) -> pa.Table:
    mark = {"ARROW:extension:name": "evil.type", "ARROW:extension:metadata": "x"}
    return table.cast(pa.schema([f.with_metadata(mark) if f.name == "title" else f for f in table.schema]))


WRONG_CONTENT: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "wide indices": (lambda t: with_column(t, "indices", t["indices"].cast(pa.list_(pa.int64()))), "columns"),
    "large strings": (lambda t: with_column(t, "id", t["id"].cast(pa.large_string())), "columns"),
    "dictionary": (lambda t: with_column(t, "title", t["title"].dictionary_encode()), "columns"),
    "a column more": (lambda t: t.append_column("more", pa.array([1] * len(t))), "columns"),
    "a column less": (lambda t: t.drop_columns(["title"]), "columns"),
    "dense": (lambda t: make_table(10, 50, "dense"), "columns"),
    "known extension": (
        lambda t: with_column(t, "title", pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1"] * 10))),
        "extension",
    ),
    "unknown extension": (marked_as_extension, "extension types"),
    "fewer rows": (lambda t: t.slice(1), "has 9 rows; expected 10"),
    "unsorted": (
        lambda t: with_column(
            with_column(t, "indices", pa.array([[3, 1]] + [[]] * 9, pa.list_(pa.int32()))),
            "values",
            pa.array([[1.0, 1.0]] + [[]] * 9, pa.list_(pa.float32())),
        ),
        "unsorted index",
    ),
    "out of range": (
        lambda t: with_column(
            with_column(t, "indices", pa.array([[50]] + [[]] * 9, pa.list_(pa.int32()))),
            "values",
            pa.array([[1.0]] + [[]] * 9, pa.list_(pa.float32())),
        ),
        "has index 50; expected 0 to 49",
    ),
    "other values": (
        lambda t: with_column(
            with_column(t, "indices", pa.array([[5]] + [[]] * 9, pa.list_(pa.int32()))),
            "values",
            pa.array([[1.0]] + [[]] * 9, pa.list_(pa.float32())),
        ),
        "has 1 values; expected",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_CONTENT.values(), ids=WRONG_CONTENT.keys())
def test_content_is_checked_even_when_the_hash_is_right(
    corpus: Corpus, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    replace_shard(corpus.root, 0, change(make_table(10)))
    with pytest.raises(DataError, match=rf"shard-00000.arrow.*{message}"):
        Corpus.open(corpus.root).shard(0)


def test_compressed_and_divided_shards_are_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [500])
    replace_shard(tmp_path, 0, make_table(500), pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(DataError, match="is compressed"):
        Corpus.open(tmp_path).shard(0)
    replace_shard(tmp_path, 0, make_table(500), batches=2)
    with pytest.raises(DataError, match="2 record batches"):
        Corpus.open(tmp_path).shard(0)
    assert corpus.n_rows == 500


def test_a_file_that_is_no_arrow_file_is_refused(corpus: Corpus) -> None:
    (Path(corpus.root) / "shard-00000.arrow").write_bytes(b"not arrow at all" * 100)
    vouch(corpus.root, 0)
    with pytest.raises(DataError, match=r"shard-00000.arrow cannot be read"):
        Corpus.open(corpus.root).shard(0)


# Manifests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../shard.arrow",
        "/etc/passwd",
        "a/../../b",
        "s3://bucket/x",
        "C:\\x",
        "..",
        "",
        "a\\..\\b",
        "a\0b",
        7,
        None,
    ],
)
def test_paths_that_leave_the_folder_are_refused(corpus: Corpus, name: Any) -> None:
    rewrite_manifest(corpus.root, lambda m: m["shards"][0].update(file=name))
    with pytest.raises(DataError, match="manifest.json: the shard path .*leaves the corpus folder"):
        Corpus.open(corpus.root)


def test_links_out_of_the_folder_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    shard = Path(corpus.root) / "shard-00000.arrow"
    outside = tmp_path / "outside.arrow"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(DataError, match=r"shard-00000.arrow is a link out of the corpus folder"):
        Corpus.open(corpus.root)
    # a link to the whole folder is nobody's business
    shard.unlink()
    outside.rename(shard)
    link = tmp_path / "link"
    link.symlink_to(corpus.root)
    assert Corpus.open(link, verify=True).n_rows == 25


BAD_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda m: m.update(version=2), "format version 2; expected 1"),
    "kind": (lambda m: m.update(kind="ragged"), "kind is 'ragged'; expected one of sparse, dense"),
    "rows": (lambda m: m.update(n_rows=99), "n_rows is 99 but the shards add up to 25"),
    "nonzeros": (lambda m: m.update(n_nonzeros=1), "n_nonzeros is 1 but"),
    "features": (lambda m: m.update(n_features=0), "n_features is 0"),
    "text for a number": (lambda m: m.update(n_features="50"), "n_features is '50'"),
    "negative": (lambda m: m["shards"][0].update(rows=-1), "shard-00000.arrow: rows is -1"),
    "hash": (lambda m: m["shards"][0].update(sha256="abc"), "sha256 'abc'"),
    "twice": (lambda m: m["shards"][1].update(file="shard-00000.arrow"), "listed twice"),
    "scale": (lambda m: m.update(row_scale=float("nan")), "row_scale is nan"),
    "classes": (lambda m: m.update(classes=[1]), "class name is no text"),
    "unknown field": (lambda m: m.update(colour="red"), "unknown one .*colour"),
    "missing field": (lambda m: m.pop("n_rows"), "n_rows"),
    "no shards": (lambda m: m.pop("shards"), "shards"),
}


@pytest.mark.parametrize(("change", "message"), BAD_MANIFESTS.values(), ids=BAD_MANIFESTS.keys())
def test_impossible_manifests_are_refused(
    corpus: Corpus, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite_manifest(corpus.root, change)
    with pytest.raises(DataError, match=f"manifest.json.*{message}"):
        Corpus.open(corpus.root)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_torn_manifests_are_refused(corpus: Corpus, text: str) -> None:
    (Path(corpus.root) / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest.json"):
        Corpus.open(corpus.root)


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
