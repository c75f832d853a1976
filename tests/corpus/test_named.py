"""Named sets as the papers have them: RCV1's recipes and counts, 20 Newsgroups, and the YAML of the docs."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer

from distclust.config import load_recipe
from distclust.corpus import named, rcv1
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import Corpus, ShardConfig
from distclust.corpus.sources import SourceConfig, open_source
from distclust.corpus.vocabulary import Vocabulary, VocabularyConfig
from distclust.errors import ConfigError, DataError

DATA = os.environ.get("DISTCLUST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="DISTCLUST_DATA is not set")
DOCS = Path(__file__).parents[2] / "docs" / "data-format.md"


def read_all(config: SourceConfig) -> pa.Table:
    source = open_source(config)
    tables = [table for split in source.splits for table in source.read_split(split)]
    return pa.concat_tables(tables).combine_chunks()


def csr_of(column: pa.ChunkedArray, values: pa.ChunkedArray, width: int) -> sparse.csr_matrix:
    lists = column.combine_chunks()
    data = values.combine_chunks().flatten().to_numpy()
    return sparse.csr_matrix(
        (data, lists.flatten().to_numpy(), lists.offsets.to_numpy()), (len(column), width)
    )


def rows_of(folder: Path) -> sparse.csr_matrix:
    corpus = Corpus.open(folder)
    shards = [corpus.shard(i) for i in range(len(corpus.shard_rows))]
    shape = corpus.n_features
    parts = [sparse.csr_matrix((s.values, s.indices, s.offsets), (s.n_rows, shape)) for s in shards]
    return sparse.vstack(parts).tocsr()


# ---- RCV1: a collection with 21 single second-level topics, written as scikit-learn's is


def bunch(n: int = 900, seed: int = 0) -> tuple[Any, sparse.csr_matrix]:
    """Documents with the official weights of counts that are known, and the counts."""
    random = np.random.default_rng(seed)
    counts = sparse.random(n, 60, density=0.3, format="csr", random_state=seed)
    counts.data = random.geometric(0.5, counts.nnz).astype(np.float64)
    counts.data[random.random(counts.nnz) < 0.02] = 600
    counts.sort_indices()
    ids = np.arange(rcv1._LAST_TRAINING_ID - n // 3, rcv1._LAST_TRAINING_ID - n // 3 + n)
    training = ids <= rcv1._LAST_TRAINING_ID
    df = np.bincount(counts[np.flatnonzero(training)].indices, minlength=60)
    weights = counts.copy()
    weights.data = (1 + np.log(counts.data)) * np.log(training.sum() / df)[counts.indices]
    norms = np.sqrt(np.asarray(weights.multiply(weights).sum(1)).ravel())
    weights = sparse.diags(1 / np.maximum(norms, 1e-12)) @ weights
    names = np.array(sorted((*rcv1.ROOTS, *rcv1.SECOND_LEVEL, "C151")))
    place = {name: i for i, name in enumerate(names)}
    target = sparse.lil_matrix((n, len(names)), dtype=np.uint8)
    for i in range(n):
        k = min(int(random.geometric(0.1)) - 1, 24)
        topics = {rcv1.SECOND_LEVEL[2 * k]}
        if i % 7 == 0:
            topics.add(rcv1.SECOND_LEVEL[-1])
        if "C15" in topics:
            topics.add("C151")
        for topic in topics:
            target[i, place[topic]] = 1
            target[i, place[f"{topic[0]}CAT"]] = 1
    found = SimpleNamespace(data=weights.tocsr(), target=target.tocsr(), target_names=names, sample_id=ids)
    return found, counts


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, sparse.csr_matrix]:
    """A little collection in the place of the whole one, of a number of documents that passes for it."""
    monkeypatch.setenv("DISTCLUST_DATA", str(tmp_path))
    monkeypatch.setattr(rcv1, "_ROWS_WRITTEN", 250)
    made = bunch()
    (tmp_path / "rcv1-full").mkdir()
    rcv1.write_rcv1(made[0], tmp_path / "rcv1-full" / "rcv1.parquet")
    entry = named.NAMED_SETS["rcv1"]
    monkeypatch.setitem(named.NAMED_SETS, "rcv1", replace(entry, documents=900))
    return made


def topic_lists(made: Any) -> list[list[str]]:
    rows = made.target.tolil().rows
    return [[made.target_names[j] for j in row] for row in rows]


def by_hand(topics: list[list[str]]) -> tuple[list[int], list[str], list[str]]:
    """DCN's recipe, said again: rows kept, their topics, and the twenty topics, the largest first."""
    singles: dict[int, str] = {}
    for i, names in enumerate(topics):
        second = [name for name in names if name in rcv1.SECOND_LEVEL]
        if len(second) == 1:
            singles[i] = second[0]
    ranked = sorted(Counter(singles.values()).items(), key=lambda item: (-item[1], item[0]))
    kept = [name for name, _ in ranked[1:21]]
    rows = [i for i, name in singles.items() if name in kept]
    return rows, [singles[i] for i in rows], kept


