"""Which rows form (epoch, step, lane): a pure function of the seed.

The permuted sequence of shards of an epoch is cut into ``lanes`` contiguous lanes of equal rows, give or
take one. A lane shuffles its rows inside a window of a few shards, and a step takes the next
``rows_per_lane`` rows of every lane. A worker owns whole lanes, so the order is the same on any number of
workers, a position is the two integers (epoch, step), and a worker reads only the shards of its own lanes.

Nothing here depends on a library's random stream: a permutation sorts 64-bit hashes (SplitMix64: Steele, Lea
and Flood 2014) of (seed, epoch, what is being shuffled, place). A run that was started with one version of
numpy can therefore be continued with another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distclust.errors import ConfigError, DataError

# What a key is for. The numbers are part of the order: changing one changes every run.
_SHARDS, _SPLIT, _WINDOW = 1, 2, 3
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """How the documents of an epoch are dealt into steps. Changing a field is another run."""

    lanes: int = 8
    """Lanes that an epoch is cut into: at least the largest number of workers of this run."""
    rows_per_lane: int = 32
    """Rows that a step takes of each lane; a step has ``lanes * rows_per_lane`` documents."""
    window: int = 4
    """Shards among which a lane shuffles its rows: larger mixes better and touches more files at a time."""

    def __post_init__(self) -> None:
        for name in ("lanes", "rows_per_lane", "window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"order.{name} is {value!r}; expected a whole number of at least 1: correct it."
                )


class Piece(NamedTuple):
    """A lane's part of one shard: places ``start`` to ``stop`` of the shard in this epoch."""

    shard: int
    start: int
    stop: int
    whole: bool


class _Lane(NamedTuple):
    pieces: list[Piece]
    window_starts: NDArray[np.int64]  # (windows + 1,) places in the lane


