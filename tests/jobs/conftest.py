"""A small table on stories of the built-in corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from tables import TINY


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path