def test_fetched_weights_give_their_counts_back(whole: tuple[Any, sparse.csr_matrix]) -> None:
    made, counts = whole
    found = read_all(SourceConfig(name="rcv1", values_are="counts", label="topics"))
    tf = csr_of(found["indices"], found["values"], 60)
    np.testing.assert_array_equal(tf.toarray(), counts.toarray())
    assert found["id"].to_pylist() == [str(i) for i in made.sample_id]
    assert found["labels"].to_pylist() == topic_lists(made)
    weights = read_all(SourceConfig(name="rcv1"))
    stored = csr_of(weights["indices"], weights["values"], 60)
    np.testing.assert_allclose(stored.toarray(), made.data.toarray(), rtol=1e-6)


def test_a_smallest_count_above_one_is_found() -> None:
    idf = np.array([3.0, 5.0, 2.0, 7.0, 4.0])
    counts = np.array(
        [[3, 5, 0, 4, 11], [1, 1, 2, 0, 9], [0, 0, 0, 0, 0], [4, 0, 5, 0, 7], [2, 3, 3, 0, 0]], float
    )
    weights = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    rows = sparse.csr_matrix(weights / np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-9))
    found, exact = rcv1.counts_of_weights(rows, idf)
    np.testing.assert_array_equal(found, counts[counts > 0])
    assert exact.all()


def test_weights_of_no_counts_are_said_to_be_inexact() -> None:
    rows = sparse.csr_matrix(np.array([[0.4, 0.5, 0.55, 0.53], [0.5, 0.5, 0.5, 0.5]]))
    found, exact = rcv1.counts_of_weights(rows, np.ones(4))
    assert exact.tolist() == [False, True]
    assert found[4:].tolist() == [1, 1, 1, 1]
    assert found.min() >= 1


def test_rcv1_20_is_dcns_recipe(
    whole: tuple[Any, sparse.csr_matrix], caplog: pytest.LogCaptureFixture
) -> None:
    made, counts = whole
    rows, labels, kept = by_hand(topic_lists(made))
    assert len(kept) == 20
    assert len(rows) < 700
    config = SourceConfig(name="rcv1", label="rcv1-20", values_are="counts")
    with caplog.at_level(logging.WARNING):
        found = read_all(config)
    assert found["id"].to_pylist() == [str(made.sample_id[i]) for i in rows]
    assert found["labels"].to_pylist() == [[name] for name in labels]
    np.testing.assert_array_equal(
        csr_of(found["indices"], found["values"], 60).toarray(), counts[rows].toarray()
    )
    assert open_source(config).layout.labels_kept == tuple(kept)
    unlabelled = open_source(config, labels=False)  # the labels still tell which documents there are
    assert sum(len(table) for split in unlabelled.splits for table in unlabelled.read_split(split)) == len(
        rows
    )
    assert f"keeps {len(rows)} of the documents of RCV1; the published number is 365,968" in caplog.text


