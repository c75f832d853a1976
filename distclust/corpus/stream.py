"""Shards and order -> batches on the device.

Three places for the data, one order: rows copied into memory (on the device, when they fit), shards mapped from
local disk, and remote shards copied to local disk on first use. The batches are the same bit for bit.

Mapped rows are gathered for several steps at once: the rows of all lanes are sorted by row number, copied shard
by shard (neighbours in the file, so neighbours in memory), then put into the order of the steps. Each batch is a
slice of that. Memory is a few megabytes whatever the corpus; the mapped pages belong to the operating system.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distclust.corpus.order import Order
from distclust.corpus.shards import Corpus, ShardRows
from distclust.errors import ConfigError, DataError

try:  # scipy's own row-gather kernel; the name is private, so a slower numpy form stands in where it is gone
    from scipy.sparse._sparsetools import csr_row_index as _csr_row_index
except ImportError:  # pragma: no cover
    _csr_row_index = None

CHUNK_BYTES = 4 << 20
"""Rows gathered at once, in bytes: large enough to spread the cost of touching a shard, small enough for caches."""


class Batch(NamedTuple):
    """The rows of one step on one worker, in lane order. All tensors are on the stream's device.

    ``offsets`` and ``indices`` are int32: ``embedding_bag`` takes either width as long as both are equal, and so
    the arrays of the file are used as they are.
    """

    epoch: int
    step: int
    """With ``epoch`` the position of the batch."""
    rows_in_step: int
    """Rows of the step over all workers."""
    lanes: tuple[int, ...]
    """Lane numbers in this batch, ascending."""
    lane_rows: tuple[int, ...]
    """Rows of each of these lanes, 0 allowed; their sum is B."""
    rows: Tensor
    """(B,) int64 global row numbers."""
    offsets: Tensor | None
    """(B + 1,) int32, sparse only, from 0."""
    indices: Tensor | None
    """(nnz,) int32, sparse only, rising within a row."""
    values: Tensor
    """(nnz,) float32 sparse | (B, D) float32 dense."""


class Rows(NamedTuple):
    """Host rows: CSR (offsets from 0) or dense."""

    offsets: NDArray[np.int32] | None
    indices: NDArray[np.int32] | None
    values: NDArray[np.float32]


class _Plan(NamedTuple):
    """What one batch holds, before its rows are gathered."""

    epoch: int
    step: int
    rows_in_step: int
    lanes: tuple[int, ...]
    lane_rows: tuple[int, ...]
    rows: NDArray[np.int64]


class Stream:
    """Batches of one worker.

    Args:
        corpus: where the rows are.
        order: which rows form a step; made for this corpus.
        lanes: the worker's lanes, ascending.
        device: where the tensors of a batch are.
        prefetch: batches that a background thread prepares ahead; 0 prepares each when it is asked for.
        resident_bytes: a corpus of at most this size is read into the device's memory once; 0 never does.

    Raises:
        ConfigError: the order is of another corpus, or the lanes are not ascending lanes of the order.

    The copies to a CUDA device go from pinned memory on a stream of their own. *This path is untested on a GPU.*
    """

    def __init__(
        self,
        corpus: Corpus,
        order: Order,
        lanes: Sequence[int],
        device: str | torch.device = "cpu",
        prefetch: int = 2,
        resident_bytes: int = 1 << 28,
    ) -> None:
        if not np.array_equal(corpus.shard_rows, order.shard_rows):
            raise ConfigError(f"the order was made for other shards than those of {corpus.root}: make it from them.")
        self.lanes = tuple(lanes)
        if list(self.lanes) != sorted(set(self.lanes)) or not set(self.lanes) <= set(range(order.config.lanes)):
            raise ConfigError(f"lanes {self.lanes}; expected ascending numbers from 0 to {order.config.lanes - 1}.")
        if prefetch < 0:
            raise ConfigError(f"prefetch is {prefetch}; expected 0 or more: correct it.")
        self.corpus, self.order = corpus, order
        self.device = torch.device(device)
        self.prefetch = prefetch
        self.waited_s = 0.0
        """Seconds that the consumer has waited for batches; the caller resets it."""
        self._resident_bytes = resident_bytes
        self._resident: _Resident | None = None
        self._resident_lock = threading.Lock()

    # What a caller uses -------------------------------------------------------------------------------------

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch]:
        """The batches of an epoch from ``start_step`` on, ``order.steps_per_epoch - start_step`` of them.

        A worker without rows in a step gets a batch of none, so that all workers take the same steps. Closing
        the generator stops the background thread; an exception in that thread is raised here.
        """
        if not 0 <= start_step <= self.order.steps_per_epoch:
            raise ValueError(f"start step {start_step}; expected 0 to {self.order.steps_per_epoch}")
        return self._deliver(self._epoch_chunks(epoch, start_step))

    def scan(self, rows_per_batch: int = 512) -> Generator[Batch]:
        """Each row of the worker's lanes once, in file order, lane after lane, the same in every epoch.

        A batch has rows of one lane; ``epoch``, ``step`` and ``rows_in_step`` are 0.
        """
        if rows_per_batch < 1:
            raise ValueError(f"{rows_per_batch} rows per batch; expected at least 1")
        return self._deliver(self._scan_chunks(rows_per_batch))

    def gather(self, rows: NDArray[np.int64] | Sequence[int]) -> Batch:
        """A batch of arbitrary rows in the order given (repeats allowed); no lanes, position 0.

        Raises:
            DataError: a row number is out of range.
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.corpus.n_rows):
            raise DataError(f"rows {wanted.min()} to {wanted.max()}; expected 0 to {self.corpus.n_rows - 1}.")
        plan = _Plan(0, 0, len(wanted), (), (), wanted)
        (batch,) = self._batches([[plan]])
        return batch

    # Plans: which rows, several steps at a time ---------------------------------------------------------------

    def _epoch_chunks(self, epoch: int, start_step: int) -> Iterator[list[_Plan]]:
        order, per_lane = self.order, self.order.config.rows_per_lane
        most = self._steps_per_chunk(per_lane * max(len(self.lanes), 1))
        step, size = start_step, 1  # the first chunk is one step, so that the first batch comes soon
        while step < order.steps_per_epoch:
            stop = min(step + size, order.steps_per_epoch)
            slices = [order.lane_slice(epoch, lane, step * per_lane, stop * per_lane) for lane in self.lanes]
            chunk = []
            for number in range(step, stop):
                at = (number - step) * per_lane
                parts = [rows[at : at + per_lane] for rows in slices]
                rows = np.concatenate(parts) if parts else np.empty(0, np.int64)
                lane_rows = tuple(len(part) for part in parts)
                chunk.append(_Plan(epoch, number, order.rows_in_step(epoch, number), self.lanes, lane_rows, rows))
            yield chunk
            step, size = stop, min(size * 2, most)

    def _scan_chunks(self, rows_per_batch: int) -> Iterator[list[_Plan]]:
        most = self._steps_per_chunk(rows_per_batch)
        for lane in self.lanes:
            span = self.order.scan_range(lane)
            chunk: list[_Plan] = []
            for start in range(span.start, span.stop, rows_per_batch):
                rows = np.arange(start, min(start + rows_per_batch, span.stop), dtype=np.int64)
                chunk.append(_Plan(0, 0, 0, (lane,), (len(rows),), rows))
                if len(chunk) == most:
                    yield chunk
                    chunk = []
            if chunk:
                yield chunk

    def _steps_per_chunk(self, rows_per_step: int) -> int:
        manifest = self.corpus.manifest
        cell_bytes = 8 if self.corpus.kind == "sparse" else 4
        row_bytes = max(1.0, manifest.n_nonzeros / max(manifest.n_rows, 1) * cell_bytes)
        return max(1, int(CHUNK_BYTES / (row_bytes * rows_per_step)))

    # Rows to tensors ------------------------------------------------------------------------------------------

    def _batches(self, chunks: Iterable[list[_Plan]]) -> Iterator[Batch]:
        resident = self._resident_rows()
        reader = None if resident is not None else _Mapped(self.corpus)
        for chunk in chunks:
            rows = np.concatenate([plan.rows for plan in chunk])
            if resident is not None and resident.on_device:
                for plan in chunk:
                    yield self._finish(plan, *resident.gather_on_device(plan.rows))
                continue
            source = resident if resident is not None else reader
            assert source is not None
            gathered = source.gather(rows)
            at = 0
            for plan in chunk:
                yield self._finish(plan, *_slice(gathered, at, at + len(plan.rows)))
                at += len(plan.rows)

    def _finish(self, plan: _Plan, offsets: Any, indices: Any, values: Any) -> Batch:
        tensors = [plan.rows, offsets, indices, values]
        rows, offsets, indices, values = (None if t is None else self._to_device(t) for t in tensors)
        assert rows is not None and values is not None
        return Batch(*plan[:5], rows=rows, offsets=offsets, indices=indices, values=values)

    def _to_device(self, array: NDArray[Any] | Tensor) -> Tensor:
        tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _resident_rows(self) -> _Resident | None:
        with self._resident_lock:
            if self._resident is None and 0 < _memory_of(self.corpus) <= self._resident_bytes:
                self._resident = _Resident(self.corpus, self.device)
            return self._resident

    # The background thread ------------------------------------------------------------------------------------

    def _deliver(self, chunks: Iterator[list[_Plan]]) -> Generator[Batch]:
        if self.prefetch == 0:
            batches = self._batches(chunks)
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                self.waited_s += time.perf_counter() - started
                if batch is None:
                    return
                yield batch
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(self.prefetch)
        stop = threading.Event()

        def work() -> None:
            try:
                for batch in self._batches(chunks):
                    ready.put(batch)
                    if stop.is_set():
                        return
                ready.put(None)
            except BaseException as error:  # handed to the consumer, whatever it is
                ready.put(error)

        thread = threading.Thread(target=work, name="distclust-prefetch", daemon=True)
        thread.start()
        try:
            while True:
                started = time.perf_counter()
                item = ready.get()
                self.waited_s += time.perf_counter() - started
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while thread.is_alive():  # it may wait for room in the queue
                with contextlib.suppress(queue.Empty):
                    ready.get(timeout=0.01)


