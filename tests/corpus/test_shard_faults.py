"""Corpus folders half-written, damaged or forged: what is wrong is named, and nothing of it is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from corpora import make_corpus, make_table
from distclust.corpus.shards import Corpus, ShardWriter, clear_unfinished, write_manifest, write_shard
from distclust.errors import DataError


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
