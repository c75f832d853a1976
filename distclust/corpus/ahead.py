"""The shards that come next, copied to this machine and checked while those before them are read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from distclust.corpus.order import Order
from distclust.corpus.shards import Corpus
from distclust.errors import DataError

log = logging.getLogger(__name__)
NAME = "distclust-fetch"
"""Name of the threads."""


class Ahead:
    """Keeps the next shards of a sequence at hand.

    Args:
        corpus: whose shards.
        shards: numbers of the shards in the order of their first use, each once.
        then: gives what follows them (the next epoch), asked for when its turn comes.
        window: how many shards beyond the last one that was opened are fetched.
        threads: how many are fetched side by side.

    A failure is only logged: whoever opens the shard meets it again, and decides. Threads are not waited for;
    after :meth:`close` each ends with the shard that it is fetching.
    """

    def __init__(
        self,
        corpus: Corpus,
        shards: Sequence[int],
        window: int,
        threads: int,
        then: Callable[[], Iterable[int]] = tuple,
    ) -> None:
        self.corpus = corpus
        self._shards, self._then = list(shards), then
        self._places = {number: place for place, number in enumerate(self._shards)}
        self._window = window
        self._taken = self._opened = 0  # places of the next shard to fetch and of the next to open
        self._continued = self._closed = False
        self._change = threading.Condition()
        for _ in range(threads if self._shards else 0):
            threading.Thread(target=self._work, name=NAME, daemon=True).start()

    def opened(self, number: int) -> None:
        """A shard is in use now: the window moves on."""
        with self._change:
            place = self._places.get(number, -1) + 1
            if place > self._opened:
                self._opened = place
                self._change.notify_all()

    def close(self) -> None:
        """Fetch nothing more."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def _work(self) -> None:
        while (number := self._next()) is not None:
            try:
                self.corpus.fetch(number)
            except (DataError, OSError) as error:
                log.info("a shard could not be fetched ahead of time: %s", error)

    def _next(self) -> int | None:
        with self._change:
            while not self._closed and self._taken >= self._opened + self._window:
                self._change.wait()
            if self._taken >= len(self._shards) and not self._continued:
                self._continued = True
                self._shards.extend(self._then())
            if self._closed or self._taken >= len(self._shards):
                return None
            self._taken += 1
            return self._shards[self._taken - 1]


def shards_of_epoch(order: Order, lanes: Sequence[int], epoch: int, start_row: int = 0) -> list[int]:
    """The shards that these lanes read from place ``start_row`` of each on, roughly in order of first use.

    Lanes are as long as each other and advance together, so their first windows come first, then their
    second ones. A lane may be cut in the middle of a shard; whether a window lies before ``start_row`` is
    decided as if it were not, so one that is over may be among them, and none that is wanted is missing.
    """
    windows: list[tuple[int, list[int]]] = []
    step = order.config.window
    for lane in lanes:
        shards = order.shards_of(epoch, lane)
        end = 0
        for number, first in enumerate(range(0, len(shards), step)):
            part = shards[first : first + step]
            end += int(order.shard_rows[part].sum())
            if end > start_row:
                windows.append((number, part))
    windows.sort(key=lambda window: window[0])
    return list(dict.fromkeys(shard for _, part in windows for shard in part))


def shards_of_scan(order: Order, lanes: Sequence[int]) -> list[int]:
    """The shards that these lanes read in file order, in order of first use."""
    found: dict[int, None] = {}
    for span in map(order.scan_range, lanes):
        if len(span):
            first = int(order.shard_starts.searchsorted(span.start, side="right")) - 1
            last = int(order.shard_starts.searchsorted(span.stop, side="left"))
            found |= dict.fromkeys(n for n in range(first, last) if order.shard_rows[n])
    return list(found)
