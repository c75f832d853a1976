"""Assignments against labels: matched by id, and only where there is exactly one label."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as reference

from corpora import make_corpus
from distclust.errors import DataError
from distclust.results.evaluate import class_numbers, evaluate, read_clusters, score_clusters


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "corpus", shard_rows=(30, 0, 25))


def write(path, ids, clusters, kind=None):
    pq.write_table(pa.table({"id": ids, "cluster": pa.array(clusters, kind or pa.int32())}), path)
    return path


IDS = [f"doc-{i}" for i in range(55)]
CLUSTERS = np.random.default_rng(0).integers(0, 4, 55)


def single(i: int) -> bool:
    return i % 5 != 4 and i % 11 != 10


def test_only_documents_with_one_label_have_a_class(corpus):
    truth = class_numbers(corpus)
    assert truth.tolist() == [i % 3 if single(i) else -1 for i in range(55)]


def test_scores_are_those_of_the_scored_documents(corpus, tmp_path):
    found = evaluate(write(tmp_path / "a.parquet", IDS, CLUSTERS), tmp_path / "corpus")
    kept = [i for i in range(55) if single(i)]
    truth, clusters = [i % 3 for i in kept], CLUSTERS[kept]
    assert found["ari"] == pytest.approx(reference.adjusted_rand_score(truth, clusters))
    assert found["nmi_arithmetic"] == pytest.approx(reference.normalized_mutual_info_score(truth, clusters))
    assert (found["documents"], found["scored"], found["clusters"], found["classes"]) == (55, len(kept), 4, 3)
    assert found["unlabelled"] == 11
    assert found["scored"] + found["unlabelled"] + found["multi_labelled"] == 55


def test_documents_are_matched_by_id(corpus, tmp_path):
    order = np.random.default_rng(1).permutation(55)
    (tmp_path / "parts").mkdir()
    ids = [IDS[i] for i in order]
    write(tmp_path / "parts" / "a.parquet", [*ids[:20], "a stranger"], [*CLUSTERS[order][:20], 3])
    write(tmp_path / "parts" / "b.parquet", ids[20:], CLUSTERS[order][20:], pa.int64())
    clusters, n_clusters = read_clusters(tmp_path / "parts", corpus)
    assert (clusters.tolist(), n_clusters) == (CLUSTERS.tolist(), 4)


@pytest.mark.parametrize(
    ("ids", "clusters", "kind", "said"),
    [
        (IDS[:-2], CLUSTERS[:-2], None, "lacks 2 of the 55 documents .* 'doc-53'"),
        ([*IDS[:-1], "doc-3"], CLUSTERS, None, "'doc-3' more than once"),
        (IDS, CLUSTERS - 1, None, "cluster -1"),
        (IDS, CLUSTERS.astype(float), pa.float64(), "whole numbers"),
        (IDS, [None, *CLUSTERS[1:].tolist()], None, "no nulls"),
        ([None, *IDS[1:]], CLUSTERS, None, "1 null ids"),
        ([["doc-0"]] * 55, CLUSTERS, None, "ids as text or whole numbers"),
        (
            IDS,
            [10**12, *CLUSTERS[1:].tolist()],
            pa.int64(),
            "cluster 1000000000000; expected .* below 1,048,576",
        ),
        (IDS, [2**63, *CLUSTERS[1:].tolist()], pa.uint64(), "cluster numbers from 0"),
    ],
)
def test_assignments_that_cannot_be_scored(corpus, tmp_path, ids, clusters, kind, said):
    with pytest.raises(DataError, match=said):
        evaluate(write(tmp_path / "a.parquet", ids, clusters, kind), tmp_path / "corpus")


def test_files_that_are_no_assignments(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no assignments"):
        evaluate(tmp_path / "empty", tmp_path / "corpus")
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(DataError, match="cannot be read"):
        evaluate(tmp_path / "a.parquet", tmp_path / "corpus")
    pq.write_table(pa.table({"id": IDS}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="id and cluster"):
        evaluate(tmp_path / "b.parquet", tmp_path / "corpus")


def test_nothing_labelled(tmp_path):
    from distclust.corpus.shards import ShardWriter

    writer = ShardWriter(tmp_path / "corpus", "sparse", 3)
    writer.write(pa.table({"id": ["a"], "indices": pa.array([[0]], pa.list_(pa.int32())), "values": [[1.0]]}))
    writer.finish()
    with pytest.raises(DataError, match="none of the 1 documents"):
        evaluate(write(tmp_path / "a.parquet", ["a"], [0]), tmp_path / "corpus")
    assert set(score_clusters(np.array([-1]), np.array([0]), 1).values()) == {None}
