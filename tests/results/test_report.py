"""What a person reads: the right words, the right documents, and tables that fit the terminal."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from corpora import dense_rows, make_corpus
from distclust.corpus.shards import Corpus, ShardWriter
from distclust.errors import DataError
from distclust.results.report import (
    ClusterSummary,
    as_text,
    clean,
    cluster_table,
    describe_clusters,
    score_table,
)

TERMS = ("bank", "corn", "rate", "ship", "the")


@pytest.fixture
def corpus(tmp_path):
    """Two stories of money, two of corn, one of ships, one empty; `the` is everywhere and heaviest."""
    rows = [
        ([0, 2, 4], [3.0, 2.0, 5.0]),
        ([0, 4], [1.0, 5.0]),
        ([1, 4], [4.0, 5.0]),
        ([1, 2, 4], [1.0, 1.0, 5.0]),
        ([3], [1.0]),
        ([], []),
    ]
    table = pa.table(
        {
            "id": [f"d{i}" for i in range(6)],
            "title": ["money first", "money second", "corn first", None, "ships", "nothing"],
            "indices": pa.array([r[0] for r in rows], pa.list_(pa.int32())),
            "values": pa.array([r[1] for r in rows], pa.list_(pa.float32())),
        }
    )
    writer = ShardWriter(tmp_path, "sparse", 5, rows_per_shard=2)
    writer.write(table)
    writer.finish()
    return Corpus.open(tmp_path)


CLUSTERS = np.array([0, 0, 1, 1, 2, 3])


def test_sizes_words_and_nearest_documents(corpus):
    found = describe_clusters(corpus, CLUSTERS, 5, terms=TERMS)
    assert [c.size for c in found] == [2, 2, 1, 1, 0]
    assert [round(c.share, 3) for c in found] == [0.333, 0.333, 0.167, 0.167, 0.0]
    # money: bank sets it apart most; `the` has the largest mean, but is nearly as frequent elsewhere
    assert found[0].terms[0] == "bank"
    assert found[1].terms[0] == "corn"
    assert found[2].terms == ("ship",)
    assert found[3].terms == found[4].terms == ()
    assert [c.nearest_id for c in found] == ["d0", "d2", "d4", None, None]
    assert found[0].nearest_title == "money first"


def test_weights_are_those_of_the_formula(corpus):
    x, means = dense_rows(corpus), []
    for k in range(3):
        means.append(x[k == CLUSTERS].mean(0))
    weights = np.where(means[0] > 0, means[0] * np.log(np.maximum(means[0], 1e-9) / x.mean(0)), -1)
    expected = [TERMS[i] for i in np.argsort(-weights) if weights[i] > 0]
    assert list(describe_clusters(corpus, CLUSTERS, 4, terms=TERMS)[0].terms) == expected


def test_the_first_of_equals_is_nearest(tmp_path):
    writer = ShardWriter(tmp_path, "sparse", 3, rows_per_shard=1)
    same = {"indices": pa.array([[0, 2]] * 3, pa.list_(pa.int32())), "values": [[1.0, 2.0]] * 3}
    writer.write(pa.table({"id": ["a", "b", "c"], **same}))
    writer.finish()
    assert describe_clusters(Corpus.open(tmp_path), np.zeros(3, int), 1)[0].nearest_id == "a"


def test_the_number_of_words_is_kept(corpus):
    assert describe_clusters(corpus, CLUSTERS, 4, terms=TERMS, n_terms=1)[0].terms == ("bank",)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_nearest_documents_against_the_plain_formula(tmp_path, kind):
    corpus = make_corpus(tmp_path, shard_rows=(9, 0, 14, 7), n_features=20, kind=kind)
    x = dense_rows(corpus).astype(np.float64)
    clusters = np.random.default_rng(0).integers(0, 4, 30)
    found = describe_clusters(corpus, clusters, 4)
    for k in range(4):
        norms = np.linalg.norm(x, axis=1)
        likeness = np.where(
            (clusters == k) & (norms > 0), x @ x[clusters == k].mean(0) / np.maximum(norms, 1e-9), -9
        )
        assert found[k].nearest_id == f"doc-{likeness.argmax()}"
        assert found[k].terms == ()


@pytest.mark.parametrize(
    ("clusters", "said"), [([0, 1], "2 clusters for the 6 documents"), ([0, 1, 2, 3, 4, 9], "0 to 4")]
)
def test_clusters_that_are_not_of_the_corpus(corpus, clusters, said):
    with pytest.raises(DataError, match=said):
        describe_clusters(corpus, np.array(clusters), 5)


# ---- tables


def summaries() -> list[ClusterSummary]:
    many = tuple(f"word{i}" for i in range(8))
    return [
        ClusterSummary(cluster=0, size=5, share=0.05, terms=many, nearest_id="a", nearest_title="A " * 60),
        ClusterSummary(cluster=1, size=1_234_567, share=0.95, terms=many, nearest_id="b", nearest_title=None),
        ClusterSummary(cluster=2, size=0, share=0.0),
    ]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_fit_the_terminal(width):
    text = as_text(cluster_table(summaries(), width=width), width=width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 5, "one line a cluster, a heading and a title"
    assert "1,234,567" in text
    assert "95.0 %" in text
    order = [line.split()[0] for line in lines[2:]]
    assert order == ["1", "0", "2"], "largest first"
    assert "word0 word1" in text
    assert "id b" in lines[2]


def test_a_wide_terminal_shows_more_words():
    narrow, wide = (as_text(cluster_table(summaries(), width=w), width=w) for w in (60, 200))
    assert "word7" not in narrow
    assert "word7" in wide


def test_rows_without_names_have_no_words():
    plain = [ClusterSummary(cluster=0, size=3, share=1.0, nearest_id="7")]
    assert "words" not in as_text(cluster_table(plain))


def test_titles_cannot_write_on_the_terminal():
    assert clean("a\x1b[31mred\x07\r\n b\u202e[bold]x[/]") == "a[31mred b[bold]x[/]"
    evil = ClusterSummary(cluster=0, size=1, share=1.0, terms=("[red]a",), nearest_title="[bold]\x1b[2J!")
    text = as_text(cluster_table([evil]))
    assert "\x1b" not in text
    assert "[bold][2J!" in text
    assert "[red]a" in text


def test_scores_beside_the_baselines():
    row = {"nmi_geometric": 0.5, "nmi_arithmetic": 0.4994, "ari": -0.0123, "acc": 1.0}
    text = as_text(score_table("damic", row, {"k-means": dict.fromkeys(row), "LSA": {**row, "ari": 0.3}}))
    lines = text.splitlines()
    assert lines[1].split() == ["NMI", "geom.", "NMI", "arith.", "ARI", "ACC"]
    assert lines[2].split() == ["damic", "0.500", "0.499", "-0.012", "1.000"]
    assert lines[3].split() == ["k-means", "-", "-", "-", "-"]
    assert max(map(len, lines)) <= 80
