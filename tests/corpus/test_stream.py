"""The stream: the order's rows with the file's values, on any number of workers, from any place."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corpora import dense_rows, make_corpus
from distclust.corpus import gather, stream
from distclust.corpus.order import Order, OrderConfig, lanes_of_worker
from distclust.corpus.shards import Corpus
from distclust.corpus.stream import Batch, Stream, StreamConfig
from distclust.errors import ConfigError, DataError
from streams import MAPPED, order_of

AWKWARD = {
    "one row": [1],
    "fewer rows than lanes": [2, 1],
    "a shard of one row": [7, 1, 12],
    "an empty shard": [5, 0, 9],
    "last short batch": [10, 10, 3],
    "one large shard": [53],
    "uneven": [1, 40, 2, 0, 17, 3],
}
PLACES = {"mapped": 0, "resident": 1 << 20}
MAPPED_NOW = StreamConfig(prefetch=0, resident_bytes=0)


def as_dense(batch: Batch, n_features: int) -> np.ndarray:
    if batch.offsets is None:
        return batch.values.numpy()
    assert batch.indices is not None
    out = np.zeros((len(batch.rows), n_features), np.float32)
    for row in range(len(out)):
        span = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        out[row, batch.indices[span].numpy()] = batch.values[span].numpy()
    return out


def same(one: Batch, other: Batch) -> bool:
    tensors = zip(one[5:], other[5:], strict=True)
    return one[:5] == other[:5] and all(
        torch.equal(a, b) and a.dtype == b.dtype
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a is b
        for a, b in tensors
    )


def assert_same(batches: Iterable[Batch], expected: Iterable[Batch]) -> None:
    for one, other in zip(batches, expected, strict=True):
        assert same(one, other)


def ids_by_step(corpus: Corpus, streams: Iterable[Stream], epoch: int, start: int = 0) -> list[list[str]]:
    """The ids of each step, worker after worker."""
    ids = [i for number in range(len(corpus.shard_rows)) for i in corpus.shard(number).ids()]
    runs = [list(s.epoch(epoch, start)) for s in streams]
    return [[ids[int(r)] for batch in batches for r in batch.rows] for batches in zip(*runs, strict=True)]


def workers(corpus: Corpus, world: int, resident_bytes: int = 0, lanes: int = 6) -> list[Stream]:
    order = order_of(corpus, lanes)
    shares = [lanes_of_worker(rank, world, lanes) for rank in range(world)]
    return [
        Stream(corpus, order, share, config=StreamConfig(resident_bytes=resident_bytes)) for share in shares
    ]


# The same rows, whoever asks --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("shard_rows", AWKWARD.values(), ids=AWKWARD.keys())
def test_ids_are_the_same_on_any_number_of_workers(
    tmp_path: Path, shard_rows: list[int], kind: str, place: str
) -> None:
    corpus = make_corpus(tmp_path, shard_rows, kind=kind)
    for epoch in (0, 1):
        alone = ids_by_step(corpus, workers(corpus, 1, PLACES[place]), epoch)
        assert sorted(i for ids in alone for i in ids) == sorted(f"doc-{r}" for r in range(corpus.n_rows))
        for world in (2, 3):
            assert ids_by_step(corpus, workers(corpus, world, PLACES[place]), epoch) == alone


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_resumed_epoch_goes_on_exactly(tmp_path: Path, world: int) -> None:
    """After every step of a short run, by the same or another number of workers."""
    corpus = make_corpus(tmp_path, [9, 1, 0, 20, 6])
    whole = ids_by_step(corpus, workers(corpus, 1), 1)
    for step in range(len(whole) + 1):
        assert ids_by_step(corpus, workers(corpus, world), 1, step) == whole[step:]


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("shard_rows", AWKWARD.values(), ids=AWKWARD.keys())
def test_batches_hold_the_rows_of_the_file(tmp_path: Path, shard_rows: list[int], kind: str) -> None:
    corpus = make_corpus(tmp_path, shard_rows, kind=kind)
    expected = dense_rows(corpus)
    order = order_of(corpus)
    for resident_bytes in PLACES.values():
        s = Stream(corpus, order, range(2, 6), config=StreamConfig(resident_bytes=resident_bytes))
        for step, batch in enumerate(s.epoch(3)):
            assert (batch.epoch, batch.step, batch.lanes) == (3, step, (2, 3, 4, 5))
            assert batch.rows_in_step == order.rows_in_step(3, step)
            parts = [order.rows(3, step, lane) for lane in batch.lanes]
            assert batch.lane_rows == tuple(map(len, parts))
            assert batch.rows.tolist() == np.concatenate(parts).tolist()
            assert batch.rows.dtype == torch.int64
            assert batch.values.dtype == torch.float32
            np.testing.assert_array_equal(as_dense(batch, 50), expected[batch.rows.numpy()])
            if kind == "sparse":
                assert batch.offsets is not None
                assert batch.indices is not None
                assert batch.offsets.dtype == batch.indices.dtype == torch.int32
                assert batch.offsets[0] == 0
                assert batch.offsets[-1] == len(batch.indices) == len(batch.values)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_every_path_gives_the_same_batches(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped or resident, with or without a thread, gathered a step or many at a time: bit for bit."""
    corpus = make_corpus(tmp_path, [30, 1, 64, 0, 25], kind=kind)
    order = order_of(corpus)
    expected = list(Stream(corpus, order, range(6), config=MAPPED_NOW).epoch(0))
    scanned = list(Stream(corpus, order, range(6), config=MAPPED_NOW).scan(7))
    for chunk_bytes in (1, 2000, 1 << 22):
        monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
        for prefetch in (0, 1, 3):
            for resident_bytes in PLACES.values():
                s = Stream(
                    corpus,
                    order,
                    range(6),
                    config=StreamConfig(prefetch=prefetch, resident_bytes=resident_bytes),
                )
                assert_same(s.epoch(0), expected)
                assert_same(s.scan(7), scanned)


