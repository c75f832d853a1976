"""Sources: every format and every named set gives the same columns, in order, however it is cut."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from distclust.corpus import named, readers, sources
from distclust.corpus.sources import SourceConfig, open_source
from distclust.errors import DataError

DATA = os.environ.get("DISTCLUST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="DISTCLUST_DATA is not set")


def read_all(config: SourceConfig) -> pa.Table:
    source = open_source(config)
    tables = []
    for split in source.splits:
        for table in source.read_split(split):
            assert 0 < len(table) <= readers.BLOCK_ROWS
            tables.append(table)
    return pa.concat_tables(tables).combine_chunks()


def files(*paths: object, **options: Any) -> SourceConfig:
    return SourceConfig(name="files", files=tuple(map(str, paths)), **options)


def write(path: Path, table: pa.Table) -> None:
    kind = path.name.split(".", 1)[1]
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=7)
    elif kind == "csv":
        pa.csv.write_csv(table, path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()) + "\n\n")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in table.to_pylist()).encode()))
    elif kind == "stream.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SPLIT_ROWS", 5)
    monkeypatch.setattr(readers, "BLOCK_ROWS", 3)
    monkeypatch.setattr(readers, "SPLIT_BYTES", 150)


N = 23
TEXT = pa.table(
    {
        "key": [f"d{i}" for i in range(N)],
        "text": [f'line "{i}"\nand, a second é\u2028line' if i % 5 else None for i in range(N)],
        "label": [None if i % 4 == 0 else f"c{i % 3}" for i in range(N)],
        "keep": [i % 2 == 0 for i in range(N)],
    }
)
SPARSE = pa.table(
    {
        "id": pa.array(range(100, 100 + N)),
        "indices": pa.array([list(range(0, i % 6 * 2, 2)) for i in range(N)], pa.list_(pa.int64())),
        "values": pa.array([[float(j * i) for j in range(i % 6)] for i in range(N)], pa.list_(pa.float64())),
        "topics": pa.array([["a", "b"][: i % 3] for i in range(N)], pa.list_(pa.string())),
    }
)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "jsonl.gz", "csv", "arrow", "stream.arrow"])
@pytest.mark.parametrize("limit", [None, 1, 10, 15, 100])
def test_text_in_every_format(ending: str, limit: int | None, tmp_path: Path) -> None:
    write(tmp_path / f"t.{ending}", TEXT)
    config = files(tmp_path / f"t.{ending}", id="key", limit=limit)
    found = read_all(config)
    wanted = TEXT.slice(0, limit)
    assert found["id"].to_pylist() == wanted["key"].to_pylist()
    assert found["text"].to_pylist() == [t or "" for t in wanted["text"].to_pylist()]
    assert found["labels"].to_pylist() == [[] if x is None else [x] for x in wanted["label"].to_pylist()]
    assert found["title"].to_pylist() == [f'line "{i}"' if i % 5 else None for i in range(len(wanted))]
    source = open_source(config)
    if limit is not None or ending not in ("jsonl", "jsonl.gz", "csv"):
        assert source.n_documents == len(wanted)
    if limit is None and ending not in ("csv", "jsonl.gz"):
        assert len(source.splits) > 2


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "arrow"])
def test_sparse_in_every_format(ending: str, tmp_path: Path) -> None:
    write(tmp_path / f"t.{ending}", SPARSE)
    found = read_all(files(tmp_path / f"t.{ending}", label="topics"))
    assert found["id"].to_pylist() == [str(100 + i) for i in range(N)]
    assert found["labels"].to_pylist() == SPARSE["topics"].to_pylist()
    assert found["indices"].type == pa.list_(pa.int32())
    assert found["values"].type == pa.list_(pa.float32())
    wanted = [
        {j: v for j, v in zip(a, b, strict=True) if v}
        for a, b in zip(SPARSE["indices"].to_pylist(), SPARSE["values"].to_pylist(), strict=True)
    ]
    rows = zip(found["indices"].to_pylist(), found["values"].to_pylist(), strict=True)
    assert [dict(zip(a, b, strict=True)) for a, b in rows] == wanted, "explicit zeros go, all else stays"


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "arrow"])
def test_dense_in_every_format(ending: str, tmp_path: Path) -> None:
    rows = np.arange(N * 4, dtype=np.float64).reshape(N, 4) / 8
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 4)
    write(tmp_path / f"t.{ending}", pa.table({"vector": column, "label": pa.array(np.arange(N) % 3)}))
    found = read_all(files(tmp_path / f"t.{ending}", dense="vector"))
    assert found["values"].type == pa.list_(pa.float32(), 4)
    np.testing.assert_array_equal(np.array(found["values"].to_pylist()), rows)
    assert found["labels"].to_pylist() == [[str(i % 3)] for i in range(N)]
    assert set(found["id"].to_pylist()) == {""}
    assert found["title"].null_count == N


@pytest.mark.usefixtures("small_pieces")
def test_numpy_archives(tmp_path: Path) -> None:
    matrix = sparse.random(N, 30, density=0.2, format="csr", random_state=3, dtype=np.float32)
    sparse.save_npz(tmp_path / "s.npz", matrix)
    source = open_source(files(tmp_path / "s.npz"))
    assert (source.kind, source.layout.n_features, source.n_documents) == ("sparse", 30, N)
    found = read_all(files(tmp_path / "s.npz"))
    assert np.concatenate(found["values"].to_pylist()).tolist() == matrix.data.tolist()
    assert source.image_shape is None
    x, y = np.random.default_rng(0).integers(0, 9, (N, 3, 2)).astype(np.uint8), np.arange(N) % 4
    np.savez_compressed(tmp_path / "d.npz", x=x, y=y)
    found = read_all(files(tmp_path / "d.npz", limit=20))
    np.testing.assert_array_equal(np.array(found["values"].to_pylist()), x.reshape(N, 6)[:20])
    assert found["labels"].to_pylist() == [[str(label)] for label in y[:20]]
    assert open_source(files(tmp_path / "d.npz")).image_shape == (1, 3, 2)
    np.savez(tmp_path / "o.npz", x=np.array([{}], dtype=object))  # would need unpickling
    with pytest.raises(DataError, match="cannot be read as npz"):
        open_source(files(tmp_path / "o.npz"))


def test_colour_images_become_rows_of_channels_lines_and_columns(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (N, 4, 5, 3)).astype(np.uint8)
    np.savez(tmp_path / "c.npz", x=x)
    source = open_source(files(tmp_path / "c.npz"))
    assert source.image_shape == (3, 4, 5)
    rows = np.array(read_all(files(tmp_path / "c.npz"))["values"].to_pylist())
    for c, h, w in [(0, 0, 0), (0, 0, 4), (1, 2, 3), (2, 3, 4)]:
        np.testing.assert_array_equal(rows[:, (c * 4 + h) * 5 + w], x[:, h, w, c])
    in_file_order = sources._fingerprint([str(tmp_path / "c.npz")], source.layout, None, None)
    assert source.fingerprint != in_file_order, "a corpus of channels last is told from one of channels first"
    np.savez(tmp_path / "f.npz", x=np.moveaxis(x, 3, 1))
    with pytest.raises(DataError, match=r"channels first; expected \(n, height, width, channels\)"):
        open_source(files(tmp_path / "f.npz"))
    np.savez(tmp_path / "g.npz", x=x[..., 0].reshape(N, 5, 4))
    np.savez(tmp_path / "h.npz", x=x[..., 0])
    with pytest.raises(DataError, match=r"images of shape 1,4,5 and .* of 1,5,4"):
        open_source(files(tmp_path / "g.npz", tmp_path / "h.npz"))


def test_many_files_and_patterns_in_order_of_name(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        write(tmp_path / f"part-{i}.parquet", TEXT.slice(i * 7, 7))
    write(tmp_path / "other.parquet", TEXT.slice(21))
    found = read_all(files(tmp_path / "part-*.parquet", tmp_path / "other.parquet", id="key"))
    assert found["id"].to_pylist() == [f"d{i}" for i in range(N)]
    found = read_all(files(tmp_path / "part-*.parquet", tmp_path / "other.parquet", id="key", limit=16))
    assert found["id"].to_pylist() == [f"d{i}" for i in range(16)]
    url = f"file://{tmp_path}/part-*.parquet"
    assert read_all(files(url, id="key"))["id"].to_pylist() == [f"d{i}" for i in range(21)]


def test_columns_joined_and_rows_chosen(tmp_path: Path) -> None:
    table = pa.table({"a": ["x", None, "z"], "b": ["1", "2", None], "keep": [True, False, None]})
    write(tmp_path / "t.parquet", table)
    assert read_all(files(tmp_path / "t.parquet", text="a+b"))["text"].to_pylist() == ["x\n1", "2", "z"]
    assert read_all(files(tmp_path / "t.parquet", text="a", where="keep"))["text"].to_pylist() == ["x"]


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        (pa.array([1, None, 3]), [["1"], [], ["3"]]),
        (pa.array([1.0, float("nan"), 2.5]), [["1"], [], ["2.5"]]),
        (pa.array(["", "b", None]), [[], ["b"], []]),
        (pa.array([True, None, False]), [["true"], [], ["false"]]),
        (pa.array([[1, 2], None, []]), [["1", "2"], [], []]),
        (pa.array([["a", None, ""], ["b"], []]), [["a"], ["b"], []]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), [["a"], ["b"], ["a"]]),
        (pa.nulls(3), [[], [], []]),
    ],
)
def test_labels(column: pa.Array, wanted: list[list[str]], tmp_path: Path) -> None:
    write(tmp_path / "t.arrow", pa.table({"text": ["x", "y", "z"], "label": column}))
    found = read_all(files(tmp_path / "t.arrow"))
    assert found["labels"].to_pylist() == wanted
    assert found["labels"].type == pa.list_(pa.string())


def test_titles_are_one_short_line(tmp_path: Path) -> None:
    table = pa.table(
        {"text": ["\n  first\tline \nsecond", "x" * 500, "  "], "name": [" A\n title ", "", None]}
    )
    write(tmp_path / "t.arrow", table)
    assert read_all(files(tmp_path / "t.arrow"))["title"].to_pylist() == ["first line", "x" * 120, None]
    assert read_all(files(tmp_path / "t.arrow", title="name"))["title"].to_pylist() == ["A title", None, None]


def test_the_fingerprint_is_of_content_and_reading_not_of_place(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "t.parquet", TEXT)
    one = open_source(files(tmp_path / "a/t.parquet")).fingerprint
    assert open_source(files(tmp_path / "b/t.parquet")).fingerprint == one
    assert open_source(files(tmp_path / "a/t.parquet", limit=5)).fingerprint != one
    assert open_source(files(tmp_path / "a/t.parquet", id="key")).fingerprint != one
    changed = TEXT.set_column(1, "text", pa.array([f"other {i}" for i in range(N)]))
    write(tmp_path / "b/t.parquet", changed)
    assert open_source(files(tmp_path / "b/t.parquet")).fingerprint != one


def test_a_source_stays_the_one_it_was() -> None:
    """Corpora prepared earlier carry this; a change that is meant is a new fingerprint here."""
    found = open_source(SourceConfig()).fingerprint
    assert found == "addfb38d347f1895c99de01a12c3ff31cdcee877e8b9f75cbfc44ceaccd5bc44"


# ---- named sets


def test_the_builtin_corpus() -> None:
    found = read_all(SourceConfig())
    assert len(found) == 7160
    assert len(set(found["id"].to_pylist())) == 7160
    labels = found["labels"].to_pylist()
    assert {len(label) for label in labels} == {1}
    assert len({label[0] for label in labels}) == 9
    assert (
        found["text"][0]
        .as_py()
        .startswith("CHAMPION PRODUCTS <CH> APPROVES STOCK SPLIT\nChampion Products Inc")
    )
    notice = (Path(named.__file__).parent / "builtin" / "NOTICE").read_text()
    assert "Reuters Ltd" in notice
    assert "research purposes" in notice


@needs_data
@pytest.mark.parametrize(
    ("name", "label", "rows", "unlabelled", "several", "classes"),
    [
        ("20news", None, 18846, 0, 0, 20),
        ("mnist", None, 70000, 0, 0, 10),
        ("reuters", None, 21578, 10211, 21578 - 10211 - 9494, None),
        ("rcv1-part", None, 27613, 0, 4185, 4),
        ("rcv1-part", "topics", 27613, None, None, None),
        ("arxiv", None, 40000, 0, 0, None),
        ("arxiv", "primary", 40000, 0, 0, None),
    ],
)
def test_named_sets(
    name: str, label: str | None, rows: int, unlabelled: int | None, several: int | None, classes: int | None
) -> None:
    limit = 40000 if name == "arxiv" else None
    source = open_source(SourceConfig(name=name, label=label, limit=limit))
    lengths: list[int] = []
    singles: set[str] = set()
    for split in source.splits:
        for table in source.read_split(split):
            labels = table["labels"].to_pylist()
            lengths += map(len, labels)
            singles |= {label[0] for label in labels if len(label) == 1}
    assert len(lengths) == source.n_documents == rows
    if unlabelled is not None:
        assert (lengths.count(0), sum(n > 1 for n in lengths)) == (unlabelled, several)
    if classes is not None:
        assert len(singles) == classes


@needs_data
def test_20news_titles_and_mnist_range() -> None:
    assert (
        read_all(SourceConfig(name="20news", limit=5))["title"][0].as_py()
        == "Alt.Atheism FAQ: Atheist Resources"
    )
    mnist = read_all(SourceConfig(name="mnist", limit=60_010))
    values = mnist["values"].combine_chunks().flatten().to_numpy().reshape(-1, 784)
    assert (values.min(), values.max()) == (0.0, 1.0)
    archive = np.load(Path(str(DATA)) / "mnist" / "mnist.npz")
    for rows, part in ((slice(0, 60_000, 997), "train"), (slice(60_000, 60_010), "test")):
        take = rows if part == "train" else slice(0, 10)
        pixels = archive[f"x_{part}"][take].reshape(-1, 784).astype(np.float32)
        np.testing.assert_array_equal(values[rows], pixels / np.float32(255))
        labels = [label for (label,) in mnist["labels"].to_pylist()[rows]]
        assert labels == archive[f"y_{part}"][take].astype(str).tolist()
    assert open_source(SourceConfig(name="mnist")).image_shape == (1, 28, 28)


@needs_data
def test_rcv1_part_has_weights_or_counts() -> None:
    weights = read_all(SourceConfig(name="rcv1-part", limit=100))
    counts = read_all(SourceConfig(name="rcv1-part", limit=100, values_are="counts"))
    assert weights["indices"].to_pylist() == counts["indices"].to_pylist()
    np.testing.assert_allclose([np.linalg.norm(row) for row in weights["values"].to_pylist()], 1.0, atol=1e-3)
    assert all(value == int(value) >= 1 for row in counts["values"].to_pylist() for value in row)


def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No local copies, and a proxy that refuses at once."""
    monkeypatch.delenv("DISTCLUST_DATA", raising=False)
    monkeypatch.setenv("DISTCLUST_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["20news", "mnist", "rcv1"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_set_that_cannot_be_fetched(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(
        DataError, match=rf"{name}.*could not be fetched.*expected \$DISTCLUST_DATA/.*copy"
    ) as caught:
        open_source(SourceConfig(name=name))
    assert "DISTCLUST_DATA is not set" in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.parquet"))
    assert not list((tmp_path / "cache").rglob("part-*"))


def test_a_fetch_that_breaks_off_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offline(monkeypatch, tmp_path)

    def broken(path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError("connection reset")

    monkeypatch.setitem(named.NAMED_SETS, "20news", replace(named.NAMED_SETS["20news"], fetch=broken))
    with pytest.raises(DataError, match="could not be fetched .connection reset"):
        open_source(SourceConfig(name="20news"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["reuters", "arxiv", "rcv1-part"])
def test_a_set_without_a_fetcher(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(DataError, match=rf"{name}.*was not found.*set DISTCLUST_DATA to the folder"):
        open_source(SourceConfig(name=name))
