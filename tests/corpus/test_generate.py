"""Generated corpora: the same from the same seed however they are made, and shaped like RCV1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from distclust.corpus.generate import GenerateConfig, generate_corpus, generate_shard
from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError, DataError

SMALL = GenerateConfig(rows=1000, terms=500, topics=4, nonzeros=20, rows_per_shard=300, seed=3)
GOLDEN_INDICES = [32, 34, 67, 131, 144, 152, 182, 288]
GOLDEN_VALUES = [11.60286, 12.37842, 11.51303]
GOLDEN_LABEL = ["topic-0000"]


def matrix(corpus: Corpus) -> sp.csr_matrix:
    parts = [corpus.shard(number) for number in range(len(corpus.shard_rows))]
    rows = [sp.csr_matrix((p.values, p.indices, p.offsets), (p.n_rows, corpus.n_features)) for p in parts]
    return sp.vstack(rows, format="csr")


def topics(corpus: Corpus) -> np.ndarray:
    labels = [corpus.shard(number).labels() for number in range(len(corpus.shard_rows))]
    return np.array([int(label[0][-4:]) for part in labels for label in part])


def test_any_number_of_processes_writes_the_same_corpus(tmp_path: Path) -> None:
    one = generate_corpus(tmp_path / "one", SMALL)
    two = generate_corpus(tmp_path / "two", SMALL, workers=2)
    assert one == two
    assert [shard.rows for shard in one.shards] == [300, 300, 300, 100]
    corpus = Corpus.open(tmp_path / "two", verify=True)
    assert corpus.shard(1).ids()[:2] == ["300", "301"]
    assert one.counts == {"documents": 1000, "empty": 0, "unlabelled": 0, "multi_labelled": 0}
    assert one.classes == ("topic-0000", "topic-0001", "topic-0002", "topic-0003")


def test_a_shard_is_a_function_of_its_number_and_the_seed() -> None:
    again = GenerateConfig(rows=1000, terms=500, topics=4, nonzeros=20, rows_per_shard=300, seed=3)
    assert generate_shard(SMALL, 2).equals(generate_shard(again, 2))
    assert not generate_shard(SMALL, 2)["indices"].equals(generate_shard(SMALL, 1)["indices"])
    other = GenerateConfig(rows=1000, terms=500, topics=4, nonzeros=20, rows_per_shard=300, seed=4)
    assert not generate_shard(SMALL, 2)["indices"].equals(generate_shard(other, 2)["indices"])
    assert SMALL.fingerprint == again.fingerprint != other.fingerprint
    for number in (-1, 4):
        with pytest.raises(ValueError, match="expected 0 to 3"):
            generate_shard(SMALL, number)


def test_these_are_the_documents_that_it_has_always_made() -> None:
    """A change of what a seed gives needs a new version in the fingerprint."""
    table = generate_shard(SMALL, 0)
    assert table["indices"][0].as_py()[:8] == GOLDEN_INDICES
    assert table["values"][0].as_py()[:3] == pytest.approx(GOLDEN_VALUES, rel=1e-5)
    assert table["labels"][0].as_py() == GOLDEN_LABEL


@pytest.mark.parametrize(("terms", "nonzeros"), [(47_236, 77.0), (2_000, 77.0), (2_000, 30.0)])
def test_documents_are_shaped_like_rcv1(tmp_path: Path, terms: int, nonzeros: float) -> None:
    config = GenerateConfig(rows=6000, terms=terms, nonzeros=nonzeros)
    corpus_manifest = generate_corpus(tmp_path, config)
    corpus = Corpus.open(tmp_path)
    x = matrix(corpus)
    assert corpus_manifest.n_nonzeros / 6000 == pytest.approx(nonzeros, rel=0.03)
    lengths = np.diff(x.indptr)
    assert lengths.min() >= 1
    assert 0.3 < lengths.std() / lengths.mean() < 0.6
    np.testing.assert_allclose(np.sqrt(x.multiply(x).sum(1)).A1, math.sqrt(2000), rtol=1e-5)
    assert corpus_manifest.row_scale == math.sqrt(2000)
    # Zipf: the logarithm of the frequency falls about linearly with that of the rank
    frequency = np.sort(np.bincount(x.indices, minlength=terms))[::-1]
    assert 0.1 < frequency[0] / 6000 < 0.5
    ranks = np.unique(np.geomspace(100, terms / 4, 30).astype(int))
    slope = np.polyfit(np.log(ranks), np.log(frequency[ranks] + 1), 1)[0]
    assert -1.4 < slope < -0.4
    # a rare term weighs more than a common one
    mean = np.asarray(x.sum(0)).ravel() / np.maximum(1, np.bincount(x.indices, minlength=terms))
    assert mean[frequency_rank(x, terms)[:20]].mean() < mean[frequency_rank(x, terms)[400:600]].mean()


def frequency_rank(x: sp.csr_matrix, terms: int) -> np.ndarray:
    return np.argsort(-np.bincount(x.indices, minlength=terms), kind="stable")


def test_topics_can_be_told_apart_as_far_as_they_share_words(tmp_path: Path) -> None:
    """Nearest topic mean, estimated on one half and asked on the other."""
    scores = {}
    for share in (0.0, 0.4):
        root = tmp_path / str(share)
        generate_corpus(root, GenerateConfig(rows=2000, terms=2000, topics=5, topic_share=share))
        corpus = Corpus.open(root)
        x, y = matrix(corpus), topics(corpus)
        assert np.bincount(y, minlength=5).min() > 200
        means = np.stack([np.asarray(x[:1000][y[:1000] == k].mean(0)).ravel() for k in range(5)])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        scores[share] = float((np.argmax(x[1000:] @ means.T, axis=1) == y[1000:]).mean())
    assert scores[0.4] > 0.95
    assert scores[0.0] < 0.4


def test_a_finished_corpus_is_left_and_an_unfinished_one_begun_again(tmp_path: Path) -> None:
    first = generate_corpus(tmp_path, SMALL)
    times = [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())]
    assert generate_corpus(tmp_path, SMALL) == first
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())] == times
    with pytest.raises(DataError, match="already holds a corpus"):
        generate_corpus(tmp_path, GenerateConfig(rows=1001, terms=500, nonzeros=20))
    (tmp_path / "manifest.json").unlink()
    assert generate_corpus(tmp_path, SMALL) == first


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 0},
        {"terms": 1},
        {"topics": 0},
        {"seed": -1},
        {"rows_per_shard": 2.5},
        {"nonzeros": 30_000.0},
        {"topic_share": 1.1},
        {"row_scale": 0.0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        GenerateConfig(**{"rows": 10, **change})
    with pytest.raises(ConfigError, match="0 workers"):
        generate_corpus("unused", GenerateConfig(rows=10), workers=0)
