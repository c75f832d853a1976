"""The order of samples: pure, complete, local, and never silently another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distclust.corpus.order import Order, OrderConfig, lanes_of_worker
from distclust.errors import ConfigError, DataError

AWKWARD = {
    "one row": [1],
    "fewer rows than lanes": [2, 1],
    "fewer rows than workers": [1, 1],
    "a shard of one row": [7, 1, 12],
    "an empty shard": [5, 0, 9],
    "empty shards at both ends": [0, 6, 0],
    "last short batch": [10, 10, 3],
    "divides evenly": [12, 12],
    "one large shard": [53],
    "many tiny shards": [1] * 23,
    "uneven": [1, 40, 2, 0, 17, 3],
}


def order_of(shard_rows: list[int], lanes: int = 4, rows: int = 3, window: int = 2, seed: int = 0) -> Order:
    return Order(shard_rows, OrderConfig(lanes=lanes, rows_per_lane=rows, window=window), seed)


def all_rows(order: Order, epoch: int) -> list[int]:
    lanes = range(order.config.lanes)
    steps = range(order.steps_per_epoch)
    return [int(r) for step in steps for lane in lanes for r in order.rows(epoch, step, lane)]


@pytest.mark.parametrize("shard_rows", AWKWARD.values(), ids=AWKWARD.keys())
@pytest.mark.parametrize("lanes", [1, 4, 7])
def test_each_row_once_an_epoch(shard_rows: list[int], lanes: int) -> None:
    order = order_of(shard_rows, lanes)
    for epoch in range(3):
        assert sorted(all_rows(order, epoch)) == list(range(sum(shard_rows)))


@pytest.mark.parametrize("shard_rows", AWKWARD.values(), ids=AWKWARD.keys())
def test_counts_agree_with_the_rows(shard_rows: list[int]) -> None:
    order = order_of(shard_rows)
    lanes = range(order.config.lanes)
    assert max(order.lane_sizes) - min(order.lane_sizes) <= 1
    assert order.steps_per_epoch == -(-max(order.lane_sizes) // 3)
    for lane in lanes:
        joined = np.concatenate([*order.lane_rows(1, lane), np.empty(0, np.int64)])
        by_step = [order.rows(1, step, lane) for step in range(order.steps_per_epoch)]
        assert joined.tolist() == np.concatenate(by_step).tolist()
        assert len(joined) == order.lane_sizes[lane]
    for step in range(order.steps_per_epoch):
        assert order.rows_in_step(1, step) == sum(len(order.rows(1, step, lane)) for lane in lanes)
    assert order.rows_in_step(1, order.steps_per_epoch) == 0


def test_position_alone_decides() -> None:
    """Asked for in any order, by fresh or used objects, a step has the same rows."""
    used = order_of([9, 1, 30, 4])
    expected = all_rows(used, 2)
    backwards = [
        used.rows(2, step, lane).tolist()
        for step in reversed(range(used.steps_per_epoch))
        for lane in reversed(range(4))
    ]
    assert [r for rows in reversed(backwards) for r in rows] == expected
    assert all_rows(order_of([9, 1, 30, 4]), 2) == expected


def test_epochs_and_seeds_differ() -> None:
    orders = [all_rows(order_of([20, 20], seed=seed), epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(o) for o in orders}) == 9


def test_lanes_read_neighbouring_shards() -> None:
    """With 4 workers each shard that is not larger than a worker's share is read by at most 2 of them."""
    rng = np.random.default_rng(0)
    for lanes in (4, 8, 9):
        shard_rows = rng.integers(0, 40, 30).tolist()
        order = order_of(shard_rows, lanes)
        share = min(sum(order.lane_sizes[i] for i in order.lanes_of_worker(w, 4)) for w in range(4))
        assert max(shard_rows) <= share
        for epoch in range(3):
            readers: dict[int, set[int]] = {}
            for worker in range(4):
                for lane in order.lanes_of_worker(worker, 4):
                    shards = order.shards_of(epoch, lane)
                    rows = np.concatenate(list(order.lane_rows(epoch, lane)))
                    holders = np.searchsorted(order.shard_starts, rows, side="right") - 1
                    assert set(holders.tolist()) == set(shards)
                    for shard in shards:
                        readers.setdefault(shard, set()).add(worker)
            assert max(len(workers) for workers in readers.values()) <= 2


