"""The cache of remote shards: its limit, what is kept, and which failures are tried again."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from corpora import make_corpus
from distclust.corpus import cache
from distclust.corpus.cache import CacheConfig, ShardCache, retrying
from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError, DataError

SHARDS = 8


@pytest.fixture
def bucket() -> Iterator[str]:
    make_corpus("memory://cache/corpus", [20] * SHARDS)
    yield "memory://cache/corpus"
    fsspec.filesystem("memory").rm("/cache", recursive=True)


def size_of(url: str) -> int:
    return max(info.bytes for info in Corpus.open(url).manifest.shards)


def opened(url: str, folder: Path, shards: float = 100) -> Corpus:
    """The corpus with a cache that has room for so many shards."""
    config = CacheConfig(folder=str(folder), max_bytes=int(size_of(url) * shards), backoff_s=0.001)
    return Corpus.open(url, cache_config=config)


def kept(folder: Path) -> set[int]:
    return {int(path.stem[-5:]) for path in folder.rglob("*.arrow")}


# The limit --------------------------------------------------------------------------------------------------


def test_the_shards_used_longest_ago_go(bucket: str, tmp_path: Path) -> None:
    corpus = opened(bucket, tmp_path, 3)
    for number in (0, 1, 2, 0, 3):
        corpus.shard(number)
        time.sleep(0.002)  # uses at different times
    assert kept(tmp_path) == {0, 2, 3}
    corpus.fetch(4)
    assert kept(tmp_path) == {0, 3, 4}


def test_a_mapped_shard_stays(bucket: str, tmp_path: Path) -> None:
    corpus = opened(bucket, tmp_path, 2)
    values = corpus.shard(0).values  # the array alone keeps it
    assert values is not None
    content = values.copy()
    for number in range(1, SHARDS):
        corpus.shard(number)
        assert kept(tmp_path) == {0, number}
    np.testing.assert_array_equal(values, content)
    del values
    corpus.shard(1)
    assert kept(tmp_path) == {1, SHARDS - 1}


def test_no_room_beside_what_is_in_use_is_said_at_once(bucket: str, tmp_path: Path) -> None:
    corpus = opened(bucket, tmp_path, 2.5)
    held = [corpus.shard(0), corpus.shard(1)]
    with pytest.raises(DataError, match=r"no room for memory://.*shard-00002.*cache.max_bytes to at least"):
        corpus.shard(2)
    assert kept(tmp_path) == {0, 1}
    held.pop()
    assert corpus.shard(2).n_rows == 20
    with pytest.raises(DataError, match="no room"):
        opened(bucket, tmp_path / "other", 0.5).shard(0)


def test_the_limit_holds_for_all_processes_and_corpora_together(bucket: str, tmp_path: Path) -> None:
    """Each thread with a cache of its own: locks are between open files, so as between processes."""
    other = "memory://cache/other"
    make_corpus(other, [20] * SHARDS, seed=1)
    limit = 9 * max(  # four readers have up to two shards open: the last and the next
        size_of(bucket), size_of(other)
    )
    config = CacheConfig(folder=str(tmp_path), max_bytes=limit)
    largest = [0]
    folder_lock = Path(config.place) / "folder.lock"
    folder_lock.parent.mkdir()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            with cache._lock(str(folder_lock)):  # while nothing is removed and no room is given away
                found = [_size(path) for path in tmp_path.rglob("*") if not path.name.endswith(".lock")]
            largest[0] = max(largest[0], sum(dict(found).values()))
            time.sleep(0.001)

    def read(worker: int) -> float:
        rng = np.random.default_rng(worker)
        corpus = Corpus.open((bucket, other)[worker % 2], cache_config=config)
        total = 0.0
        for number in rng.permutation(np.tile(np.arange(SHARDS), 4)):
            values = corpus.shard(int(number)).values
            assert values is not None
            total += float(values.sum(dtype=np.float64))
        return total

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            totals = list(pool.map(read, range(4)))
    finally:
        done.set()
        watcher.join()
    for url, total in zip((bucket, other), totals, strict=False):
        plain = opened(url, tmp_path / "plain")
        values = [plain.shard(number).values for number in range(SHARDS)]
        assert total == pytest.approx(4 * sum(float(v.sum(dtype=np.float64)) for v in values))  # type: ignore
    assert totals[:2] == pytest.approx(totals[2:])
    assert limit / 2 < largest[0] <= limit


def _size(path: Path) -> tuple[int, int]:
    """Inode, which a file keeps when it gets its name, and size."""
    try:
        return (path.stat().st_ino, path.stat().st_size) if path.is_file() else (0, 0)
    except FileNotFoundError:
        return 0, 0


def test_what_a_dead_process_was_fetching_is_removed(bucket: str, tmp_path: Path) -> None:
    corpus = opened(bucket, tmp_path, 2)
    corpus.shard(0)
    assert corpus._cache is not None
    mark = Path(corpus._cache.folder) / f".fetching-{2 * size_of(bucket)}-dead"
    mark.touch()
    part = mark.with_name(mark.name + ".part")
    part.write_bytes(b"half")
    corpus.shard(1)
    assert kept(tmp_path) == {0, 1}  # what it had reserved counts no more
    assert not mark.exists()
    assert not part.exists()


def test_room_that_another_process_has_reserved_is_not_taken(bucket: str, tmp_path: Path) -> None:
    corpus = opened(bucket, tmp_path, 2)
    corpus.shard(0)
    assert corpus._cache is not None
    with corpus._cache._reserved("another", corpus._cache.folder, size_of(bucket)):
        corpus.shard(1)
        assert kept(tmp_path) == {1}
    assert corpus.shard(0).n_rows == 20
    assert kept(tmp_path) == {0, 1}


def test_using_a_shard_does_not_have_it_checked_again(bucket: str, tmp_path: Path) -> None:
    corpus = opened(bucket, tmp_path)
    corpus.shard(0)
    (path,) = tmp_path.rglob("*.arrow")
    before = path.stat()
    time.sleep(0.01)
    corpus.shard(0)
    after = path.stat()
    assert after.st_mtime_ns == before.st_mtime_ns
    assert after.st_atime_ns > before.st_atime_ns


# Failures ---------------------------------------------------------------------------------------------------


class Flaky:
    """Fails as often as it is told to."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "content"


