"""Files that are odd in places that nobody looks at first: late lines, damaged middles, unusual arrays."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec.compression
import fsspec.utils
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from distclust.corpus import readers
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import Corpus, ShardConfig
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import Vocabulary
from distclust.errors import DataError

ROWS = 2200  # more than a block, of which only the first lines were looked at
WORDS = "wheat corn bank rate vessel port".split()


def text_of(row: int) -> str:
    return " ".join(WORDS[(row * 7 + k) % 6] for k in range(4))


def lines(path: Path, **columns: Any) -> Path:
    """A JSONL file; a column is a function of the row, and None leaves the key out."""
    records = []
    for row in range(ROWS):
        found = {name: make(row) for name, make in columns.items()}
        records.append({name: value for name, value in found.items() if value is not None})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def files(path: Path, **options: Any) -> SourceConfig:
    return SourceConfig(name="files", files=(str(path),), **options)


def prepared(source: SourceConfig, out: Path) -> Corpus:
    prepare_local(source, None, ShardConfig(), out)
    return Corpus.open(out)


def refused(source: SourceConfig, out: Path, pattern: str) -> None:
    with pytest.raises(DataError, match=f"(?s){pattern}") as error:
        prepare_local(source, None, ShardConfig(), out)
    assert "expected" in str(error.value)
    assert not out.exists(), "something was left behind"


# ---- JSONL: a type that changes after the lines that were looked at


@pytest.mark.parametrize(
    ("column", "late", "options"),
    [
        ("text", ["a"], {}),
        ("text", 5, {}),
        ("title", ["a"], {}),
        ("id", 1.5, {}),
        ("id", {"a": 1}, {}),
        ("label", {"a": 1}, {}),
        ("keep", "yes", {"where": "keep"}),
        ("keep", [True], {"where": "keep"}),
    ],
)
def test_a_column_whose_type_changes_late(tmp_path: Path, column: str, late: Any, options: Any) -> None:
    early = {"text": text_of, "title": text_of, "id": str, "label": str, "keep": lambda row: True}
    columns = {"text": text_of, column: lambda row: early[column](row) if row < 2048 else late}
    file = lines(tmp_path / "a.jsonl", **columns)
    refused(files(file, **options), tmp_path / "c", rf"a\.jsonl, counting from row 2048: column '{column}'")


@pytest.mark.parametrize(("late", "said"), [([1.0, 2.0], "has 2 numbers.*expected 3"), ("x", "holds string")])
def test_dense_rows_that_change_late(tmp_path: Path, late: Any, said: str) -> None:
    rows = lines(tmp_path / "a.jsonl", x=lambda row: [1.0, 2.0, row] if row < 2048 else late)
    refused(files(rows, dense="x"), tmp_path / "c", said)


def test_where_may_be_missing_for_a_whole_block(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", text=text_of, keep=lambda row: True if row < 100 else None)
    assert prepared(files(file, where="keep"), tmp_path / "c").n_rows == 100


@pytest.mark.parametrize("options", [{}, {"label": "label"}], ids=["by default", "named"])
def test_a_label_that_only_late_lines_have(tmp_path: Path, options: Any) -> None:
    file = lines(tmp_path / "a.jsonl", text=text_of, label=lambda row: "late" if row >= 150 else None)
    manifest = prepared(files(file, **options), tmp_path / "c").manifest
    assert manifest.counts["unlabelled"] == 150


def test_a_column_that_was_asked_for_is_looked_for_to_the_end(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", text=text_of, label=lambda row: "x" if row == ROWS - 1 else None)
    with file.open("r+") as out:  # 20 MB before it
        rest = out.read()
        out.seek(0)
        out.write("".join(json.dumps({"text": "wheat " * 600}) + "\n" for _ in range(6000)) + rest)
    source = files(file, label="label", limit=3)
    assert prepared(source, tmp_path / "c").n_rows == 3


# ---- labels, text, files


@pytest.mark.parametrize("column", ["label", "id", "title"])
@pytest.mark.parametrize("first", ["a", "b"])
def test_a_column_that_only_some_files_have(tmp_path: Path, column: str, first: str) -> None:
    """Whichever file comes first."""
    texts = list(map(text_of, range(2)))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": texts, column: ["x", "y"]}), tmp_path / "b.parquet")
    paths = [str(tmp_path / f"{name}.parquet") for name in sorted("ab", reverse=first == "b")]
    source = SourceConfig(name="files", files=tuple(paths))
    refused(source, tmp_path / "c", rf"a\.parquet has no column '{column}'; .*one file has, all must have")


def test_an_infinite_label_is_a_label(tmp_path: Path) -> None:
    table = pa.table({"text": list(map(text_of, range(4))), "label": [1.0, float("inf"), float("nan"), 2.5]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert prepared(files(tmp_path / "a.parquet"), tmp_path / "c").manifest.counts["unlabelled"] == 1


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_dense_row_that_is_null(tmp_path: Path, ending: str) -> None:
    table = pa.table({"x": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2))})
    if ending == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        pyarrow.feather.write_feather(table, tmp_path / "a.arrow")
    refused(files(tmp_path / f"a.{ending}"), tmp_path / "c", rf"a\.{ending}.*row.* has no .*\(null\)")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    bad = pa.array([b"wheat corn", b"bank \xff rate"]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    refused(files(tmp_path / "a.parquet"), tmp_path / "c", r"a\.parquet, counting from row 0 .*UTF")


def test_half_of_a_sign_in_json(tmp_path: Path) -> None:
    """A text that was cut inside a pair, in the lines that are looked at first and behind them."""
    half = "corn \ud83d"

    def at(row: int, text: str) -> str:
        return f"{text} {half}" if row in (1, 2100) else text

    file = lines(
        tmp_path / "a.jsonl",
        text=lambda row: at(row, text_of(row)),
        title=lambda row: at(row, "A title"),
        id=lambda row: at(row, str(row)),
        label=lambda row: [at(row, "x")],
        more=lambda row: {half: half},
    )
    assert file.read_text().count("ud83d") > 8
    corpus = prepared(files(file), tmp_path / "c")
    shard, vocabulary = corpus.shard(0), Vocabulary.load(tmp_path / "c")
    assert (shard.n_rows, shard.ids()[2100], shard.titles()[2100]) == (ROWS, "2100 corn ?", "A title corn ?")
    assert shard.labels()[1] == ["x corn ?"]
    assert shard.offsets is not None
    assert shard.values is not None
    served = vocabulary.transform([at(1, text_of(1))])
    assert shard.values[shard.offsets[1] : shard.offsets[2]].tolist() == served.data.tolist()


def test_a_packed_file_that_is_damaged_in_the_middle(tmp_path: Path) -> None:
    half = gzip.compress(b'{"text": "wheat corn bank"}\n' * 500)
    damaged = half[:10] + bytes([half[10] | 0b110]) + half[11:]  # there is no fourth type of block
    (tmp_path / "a.jsonl.gz").write_bytes(half + damaged)
    refused(
        files(tmp_path / "a.jsonl.gz"), tmp_path / "c", r"a\.jsonl\.gz cannot be read as jsonl.*block type"
    )


def zipped(content: bytes, *others: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in ("a.jsonl", *others):
            archive.writestr(name, content)
    return packed.getvalue()


PACKED: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("a.jsonl.gz", gzip.compress),
    ("A.JSONL.GZ", gzip.compress),
    ("a.jsonl.Bz2", bz2.compress),
    ("a.jsonl.xz", lzma.compress),
    ("a.jsonl.lzma", lambda content: lzma.compress(content, lzma.FORMAT_ALONE)),
    ("a.jsonl.zip", zipped),
]


@pytest.mark.parametrize(("name", "pack"), PACKED, ids=[name for name, _ in PACKED])
@pytest.mark.parametrize("limit", [None, 450])
def test_a_packed_file_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pack: Callable[[bytes], bytes], limit: Any
) -> None:
    """However it is packed, and whatever its size says of the text's."""
    monkeypatch.setattr(readers, "SPLIT_ROWS", 100)
    content = "".join(json.dumps({"text": f"{text_of(row)} {row}"}) + "\n" for row in range(500))
    (tmp_path / name).write_bytes(pack(content.encode()))
    assert prepared(files(tmp_path / name, limit=limit), tmp_path / "c").n_rows == (limit or 500)


