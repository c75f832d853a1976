"""Where the rows of a batch come from: mapped shards, or a copy of the corpus in memory."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distclust.corpus.shards import Corpus, ShardRows
from distclust.errors import DataError

try:  # scipy's own row-gather kernel; the name is private, so a slower numpy form stands in where it is gone
    from scipy.sparse._sparsetools import csr_row_index as _csr_row_index
except ImportError:  # pragma: no cover
    _csr_row_index = None


class Rows(NamedTuple):
    """Host rows: CSR (offsets from 0), or dense with neither offsets nor indices."""

    offsets: NDArray[np.int32] | None
    indices: NDArray[np.int32] | None
    values: NDArray[np.float32]


class Mapped:
    """Rows from mapped shards, several steps at a time.

    The rows asked for are grouped by shard and copied shard by shard into one scratch buffer, then put into
    the order asked for: a row is copied twice, the second time from the caches, and each shard is visited
    once. Only the shards that the last call used stay open; ``on_open`` is told of each that is opened.
    """

    def __init__(self, corpus: Corpus, on_open: Callable[[int], None] = lambda number: None) -> None:
        self.corpus = corpus
        self._on_open = on_open
        self._open: dict[int, ShardRows] = {}
        self._scratch, self._final = Buffers(), Buffers()

    def gather(self, rows: NDArray[np.int64]) -> Rows:
        """The global rows (n,), in the order given."""
        shards, places = self.corpus.locate(rows)
        by_shard = None
        if (shards[1:] < shards[:-1]).any():
            # 16-bit keys get numpy's radix sort.
            keys = shards.astype(np.uint16) if len(self.corpus.shard_rows) <= 1 << 16 else shards
            by_shard = np.argsort(keys, kind="stable")
            shards, places = shards[by_shard], places[by_shard]
        starts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(rows)]
        groups = [(int(shards[a]), places[a:b].astype(np.int32)) for a, b in pairwise(starts) if a < b]
        held, self._open = self._open, {}
        for number, _ in groups:
            if number not in held:
                self._on_open(number)
            self._open[number] = held.get(number) or self.corpus.shard(number)
        del held  # before room is made for the batch
        if self.corpus.kind == "dense":
            return self._gather_dense(groups, by_shard, len(rows))
        if by_shard is None:
            return self._gather_sparse(groups, len(rows), self._final)
        found = self._gather_sparse(groups, len(rows), self._scratch)
        back = np.empty(len(rows), np.int32)
        back[by_shard] = np.arange(len(rows), dtype=np.int32)
        return take_rows(found, back, self._final)

    def _gather_sparse(
        self, groups: list[tuple[int, NDArray[np.int32]]], n_rows: int, buffers: Buffers
    ) -> Rows:
        lengths = np.empty(n_rows, np.int32)
        at = 0
        for number, places in groups:
            bounds = self._open[number].offsets
            assert bounds is not None
            np.subtract(bounds[1:].take(places), bounds.take(places), out=lengths[at : at + len(places)])
            at += len(places)
        out = _empty_rows(lengths, buffers)
        assert out.offsets is not None
        assert out.indices is not None
        at = 0
        for number, places in groups:
            shard = self._open[number]
            assert shard.values is not None
            span = slice(out.offsets[at], out.offsets[at + len(places)])
            source = Rows(shard.offsets, shard.indices, shard.values)
            _copy_rows(source, places, out.indices[span], out.values[span])
            at += len(places)
        return out

    def _gather_dense(
        self,
        groups: list[tuple[int, NDArray[np.int32]]],
        by_shard: NDArray[np.int64] | None,
        n_rows: int,
    ) -> Rows:
        width = self.corpus.n_features
        memory = self._final.lease(4 * n_rows * width)
        out = memory.view(np.float32).reshape(n_rows, width)
        at = 0
        for number, places in groups:
            dense = self._open[number].dense
            assert dense is not None
            span = slice(at, at + len(places))
            out[span if by_shard is None else by_shard[span]] = dense[places]
            at += len(places)
        return Rows(None, None, out)


class Resident:
    """All rows of a corpus in the host's memory.

    Raises:
        DataError: a sparse corpus has 2**31 non-zeros or more.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._buffers = Buffers()
        self._host = _read_all(corpus)

    def gather(self, rows: NDArray[np.int64]) -> Rows:
        """The global rows (n,) in the order given."""
        if self._host.offsets is None:
            width = self._host.values.shape[1]
            out = self._buffers.lease(4 * len(rows) * width).view(np.float32).reshape(len(rows), width)
            np.take(self._host.values, rows, axis=0, out=out, mode="clip")
            return Rows(None, None, out)
        return take_rows(self._host, rows.astype(np.int32), self._buffers)