class Answered(Exception):
    """A file system's own exception, which carries the server's answer."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the server said {status}")
        self.status = status


class NoCredentialsError(Exception):
    pass


def wrapped(error: Exception) -> OSError:
    outer = OSError("something")
    outer.__cause__ = error
    return outer


PASSING = [OSError("reset"), TimeoutError("late"), Answered(503), Answered(429), wrapped(Answered(500))]
DENIED = [PermissionError("no"), Answered(403), Answered(401), wrapped(Answered(403)), NoCredentialsError()]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_tried_again(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    config = CacheConfig(attempts=3, backoff_s=0.001)
    flaky = Flaky(error, 2)
    assert retrying(flaky, "s3://a/b", config) == "content"
    assert flaky.calls == 3
    assert [r.getMessage().split(";")[0] for r in caplog.records] == [
        "attempt 1 of 3 for s3://a/b failed",
        "attempt 2 of 3 for s3://a/b failed",
    ]
    flaky = Flaky(error, 3)
    with pytest.raises(DataError, match=r"s3://a/b: attempt 3 of 3 failed"):
        retrying(flaky, "s3://a/b", config)
    assert flaky.calls == 3


@pytest.mark.parametrize("error", DENIED, ids=repr)
def test_denied_access_is_final(error: Exception) -> None:
    flaky = Flaky(error, 9)
    with pytest.raises(DataError, match=r"access to s3://a/b is denied .*credentials.*endpoint"):
        retrying(flaky, "s3://a/b", CacheConfig(attempts=5))
    assert flaky.calls == 1


def test_a_full_disk_is_final() -> None:
    flaky = Flaky(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 9)
    with pytest.raises(DataError, match=r"No space left.*lower cache.max_bytes"):
        retrying(flaky, "s3://a/b", CacheConfig())
    assert flaky.calls == 1


def test_waits_double_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cache.time, "sleep", waits.append)
    config = CacheConfig(attempts=8, backoff_s=1, max_backoff_s=10)
    with caplog.at_level(logging.ERROR):
        retrying(Flaky(OSError("reset"), 7), "s3://a/b", config)
    assert len(waits) == 7
    for wait, longest in zip(waits, (1, 2, 4, 8, 10, 10, 10), strict=True):
        assert longest / 2 <= wait <= longest
    assert len(set(waits)) == 7  # workers that failed together do not come back together


def test_a_file_that_is_changed_at_its_source_is_asked_for_twice(bucket: str, tmp_path: Path) -> None:
    corpus = opened(bucket, tmp_path)
    info = corpus.manifest.shards[0]
    asked = ShardCache(bucket, "f", CacheConfig(folder=str(tmp_path), attempts=5, backoff_s=0.001))
    with pytest.raises(DataError, match=r"shard-00000.arrow arrived with .*or was changed"):
        asked.open(info.file, info.bytes, "0" * 64)
    assert list(tmp_path.rglob("*.arrow")) == list(tmp_path.rglob(".fetching*")) == []


@pytest.mark.parametrize(
    "change",
    [{"max_bytes": 0}, {"max_bytes": 1e9}, {"attempts": 0}, {"attempts": True}, {"backoff_s": -1.0}],
    ids=str,
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"cache.{next(iter(change))}"):
        CacheConfig(**change)


def test_where_copies_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.CACHE_VARIABLE, raising=False)
    assert CacheConfig().place == str(Path.home() / ".cache" / "distclust" / "shards")
    monkeypatch.setenv(cache.CACHE_VARIABLE, "/v")
    assert CacheConfig().place == "/v/shards"
    assert CacheConfig(folder="/f").place == "/f/shards"