def test_a_zip_file_of_several_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zip").write_bytes(zipped(b'{"text": "wheat corn"}\n', "b.jsonl"))
    refused(
        files(tmp_path / "a.jsonl.zip"), tmp_path / "c", r"a\.jsonl\.zip holds 2 files \(a\.jsonl, b\.jsonl\)"
    )
    (tmp_path / "b.jsonl.zip").write_bytes(b"no zip file at all")
    refused(files(tmp_path / "b.jsonl.zip"), tmp_path / "c", r"b\.jsonl\.zip cannot be read as jsonl")


@pytest.mark.parametrize("ending", ["jsonl.zst", "csv.ZST"])
@pytest.mark.parametrize("format_", ["auto", "named"])
def test_a_packed_file_that_nothing_here_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, format_: str
) -> None:
    monkeypatch.delitem(fsspec.utils.compressions, "zst", raising=False)
    (tmp_path / f"a.{ending}").write_bytes(pa.Codec("zstd").compress(b'{"text": "wheat"}\n').to_pybytes())
    kind = "auto" if format_ == "auto" else ending[: ending.index(".")]
    refused(files(tmp_path / f"a.{ending}", format=kind), tmp_path / "c", r"a\..*pip install zstandard")


def test_an_unpacker_that_knows_no_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As zstandard's is."""

    class Raw(io.RawIOBase):
        def __init__(self, file: Any, mode: str = "rb") -> None:
            self.content = io.BytesIO(file.read())

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            return self.content.readinto(buffer)

        def readline(self, size: int | None = -1) -> bytes:
            raise io.UnsupportedOperation

        __next__ = readline

    monkeypatch.setitem(fsspec.utils.compressions, "zst", "test")
    monkeypatch.setitem(fsspec.compression.compr, "test", Raw)
    (tmp_path / "a.jsonl.zst").write_bytes(b'{"text": "wheat corn bank rate"}\n' * 500)
    assert prepared(files(tmp_path / "a.jsonl.zst"), tmp_path / "c").n_rows == 500


