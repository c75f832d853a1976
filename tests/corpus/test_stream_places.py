"""Where a stream's rows lie: the shards a worker fetches, those it fetches ahead, and a corpus in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from corpora import make_corpus
from distclust.corpus import ahead, gather, stream
from distclust.corpus.ahead import shards_of_epoch, shards_of_scan
from distclust.corpus.cache import CacheConfig
from distclust.corpus.order import lanes_of_worker
from distclust.corpus.shards import Corpus
from distclust.corpus.stream import Stream, StreamConfig
from distclust.errors import DataError
from streams import MAPPED, order_of

# Where the data lies ----------------------------------------------------------------------------------------


def test_with_four_workers_a_shard_is_fetched_by_at_most_two(tmp_path: Path) -> None:
    """Each worker on a machine of its own, with a cache of its own: and what it copies."""
    fs = fsspec.filesystem("memory")
    try:
        make_corpus("memory://four/corpus", [16, 3, 0, 11, 16, 1, 16, 9, 16, 16, 2, 14])
        for epoch in range(3):
            fetched: list[str] = []
            for rank in range(4):
                cache_dir = tmp_path / f"{epoch}-{rank}"
                cached = CacheConfig(folder=str(cache_dir))
                corpus = Corpus.open("memory://four/corpus", cache_config=cached)
                order = order_of(corpus, lanes=8)
                lanes = lanes_of_worker(rank, 4, 8)
                assert sum(order.lane_sizes[lane] for lane in lanes) >= 16
                alone = StreamConfig(resident_bytes=0, fetch_threads=0)  # not the next epoch's as well
                for _ in Stream(corpus, order, lanes, config=alone).epoch(epoch):
                    pass
                assert corpus._cache is not None
                mine = corpus._cache.fetched
                wanted = {f"shard-{s:05d}.arrow" for lane in lanes for s in order.shards_of(epoch, lane)}
                assert sorted(mine) == sorted(wanted)
                fetched += mine
            assert max(fetched.count(name) for name in fetched) <= 2
            assert len(set(fetched)) == 11
    finally:
        fs.rm("/four", recursive=True)


def test_only_the_shards_of_the_window_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path, [8] * 24)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1)
    order = order_of(corpus, lanes=2, window=2)
    mapped = gather.Mapped(corpus)
    s = Stream(corpus, order, range(2), config=MAPPED)
    for chunk in s._epoch_chunks(0, 0):
        mapped.gather(np.concatenate([plan.rows for plan in chunk]))
        assert len(mapped._open) <= 2 * 2 * 2  # two lanes, each on the edge of two windows of two shards


@pytest.fixture
def bucket() -> Iterator[str]:
    yield "memory://ahead/corpus"
    fsspec.filesystem("memory").rm("/ahead", recursive=True)


def wait_for(condition: Callable[[], bool]) -> bool:
    for _ in range(400):
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("start", [0, 5, 30])
def test_what_is_fetched_ahead_is_what_will_be_read(tmp_path: Path, epoch: int, start: int) -> None:
    corpus = make_corpus(tmp_path, [9, 1, 0, 20, 6, 16, 16, 16, 3, 12])
    order = order_of(corpus, lanes=3, rows=1)
    for lanes in ([0], [1, 2], [0, 1, 2]):
        listed = shards_of_epoch(order, lanes, epoch, start)
        assert len(listed) == len(set(listed))
        rows = [order.lane_slice(epoch, lane, start, order.lane_sizes[lane]) for lane in lanes]
        needed = list(
            dict.fromkeys(corpus.locate(np.stack([r[:29] for r in rows]).T.reshape(-1))[0].tolist())
        )
        assert set(corpus.locate(np.concatenate(rows))[0]) <= set(listed)
        assert set(listed) <= {s for lane in lanes for s in order.shards_of(epoch, lane)}
        if start == 0:  # in order: the windows that come first are read first
            first = {s for lane in lanes for s in order.shards_of(epoch, lane)[:2]}
            assert set(listed[: len(first)]) == first
            assert set(needed[: len(first)]) <= set(listed)
        scanned = shards_of_scan(order, lanes)
        wanted = np.concatenate([np.array(order.scan_range(lane)) for lane in lanes])
        assert scanned == list(dict.fromkeys(corpus.locate(wanted)[0].tolist()))


def test_the_next_shards_are_fetched_while_these_are_read(bucket: str, tmp_path: Path) -> None:
    """First this epoch's next windows; at its end those that the next epoch begins with."""
    make_corpus(bucket, [8] * 24)
    corpus = Corpus.open(bucket, cache_config=CacheConfig(folder=str(tmp_path)))
    order = order_of(corpus, lanes=4, rows=2, window=1)
    own = corpus._cache
    assert own is not None
    s = Stream(corpus, order, [0, 1], config=StreamConfig(prefetch=0, resident_bytes=0))

    def named(epoch: int, windows: slice) -> set[str]:
        shards = [shard for lane in (0, 1) for shard in order.shards_of(epoch, lane)[windows]]
        return {f"shard-{shard:05d}.arrow" for shard in shards}

    batches = s.epoch(0)
    next(batches)  # of the first windows alone
    assert wait_for(lambda: named(0, slice(2)) <= set(own.fetched))
    assert not named(0, slice(3, None)) <= set(own.fetched)
    for batch in batches:
        if batch.step + 1 == order.steps_per_epoch:
            break
    assert wait_for(lambda: named(1, slice(1)) <= set(own.fetched))
    batches.close()
    assert wait_for(lambda: not [t for t in threading.enumerate() if t.name == ahead.NAME])
    assert set(own.fetched) <= named(0, slice(None)) | named(1, slice(None))