# Where rows come from -----------------------------------------------------------------------------------------


class _Mapped:
    """Rows from mapped shards. Keeps open only the shards that the last call used."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._open: dict[int, ShardRows] = {}

    def gather(self, rows: NDArray[np.int64]) -> Rows:
        """The rows (n,) in the order given."""
        ordered = bool((rows[1:] >= rows[:-1]).all())
        by_place = None if ordered else np.argsort(rows, kind="stable")
        shards, places = self.corpus.locate(rows if by_place is None else rows[by_place])
        numbers, starts = np.unique(shards, return_index=True)
        groups = list(zip(numbers.tolist(), np.split(places, starts[1:]), strict=True)) if len(rows) else []
        self._open = {n: self._open.get(n) or self.corpus.shard(n) for n, _ in groups}
        if self.corpus.kind == "dense":
            return self._gather_dense(groups, by_place, len(rows))
        found = self._gather_sparse(groups, len(rows))
        if by_place is None:
            return found
        back = np.empty(len(rows), np.int32)
        back[by_place] = np.arange(len(rows), dtype=np.int32)
        return take_rows(found, back)

    def _gather_sparse(self, groups: list[tuple[int, NDArray[np.int64]]], n_rows: int) -> Rows:
        offsets = np.zeros(n_rows + 1, np.int64)
        at = 0
        for number, places in groups:
            bounds = self._open[number].offsets
            assert bounds is not None
            offsets[at + 1 : at + 1 + len(places)] = bounds[places + 1] - bounds[places]
            at += len(places)
        np.cumsum(offsets, out=offsets)
        _check_count(int(offsets[-1]))
        out = Rows(offsets.astype(np.int32), np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32))
        at = 0
        for number, places in groups:
            shard = self._open[number]
            span = slice(offsets[at], offsets[at + len(places)])
            assert shard.values is not None and out.indices is not None
            source = Rows(shard.offsets, shard.indices, shard.values)
            _copy_rows(source, places.astype(np.int32), out.indices[span], out.values[span])
            at += len(places)
        return out

    def _gather_dense(
        self, groups: list[tuple[int, NDArray[np.int64]]], by_place: NDArray[np.int64] | None, n_rows: int
    ) -> Rows:
        out = np.empty((n_rows, self.corpus.n_features), np.float32)
        at = 0
        for number, places in groups:
            dense = self._open[number].dense
            assert dense is not None
            span = slice(at, at + len(places))
            out[span if by_place is None else by_place[span]] = dense[places]
            at += len(places)
        return Rows(None, None, out)


class _Resident:
    """All rows of a corpus in memory, on the device when it is a GPU."""

    def __init__(self, corpus: Corpus, device: torch.device) -> None:
        parts = [corpus.shard(number) for number in range(len(corpus.shard_rows))]
        self.on_device = device.type != "cpu"
        if corpus.kind == "dense":
            dense = [part.dense for part in parts if part.dense is not None]
            self.host = Rows(None, None, np.concatenate(dense))
        else:
            lengths = [np.diff(part.offsets) for part in parts if part.offsets is not None]
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths), dtype=np.int64)])
            _check_count(int(offsets[-1]))
            indices = np.concatenate([part.indices for part in parts if part.indices is not None])
            values = np.concatenate([part.values for part in parts if part.values is not None])
            self.host = Rows(offsets.astype(np.int32), indices, values)
        if self.on_device:
            self.device = device
            self.indices = None if self.host.indices is None else torch.from_numpy(self.host.indices).to(device)
            self.values = torch.from_numpy(self.host.values).to(device)
            self.host = self.host._replace(indices=None, values=np.empty(0, np.float32))

    def gather(self, rows: NDArray[np.int64]) -> Rows:
        """The rows (n,) in the order given."""
        if self.host.offsets is None:
            return Rows(None, None, self.host.values[rows])
        return take_rows(self.host, rows.astype(np.int32))

    def gather_on_device(self, rows: NDArray[np.int64]) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(n + 1,) offsets, (nnz,) indices and values, gathered on the device; row lengths are known on the host."""
        if self.host.offsets is None:
            return None, None, self.values[torch.from_numpy(rows).to(self.device)]
        assert self.indices is not None
        starts = self.host.offsets[rows].astype(np.int64)
        lengths = self.host.offsets[rows + 1] - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        shift = torch.from_numpy(starts - offsets[:-1]).to(self.device)
        repeats = torch.from_numpy(lengths).to(self.device)
        total = int(offsets[-1])
        flat = torch.repeat_interleave(shift, repeats, output_size=total)
        flat += torch.arange(total, device=self.device)
        return torch.from_numpy(offsets.astype(np.int32)), self.indices[flat], self.values[flat]


