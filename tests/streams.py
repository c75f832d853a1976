"""Streams over small corpora, for tests: an order of few rows a step, and shards that stay in their files."""

from __future__ import annotations

from distclust.corpus.order import Order, OrderConfig
from distclust.corpus.shards import Corpus
from distclust.corpus.stream import StreamConfig

MAPPED = StreamConfig(resident_bytes=0)


def order_of(corpus: Corpus, lanes: int = 6, rows: int = 3, window: int = 2) -> Order:
    return Order(corpus.shard_rows, OrderConfig(lanes=lanes, rows_per_lane=rows, window=window), seed=7)
