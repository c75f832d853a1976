"""Cells of a table on disk and in Ray: unlabelled documents, rows of one's own, damaged files."""

from __future__ import annotations

import json
from pathlib import Path

from distclust.config import to_dict
from distclust.corpus.shards import Corpus
from distclust.results.evaluate import class_numbers
from jobs._tables import corpus_folder, load_table, plan
from jobs.paper_tables import prepare_cell
from tables import changed


def test_directions_of_documents_without_one_label_are_not_scored(tiny: Path, tmp_path: Path) -> None:
    stories = ("grain wheat corn", "bank money rates", "ship port oil")
    labels: list[list[str]] = [[], ["class 0"], ["class 0", "class 1"], ["class 1"]]
    rows = [{"text": f"{stories[n % 3]} word{n % 7}", "label": labels[n % 4]} for n in range(60)]
    documents = tmp_path / "documents.jsonl"
    documents.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    changed(tiny, "{name: builtin, limit: 300}", f"{{name: files, files: [{documents}], text: text}}")
    changed(tiny, "\nrows:\n", "\nsections:\n- lsa: 3\n  rows:\n")
    (cell,) = plan(load_table(str(tiny)), "cpu", 1, tmp_path)[0].cells
    assert cell.documents is not None
    text = corpus_folder(cell.documents, tmp_path)
    assert prepare_cell(to_dict(cell.config), str(cell.corpus), to_dict(cell.documents), str(text)) is None
    words, directions = Corpus.open(text), Corpus.open(cell.corpus)
    assert class_numbers(directions).tolist() == class_numbers(words).tolist()
    assert (class_numbers(directions) >= 0).sum() == 30
    assert directions.manifest.classes == ("0", "1")