def test_the_numpy_kernel_is_the_scipy_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path, [30, 1, 64, 0, 25])
    order = order_of(corpus)
    assert gather._csr_row_index is not None
    expected = list(Stream(corpus, order, range(6), config=MAPPED).epoch(0))
    monkeypatch.setattr(gather, "_csr_row_index", None)
    assert_same(Stream(corpus, order, range(6), config=MAPPED).epoch(0), expected)


def test_rows_gathered_on_the_device_are_the_same(tmp_path: Path) -> None:
    """The arithmetic of the GPU's resident path, run on the CPU."""
    for kind in ("sparse", "dense"):
        corpus = make_corpus(tmp_path / kind, [30, 1, 0, 25], kind=kind)
        host, device = gather.Resident(corpus), gather.ResidentOnDevice(corpus, torch.device("cpu"))
        for rows in (np.array([5, 5, 55, 0, 31, 6]), np.empty(0, np.int64), np.arange(56)):
            for got, wanted in zip(device.gather(rows), host.gather(rows), strict=True):
                assert got is wanted is None or (
                    np.array_equal(got.numpy(), wanted) and got.numpy().dtype == wanted.dtype
                )


def test_batches_outlive_the_next_ones(tmp_path: Path) -> None:
    """Memory is used again only when nothing looks at it."""
    for kind in ("sparse", "dense"):
        corpus = make_corpus(tmp_path / kind, [200], kind=kind)
        s = Stream(corpus, order_of(corpus), range(6), config=MAPPED)
        kept = [(batch, as_dense(batch, 50).copy()) for batch in s.epoch(0)]
        for _ in s.epoch(1):
            pass
        for batch, content in kept:
            np.testing.assert_array_equal(as_dense(batch, 50), content)


def test_memory_of_dead_batches_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path, [600])
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1)
    s = Stream(corpus, order_of(corpus), range(6), config=MAPPED_NOW)
    places = {batch.indices.data_ptr() for batch in s.epoch(0) if batch.indices is not None}
    assert s.order.steps_per_epoch > 30
    assert len(places) < 10