def test_single_root_is_decs_recipe(
    whole: tuple[Any, sparse.csr_matrix], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    roots = [[name for name in names if name in rcv1.ROOTS] for names in topic_lists(whole[0])]
    single = [names for names in roots if len(names) == 1]
    assert 0 < len(single) < len(roots)
    monkeypatch.setitem(rcv1.PUBLISHED, "single-root", len(single))
    with caplog.at_level(logging.WARNING):
        found = read_all(SourceConfig(name="rcv1", label="single-root"))
    assert found["labels"].to_pylist() == single
    assert not caplog.records, "the published number is no reason to warn"
    every = read_all(SourceConfig(name="rcv1", label="root"))
    assert every["labels"].to_pylist() == roots


def test_a_recipe_is_a_source_of_its_own(whole: tuple[Any, sparse.csr_matrix]) -> None:
    marks = [open_source(SourceConfig(name="rcv1", label=label)).fingerprint for label in rcv1.LABELS]
    assert len(set(marks)) == len(marks)
    assert open_source(SourceConfig(name="rcv1")).fingerprint == marks[0]


def test_the_words_of_rcv1_20_by_summed_tfidf(whole: tuple[Any, sparse.csr_matrix], tmp_path: Path) -> None:
    config = SourceConfig(name="rcv1", label="rcv1-20", values_are="counts")
    options = VocabularyConfig(max_features=20, rank_by="tfidf", sublinear_tf=True, scale=1.0)
    prepare_local(config, options, ShardConfig(), tmp_path / "c")
    rows, _, _ = by_hand(topic_lists(whole[0]))
    weighed = TfidfTransformer(sublinear_tf=True).fit_transform(whole[1][rows])
    best = np.sort(np.argsort(-np.asarray(weighed.sum(0)).ravel(), kind="stable")[:20])
    assert sorted(map(int, Vocabulary.load(tmp_path / "c" / "vocabulary.json").terms)) == best.tolist()


def test_too_few_topics_for_twenty(tmp_path: Path) -> None:
    topics = pa.array([[name] for name in rcv1.SECOND_LEVEL[:20]], pa.list_(pa.string()))
    pq.write_table(pa.table({"topics": topics}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="of 20 single second-level topics; expected more than 20"):
        rcv1.recipe([str(tmp_path / "t.parquet")], "rcv1-20")


def test_topics_of_one_size_go_by_their_name(tmp_path: Path) -> None:
    names = ["GSPO", *reversed(rcv1.SECOND_LEVEL[:25]), "GSPO"]
    topics = pa.array([[name, "X"] for name in names] + [None], pa.list_(pa.string()))
    pq.write_table(pa.table({"topics": topics}), tmp_path / "t.parquet", row_group_size=4)
    found = rcv1.recipe([str(tmp_path / "t.parquet")], "rcv1-20")
    assert found == (rcv1.SECOND_LEVEL[:20], (1,) * 20)


def test_the_whole_collection_or_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTCLUST_DATA", str(tmp_path))
    (tmp_path / "rcv1-full").mkdir()
    rcv1.write_rcv1(bunch(50)[0], tmp_path / "rcv1-full" / "rcv1.parquet")
    for label in rcv1.LABELS[:2]:
        with pytest.raises(DataError, match=r"has 50 documents here; expected 804,414.*rcv1-part"):
            open_source(SourceConfig(name="rcv1", label=label))


@pytest.mark.parametrize("label", rcv1.LABELS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_part_never_stands_for_the_whole(
    label: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "rcv1").mkdir()
    rcv1.write_rcv1(bunch(50)[0], tmp_path / "rcv1" / "part-0.parquet")
    monkeypatch.setenv("DISTCLUST_DATA", str(tmp_path))
    monkeypatch.setenv("DISTCLUST_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match=r"'rcv1'.*could not be fetched.*rcv1-full/rcv1\.parquet"):
        open_source(SourceConfig(name="rcv1", label=label))


def test_a_label_that_rcv1_has_not() -> None:
    with pytest.raises(ConfigError, match="'root' or 'topics' or 'single-root' or 'rcv1-20'"):
        SourceConfig(name="rcv1-part", label="rcv1-10")


# ---- the part of RCV1


def part(*columns: str) -> pa.Table:
    paths = sorted((Path(str(DATA)) / "rcv1").glob("part-*.parquet"))
    return pa.concat_tables(pq.read_table(path, columns=list(columns)) for path in paths)


@needs_data
def test_the_hierarchy_agrees_with_the_topics_of_the_part() -> None:
    assert len(rcv1.SECOND_LEVEL) == len(set(rcv1.SECOND_LEVEL)) == 55
    seen = set()
    for names in part("topics")["topics"].to_pylist():
        seen |= set(names)
        for name in names:
            if name in rcv1.SECOND_LEVEL:
                assert f"{name[0]}CAT" in names, "a document has the root of each of its topics"
            elif name not in rcv1.ROOTS:
                assert name[:3] in rcv1.SECOND_LEVEL, "all others are below a second-level topic"
                assert name[:3] in names, "and their documents have that one too"
    assert set(rcv1.SECOND_LEVEL) | set(rcv1.ROOTS) <= seen
    assert len(seen) == 102, "of 103: M143 is empty in the part"


@needs_data
def test_recipes_on_the_part() -> None:
    table = part("doc", "topics")
    rows, labels, kept = by_hand(table["topics"].to_pylist())
    found = read_all(SourceConfig(name="rcv1-part", label="rcv1-20", values_are="counts"))
    assert found["id"].to_pylist() == [str(i) for i in table["doc"].take(rows).to_pylist()]
    assert [label for (label,) in found["labels"].to_pylist()] == labels
    assert (len(rows), len(kept), kept[0]) == (13_220, 20, "M14")
    single = read_all(SourceConfig(name="rcv1-part", label="single-root"))
    root = [name for name in part("root")["root"].to_pylist() if name]
    assert [label for (label,) in single["labels"].to_pylist()] == root
    balanced = SourceConfig(name="rcv1-part", label="single-root", where="balanced10k", values_are="counts")
    assert len(read_all(balanced)) == 10_000


@needs_data
def test_the_parts_counts_follow_from_its_weights() -> None:
    table = part("indices", "tfidf", "tf", "tf_exact")
    idf = pq.read_table(Path(str(DATA)) / "rcv1" / "terms.parquet")["idf"].to_numpy().astype(np.float64)
    weights = csr_of(table["indices"], table["tfidf"], rcv1.TERMS)
    found, exact = rcv1.counts_of_weights(weights, idf)
    tf, given = table["tf"].combine_chunks().flatten().to_numpy(), table["tf_exact"].to_numpy()
    row_of = np.repeat(np.arange(len(table)), np.diff(weights.indptr))
    unlike = np.bincount(row_of, weights=found != tf, minlength=len(table)) > 0
    # The part's idf is itself recovered from rounded weights: two of 27,574 rows come out otherwise.
    assert (unlike & given).sum() <= 2
    assert (exact != given).sum() <= 8


# ---- 20 Newsgroups, and what the docs tell to paste


def recipes() -> list[dict[str, Any]]:
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.S)]


@pytest.mark.parametrize("place", range(5))
def test_the_docs_recipes_are_read(place: int, tmp_path: Path) -> None:
    pasted = recipes()[place]
    whole = {"method": "damic-text", "clusters": 20, **pasted}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole))
    config = load_recipe(tmp_path / "recipe.yaml")
    for group, values in pasted.items():
        for name, value in values.items():
            assert getattr(getattr(config, group), name) == value
    assert len(recipes()) == 5


@needs_data
@pytest.mark.parametrize(
    "place", [pytest.param(0, id="DKM"), pytest.param(1, id="AE-CM", marks=pytest.mark.slow)]
)
def test_20news_rows_are_scikit_learns(place: int, tmp_path: Path) -> None:
    pasted = recipes()[place]
    config = SourceConfig(**pasted["source"])
    prepare_local(config, VocabularyConfig(**pasted["vocabulary"]), ShardConfig(), tmp_path / "c")
    texts = read_all(config)["text"].to_pylist()
    if place == 0:
        wanted = TfidfVectorizer(max_features=2000).fit_transform(texts)
    else:
        counts = CountVectorizer(max_features=2000).fit_transform(texts)
        wanted = TfidfTransformer(norm="l2", sublinear_tf=True).fit_transform(counts)
    found = rows_of(tmp_path / "c")
    assert found.shape == wanted.shape == (18_846, 2000)
    wanted.sort_indices()
    np.testing.assert_array_equal(found.indptr, wanted.indptr)
    np.testing.assert_array_equal(found.indices, wanted.indices)
    np.testing.assert_allclose(found.data, wanted.data, rtol=1e-6)
