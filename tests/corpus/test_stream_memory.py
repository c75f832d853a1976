"""A worker's own memory does not grow with the corpus (mapped pages belong to the operating system)."""

from __future__ import annotations

from pathlib import Path

import pytest

from distclust.corpus.generate import GenerateConfig, generate_corpus
from stream_memory import measure

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def test_memory_is_flat(tmp_path: Path) -> None:
    """Ten times the documents in shards of the same size; small buffers, which both corpora fill."""
    peaks = {}
    for rows in (20_000, 200_000):
        config = GenerateConfig(rows=rows, terms=2000, nonzeros=5, rows_per_shard=2048)
        generate_corpus(tmp_path / str(rows), config)
        found = measure(tmp_path / str(rows), 8, 32, 1 << 18)
        assert found["rows"] == rows
        peaks[rows] = (found["peak"], found["peak"] - found["before"])
    (small, small_own), (large, large_own) = peaks[20_000], peaks[200_000]
    assert large < 1.1 * small
    assert large_own - small_own < 6 << 20  # 200,000 rows of 5 values and their numbers are 9 MB


@pytest.mark.slow
def test_memory_is_flat_at_a_million_documents(tmp_path: Path) -> None:
    """As a run has it: 77 non-zeros a row, shards of 16,384, 8 lanes of 128, the usual buffers."""
    peaks = {}
    for rows in (100_000, 1_000_000):
        generate_corpus(tmp_path / str(rows), GenerateConfig(rows=rows), workers=2)
        found = measure(tmp_path / str(rows))
        assert found["rows"] == rows
        peaks[rows] = found["peak"]
    assert peaks[1_000_000] < 1.1 * peaks[100_000]
