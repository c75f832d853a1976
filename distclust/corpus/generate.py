"""Generated corpora of any size, shaped like RCV1, straight to shards.

A document has one topic. Its number of words is lognormal; each word is drawn either from a background
shared by all topics or from its topic's own distribution, both Zipf-Mandelbrot (Mandelbrot 1953: the
frequency of rank r falls as 1/(r + q)), the topic's with its ranks dealt over the vocabulary by a permutation
of its own. Counts become (1 + log tf) * idf, with the idf that the model itself expects, so that no pass over
the documents is needed; rows get length 1 and are multiplied with the row scale.

A shard is a pure function of the configuration and its number: shards can be made in any order and in
parallel, and only one is held at a time in each process. Only uniform numbers are taken from numpy's PCG64
stream, since numpy does not promise that its other distributions stay the same from version to version.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distclust.corpus import cache
from distclust.corpus.manifest import Manifest, ShardInfo
from distclust.corpus.rows import RowCounts, corpus_schema
from distclust.corpus.shards import clear_unfinished, shard_name, write_manifest, write_shard
from distclust.errors import ConfigError

log = logging.getLogger(__name__)

RCV1_TERMS = 47_236
_BACKGROUND_Q, _TOPIC_Q = 50.0, 5.0
"""The q of the two Zipf-Mandelbrot laws: larger flattens the head. With these the most frequent term is in
about a fifth of the documents, and a topic's first word in about half of its own."""
_LENGTH_SIGMA = 0.5
"""Standard deviation of the logarithm of a document's number of words."""
_VERSION = 1
"""Goes into the fingerprint: to be raised when the same configuration gives other documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """A generated corpus. All fields but ``rows_per_shard`` say what its documents are."""

    rows: int
    """Documents."""
    terms: int = RCV1_TERMS
    """Columns. 47,236 is RCV1's vocabulary, 2,000 what is usually kept of it for clustering."""
    topics: int = 20
    """Labels ``topic-0000``, ...; topic k is drawn with a frequency proportional to 1/sqrt(k + 1)."""
    seed: int = 0
    nonzeros: float = 77.0
    """Mean distinct terms of a document; RCV1 has 76."""
    topic_share: float = 0.4
    """The share of a document's words that is drawn from its topic: 0 cannot be clustered at all."""
    row_scale: float = math.sqrt(2000.0)
    """Length of every row."""
    rows_per_shard: int = 16384
    """Documents in a file. Another number gives other documents."""

    def __post_init__(self) -> None:
        least = {"rows": 1, "terms": 2, "topics": 1, "seed": 0, "rows_per_shard": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(
                    f"{name} is {value!r}; expected a whole number of at least {minimum}: correct it."
                )
        if not 1 <= self.nonzeros <= self.terms / 2:
            raise ConfigError(
                f"nonzeros is {self.nonzeros}; expected 1 to {self.terms / 2:g}, half the terms: correct it."
            )
        if not 0 <= self.topic_share <= 1:
            raise ConfigError(f"topic_share is {self.topic_share}; expected 0 to 1: correct it.")
        if not 0 < self.row_scale < math.inf:
            raise ConfigError(f"row_scale is {self.row_scale}; expected a positive number: correct it.")

    @property
    def shards(self) -> int:
        """How many files the corpus has."""
        return -(-self.rows // self.rows_per_shard)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what the documents depend on."""
        text = json.dumps({"generator": _VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def generate_corpus(root: str | os.PathLike[str], config: GenerateConfig, workers: int = 1) -> Manifest:
    """Write a generated corpus, whole or without a manifest.

    Args:
        root: folder or fsspec URL. A corpus that this configuration gave is left as it is; what an unfinished
            run left is removed.
        config: what to generate.
        workers: processes that make shards side by side; the corpus is the same for any number.

    Raises:
        DataError: another corpus is there, or it cannot be written.
        ConfigError: fewer than one worker.

    Memory: one shard a process, about 200 MB for 16,384 rows of 77 non-zeros.
    """
    if workers < 1:
        raise ConfigError(f"{workers} workers; expected at least 1: correct it.")
    where = os.fspath(root)
    if (finished := _finished(where)) is not None and finished.source_fingerprint == config.fingerprint:
        log.info("%s already holds this generated corpus", where)
        return finished
    clear_unfinished(where)
    infos, counts = [], RowCounts()
    for info, count in _shards(where, config, workers):
        infos.append(info)
        counts += count
    manifest = Manifest(
        kind="sparse",
        n_rows=config.rows,
        n_features=config.terms,
        n_nonzeros=sum(info.nonzeros for info in infos),
        row_scale=config.row_scale,
        shards=tuple(infos),
        dtypes={field.name: str(field.type) for field in corpus_schema("sparse", config.terms)},
        source_fingerprint=config.fingerprint,
        options={"generated": asdict(config)},
        **counts.as_manifest(),
    )
    write_manifest(where, manifest)
    return manifest


def generate_shard(config: GenerateConfig, number: int) -> pa.Table:
    """The rows of one shard, with the columns of :func:`corpus_schema`.

    Raises:
        ValueError: there is no shard of that number.
    """
    if not 0 <= number < config.shards:
        raise ValueError(f"shard {number}; expected 0 to {config.shards - 1}")
    model = _model(config)
    first = number * config.rows_per_shard
    n_rows = min(config.rows_per_shard, config.rows - first)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([config.seed, number])))
    topics = np.searchsorted(model.topic_cdf, rng.random(n_rows), side="right")
    sizes = model.document_sizes(rng, n_rows)
    offsets, indices, counts = model.draw(rng, topics, sizes)
    lengths = np.diff(offsets)
    values = ((1 + np.log(counts)) * model.idf[indices]).astype(np.float32)
    squares = np.add.reduceat(values.astype(np.float64) ** 2, offsets[:-1])
    values *= np.repeat((config.row_scale / np.sqrt(squares)).astype(np.float32), lengths)
    names = pa.array([f"topic-{k:04d}" for k in range(config.topics)])
    labels = pa.ListArray.from_arrays(np.arange(n_rows + 1, dtype=np.int32), names.take(pa.array(topics)))
    columns = [
        pa.array(np.arange(first, first + n_rows)).cast(pa.string()),
        labels,
        pa.nulls(n_rows, pa.string()),
        pa.ListArray.from_arrays(offsets, indices),
        pa.ListArray.from_arrays(offsets, values),
    ]
    return pa.Table.from_arrays(columns, schema=corpus_schema("sparse", config.terms))


def _shards(root: str, config: GenerateConfig, workers: int) -> Iterator[tuple[ShardInfo, RowCounts]]:
    """Write all shards; what the manifest says of each, in order."""
    make = functools.partial(_write, root, config)
    if workers == 1:
        yield from map(make, range(config.shards))
        return
    # Spawned, not forked: the parent may have threads of torch or of a file system.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(make, range(config.shards))


def _write(root: str, config: GenerateConfig, number: int) -> tuple[ShardInfo, RowCounts]:
    table = generate_shard(config, number)
    info = write_shard(cache.join(root, shard_name(number)), table, config.terms)
    return info, RowCounts.of(table)


def _finished(root: str) -> Manifest | None:
    """The manifest of the corpus at ``root``, None where there is none."""
    try:
        if "manifest.json" not in cache.list_names(root):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Manifest.load(root)


class _Model:
    """What all shards of a configuration share."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        weights = np.arange(1, config.topics + 1) ** -0.5
        self.topic_cdf: NDArray[np.float64] = np.cumsum(weights / weights.sum())
        self.topic_cdf[-1] = 1.0
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([config.seed, 1 << 40])))
        # Topic k has at rank r the term (factor r + shift) mod terms: a permutation, for a coprime factor.
        factors = 1 + (rng.random(config.topics) * (config.terms - 1)).astype(np.int64)
        while (wrong := np.gcd(factors, config.terms) != 1).any():
            factors[wrong] = factors[wrong] % config.terms + 1
        self._factors: NDArray[np.int64] = factors
        self._shifts: NDArray[np.int64] = (rng.random(config.topics) * config.terms).astype(np.int64)
        self._background, self._topic = (_law(config.terms, q) for q in (_BACKGROUND_Q, _TOPIC_Q))
        self.words = self._words_for(config.nonzeros)
        """Mean words of a document."""
        share = np.diff(self.topic_cdf, prepend=0.0)
        found = sum(share[k] * self._chance(k, self.words) for k in range(config.topics))
        # scikit-learn's smoothed idf, with expected document frequencies
        self.idf: NDArray[np.float32] = (1 - np.log((1 + config.rows * found) / (1 + config.rows))).astype(
            np.float32
        )

    def document_sizes(self, rng: np.random.Generator, n_rows: int) -> NDArray[np.int64]:
        """(n_rows,) words of each document, at least one: Box and Muller's normal numbers, exponentiated."""
        radius = np.sqrt(-2 * np.log1p(-rng.random(n_rows)))
        normal = radius * np.cos(2 * np.pi * rng.random(n_rows))
        sizes = self.words * np.exp(_LENGTH_SIGMA * normal - _LENGTH_SIGMA**2 / 2)
        return np.maximum(1, np.rint(sizes)).astype(np.int64)

    def draw(
        self, rng: np.random.Generator, topics: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        """CSR offsets (n + 1,), terms (nnz,) rising in a row, and how often each was drawn (nnz,)."""
        terms, n_rows, total = self.config.terms, len(sizes), int(sizes.sum())
        of_topic = rng.random(total) < self.config.topic_share
        q = np.where(of_topic, _TOPIC_Q, _BACKGROUND_Q)
        ranks = (q * (np.exp(rng.random(total) * np.log((terms + q) / q)) - 1)).astype(np.int64)
        np.minimum(ranks, terms - 1, out=ranks)  # a product may round up to the end
        rows = np.repeat(np.arange(n_rows), sizes)
        own = topics[rows[of_topic]]
        ranks[of_topic] = (self._factors[own] * ranks[of_topic] + self._shifts[own]) % terms
        keys = rows * terms + ranks
        if n_rows * terms < 1 << 32:
            keys = keys.astype(np.uint32)  # half as much to sort
        keys.sort()
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        kept = keys[starts].astype(np.int64)
        offsets = np.searchsorted(kept, np.arange(n_rows + 1) * terms).astype(np.int32)
        return offsets, (kept % terms).astype(np.int32), np.diff(starts, append=total)

    def _chance(self, topic: int, words: float) -> NDArray[np.float64]:
        """(terms,) the share of a topic's documents that have each term, of ``words`` words in the mean."""
        share, terms = self.config.topic_share, self.config.terms
        places = (self._factors[topic] * np.arange(terms) + self._shifts[topic]) % terms
        p = (1 - share) * self._background
        p[places] += share * self._topic
        rate = np.log1p(-p)
        nodes, weights = np.polynomial.hermite_e.hermegauss(5)
        sizes = words * np.exp(_LENGTH_SIGMA * nodes - _LENGTH_SIGMA**2 / 2)
        parts = [w * -np.expm1(n * rate) for n, w in zip(sizes, weights / weights.sum(), strict=True)]
        return np.sum(parts, axis=0)

    def _words_for(self, nonzeros: float) -> float:
        """The mean number of words whose mean number of distinct ones is ``nonzeros``."""
        low, high = 1.0, 2.0
        while self._chance(0, high).sum() < nonzeros:
            low, high = high, 2 * high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self._chance(0, middle).sum() < nonzeros else (low, middle)
        return high


@functools.lru_cache(maxsize=4)
def _model(config: GenerateConfig) -> _Model:
    return _Model(config)


def _law(terms: int, q: float) -> NDArray[np.float64]:
    """(terms,) the chance of each rank: q (exp(u log((terms + q) / q)) - 1), u uniform, rounded down."""
    bounds = np.log(np.arange(terms + 1) + q)
    return np.diff(bounds) / (bounds[-1] - bounds[0])