def test_a_worker_without_rows_takes_every_step(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [4])
    order = order_of(corpus, lanes=8)
    idle = next(lane for lane in range(8) if order.lane_sizes[lane] == 0)
    for resident_bytes in PLACES.values():
        for lanes in ([idle], []):
            (batch,) = Stream(corpus, order, lanes, config=StreamConfig(resident_bytes=resident_bytes)).epoch(
                0
            )
            assert batch.lane_rows == (0,) * len(lanes)
            assert batch.rows_in_step == 4
            assert batch.rows.shape == batch.values.shape == (0,)
            assert batch.offsets is not None
            assert batch.offsets.tolist() == [0]
            assert (
                list(Stream(corpus, order, lanes, config=StreamConfig(resident_bytes=resident_bytes)).scan())
                == []
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_batches_on_a_gpu_are_the_same(tmp_path: Path, kind: str, place: str) -> None:
    corpus = make_corpus(tmp_path, [30, 1, 64, 0, 25], kind=kind)
    order = order_of(corpus)
    expected = Stream(corpus, order, range(6)).epoch(0)
    s = Stream(corpus, order, range(6), device="cuda", config=StreamConfig(resident_bytes=PLACES[place]))
    for batch, wanted in zip(s.epoch(0), expected, strict=True):
        tensors = [t if t is None else t.cpu() for t in batch[5:]]
        assert all(t.is_cuda for t in batch[5:] if t is not None)
        assert same(Batch(*batch[:5], *tensors), wanted)


# Scan and gather --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_scan_covers_each_row_once_in_file_order(tmp_path: Path, world: int, place: str) -> None:
    corpus = make_corpus(tmp_path, [9, 1, 0, 20, 6])
    expected = dense_rows(corpus)
    seen: list[int] = []
    for s in workers(corpus, world, PLACES[place]):
        lanes_seen = []
        for batch in s.scan(4):
            (lane,) = batch.lanes
            lanes_seen.append(lane)
            assert batch.lane_rows == (len(batch.rows),)
            assert 1 <= len(batch.rows) <= 4
            assert (batch.epoch, batch.step, batch.rows_in_step) == (0, 0, 0)
            np.testing.assert_array_equal(as_dense(batch, 50), expected[batch.rows.numpy()])
            seen += batch.rows.tolist()
        assert lanes_seen == sorted(lanes_seen)
        assert set(lanes_seen) == set(s.lanes)
    assert seen == list(range(36))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_gather_takes_rows_as_they_come(tmp_path: Path, kind: str, place: str) -> None:
    corpus = make_corpus(tmp_path, [9, 1, 0, 20, 6], kind=kind)
    s = Stream(corpus, order_of(corpus), [], config=StreamConfig(resident_bytes=PLACES[place]))
    for rows in ([35, 0, 9, 9, 10, 30], [3], list(range(36)), []):
        batch = s.gather(rows)
        assert batch.rows.tolist() == rows
        np.testing.assert_array_equal(as_dense(batch, 50), dense_rows(corpus)[rows])
    for rows in ([36], [-1]):
        with pytest.raises(DataError, match="expected 0 to 35"):
            s.gather(rows)


# The thread -------------------------------------------------------------------------------------------------


def prefetching() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "distclust-prefetch"]


def test_an_error_in_the_thread_reaches_the_consumer(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [20] * 6)
    path = tmp_path / "shard-00004.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for prefetch in (0, 2):
        s = Stream(
            corpus, order_of(corpus), range(6), config=StreamConfig(prefetch=prefetch, resident_bytes=0)
        )
        with pytest.raises(DataError, match=r"shard-00004.arrow has sha256"):
            list(s.epoch(0))
        with pytest.raises(DataError, match=r"shard-00004.arrow"):
            list(Stream(corpus, order_of(corpus), range(6), config=StreamConfig(prefetch=prefetch)).epoch(0))
    assert prefetching() == []


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_early_stops_the_thread(tmp_path: Path, taken: int) -> None:
    corpus = make_corpus(tmp_path, [200])
    s = Stream(corpus, order_of(corpus), range(6), config=MAPPED)
    batches = s.epoch(0)
    for _ in range(taken):
        next(batches)
    assert len(prefetching()) == (taken > 0)
    batches.close()
    assert prefetching() == []