class ResidentOnDevice:
    """All rows of a corpus in the device's memory, where they are gathered too.

    Shards are copied one after another: the host never holds more than one of them, and keeps the bounds of
    the rows, 8 bytes a row, so that the size of a batch is known without asking the device.
    """

    def __init__(self, corpus: Corpus, device: torch.device) -> None:
        self.device = device
        self._offsets: NDArray[np.int64] | None = None
        self._indices: Tensor | None = None
        if corpus.kind == "dense":
            self._values = torch.empty(corpus.n_rows, corpus.n_features, device=device)
        else:
            self._offsets = np.zeros(corpus.n_rows + 1, np.int64)
            self._indices = torch.empty(corpus.manifest.n_nonzeros, dtype=torch.int32, device=device)
            self._values = torch.empty(corpus.manifest.n_nonzeros, device=device)
        filled = 0
        for number, row in enumerate(corpus.shard_starts[:-1].tolist()):
            shard = corpus.shard(number)
            values = shard.values if shard.dense is None else shard.dense
            assert values is not None
            span = slice(filled, filled + len(values))
            self._values[span] = upload(values.copy(), device)  # torch wants writable memory
            if shard.offsets is not None:
                assert self._offsets is not None and self._indices is not None
                self._offsets[row + 1 : row + shard.n_rows + 1] = shard.offsets[1:]
                self._offsets[row + 1 : row + shard.n_rows + 1] += filled
                assert shard.indices is not None
                self._indices[span] = upload(shard.indices.copy(), device)
            filled = span.stop

    def gather(self, rows: NDArray[np.int64]) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(n + 1,) offsets, (nnz,) indices and values, gathered on the device; dense: (n, D) values alone.

        Nothing waits for the device.
        """
        if self._offsets is None:
            return None, None, self._values[upload(rows, self.device)]
        assert self._indices is not None
        starts = self._offsets[rows]
        lengths = self._offsets[rows + 1] - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        total = int(offsets[-1])
        _check_count(total)
        shift = upload(starts - offsets[:-1], self.device)  # (n,) from places in the batch to the corpus's
        flat = torch.repeat_interleave(shift, upload(lengths, self.device), output_size=total)
        flat += torch.arange(total, device=self.device)
        return upload(offsets.astype(np.int32), self.device), self._indices[flat], self._values[flat]


def bytes_of(corpus: Corpus) -> int:
    """What the rows of a corpus take in memory."""
    if corpus.kind == "dense":
        return 4 * corpus.n_rows * corpus.n_features
    return 8 * corpus.manifest.n_nonzeros + 4 * (corpus.n_rows + 1)


class Buffers:
    """Memory of dead batches, used again: fresh pages would cost more than the copy into them.

    A lease is a view of pooled memory; when the last array or tensor that looks into it is gone, its memory
    comes back. A consumer that keeps its batches keeps their memory, and new memory is allocated.
    """

    def __init__(self, keep: int = 4) -> None:
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=keep)  # appended to by whichever thread lets go

    def lease(self, n_bytes: int) -> NDArray[np.uint8]:
        """(n_bytes,) uint8 of undefined content, aligned for any number."""
        memory = np.empty(0, np.uint8)
        while self._free and len(memory) < n_bytes:
            memory = self._free.pop()
        if len(memory) < n_bytes:
            memory = np.empty(n_bytes + n_bytes // 8, np.uint8)
        # Through a memoryview, or numpy would let slices of the lease refer to the memory itself.
        lease: NDArray[np.uint8] = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(lease, self._free.append, memory).atexit = False
        return lease[:n_bytes]


def upload(array: NDArray[Any] | Tensor | None, device: torch.device) -> Any:
    """The array as a tensor on the device; to a GPU from pinned memory, without waiting. None stays None."""
    if array is None:
        return None
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # torch keeps this memory until the copy is done
    return tensor.to(device, non_blocking=True)


def split_rows(rows: Rows, sizes: Sequence[int]) -> Iterator[Rows]:
    """Consecutive parts of these sizes: views, but for the offsets, which start from 0 again."""
    for start, stop in pairwise(np.cumsum([0, *sizes]).tolist()):
        if rows.offsets is None:
            yield Rows(None, None, rows.values[start:stop])
            continue
        assert rows.indices is not None
        first, last = int(rows.offsets[start]), int(rows.offsets[stop])
        offsets = rows.offsets[start : stop + 1] - first
        yield Rows(offsets, rows.indices[first:last], rows.values[first:last])


def take_rows(source: Rows, rows: NDArray[np.int32], buffers: Buffers) -> Rows:
    """The CSR rows ``rows`` (n,) of ``source``, in that order."""
    assert source.offsets is not None
    out = _empty_rows(source.offsets[rows + 1] - source.offsets[rows], buffers)
    assert out.indices is not None
    _copy_rows(source, rows, out.indices, out.values)
    return out


def _empty_rows(lengths: NDArray[np.int32], buffers: Buffers) -> Rows:
    """Room for rows with these numbers of non-zeros, offsets filled in."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    total = int(offsets[-1])
    _check_count(total)
    memory = buffers.lease(8 * total)
    indices, values = memory[: 4 * total].view(np.int32), memory[4 * total :].view(np.float32)
    return Rows(offsets.astype(np.int32), indices, values)


