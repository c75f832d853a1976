"""Bad input ends at once, says what was found, what was expected and what to do, and leaves nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import ShardConfig
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import VocabularyConfig
from distclust.errors import ConfigError, DataError, DistclustError

NAN, INF = float("nan"), float("inf")


def given(path: Path, **columns: Any) -> SourceConfig:
    options = columns.pop("options", {})
    pq.write_table(pa.table(columns), path)
    return SourceConfig(name="files", files=(str(path),), **options)


def refused(
    source: SourceConfig | Callable[[], SourceConfig],
    out: Path,
    pattern: str,
    error: type[DistclustError] = DataError,
    vocabulary: VocabularyConfig | None = None,
) -> None:
    before = sorted(out.parent.iterdir())
    started = time.monotonic()

    def work() -> None:
        config = source() if callable(source) else source
        prepare_local(config, vocabulary, ShardConfig(rows_per_shard=2), out)

    with pytest.raises(error, match=f"(?s){pattern}") as caught:
        work()
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert "expected" in message
    assert message.endswith((".", "?")), message
    assert sorted(out.parent.iterdir()) == before, "something was left behind"


LISTS = pa.list_(pa.int64())


def test_a_missing_file(tmp_path: Path) -> None:
    source = SourceConfig(name="files", files=(str(tmp_path / "no.parquet"),))
    refused(source, tmp_path / "c", r"no\.parquet was not found.*check source\.files")
    source = SourceConfig(name="files", files=(str(tmp_path / "no-*.parquet"),))
    refused(source, tmp_path / "c", r"no-\*\.parquet was not found.*pattern")


def test_a_folder_in_place_of_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    source = SourceConfig(name="files", files=(str(tmp_path / "folder"),))
    refused(source, tmp_path / "c", r"is a folder.*folder/\*\.parquet")


def test_the_same_file_twice(tmp_path: Path) -> None:
    given(tmp_path / "t.parquet", text=["a word"])
    source = SourceConfig(name="files", files=(str(tmp_path / "t.parquet"), str(tmp_path / "*.parquet")))
    refused(source, tmp_path / "c", "named twice")


@pytest.mark.parametrize("field", ["text", "id", "label", "title", "where"])
def test_a_missing_column(field: str, tmp_path: Path) -> None:
    source = given(tmp_path / "t.parquet", text=["one"], abstract=["two"], options={field: "abstrct"})
    refused(
        source,
        tmp_path / "c",
        "no column 'abstrct'; expected .* which are text, abstract; did you mean 'abstract'",
    )


def test_a_column_missing_in_the_second_file(tmp_path: Path) -> None:
    given(tmp_path / "a.parquet", text=["one"])
    given(tmp_path / "b.parquet", body=["two"])
    source = SourceConfig(name="files", files=(str(tmp_path / "*.parquet"),))
    refused(source, tmp_path / "c", r"b\.parquet has no column 'text'; expected .* which are body")


def test_no_column_that_could_be_documents(tmp_path: Path) -> None:
    refused(given(tmp_path / "t.parquet", a=[1], b=["x"]), tmp_path / "c", "the columns a, b; .*source.text")


@pytest.mark.parametrize(
    ("columns", "options", "pattern"),
    [
        ({"text": [1, 2]}, {}, "'text' holds int64; expected text"),
        ({"text": [["a"]]}, {}, "'text' holds list.*expected text"),
        ({"text": ["a"], "id": [1.5]}, {}, "'id' holds double; expected text or whole numbers"),
        ({"text": ["a"], "label": [{"x": 1}]}, {}, "'label' holds struct.*expected text, whole numbers"),
        ({"text": ["a"], "keep": [1]}, {"where": "keep"}, "'keep' holds int64; expected true or false"),
        ({"indices": [1], "values": [[1.0]]}, {}, "'indices' holds int64; expected lists of whole numbers"),
        (
            {"indices": [[1.0]], "values": [[1.0]]},
            {},
            "'indices' holds list.*double.*expected lists of whole",
        ),
        ({"indices": [[1]], "values": [["a"]]}, {}, "'values' holds list.*string.*expected lists of numbers"),
        (
            {"vector": ["a"]},
            {"dense": "vector"},
            "'vector' holds string; expected lists of numbers of one length",
        ),
    ],
)
def test_a_column_of_the_wrong_type(
    columns: dict[str, Any], options: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    refused(
        given(tmp_path / "t.parquet", **columns, options=options), tmp_path / "c", rf"t\.parquet.*{pattern}"
    )


@pytest.mark.parametrize(
    ("indices", "values", "options", "pattern"),
    [
        (
            [[0, 1], [2]],
            [[1.0, 1.0], [1.0, 2.0]],
            {},
            "row 1 has 1 indices and 2 values; expected .*equal length",
        ),
        ([[0, 1], [5, 2]], [[1.0, 1.0]] * 2, {}, "row 1 has the unsorted index 2.*sort"),
        ([[0, 1], [3, 3]], [[1.0, 1.0]] * 2, {}, "row 1 has the repeated index 3"),
        ([[0], [-1]], [[1.0]] * 2, {}, "row 1 has index -1; expected 0 to"),
        ([[0], [10]], [[1.0]] * 2, {"n_features": 10}, "row 1 has index 10; expected 0 to 9"),
        ([[0], [2**31]], [[1.0]] * 2, {}, "2147483648"),
        ([[0], [1]], [[1.0], [NAN]], {}, "row 1 has the value nan; expected finite"),
        ([[0], [1]], [[1.0], [-INF]], {}, "row 1 has the value -inf; expected finite"),
        ([[0], [1]], [[1.0], [1e39]], {}, "row 1 has the value inf; expected finite"),
        ([[0], [1]], [[1.0], [-2.0]], {"values_are": "counts"}, "row 1 has the count -2; expected a whole"),
        ([[0], [1]], [[1.0], [0.5]], {"values_are": "counts"}, "row 1 has the count 0.5; .*=weights"),
        ([[0], None], [[1.0], [1.0]], {}, "row 1 has no indices"),
        ([[0], [None]], [[1.0], [1.0]], {}, "'indices' holds a null"),
    ],
)
def test_bad_sparse_rows(
    indices: Any, values: Any, options: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    columns = {"indices": pa.array(indices, LISTS), "values": pa.array(values, pa.list_(pa.float64()))}
    source = given(tmp_path / "t.parquet", **columns, options=options)
    refused(source, tmp_path / "c", rf"t\.parquet, counting from row 0.*{pattern}")


@pytest.mark.parametrize("value", [NAN, INF])
def test_dense_rows_that_are_not_finite(value: float, tmp_path: Path) -> None:
    x = np.ones((5, 3), np.float32)
    x[4, 1] = value
    np.savez(tmp_path / "t.npz", x=x)
    source = SourceConfig(name="files", files=(str(tmp_path / "t.npz"),))
    refused(source, tmp_path / "c", rf"row 4 has the value {value}; expected finite")


def test_dense_rows_of_unequal_lengths(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"x": [1, 2]}\n{"x": [1, 2, 3]}\n')
    source = SourceConfig(name="files", files=(str(tmp_path / "t.jsonl"),), dense="x")
    refused(source, tmp_path / "c", "row 1 has 3 numbers in 'x'; expected 2")
    (tmp_path / "u.jsonl").write_text('{"x": [1, 2, 3]}\n')
    (tmp_path / "t.jsonl").write_text('{"x": [1, 2]}\n')
    source = SourceConfig(name="files", files=(str(tmp_path / "*.jsonl"),), dense="x")
    refused(source, tmp_path / "c", "u.jsonl has rows of 3 numbers and .*t.jsonl of 2")
    for name, width in (("a", 2), ("b", 3)):
        pq.write_table(
            pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(6)), width)}),
            tmp_path / f"{name}.pq",
        )
    source = SourceConfig(name="files", files=(str(tmp_path / "*.pq"),))
    refused(source, tmp_path / "c", r"b\.pq has rows of 3 numbers; expected 2 as in .*a\.pq")


def test_repeated_ids(tmp_path: Path) -> None:
    source = given(tmp_path / "t.parquet", text=["a word"] * 4, id=["x", "y", "x", "y"])
    refused(source, tmp_path / "c", r"The id 'x' appears 2 times \(in .*t\.parquet\); 2 ids are repeated")
    given(tmp_path / "a.parquet", text=["a word"] * 2, id=[1, 2])
    given(tmp_path / "b.parquet", text=["a word"] * 2, id=[3, 2])
    source = SourceConfig(name="files", files=(str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")))
    refused(source, tmp_path / "c", r"The id '2' appears 2 times \(in .*a\.parquet and .*b\.parquet\)")


def test_ids_that_only_share_a_hash_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distclust.corpus.passes.hash_id", lambda name: b"12345678")
    source = given(tmp_path / "t.parquet", text=["a word"] * 3, id=["x", "y", "z"])
    assert prepare_local(source, None, ShardConfig(), tmp_path / "c").n_rows == 3


def test_null_ids(tmp_path: Path) -> None:
    source = given(tmp_path / "t.parquet", text=["a word"] * 2, id=["x", None])
    refused(source, tmp_path / "c", "row 1 has no id")


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.csv", "t.npz", "t.arrow"])
def test_no_documents(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    empty = pa.table({"text": pa.array([], pa.string())})
    if name == "t.parquet":
        pq.write_table(empty, path)
    elif name == "t.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, empty.schema):
            pass
    elif name == "t.npz":
        np.savez(path, x=np.zeros((0, 4)))
    else:
        path.write_text("text\n" if name == "t.csv" else "\n")
    source = SourceConfig(name="files", files=(str(path),), text=None if name == "t.npz" else "text")
    refused(source, tmp_path / "c", "no documents")


def test_no_documents_after_choosing(tmp_path: Path) -> None:
    source = given(tmp_path / "t.parquet", text=["a word"], keep=[False], options={"where": "keep"})
    refused(source, tmp_path / "c", "There are no documents.*source.where")


def test_null_and_empty_texts_are_kept_as_zero_rows(tmp_path: Path) -> None:
    source = given(tmp_path / "t.parquet", text=["some words", None, "", "  ", "other words"])
    manifest = prepare_local(source, None, ShardConfig(), tmp_path / "c")
    assert manifest.counts["documents"] == 5
    assert manifest.counts["empty"] == 3


@pytest.mark.parametrize(
    ("texts", "options", "pattern"),
    [
        ([None, "", "x"], {}, "vocabulary is empty: found no term at all in the 3 documents"),
        (
            ["a cat", "a dog"],
            {"min_df": 2},
            "vocabulary is empty: found 2 distinct terms, none of them in 2 to 2",
        ),
        (["the", "and"], {"stop_words": "english"}, "vocabulary is empty.*stop_words=english"),
        (["one", "two"], {"min_df": 2, "max_df": 0.5}, "No word can pass: of 2 documents, max_df=0.5"),
    ],
)
def test_a_vocabulary_empty_after_pruning(
    texts: list[str | None], options: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    refused(
        given(tmp_path / "t.parquet", text=texts),
        tmp_path / "c",
        pattern,
        vocabulary=VocabularyConfig(**options),
    )


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.npz", "t.jsonl.gz"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_truncated_files(name: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / name
    rng = np.random.default_rng(0)
    table = pa.table({"text": [" ".join(map(str, rng.integers(0, 1 << 60, 30))) for _ in range(2000)]})
    if name == "t.parquet":
        pq.write_table(table, path)
    elif name == "t.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif name == "t.npz":
        np.savez(path, x=rng.normal(size=(500, 50)))
    else:
        import gzip

        path.write_bytes(gzip.compress("\n".join(map(json.dumps, table.to_pylist())).encode()))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    source = SourceConfig(name="files", files=(str(path),), text=None if name == "t.npz" else "text")
    pattern = rf"{name} cannot be read as .*expected a whole file.*|{name}.*no column 'text'|no documents"
    refused(source, tmp_path / "c", pattern)


def test_a_parquet_file_damaged_in_the_middle(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 1 << 60, 30))) for _ in range(2000)]
    source = given(tmp_path / "t.parquet", text=texts)
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[2000:60_000] = bytes(58_000)
    (tmp_path / "t.parquet").write_bytes(content)
    refused(source, tmp_path / "c", r"t\.parquet cannot be read as parquet")


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ('{"text": "a"', "is not JSON"),
        ('["text"]', "holds a list; expected one JSON object a line"),
        ('{"text": 5}', "does not hold one type|holds int64"),
    ],
)
def test_bad_lines_of_json(line: str, pattern: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n' + line + "\n")
    refused(
        SourceConfig(name="files", files=(str(tmp_path / "t.jsonl"),)),
        tmp_path / "c",
        rf"t\.jsonl.*{pattern}",
    )


def test_bad_line_of_json_far_down(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n' * 3000 + '{"text": 5}\n')
    refused(
        SourceConfig(name="files", files=(str(tmp_path / "t.jsonl"),)),
        tmp_path / "c",
        r"t\.jsonl.*'text'.*expected",
    )


def test_csv_rows_of_unequal_lengths(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,id\none,1\ntwo\n")
    refused(
        SourceConfig(name="files", files=(str(tmp_path / "t.csv"),)),
        tmp_path / "c",
        r"t\.csv cannot be read as csv",
    )


def test_sparse_lists_in_csv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('indices,values\n"[1]","[2]"\n')
    refused(
        SourceConfig(name="files", files=(str(tmp_path / "t.csv"),)),
        tmp_path / "c",
        "CSV has no such columns",
    )


def test_a_broken_csr_archive(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "t.npz",
        indptr=np.array([0, 3]),
        indices=np.array([0, 1]),
        data=np.ones(2),
        shape=np.array([1, 4]),
        format=np.array(b"csr"),
    )
    source = SourceConfig(name="files", files=(str(tmp_path / "t.npz"),))
    refused(source, tmp_path / "c", "do not fit together.*expected a valid CSR matrix")
    np.savez(tmp_path / "t.npz", z=np.ones(3))
    refused(source, tmp_path / "c", r"holds z \(3,\) float64; expected")


def test_a_format_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "t.docx").write_text("x")
    source = SourceConfig(name="files", files=(str(tmp_path / "t.docx"),))
    refused(
        source, tmp_path / "c", r"ends in '\.docx'.*expected one of \.parquet.*source\.format", ConfigError
    )


def test_files_of_several_formats(tmp_path: Path) -> None:
    given(tmp_path / "t.parquet", text=["a"])
    (tmp_path / "t.csv").write_text("text\na\n")
    source = SourceConfig(name="files", files=(str(tmp_path / "t.*"),))
    refused(source, tmp_path / "c", "several formats", ConfigError)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"name": "20nws"}, "'20nws'.*did you mean '20news'"),
        ({"name": "rcv1part"}, "did you mean 'rcv1-part'"),
        ({"name": "wikipedia-2026"}, "expected one of builtin, 20news"),
        ({"name": "files"}, "'files' with no files"),
        ({"name": "arxiv", "files": ("x.parquet",)}, "'arxiv' with 1 files"),
        ({"name": "arxiv", "text": "abstract"}, "source.text is 'abstract' for the data set 'arxiv'"),
        ({"name": "arxiv", "label": "date"}, "source.label is 'date'.*'group' or 'primary'"),
        ({"name": "20news", "values_are": "counts"}, "values_are is 'counts'"),
        ({"name": "files", "files": ("x.npz",), "text": "a", "dense": "b"}, "both text and dense"),
        ({"limit": 0}, "source.limit is 0"),
        ({"name": "files", "files": ("x.npz",), "n_features": -1}, "source.n_features is -1"),
        ({"name": "files", "files": ("x.npz",), "format": "xlsx"}, "source.format is 'xlsx'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    refused(lambda: SourceConfig(**options), tmp_path / "c", pattern, ConfigError)


def test_counts_that_are_texts(tmp_path: Path) -> None:
    source = given(tmp_path / "t.parquet", text=["a word"], options={"values_are": "counts"})
    refused(source, tmp_path / "c", "values_are is 'counts' but the documents are text", ConfigError)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written.*expected a folder"):
        prepare_local(SourceConfig(limit=5), None, ShardConfig(), tmp_path / "file" / "c")


def test_bad_input_leaves_no_folders_above(tmp_path: Path) -> None:
    source = given(tmp_path / "t.parquet", text=["", ""])
    with pytest.raises(DataError, match="vocabulary is empty"):
        prepare_local(source, None, ShardConfig(), tmp_path / "deep" / "er" / "c")
    assert not (tmp_path / "deep").exists()