def test_an_abandoned_epoch_stops_its_thread(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [200])
    s = Stream(corpus, order_of(corpus), range(6), config=MAPPED)
    for batch in s.epoch(0):
        assert batch.step == 0
        break
    gc.collect()
    assert prefetching() == []


def test_a_consumer_that_fails_stops_the_thread(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [200])

    def consume() -> None:
        for batch in Stream(corpus, order_of(corpus), range(6), config=MAPPED).epoch(0):
            raise RuntimeError(f"step {batch.step}")

    with pytest.raises(RuntimeError, match="step 0"):
        consume()
    gc.collect()
    assert prefetching() == []


def test_no_more_than_prefetch_batches_are_made_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(tmp_path, [300])
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1)
    s = Stream(corpus, order_of(corpus), range(6), config=StreamConfig(prefetch=2, resident_bytes=0))
    asked: list[int] = []
    chunks = s._epoch_chunks

    def counted(epoch: int, start_step: int) -> Iterator[list[stream._Plan]]:
        for chunk in chunks(epoch, start_step):
            asked.append(chunk[0].step)
            yield chunk

    monkeypatch.setattr(s, "_epoch_chunks", counted)
    batches = s.epoch(0)
    next(batches)
    for _ in range(200):
        time.sleep(0.05)
        if len(asked) >= 4:
            break
    time.sleep(0.1)
    # one taken, two in the queue, one in the thread's hand
    assert asked == [0, 1, 2, 3]
    batches.close()
    assert len(asked) <= 5 < s.order.steps_per_epoch  # nor is the rest made to be thrown away


def test_two_epochs_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [30, 1, 64, 0, 25])
    s = Stream(corpus, order_of(corpus), range(6), config=MAPPED)
    expected = [list(s.epoch(0)), list(s.epoch(1))]
    for one, two, first, second in zip(s.epoch(0), s.epoch(1), *expected, strict=True):
        assert same(one, first)
        assert same(two, second)
        s.gather([0, 119])


def test_waiting_is_measured(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [200])
    s = Stream(corpus, order_of(corpus), range(6), config=MAPPED)
    started = time.perf_counter()
    assert s.waited_s == 0
    for number, _ in enumerate(s.epoch(0)):
        if number == 0:
            first = s.waited_s
            assert 0 < first <= time.perf_counter() - started
            s.waited_s = 0.0
            time.sleep(0.05)  # the consumer's own time is none of it
    assert 0 < s.waited_s < time.perf_counter() - started - 0.05


def test_impossible_streams_are_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [10, 10])
    order = order_of(corpus)
    with pytest.raises(ConfigError, match="other shards"):
        Stream(corpus, Order([20], OrderConfig(), 0), [0])
    for lanes in ([1, 0], [0, 0], [6], [-1]):
        with pytest.raises(ConfigError, match="lanes"):
            Stream(corpus, order, lanes)
    with pytest.raises(ConfigError, match="prefetch"):
        Stream(corpus, order, [0], config=StreamConfig(prefetch=-1))
    with pytest.raises(ValueError, match="start step 3"):
        Stream(corpus, order, [0]).epoch(0, 3)
    with pytest.raises(ValueError, match="0 rows per batch"):
        Stream(corpus, order, [0]).scan(0)


@pytest.mark.parametrize(
    "change",
    [{"prefetch": -1}, {"resident_bytes": 1.5}, {"resident_share": 1.5}, {"fetch_threads": True}],
    ids=str,
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"stream.{next(iter(change))}"):
        StreamConfig(**change)