def test_counts_of_a_column_far_out(tmp_path: Path) -> None:
    table = pa.table({"indices": [[0, 1], [2 * 10**9]], "values": [[1, 2], [3]]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = files(tmp_path / "a.parquet", values_are="counts")
    refused(source, tmp_path / "c", "index 2000000000; expected 0 to 134217727")


# ---- npz


def npz(path: Path, **arrays: Any) -> SourceConfig:
    np.savez(path, **arrays)
    return files(path)


CSR: dict[str, Any] = {
    "indptr": np.array([0, 1, 2, 3]),
    "indices": np.array([0, 1, 0]),
    "data": np.array([1.0, 2.0, 3.0]),
    "shape": np.array([3, 2]),
    "format": np.array("csr"),
}


def test_arrays_of_the_other_order_of_bytes(tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(3, 2) + 1
    corpus = prepared(
        npz(tmp_path / "a.npz", x=x.astype(">f4"), y=np.array([1, 2, 3], ">i8")), tmp_path / "c"
    )
    assert np.array_equal(corpus.shard(0).dense, x)
    swapped = {
        name: part.astype(part.dtype.newbyteorder(">")) for name, part in CSR.items() if name != "format"
    }
    corpus = prepared(npz(tmp_path / "b.npz", format=CSR["format"], **swapped), tmp_path / "d")
    assert corpus.shard(0).values.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"y": np.arange(4)}, r"y is int64 of shape \(4,\); expected \(3,\)"),
        ({"y": np.array(1)}, r"y is int64 of shape \(\)"),
        ({"y": np.array([1j, 2, 3])}, "y is complex128"),
        ({"y": np.array([-1, 0, 1])}, "the label -1 among 0, 1 .*NaN in an npz"),
        ({"y": np.array([-1.0, np.nan, 10])}, "the label -1 among 10 "),
        ({"data": np.array([1j, 2, 3])}, "data is complex128"),
        ({"data": np.array([1, 2, 3], np.longdouble)}, "data is float128"),
        ({"indptr": np.array([0.0, 1, 2, 3])}, "indptr is float64"),
        ({"indptr": np.array(3)}, r"indptr is int64 of shape \(\)"),
        ({"indptr": np.array([], int)}, "do not fit together"),
        ({"shape": np.array([3, 0])}, "no columns"),
    ],
)
def test_a_matrix_that_is_none(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    refused(npz(tmp_path / "a.npz", **(CSR | changes)), tmp_path / "c", rf"a\.npz.*: .*{said}")


@pytest.mark.parametrize(
    ("y", "found"),
    [
        (np.array([0, np.nan, 2]), [["0"], [], ["2"]]),
        (np.array([-1, 1, -1]), [["-1"], ["1"], ["-1"]]),  # two classes, as many have them
        (np.array([1.0, np.nan, -1]), [["1"], [], ["-1"]]),
        (np.array(["-1", "1", "unknown"]), [["-1"], ["1"], ["unknown"]]),
        (np.array([0, 5, 2], np.uint8), [["0"], ["5"], ["2"]]),
    ],
)
def test_rows_without_a_label(tmp_path: Path, y: np.ndarray, found: list[list[str]]) -> None:
    corpus = prepared(npz(tmp_path / "a.npz", **CSR, y=y), tmp_path / "c")
    assert corpus.shard(0).labels() == found


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("apart", [False, True])
def test_minus_one_is_no_class_in_any_format(tmp_path: Path, ending: str, apart: bool) -> None:
    """Also where one file has nothing else: the unlabelled documents beside the labelled ones."""

    def source(labels: list[int]) -> SourceConfig:
        parts = [[y for y in labels if (y == -1) == minus] for minus in (True, False)] if apart else [labels]
        for number, part in enumerate(parts):
            path = tmp_path / f"{number}.{ending}"
            table = pa.table({"text": [f"wheat and corn {i}" for i in range(len(part))], "label": part})
            if ending == "parquet":
                pq.write_table(table, path)
            elif ending == "csv":
                pa.csv.write_csv(table, path)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        return files(tmp_path / f"*.{ending}")

    said = (
        "the documents: the label -1 among 0, 3, 12 and"
        if apart
        else rf"0\.{ending}, .*the label -1 among 0, 3"
    )
    refused(source([0, 3, -1, 12, -1]), tmp_path / "c", said)
    assert set(prepared(source([1, -1, 1]), tmp_path / "d").manifest.classes) == {"-1", "1"}


def test_nothing_but_minus_one_is_no_class_either(tmp_path: Path) -> None:
    source = npz(tmp_path / "a.npz", **CSR, y=np.array([-1.0, np.nan, -1]))
    refused(source, tmp_path / "c", "the documents: the label -1 alone.*NaN in an npz")


def test_rows_of_no_numbers(tmp_path: Path) -> None:
    refused(npz(tmp_path / "a.npz", x=np.zeros((3, 0))), tmp_path / "c", "at least one number")
    table = pa.table({"x": pa.array([[], []], pa.list_(pa.float32(), 0))})
    pq.write_table(table, tmp_path / "b.parquet")
    refused(files(tmp_path / "b.parquet", dense="x"), tmp_path / "c", "at least one")


def test_an_archive_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    first = prepared(npz(tmp_path / "a.npz", x=np.full((3, 2), 1.0)), tmp_path / "c")
    second = prepared(npz(tmp_path / "a.npz", x=np.full((3, 2), 2.0)), tmp_path / "d")
    assert np.array_equal(first.shard(0).dense, np.full((3, 2), 1.0))
    assert np.array_equal(second.shard(0).dense, np.full((3, 2), 2.0))
