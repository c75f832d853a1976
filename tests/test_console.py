"""What a person reads at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distclust import console


def summary(sizes: list[int]) -> dict[str, Any]:
    clusters = [
        {
            "cluster": k,
            "size": n,
            "share": n / sum(sizes),
            "terms": ["word"],
            "nearest_id": None,
            "nearest_title": None,
        }
        for k, n in enumerate(sizes)
    ]
    return {
        "method": "damic",
        "seed": 0,
        "clusters": clusters,
        "scored": 0,
        "unlabelled": sum(sizes),
        "multi_labelled": 0,
        "n_documents": sum(sizes),
        "assignments": "assignments",
        "model": None,
        "how_to_open": None,
        "baselines": {},
    }


@pytest.mark.parametrize(("sizes", "said"), [([5, 0, 3, 0], True), ([5, 1, 3, 2], False)])
def test_clusters_without_documents_are_reported(
    sizes: list[int], said: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    console.print_summary(summary(sizes), tmp_path)
    printed = capsys.readouterr().out
    assert ("2 of 4 clusters have no document" in printed) == said