def test_no_more_is_fetched_ahead_than_a_window_and_half_the_cache(bucket: str, tmp_path: Path) -> None:
    corpus = make_corpus(bucket, [8] * 24)
    size = max(info.bytes for info in corpus.manifest.shards)
    for room, window, expected in ((100, 5, 5), (6, 5, 3)):
        config = CacheConfig(folder=str(tmp_path / str(room)), max_bytes=room * size)
        corpus = Corpus.open(bucket, cache_config=config)
        s = Stream(corpus, order_of(corpus, lanes=1, window=window), [0], config=MAPPED)
        found = s._ahead(0, 0)
        assert found is not None
        assert corpus._cache is not None
        fetched = corpus._cache.fetched
        assert wait_for(lambda fetched=fetched, n=expected: len(fetched) >= n)  # type: ignore[misc]
        time.sleep(0.05)
        assert len(fetched) == expected
        found.opened(found._shards[1])
        assert wait_for(lambda fetched=fetched, n=expected: len(fetched) >= n + 2)  # type: ignore[misc]
        found.close()


def test_a_failure_ahead_of_time_is_the_readers(bucket: str, tmp_path: Path) -> None:
    make_corpus(bucket, [8] * 6)
    fsspec.filesystem("memory").rm("/ahead/corpus/shard-00003.arrow")
    corpus = Corpus.open(bucket, cache_config=CacheConfig(folder=str(tmp_path)))
    with pytest.raises(DataError, match=r"shard-00003.arrow is missing"):
        list(Stream(corpus, order_of(corpus), range(6), config=MAPPED).epoch(0))


def test_the_rule_for_residence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a fixed size; on a GPU a share of what is free when the stream first reads."""
    corpus = make_corpus(tmp_path, [50, 50])
    size = gather.bytes_of(corpus)
    s = Stream(corpus, order_of(corpus), range(6))
    assert s._fits()
    monkeypatch.setattr(stream, "_RESIDENT_ON_CPU", size - 1)
    assert not Stream(corpus, order_of(corpus), range(6))._fits()
    for free, fits in ((4 * size, True), (4 * size - 4, False)):
        s = Stream(corpus, order_of(corpus), range(6), config=StreamConfig(resident_share=0.25))
        s.device = torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 8 * size))
        assert s._fits() == fits
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 8 * size))
        assert s._fits() == fits  # decided once


def test_a_large_corpus_is_not_made_resident(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [50, 50])
    size = gather.bytes_of(corpus)
    s = Stream(corpus, order_of(corpus), range(6), config=StreamConfig(resident_bytes=size - 1))
    list(s.epoch(0))
    assert s._resident is None
    s = Stream(corpus, order_of(corpus), range(6), config=StreamConfig(resident_bytes=size))
    list(s.epoch(0))
    assert s._resident is not None