def _copy_rows(
    source: Rows, rows: NDArray[np.int32], indices: NDArray[np.int32], values: NDArray[np.float32]
) -> None:
    """Copy the CSR rows ``rows`` of ``source`` one after another into ``indices`` and ``values`` (nnz,)."""
    if _csr_row_index is None:
        _copy_rows_numpy(source, rows, indices, values)
    else:
        _csr_row_index(len(rows), rows, source.offsets, source.indices, source.values, indices, values)


def _copy_rows_numpy(
    source: Rows, rows: NDArray[np.int32], indices: NDArray[np.int32], values: NDArray[np.float32]
) -> None:
    assert source.offsets is not None
    assert source.indices is not None
    starts = source.offsets[rows].astype(np.int64)
    lengths = source.offsets[rows + 1] - starts
    flat = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    flat += np.arange(len(flat))
    np.take(source.indices, flat, out=indices, mode="clip")
    np.take(source.values, flat, out=values, mode="clip")


def _read_all(corpus: Corpus) -> Rows:
    parts = [corpus.shard(number) for number in range(len(corpus.shard_rows))]
    if corpus.kind == "dense":
        return Rows(None, None, np.concatenate([part.dense for part in parts if part.dense is not None]))
    lengths = [np.diff(part.offsets) for part in parts if part.offsets is not None]
    offsets = np.zeros(corpus.n_rows + 1, np.int64)
    np.cumsum(np.concatenate(lengths), out=offsets[1:])
    _check_count(int(offsets[-1]))
    indices = np.concatenate([part.indices for part in parts if part.indices is not None])
    values = np.concatenate([part.values for part in parts if part.values is not None])
    return Rows(offsets.astype(np.int32), indices, values)


def _check_count(nonzeros: int) -> None:
    if nonzeros >= 1 << 31:
        raise DataError(
            f"{nonzeros} non-zeros are gathered at once; expected less than 2**31: use fewer rows in a step, "
            "or a smaller limit for the resident corpus."
        )