class Order:
    """The order of all rows in every epoch.

    Args:
        shard_rows: (n_shards,) rows of each shard, in manifest order; zeros are allowed.
        config: lanes, rows per lane and window.
        seed: 0 <= seed < 2**63.

    Raises:
        ConfigError: for a seed out of range.
        DataError: when there are no rows at all, or a negative count.

    A shard that a lane boundary cuts is dealt out by a permutation of its rows, so a corpus of few shards
    whose documents lie sorted (by date, by class) still gives every lane a random sample. A shard inside one
    lane needs none: the window shuffles it. Memory: O(shards) for the plan of the current epoch and, for each
    lane that is asked for, the row numbers of one window.
    """

    def __init__(self, shard_rows: Sequence[int] | NDArray[np.int64], config: OrderConfig, seed: int) -> None:
        counts = np.asarray(shard_rows, dtype=np.int64).reshape(-1)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
            raise ConfigError(f"seed is {seed!r}; expected a whole number from 0 to 2**63 - 1: correct it.")
        if counts.size and counts.min() < 0:
            raise DataError(f"a shard has {counts.min()} rows; expected 0 or more: the manifest is damaged.")
        if counts.sum() == 0:
            raise DataError(
                "the corpus has no documents; expected at least one: check what it was prepared from."
            )
        self.shard_rows = counts
        self.config = config
        self.seed = seed
        self.n_rows = int(counts.sum())
        self.shard_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])  # (n_shards + 1,)
        bounds = [lane * self.n_rows // config.lanes for lane in range(config.lanes + 1)]
        self._bounds = bounds
        self.lane_sizes: tuple[int, ...] = tuple(b - a for a, b in pairwise(bounds))
        self.steps_per_epoch: int = -(-max(self.lane_sizes) // config.rows_per_lane)
        # Entries are replaced whole: a reader in another thread sees the old or the new one, never a mixture.
        self._plan: tuple[int, list[_Lane]] | None = None
        self._windows: dict[int, tuple[int, int, NDArray[np.int64]]] = {}

    def lanes_of_worker(self, rank: int, world_size: int) -> range:
        """The lanes of one worker; see :func:`lanes_of_worker`."""
        return lanes_of_worker(rank, world_size, self.config.lanes)

    def rows_in_step(self, epoch: int, step: int) -> int:
        """Rows of a step over all lanes, so over all workers. The last step of an epoch may be short."""
        start = step * self.config.rows_per_lane
        return sum(min(max(size - start, 0), self.config.rows_per_lane) for size in self.lane_sizes)

    def shards_of(self, epoch: int, lane: int) -> list[int]:
        """Shards that a lane reads in an epoch, in the order it reads them."""
        return [piece.shard for piece in self._lane(epoch, lane).pieces]

    def lane_rows(self, epoch: int, lane: int) -> Iterator[NDArray[np.int64]]:
        """The lane's global row numbers in order, one array a window: concatenated, the whole lane."""
        for window in range(len(self._lane(epoch, lane).window_starts) - 1):
            yield self._window_rows(epoch, lane, window)

    def rows(self, epoch: int, step: int, lane: int) -> NDArray[np.int64]:
        """(<= rows_per_lane,) global row numbers of the lane in the step; empty when it has none left."""
        start = step * self.config.rows_per_lane
        return self.lane_slice(epoch, lane, start, start + self.config.rows_per_lane)

    def lane_slice(self, epoch: int, lane: int, start: int, stop: int) -> NDArray[np.int64]:
        """(<= stop - start,) global row numbers at places ``start`` to ``stop`` of the lane."""
        starts = self._lane(epoch, lane).window_starts
        stop = min(stop, self.lane_sizes[lane])
        if start < 0:
            raise ValueError(f"place {start} in a lane; expected 0 or more")
        if start >= stop:
            return np.empty(0, np.int64)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left")) - 1
        parts = []
        for window in range(first, last + 1):
            base = int(starts[window])
            rows = self._window_rows(epoch, lane, window)
            parts.append(rows[max(start - base, 0) : stop - base])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def scan_range(self, lane: int) -> range:
        """Global rows of the lane when nothing is shuffled: file order, the same in every epoch."""
        return range(self._bounds[lane], self._bounds[lane + 1])

    # The plan of an epoch -----------------------------------------------------------------------------------

    def _lane(self, epoch: int, lane: int) -> _Lane:
        if not 0 <= lane < self.config.lanes:
            raise ValueError(f"lane {lane}; expected 0 to {self.config.lanes - 1}")
        if epoch < 0:
            raise ValueError(f"epoch {epoch}; expected 0 or more")
        plan = self._plan
        if plan is None or plan[0] != epoch:
            plan = (epoch, self._make_plan(epoch))
            self._plan = plan
        return plan[1][lane]

    def _make_plan(self, epoch: int) -> list[_Lane]:
        filled = np.flatnonzero(self.shard_rows)
        sequence = filled[_permutation(len(filled), self.seed, epoch, _SHARDS)]
        ends = np.cumsum(self.shard_rows[sequence])  # (filled shards,) places in the epoch
        lanes = []
        for begin, end in pairwise(self._bounds):
            pieces: list[Piece] = []
            place = int(np.searchsorted(ends, begin, side="right"))
            at = begin
            while at < end:
                shard = int(sequence[place])
                base = int(ends[place]) - int(self.shard_rows[shard])
                stop = min(end, int(ends[place]))
                pieces.append(Piece(shard, at - base, stop - base, stop - at == int(self.shard_rows[shard])))
                at = stop
                place += 1
            sizes = [p.stop - p.start for p in pieces]
            step = self.config.window
            window_sizes = [sum(sizes[i : i + step]) for i in range(0, len(sizes), step)]
            lanes.append(_Lane(pieces, np.cumsum([0, *window_sizes], dtype=np.int64)))
        return lanes

    def _window_rows(self, epoch: int, lane: int, window: int) -> NDArray[np.int64]:
        cached = self._windows.get(lane)
        if cached is not None and cached[0] == epoch and cached[1] == window:
            return cached[2]
        first = window * self.config.window
        pieces = self._lane(epoch, lane).pieces[first : first + self.config.window]
        rows = np.concatenate([self._piece_rows(epoch, piece) for piece in pieces])
        rows = rows[_permutation(len(rows), self.seed, epoch, _WINDOW, lane, window)]
        rows.flags.writeable = False
        self._windows[lane] = (epoch, window, rows)
        return rows

    def _piece_rows(self, epoch: int, piece: Piece) -> NDArray[np.int64]:
        base = int(self.shard_starts[piece.shard])
        if piece.whole:
            return np.arange(base, base + piece.stop, dtype=np.int64)
        dealt = _permutation(int(self.shard_rows[piece.shard]), self.seed, epoch, _SPLIT, piece.shard)
        return base + dealt[piece.start : piece.stop]


def lanes_of_worker(rank: int, world_size: int, lanes: int) -> range:
    """The contiguous whole lanes of worker ``rank`` of ``world_size``; shares differ by at most one lane.

    Raises:
        ConfigError: when there are more workers than lanes, since a worker must own at least one.
    """
    if world_size > lanes:
        raise ConfigError(
            f"{world_size} workers and {lanes} lanes; expected at least as many lanes as workers: use at "
            f"most {lanes} workers, or start a new run with order.lanes={world_size} or more."
        )
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(
            f"worker {rank} of {world_size}; expected a rank from 0 to the number of workers - 1."
        )
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


def _mix(z: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit numbers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _permutation(n: int, *key: int) -> NDArray[np.int64]:
    """(n,) a permutation of 0..n-1 that depends on the integers of ``key`` alone.

    Each place is hashed by SplitMix64 from a state hashed from ``key``, its number takes the low bits of the
    hash, and is read off the sorted hashes. They are distinct, so the sorting algorithm does not matter; and
    sorting numbers is several times faster than an argsort.
    """
    state = 0
    for word in key:
        state = _mix((state + _GOLDEN) & _MASK ^ word)
    z = np.arange(1, n + 1, dtype=np.uint64)
    z *= np.uint64(_GOLDEN)
    z += np.uint64(state)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    low = np.uint64((1 << max(n - 1, 0).bit_length()) - 1)
    z &= ~low
    z |= np.arange(n, dtype=np.uint64)
    z.sort()
    z &= low
    return z.view(np.int64)
