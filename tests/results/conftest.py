"""What tests of assignments share: stories, a corpus of them, and a model for it."""

from __future__ import annotations

import pytest

from assigning import files_of, random_model
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import Corpus, ShardConfig
from distclust.corpus.vocabulary import VocabularyConfig
from stories import records, write_jsonl


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(file of 70 stories, corpus folder in shards of 8, model folder)"""
    folder = tmp_path_factory.mktemp("texts")
    rows = records(70)
    rows[3]["text"], rows[4]["text"], rows[5]["text"] = None, "", "nothing known here"
    rows[3]["title"] = rows[4]["title"] = rows[5]["title"] = "x"
    file = write_jsonl(folder / "stories.jsonl", rows)
    prepare_local(
        files_of(file), VocabularyConfig(max_features=30), ShardConfig(rows_per_shard=8), folder / "corpus"
    )
    return file, folder / "corpus", random_model(Corpus.open(folder / "corpus"), folder / "model")
