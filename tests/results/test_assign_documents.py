"""New documents whose columns change on the way, hold nothing, or are not needed."""

from __future__ import annotations

import pyarrow as pa
import pytest

from assigning import files_of
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import ShardConfig
from distclust.errors import DataError
from distclust.results.assign import assign_documents
from stories import write_jsonl


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