def test_rows_stay_inside_their_window() -> None:
    """A lane never looks further than its window of shards, and it does mix them."""
    order = order_of([10] * 12, lanes=2, window=3)
    rows = np.concatenate(list(order.lane_rows(0, 0)))
    shards = rows // 10
    expected = order.shards_of(0, 0)
    assert set(shards[:30].tolist()) == set(expected[:3])
    assert set(shards[30:].tolist()) == set(expected[3:])
    assert len(set(shards[:10].tolist())) > 1


def test_a_sorted_corpus_of_one_shard_is_dealt_out() -> None:
    """A shard that lanes share is split at random, not into its first and second half."""
    order = order_of([4000], lanes=2)
    first = np.concatenate(list(order.lane_rows(0, 0)))
    assert 0.45 < (first < 2000).mean() < 0.55


def test_permutations_are_uniform() -> None:
    """Every row is in every place about equally often, over epochs (chi-squared over 16 x 16 cells)."""
    order = order_of([8, 8], lanes=2)
    epochs = 1600
    counts = np.zeros((16, 16))
    for epoch in range(epochs):
        rows = np.concatenate([np.concatenate(list(order.lane_rows(epoch, lane))) for lane in range(2)])
        counts[np.arange(16), rows] += 1
    # Whole shards are moved, so the places of two rows of a shard go together: the bound is generous.
    chi2 = ((counts - epochs / 16) ** 2 / (epochs / 16)).sum()
    assert chi2 < 400  # 225 degrees of freedom


def test_scan_covers_each_row_once_in_file_order() -> None:
    order = order_of([5, 0, 1, 16])
    rows = [r for lane in range(4) for r in order.scan_range(lane)]
    assert rows == list(range(22))


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_workers_own_whole_contiguous_lanes(world: int) -> None:
    shares = [lanes_of_worker(rank, world, 8) for rank in range(world)]
    assert [lane for share in shares for lane in share] == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert min(map(len, shares)) >= 1


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="9 workers and 8 lanes"):
        lanes_of_worker(0, 9, 8)
    with pytest.raises(ConfigError, match="worker 2 of 2"):
        lanes_of_worker(2, 2, 8)
    for field in ("lanes", "rows_per_lane", "window"):
        for value in (0, -1, 1.5, True):
            with pytest.raises(ConfigError, match=field):
                OrderConfig(**{field: value})
    with pytest.raises(ConfigError, match="seed"):
        Order([1], OrderConfig(), -1)
    with pytest.raises(DataError, match="no documents"):
        Order([0, 0], OrderConfig(), 0)
    with pytest.raises(ValueError, match="lane 4"):
        order_of([5]).rows(0, 0, 4)


def golden_lines() -> list[str]:
    lines = []
    for seed in (0, 20250101):
        order = order_of([9, 0, 1, 14, 6], lanes=3, rows=4, window=2, seed=seed)
        for epoch in (0, 1):
            for step in range(order.steps_per_epoch):
                rows = [" ".join(map(str, order.rows(epoch, step, lane))) for lane in range(3)]
                lines.append(f"seed {seed} epoch {epoch} step {step}: {' | '.join(rows)}")
    return lines


def test_golden_order() -> None:
    """The order never changes silently: runs that are under way depend on it."""
    golden = Path(__file__).with_name("golden_order.txt").read_text(encoding="utf-8").splitlines()
    assert golden_lines() == golden


def test_needs_numpy_alone() -> None:
    code = "import sys, distclust.corpus.order; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_memory_of_a_large_plan_is_flat() -> None:
    """100 million rows: a plan of shards and one window a lane, not one number a row."""
    order = Order([16384] * 6104, OrderConfig(), 0)
    rows = order.rows(3, 1000, 5)
    assert len(rows) == 32
    assert order._windows.keys() == {5}
    assert sum(held[2].nbytes for held in order._windows.values()) == 4 * 16384 * 8
