"""Preparing: the same corpus however the work is cut, nothing half-made, nothing done twice."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer

from distclust.corpus import readers
from distclust.corpus.prepare import prepare, prepare_local
from distclust.corpus.shards import Corpus, Manifest, ShardConfig
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import Vocabulary, VocabularyConfig
from distclust.errors import ConfigError, DataError

DATA = os.environ.get("DISTCLUST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="DISTCLUST_DATA is not set")

LITTLE = SourceConfig(limit=700)
SHARDS = ShardConfig(rows_per_shard=300)


def files(*paths: object, **options: Any) -> SourceConfig:
    return SourceConfig(name="files", files=tuple(map(str, paths)), **options)


def whole(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "manifest.json"}


def rows_of(folder: Path) -> sparse.csr_matrix:
    corpus = Corpus.open(folder, verify=True)
    shards = [corpus.shard(i) for i in range(len(corpus.shard_rows))]
    return sparse.vstack(
        [
            sparse.csr_matrix((s.values, s.indices, s.offsets), shape=(s.n_rows, corpus.n_features))
            for s in shards
        ]
    ).tocsr()


def test_shards_in_source_order_with_exact_rows(tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    manifest = prepare_local(
        LITTLE,
        VocabularyConfig(max_features=500),
        SHARDS,
        tmp_path / "c",
        progress=lambda *a: stages.append(a),
    )
    assert [shard.rows for shard in manifest.shards] == [300, 300, 100]
    assert manifest == Manifest.load(tmp_path / "c")
    assert (manifest.kind, manifest.n_rows, manifest.n_features) == ("sparse", 700, 500)
    assert manifest.row_scale == pytest.approx(2000**0.5)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "manifest.json",
        "shard-00000.arrow",
        "shard-00001.arrow",
        "shard-00002.arrow",
        "vocabulary.json",
    ]
    assert manifest.vocabulary_fingerprint == Vocabulary.load(tmp_path / "c").fingerprint
    assert stages == [("read", 1, 1), ("write", 1, 3), ("write", 2, 3), ("write", 3, 3)]
    given = pq.read_table(Path(readers.__file__).parent / "builtin" / "reuters9.parquet").slice(0, 700)
    corpus = Corpus.open(tmp_path / "c")
    assert [i for s in range(3) for i in corpus.shard(s).ids()] == [str(i) for i in given["id"].to_pylist()]
    assert [x for s in range(3) for x in corpus.shard(s).labels()] == [
        [t] for t in given["topic"].to_pylist()
    ]
    assert list(manifest.classes) == sorted(set(given["topic"].to_pylist()))


def options_that_differ() -> list[VocabularyConfig]:
    return [
        VocabularyConfig(max_features=500),
        VocabularyConfig(max_features=300, rank_by="tfidf", tokens="letters", sublinear_tf=True, max_df=0.5),
        VocabularyConfig(max_features=400, ngram_range=(1, 2), norm="l1"),
    ]


@pytest.mark.parametrize("vocabulary", options_that_differ(), ids=["count", "tfidf", "ngrams"])
def test_how_the_work_is_cut_changes_no_bit(
    vocabulary: VocabularyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepare_local(LITTLE, vocabulary, SHARDS, tmp_path / "one")
    table = pq.read_table(Path(readers.__file__).parent / "builtin" / "reuters9.parquet").slice(0, 700)
    for i in range(7):
        pq.write_table(table.slice(i * 100, 100), tmp_path / f"part-{i}.parquet", row_group_size=40)
    monkeypatch.setattr(readers, "SPLIT_ROWS", 13)
    monkeypatch.setattr(readers, "BLOCK_ROWS", 7)
    cut = files(tmp_path / "part-*.parquet", text="title+text", label="topic")
    many = prepare_local(cut, vocabulary, SHARDS, tmp_path / "many")
    assert many.fingerprint == one.fingerprint
    assert whole(tmp_path / "many") == whole(tmp_path / "one")


@pytest.mark.slow
def test_ray_gives_the_same_corpus_and_the_same_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(readers, "SPLIT_ROWS", 200)
    try:
        for number, vocabulary in enumerate(options_that_differ()):
            local = prepare_local(LITTLE, vocabulary, SHARDS, tmp_path / f"local{number}")
            stages: list[tuple[str, int, int]] = []
            on_ray = prepare(
                LITTLE,
                vocabulary,
                SHARDS,
                tmp_path / f"ray{number}",
                progress=lambda *a, s=stages: s.append(a),
            )
            assert on_ray == local
            assert whole(tmp_path / f"ray{number}") == whole(tmp_path / f"local{number}")
            assert stages[-1] == ("write", 3, 3)
            assert ("read", 4, 4) in stages
        broken = pa.table({"indices": [[0, 1], [3, 2]], "values": [[1.0, 1.0], [1.0, 1.0]]})
        pq.write_table(broken, tmp_path / "b.parquet")
        with pytest.raises(DataError, match=r"b\.parquet.*row 1.*unsorted") as caught:
            prepare(files(tmp_path / "b.parquet"), None, SHARDS, tmp_path / "b")
        assert "Traceback" not in str(caught.value)
        assert not (tmp_path / "b").exists()
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_preparing_again_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").iterdir()}
    assert prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c") == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c").iterdir()} == before
    assert "nothing to do" in caplog.text


def test_another_corpus_is_refused_with_the_differences(tmp_path: Path) -> None:
    prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c")
    before = whole(tmp_path / "c")
    with pytest.raises(DataError) as caught:
        prepare_local(
            replace(LITTLE, limit=600),
            VocabularyConfig(min_df=2),
            ShardConfig(rows_per_shard=100),
            tmp_path / "c",
        )
    for part in (
        "source.limit: 700 there, 600 asked",
        "vocabulary.min_df: 1 there, 2 asked",
        "shards.rows_per_shard: 300 there, 100 asked",
        "overwrite",
    ):
        assert part in str(caught.value)
    assert whole(tmp_path / "c") == before
    with pytest.raises(DataError, match="max_features: 2000 there, 10 asked"):
        prepare_local(LITTLE, VocabularyConfig(max_features=10), SHARDS, tmp_path / "c")
    again = prepare_local(LITTLE, VocabularyConfig(max_features=10), SHARDS, tmp_path / "c", overwrite=True)
    assert Manifest.load(tmp_path / "c") == again
    assert Vocabulary.load(tmp_path / "c").n_features == 10


def test_changed_files_are_a_difference(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one two", "two three"]}), tmp_path / "t.parquet")
    prepare_local(files(tmp_path / "t.parquet"), None, SHARDS, tmp_path / "c")
    pq.write_table(pa.table({"text": ["one two", "two four"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="differs in: the content of the source's files"):
        prepare_local(files(tmp_path / "t.parquet"), None, SHARDS, tmp_path / "c")


def test_a_failed_replacement_leaves_the_old_corpus(tmp_path: Path) -> None:
    prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c")
    before = whole(tmp_path / "c"), (tmp_path / "c" / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="vocabulary is empty"):
        prepare_local(LITTLE, VocabularyConfig(min_df=700), SHARDS, tmp_path / "c", overwrite=True)
    assert (whole(tmp_path / "c"), (tmp_path / "c" / "manifest.json").read_bytes()) == before


def test_a_replacement_broken_off_leaves_the_old_corpus(tmp_path: Path) -> None:
    prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c")
    before = whole(tmp_path / "c")

    def broken_off(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("write", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_local(
            LITTLE,
            VocabularyConfig(max_features=9),
            SHARDS,
            tmp_path / "c",
            overwrite=True,
            progress=broken_off,
        )
    assert whole(tmp_path / "c") == before
    assert Corpus.open(tmp_path / "c", verify=True).n_features == 2000


def test_a_half_written_folder_starts_clean(tmp_path: Path) -> None:
    prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c")
    wanted = whole(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    (tmp_path / "c" / "shard-00009.arrow").write_bytes(b"left over")
    (tmp_path / "c" / ".work" / "new").mkdir(parents=True)
    (tmp_path / "c" / ".work" / "new" / "shard-00007.arrow").write_bytes(b"left over")
    with pytest.raises(DataError, match="did not finish"):
        Corpus.open(tmp_path / "c")
    prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c")
    assert whole(tmp_path / "c") == wanted


def test_a_damaged_corpus_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c")
    wanted = whole(tmp_path / "c")
    shard = tmp_path / "c" / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c")
    assert whole(tmp_path / "c") == wanted
    assert "shard-00001.arrow" in caplog.text


KILLED = """
import os, signal, sys
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import ShardConfig
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import VocabularyConfig
def progress(stage, done, total):
    if stage == sys.argv[2] and done == 1:
        print("about to die in", stage, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
source, vocabulary = SourceConfig(limit=700), VocabularyConfig(rank_by="tfidf")
prepare_local(source, vocabulary, ShardConfig(rows_per_shard=300), sys.argv[1], progress=progress)
"""


@pytest.mark.parametrize("stage", ["read", "rank", "write"])
def test_killed_in_the_middle(stage: str, tmp_path: Path) -> None:
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "c"), stage],
        capture_output=True,
        text=True,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    assert f"about to die in {stage}" in died.stdout
    with pytest.raises(DataError, match=r"manifest\.json"):
        Corpus.open(tmp_path / "c")
    options = VocabularyConfig(rank_by="tfidf")
    prepare_local(LITTLE, options, SHARDS, tmp_path / "c")
    prepare_local(LITTLE, options, SHARDS, tmp_path / "clean")
    assert whole(tmp_path / "c") == whole(tmp_path / "clean")


def test_two_at_once_are_told_apart(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        import socket

        (tmp_path / "c" / ".work").mkdir(parents=True)
        holder = {"host": socket.gethostname(), "pid": sleeper.pid}
        (tmp_path / "c" / ".work" / "holder.json").write_text(json.dumps(holder))
        with pytest.raises(DataError, match=f"being prepared by process {sleeper.pid}"):
            prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c")
        assert (tmp_path / "c" / ".work" / "holder.json").exists()
    finally:
        sleeper.kill()
        sleeper.wait()
    prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c")


def test_new_documents_with_the_vocabulary_of_the_old(tmp_path: Path) -> None:
    prepare_local(LITTLE, VocabularyConfig(max_features=300), SHARDS, tmp_path / "old")
    vocabulary = Vocabulary.load(tmp_path / "old")
    texts = ["profit rose and dividend", None, "zyxwv unknown", "the money market of the bank"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "new.parquet")
    manifest = prepare_local(files(tmp_path / "new.parquet"), vocabulary, SHARDS, tmp_path / "new")
    assert manifest.vocabulary_fingerprint == vocabulary.fingerprint
    assert Vocabulary.load(tmp_path / "new").terms == vocabulary.terms
    np.testing.assert_array_equal(rows_of(tmp_path / "new").toarray(), vocabulary.transform(texts).toarray())
    assert manifest.counts == {"documents": 4, "empty": 2, "unlabelled": 4, "multi_labelled": 0}
    again = prepare_local(LITTLE, vocabulary, SHARDS, tmp_path / "again")
    assert [s.sha256 for s in again.shards] == [s.sha256 for s in Manifest.load(tmp_path / "old").shards]


def counts_table(n: int = 200, width: int = 60) -> tuple[pa.Table, sparse.csr_matrix]:
    rng = np.random.default_rng(4)
    matrix = sparse.csr_matrix(rng.poisson(0.2, (n, width)))
    bounds = pa.array(matrix.indptr)
    table = pa.table(
        {
            "indices": pa.ListArray.from_arrays(bounds, pa.array(matrix.indices)),
            "values": pa.ListArray.from_arrays(bounds, pa.array(matrix.data)),
        }
    )
    return table, matrix


@pytest.mark.parametrize("given_width", [None, 80])
def test_counts_are_weighed_as_scikit_learn_does(given_width: int | None, tmp_path: Path) -> None:
    table, matrix = counts_table()
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=64)
    source = files(tmp_path / "t.parquet", values_are="counts", n_features=given_width)
    config = VocabularyConfig(max_features=25, sublinear_tf=True, scale=3.0)
    manifest = prepare_local(source, config, SHARDS, tmp_path / "c")
    assert (manifest.n_features, manifest.row_scale) == (25, 3.0)
    vocabulary = Vocabulary.load(tmp_path / "c")
    totals = np.asarray(matrix.sum(axis=0), np.float64).ravel()
    columns = np.sort((-totals).argsort()[:25])
    assert vocabulary.terms == tuple(map(str, columns))
    assert vocabulary.of == "columns"
    wanted = TfidfTransformer(sublinear_tf=True).fit_transform(matrix[:, columns]).toarray() * 3.0
    np.testing.assert_allclose(rows_of(tmp_path / "c").toarray(), wanted, rtol=1e-6, atol=1e-6)
    again = prepare_local(source, vocabulary, SHARDS, tmp_path / "again")
    assert [s.sha256 for s in again.shards] == [s.sha256 for s in manifest.shards]
    with pytest.raises(DataError, match="has no words"):
        vocabulary.transform(["text"])


def test_weights_are_taken_as_they_are_but_for_the_scale(tmp_path: Path) -> None:
    table, matrix = counts_table()
    pq.write_table(table, tmp_path / "t.parquet")
    manifest = prepare_local(files(tmp_path / "t.parquet"), None, SHARDS, tmp_path / "plain")
    assert manifest.row_scale == 1.0
    assert manifest.vocabulary_fingerprint == ""
    assert not (tmp_path / "plain" / "vocabulary.json").exists()
    np.testing.assert_array_equal(rows_of(tmp_path / "plain").toarray(), matrix.toarray())
    scaled = prepare_local(
        files(tmp_path / "t.parquet"), VocabularyConfig(scale=0.5), SHARDS, tmp_path / "scaled"
    )
    assert scaled.row_scale == 0.5
    np.testing.assert_array_equal(rows_of(tmp_path / "scaled").toarray(), matrix.toarray() * 0.5)
    assert Corpus.open(tmp_path / "scaled").shard(0).ids()[:3] == ["0", "1", "2"]


def test_dense_rows(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    x[3] = 0
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(50) % 5)
    manifest = prepare_local(
        files(tmp_path / "d.npz"), VocabularyConfig(scale=2.0), ShardConfig(rows_per_shard=20), tmp_path / "c"
    )
    assert (manifest.kind, manifest.n_features, manifest.counts["empty"]) == ("dense", 6, 1)
    corpus = Corpus.open(tmp_path / "c")
    np.testing.assert_array_equal(np.concatenate([corpus.shard(i).dense for i in range(3)]), x * 2)


def test_counts_of_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    table = pa.table({"text": ["one", "", "two", "three"], "label": [["a"], ["b", "c"], [], ["d"]]})
    pq.write_table(table, tmp_path / "t.parquet")
    manifest = prepare_local(files(tmp_path / "t.parquet"), None, SHARDS, tmp_path / "c")
    assert manifest.counts == {"documents": 4, "empty": 1, "unlabelled": 1, "multi_labelled": 1}
    assert manifest.classes == ("a", "d")
    assert "4 documents" in caplog.text
    assert "1 empty (all-zero rows), 1 without a label, 1 with several labels" in caplog.text


@needs_data
def test_the_dec_recipe_on_the_part_of_rcv1(tmp_path: Path) -> None:
    source = SourceConfig(name="rcv1-part", values_are="counts", limit=7000)
    manifest = prepare_local(source, VocabularyConfig(sublinear_tf=True), ShardConfig(), tmp_path / "c")
    assert (manifest.n_rows, manifest.n_features) == (7000, 2000)
    rows = rows_of(tmp_path / "c")
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1))).ravel()
    np.testing.assert_allclose(norms[norms > 0], 2000**0.5, rtol=1e-5)


@needs_data
@pytest.mark.slow
def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from distclust.corpus.prepare import prepare_local\n"
        "from distclust.corpus.shards import ShardConfig\n"
        "from distclust.corpus.sources import SourceConfig\n"
        "from distclust.corpus.vocabulary import VocabularyConfig\n"
        "prepare_local(SourceConfig(name='arxiv', limit=int(sys.argv[2])), VocabularyConfig(), ShardConfig(),"
        " sys.argv[1])\n"
        "status = open('/proc/self/status').read()\n"
        "print([line for line in status.splitlines() if line.startswith('VmHWM')][0].split()[1])\n"
    )
    peak = {}
    for limit in (40_000, 160_000):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / str(limit)), str(limit)],
            capture_output=True,
            text=True,
            check=True,
        )
        peak[limit] = int(done.stdout) / 1024
        shutil.rmtree(tmp_path / str(limit))
    # 120,000 more abstracts are 140 MB of text and 60 MB of rows; only the distinct terms may grow
    assert peak[160_000] < peak[40_000] + 120, peak


def test_the_work_folder_is_seen_or_the_node_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distclust.corpus import passes
    from distclust.errors import ClusterError

    real = passes.count_part

    def elsewhere(job: Any, part: int) -> dict[str, Any]:
        return real(replace(job, work="/nowhere/at/all"), part)

    monkeypatch.setattr(passes, "count_part", elsewhere)
    with pytest.raises(ClusterError, match=r"The node .* cannot see /nowhere/at/all.*that all nodes share"):
        prepare_local(LITTLE, VocabularyConfig(), SHARDS, tmp_path / "c")


def test_the_wrong_kind_of_vocabulary(tmp_path: Path) -> None:
    prepare_local(LITTLE, VocabularyConfig(max_features=50), SHARDS, tmp_path / "c")
    words = Vocabulary.load(tmp_path / "c")
    table, _ = counts_table()
    pq.write_table(table, tmp_path / "t.parquet")
    for values_are in ("weights", "counts"):
        with pytest.raises(ConfigError, match="numbers words but the documents are"):
            prepare_local(files(tmp_path / "t.parquet", values_are=values_are), words, SHARDS, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_remote_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/c; expected a folder"):
        prepare_local(LITTLE, VocabularyConfig(), SHARDS, "s3://bucket/c")


def test_it_is_quick_to_refuse(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DataError):
        prepare_local(files(tmp_path / "missing.parquet"), None, SHARDS, tmp_path / "c")
    assert time.monotonic() - started < 2