def take_rows(source: Rows, rows: NDArray[np.int32]) -> Rows:
    """The CSR rows ``rows`` (n,) of ``source``, in that order."""
    assert source.offsets is not None
    lengths = source.offsets[rows + 1] - source.offsets[rows]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    total = int(offsets[-1])
    _check_count(total)
    out = Rows(offsets.astype(np.int32), np.empty(total, np.int32), np.empty(total, np.float32))
    assert out.indices is not None
    _copy_rows(source, rows, out.indices, out.values)
    return out


def _copy_rows(
    source: Rows, rows: NDArray[np.int32], indices: NDArray[np.int32], values: NDArray[np.float32]
) -> None:
    """Copy the CSR rows ``rows`` of ``source`` one after another into ``indices`` and ``values`` (nnz,)."""
    if _csr_row_index is not None:
        _csr_row_index(len(rows), rows, source.offsets, source.indices, source.values, indices, values)
    else:
        _copy_rows_numpy(source, rows, indices, values)


def _copy_rows_numpy(
    source: Rows, rows: NDArray[np.int32], indices: NDArray[np.int32], values: NDArray[np.float32]
) -> None:
    assert source.offsets is not None and source.indices is not None
    starts = source.offsets[rows].astype(np.int64)
    lengths = source.offsets[rows + 1] - starts
    flat = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    flat += np.arange(len(flat))
    np.take(source.indices, flat, out=indices, mode="clip")
    np.take(source.values, flat, out=values, mode="clip")


def _slice(rows: Rows, start: int, stop: int) -> Rows:
    """Rows ``start`` to ``stop``: views, but for the offsets, which start from 0 again."""
    if rows.offsets is None:
        return Rows(None, None, rows.values[start:stop])
    assert rows.indices is not None
    span = slice(rows.offsets[start], rows.offsets[stop])
    return Rows(rows.offsets[start : stop + 1] - rows.offsets[start], rows.indices[span], rows.values[span])


def _memory_of(corpus: Corpus) -> int:
    if corpus.kind == "dense":
        return corpus.n_rows * corpus.n_features * 4
    return corpus.manifest.n_nonzeros * 8 + corpus.n_rows * 4


def _check_count(nonzeros: int) -> None:
    if nonzeros > np.iinfo(np.int32).max:
        raise DataError(f"{nonzeros} non-zeros are gathered at once; expected less than 2**31: use smaller steps.")
