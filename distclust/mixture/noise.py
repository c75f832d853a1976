"""Random draws that depend on where a row stands in the order, and on nothing else.

Each draw is a hash of (seed, global step, lane, row in the lane, name, column). So a mask is the same on one
worker or
on eight, on a CPU or a GPU, for sparse or dense rows, and after a resume.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from distclust.mixture.sparse import Rows, SparseRows


def _hash32(x: Tensor) -> Tensor:
    """A well-mixed 32-bit hash of int32 values (the constants of Ettinger's lowbias32)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def _mix(*parts: int) -> int:
    """One 31-bit number from several integers, in Python."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 29
        state = state * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 32
    return state & 0x7FFFFFFF


class Noise:
    """The draws of one step for the lanes of one batch.

    `lanes` and `lane_rows` name each lane in the batch and its number of rows, in the batch's order; `step`
    is the global step.
    """

    def __init__(
        self, seed: int, step: int, lanes: Sequence[int], lane_rows: Sequence[int], device: torch.device | str
    ):
        self._seed, self.step = seed, step
        self._lanes, self._counts = tuple(lanes), tuple(lane_rows)
        self._device = torch.device(device)

    def _row_keys(self, name: str) -> Tensor:
        """A key (B,) int32 for each row."""
        code = zlib.crc32(name.encode())
        keys = [
            torch.arange(n, dtype=torch.int32) * 0x61C88647 + _mix(self._seed, self.step, lane, code)
            for lane, n in zip(self._lanes, self._counts, strict=True)
        ]
        flat = torch.cat(keys) if keys else torch.empty(0, dtype=torch.int32)
        return _hash32(flat).to(self._device, non_blocking=True)

    def bits(self, name: str, n_columns: int) -> Tensor:
        """Uniform draws (B, n_columns) in [0, 2^31)."""
        columns = torch.arange(n_columns, dtype=torch.int32, device=self._device) * 0x3C6EF372
        return _hash32(self._row_keys(name)[:, None] + columns) & 0x7FFFFFFF

    def _bits_at(self, name: str, x: SparseRows) -> Tensor:
        """The same draws as `bits`, only where x has non-zeros, (nnz,)."""
        keys = self._row_keys(name)[x.row_numbers()]
        return _hash32(keys + x.indices.to(torch.int32) * 0x3C6EF372) & 0x7FFFFFFF

    @property
    def lane_rows(self) -> tuple[int, ...]:
        """Rows of each lane, in the batch's order."""
        return self._counts

    def uniform(self, name: str, n_columns: int) -> Tensor:
        """Uniform draws (B, n_columns) in [0, 1)."""
        return self.bits(name, n_columns).to(torch.float32) * 2.0**-31

    def normal(self, name: str, n_columns: int) -> Tensor:
        """Standard normal draws (B, n_columns), by Box and Muller's transform of two uniform ones."""
        radius = (
            -2.0 * torch.log1p(-self.uniform(f"{name}.radius", n_columns).clamp_max(1 - 2.0**-24))
        ).sqrt()
        angle = 2.0 * math.pi * self.uniform(f"{name}.angle", n_columns)
        return radius * angle.cos()

    def dropout(self, name: str, x: Rows, rate: float) -> Rows:
        """x with each entry zeroed with probability `rate` and the rest divided by 1 - rate."""
        if rate <= 0.0:
            return x
        threshold = int(rate * 2**31)
        keep_scale = 1.0 / (1.0 - rate)
        if isinstance(x, SparseRows):
            keep = self._bits_at(name, x) >= threshold
            return x.with_values(x.values * keep * keep_scale)
        keep = self.bits(name, x.shape[1]) >= threshold
        return x * keep * keep_scale
