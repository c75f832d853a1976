"""What tests of the corpus folder share: a small one."""

from __future__ import annotations

from pathlib import Path

import pytest

from corpora import make_corpus
from distclust.corpus.shards import Corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus", [10, 0, 1, 14])
