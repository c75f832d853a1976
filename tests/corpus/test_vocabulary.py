"""Vocabulary: scikit-learn's rules, and what goes beyond them."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from distclust.corpus.counting import analyzer, count_block, strip_headers
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import Corpus, ShardConfig
from distclust.corpus.sources import SourceConfig, open_source
from distclust.corpus.vocabulary import Vocabulary, VocabularyConfig
from distclust.errors import ConfigError, DataError

DATA = os.environ.get("DISTCLUST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="DISTCLUST_DATA is not set")

NASTY = [
    None,
    "",
    " \t\n",
    "a b c",
    "The quick brown fox_jumps over 3 lazy-dogs, 42nd St.",
    "naïve café résumé ÜBER straße ΣΊΣΥΦΟΣ Владимир 東京 タワー",
    "İstanbul DİYARBAKIR ﬁne ǅungla ß",
    "tab\tsep\x0bvt\x0cff\x1cfs\x1dgs\x1ers\x1fus\x85nel\xa0nbsp\u2028ls\u3000wide",
    "zero\x00byte x\x00y under__score __init__ _",
    "e\u0301cole cafe\u0301 \u200bzero\u200dwidth",
    "emoji 😀 mixed😀word ½ ² x² ٣٤٥ १२३",
    "don't can't it's o'clock U.S.A. e-mail re-enter",
    "ALL CAPS SHOUTING aaa AAA aAa",
    "1 22 333 4444 a1 1a ab1 1ab abc1 1abc abc_def",
]


def texts_of(config: SourceConfig) -> list[str]:
    source = open_source(config)
    return [
        t for split in source.splits for table in source.read_split(split) for t in table["text"].to_pylist()
    ]


def matrix_of(folder: Path) -> sparse.csr_matrix:
    corpus = Corpus.open(folder)
    rows = [corpus.shard(i) for i in range(len(corpus.shard_rows))]
    parts = [
        sparse.csr_matrix((r.values, r.indices, r.offsets), shape=(r.n_rows, corpus.n_features)) for r in rows
    ]
    return sparse.vstack(parts).tocsr()


def assert_as_sklearn(
    folder: Path, texts: list[str], source: SourceConfig, options: dict[str, object]
) -> None:
    reference = TfidfVectorizer(**options)
    wanted = reference.fit_transform(texts).tocsr()
    wanted.sort_indices()
    config = VocabularyConfig(**{"scale": 1.0, "max_features": None, **options})  # type: ignore[arg-type]
    prepare_local(source, config, ShardConfig(rows_per_shard=5000), folder)
    vocabulary = Vocabulary.load(folder)
    assert list(vocabulary.terms) == list(reference.get_feature_names_out())
    np.testing.assert_allclose(vocabulary.idf, reference.idf_, rtol=0, atol=1e-6)
    for found in (matrix_of(folder), vocabulary.transform(texts)):
        np.testing.assert_array_equal(found.indptr, wanted.indptr)
        np.testing.assert_array_equal(found.indices, wanted.indices)
        np.testing.assert_allclose(found.data, wanted.data, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return texts_of(SourceConfig(limit=1500))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_features": 2000},
        {"max_features": 137, "stop_words": "english", "sublinear_tf": True},
        {"min_df": 3, "max_df": 0.2, "max_features": 500},
        {"min_df": 0.01, "max_df": 900, "norm": "l1"},
        {"norm": None, "lowercase": False, "max_features": 1000},
        {"ngram_range": (1, 2), "max_features": 3000, "stop_words": "english"},
        {"ngram_range": (2, 2), "min_df": 2},
    ],
    ids=str,
)
def test_as_scikit_learn_on_the_builtin_corpus(
    options: dict[str, object], stories: list[str], tmp_path: Path
) -> None:
    assert_as_sklearn(tmp_path / "c", stories, SourceConfig(limit=1500), options)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_features": 2000},
        {"max_features": 2000, "stop_words": "english", "sublinear_tf": True, "max_df": 0.1, "min_df": 3},
        {"max_features": 5000, "ngram_range": (1, 2)},
    ],
    ids=str,
)
def test_as_scikit_learn_on_all_of_20_newsgroups(options: dict[str, object], tmp_path: Path) -> None:
    source = SourceConfig(name="20news")
    assert_as_sklearn(tmp_path / "c", texts_of(source), source, options)


@needs_data
def test_as_scikit_learn_on_20_newsgroups_once(tmp_path: Path) -> None:
    source = SourceConfig(name="20news")
    assert_as_sklearn(tmp_path / "c", texts_of(source), source, {"max_features": 2000, "sublinear_tf": True})


def test_ties_at_the_limit_fall_as_in_scikit_learn(tmp_path: Path) -> None:
    rng = random.Random(5)
    words = [f"w{i:04d}" for i in range(3000)]
    texts = [" ".join(rng.choice(words) for _ in range(20)) for _ in range(400)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    source = SourceConfig(name="files", files=(str(tmp_path / "t.parquet"),))
    for limit in (100, 777, 1500):
        assert_as_sklearn(tmp_path / f"c{limit}", texts, source, {"max_features": limit})


def tokens_of(text: str | None, config: VocabularyConfig) -> list[str]:
    block = count_block([text], config)
    return sorted(t for i, n in zip(block.indices, block.counts, strict=True) for t in [block.terms[i]] * n)


@pytest.mark.parametrize("tokens", ["words", "letters"])
@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("stop_words", [None, "english"])
def test_tokens_are_those_of_scikit_learns_analyzer(
    tokens: str, lowercase: bool, stop_words: str | None
) -> None:
    config = VocabularyConfig(tokens=tokens, lowercase=lowercase, stop_words=stop_words)  # type: ignore[arg-type]
    analyze = analyzer(config)
    rng = random.Random(1)
    alphabet = "".join(t for t in NASTY if t) + "".join(map(chr, range(128)))
    made = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(60))) for _ in range(600)]
    made += ["".join(chr(rng.randrange(128)) for _ in range(60)) for _ in range(200)]
    for text in [*NASTY, *made]:
        assert tokens_of(text, config) == sorted(analyze(text or "")), repr(text)
    together = count_block([*NASTY, *made], config)  # texts in one block do not touch each other
    assert np.diff(together.indptr).tolist() == [len(set(analyze(t or ""))) for t in [*NASTY, *made]]


def test_letters_only() -> None:
    config = VocabularyConfig(tokens="letters")
    assert tokens_of("abc1def x_yzw ab 1995 Été", config) == ["abc", "def", "yzw", "été"]


def test_blocks_that_are_halved_count_the_same(monkeypatch: pytest.MonkeyPatch, stories: list[str]) -> None:
    config = VocabularyConfig()
    whole = count_block(stories[:64], config)
    monkeypatch.setattr("distclust.corpus.counting._BLOCK_BYTES", 4096)
    halved = count_block(stories[:64], config)

    def rows(block: object) -> list[dict[str, int]]:
        return [
            {block.terms[i]: int(c) for i, c in zip(block.indices[a:b], block.counts[a:b], strict=True)}  # type: ignore[attr-defined]
            for a, b in zip(block.indptr, block.indptr[1:], strict=False)  # type: ignore[attr-defined]
        ]

    assert rows(halved) == rows(whole)
    assert len(set(halved.terms)) == len(halved.terms)


def test_lone_surrogates_separate_words() -> None:
    assert tokens_of("one\ud800two three", VocabularyConfig()) == ["one", "three", "two"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("From: a@b.c\nSubject: Re: Cars\nLines: 3\n\nBody here.\n\nMore.", "Re: Cars\nBody here.\n\nMore."),
        ("Lines: 3\r\nSUBJECT:  x y \r\n\r\nBody", "x y\nBody"),
        ("From: a@b.c\n\nBody", "Body"),
        ("From: only a head", ""),
        ("No head here.\nSubject: in the text\n\nBody", "No head here.\nSubject: in the text\n\nBody"),
        ("", ""),
    ],
)
def test_strip_headers(text: str, wanted: str) -> None:
    assert strip_headers(text) == wanted


def test_headers_are_dropped_before_counting() -> None:
    text = "From: somebody\nSubject: engines\n\nwheels"
    assert tokens_of(text, VocabularyConfig(strip_headers=True)) == ["engines", "wheels"]


def test_words_by_summed_tfidf(stories: list[str], tmp_path: Path) -> None:
    options = {"min_df": 2, "max_df": 0.3, "stop_words": "english", "sublinear_tf": True}
    reference = TfidfVectorizer(**options)
    sums = np.asarray(reference.fit_transform(stories).sum(axis=0)).ravel()
    names = reference.get_feature_names_out()
    ranked = sorted(zip(-sums, names, strict=True))
    assert ranked[199][0] < ranked[200][0] - 1e-6, (
        "the cut must not fall into a tie for this test to mean anything"
    )
    config = VocabularyConfig(**options, max_features=200, rank_by="tfidf")  # type: ignore[arg-type]
    prepare_local(SourceConfig(limit=1500), config, ShardConfig(), tmp_path / "c")
    chosen = Vocabulary.load(tmp_path / "c")
    assert list(chosen.terms) == sorted(name for _, name in ranked[:200])
    prepare_local(SourceConfig(limit=1500), replace(config, rank_by="count"), ShardConfig(), tmp_path / "d")
    assert chosen.terms != Vocabulary.load(tmp_path / "d").terms


# ---- a vocabulary by itself


@pytest.fixture
def small() -> Vocabulary:
    config = VocabularyConfig(scale=2.0)
    return Vocabulary(("apple", "pear", "żółw"), np.array([3, 1, 1]), np.array([1.0, 1.5, 2.0]), 3, config)


def test_rows_have_the_scale_and_empty_texts_are_zero(small: Vocabulary) -> None:
    rows = small.transform(["apple apple pear", None, "", "unknown words", "Żółw żółw"])
    assert rows.shape == (5, 3)
    assert rows.dtype == np.float32
    dense = rows.toarray()
    norm = np.hypot(2.0, 1.5)
    np.testing.assert_allclose(dense[0], [4.0 / norm, 3.0 / norm, 0], rtol=1e-6)
    assert not dense[1:4].any()
    assert not np.isnan(dense).any()
    np.testing.assert_allclose(dense[4], [0, 0, 2.0])
    assert small.transform([]).shape == (0, 3)
    column = pa.chunked_array([["apple", None], ["żółw"]]).cast(pa.large_string())
    assert np.flatnonzero(small.transform(column).toarray().any(axis=1)).tolist() == [0, 2]
    pairs = replace(small, config=replace(small.config, ngram_range=(1, 2)))
    assert np.flatnonzero(pairs.transform(column).toarray().any(axis=1)).tolist() == [0, 2]


def test_weigh_sorts_and_refuses_other_widths(small: Vocabulary) -> None:
    counts = sparse.csr_matrix((np.array([1, 2]), np.array([2, 0]), np.array([0, 2])), shape=(1, 3))
    assert small.weigh(counts).has_sorted_indices
    np.testing.assert_allclose(small.weigh(counts).toarray(), small.weigh(counts.sorted_indices()).toarray())
    assert counts.indices.tolist() == [2, 0], "the given matrix was changed"
    zeros = sparse.csr_matrix((np.array([0, 0, 2]), np.array([0, 0, 1]), np.array([0, 1, 3])), shape=(2, 3))
    sublinear = replace(small, config=replace(small.config, sublinear_tf=True))
    np.testing.assert_allclose(sublinear.weigh(zeros).toarray(), [[0, 0, 0], [0, 2, 0]])
    with pytest.raises(DataError, match="2 columns; expected 3"):
        small.weigh(sparse.csr_matrix((1, 2)))


def test_one_string_is_not_a_list_of_texts(small: Vocabulary) -> None:
    with pytest.raises(DataError, match=r"wrap it as \[text\]"):
        small.transform("apple")


def test_saved_and_loaded(small: Vocabulary, tmp_path: Path) -> None:
    small.save(tmp_path / "vocabulary.json")
    for place in (tmp_path, tmp_path / "vocabulary.json"):
        again = Vocabulary.load(place)
        assert again.fingerprint == small.fingerprint
        assert again.terms == small.terms
        assert again.config == small.config
        np.testing.assert_array_equal(again.idf, small.idf)
    assert "żółw" in (tmp_path / "vocabulary.json").read_text(encoding="utf-8")
    assert replace(small, n_documents=4).fingerprint != small.fingerprint
    assert replace(small, config=replace(small.config, scale=3.0)).fingerprint != small.fingerprint


def test_damaged_vocabularies_are_refused(small: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    with pytest.raises(DataError, match="does not exist"):
        Vocabulary.load(path)
    small.save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "idf": [1.0, 1.5, 2.5]}))
    with pytest.raises(DataError, match="changed after it was written"):
        Vocabulary.load(path)
    path.write_text(json.dumps({**content, "options": {**content["options"], "colour": 1}}))
    with pytest.raises(DataError, match="another version.*colour"):
        Vocabulary.load(path)
    path.write_text(path.read_text()[:40])
    with pytest.raises(DataError, match=r"vocabulary.json cannot be read"):
        Vocabulary.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_features", 0),
        ("min_df", 0),
        ("min_df", -0.1),
        ("max_df", 1.5),
        ("ngram_range", (2, 1)),
        ("ngram_range", (0, 1)),
        ("scale", 0.0),
        ("scale", float("nan")),
        ("rank_by", "size"),
        ("norm", "max"),
        ("tokens", "bytes"),
        ("stop_words", "klingon"),
    ],
)
def test_impossible_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"vocabulary\.{field} is .*expected .*;"):
        VocabularyConfig(**{field: value})  # type: ignore[arg-type]
