"""A process that streams an epoch and prints the most memory of its own that it had: for tests and by hand.

    python tests/stream_memory.py CORPUS [LANES ROWS_PER_LANE CHUNK_BYTES]

What is counted is ``RssAnon`` of /proc/self/status, read every millisecond: heap, stacks and buffers. Mapped
shards are ``RssFile``: pages of the operating system's cache, which it takes back as it likes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from distclust.corpus import stream
from distclust.corpus.order import Order, OrderConfig
from distclust.corpus.shards import Corpus
from distclust.corpus.stream import Stream, StreamConfig


def anonymous() -> int:
    """Bytes of memory of this process that no file is behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon in /proc/self/status")


def main(root: str, lanes: int = 8, rows_per_lane: int = 128, chunk_bytes: int = 0) -> None:
    torch.set_num_threads(1)
    stream.CHUNK_BYTES = chunk_bytes or stream.CHUNK_BYTES
    before, peak, done = anonymous(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=sample)
    watcher.start()
    started = time.perf_counter()
    corpus = Corpus.open(root)
    order = Order(corpus.shard_rows, OrderConfig(lanes=lanes, rows_per_lane=rows_per_lane), 0)
    rows = 0
    for batch in Stream(corpus, order, range(lanes), config=StreamConfig(resident_bytes=0)).epoch(0):
        rows += len(batch.rows)
        float(batch.values[:1].sum())
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    print(json.dumps({"rows": rows, "before": before, "peak": peak[0], "seconds": seconds}))


def measure(root: str | Path, *arguments: int) -> dict[str, float]:
    """What a process of its own found; see :func:`main`."""
    command = [sys.executable, __file__, str(root), *map(str, arguments)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
