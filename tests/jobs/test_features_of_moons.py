"""The exact affinity separates the moons, random features of it do not."""

from __future__ import annotations

import pytest

from jobs.features_of_moons import main


def test_random_features_lose_what_the_exact_affinity_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "2"]) == 0
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    found = {name: float(figures.split()[0]) for name, figures in lines.items()}
    assert found.pop("eigenvectors of the exact affinity") > 0.98
    assert len(found) == 4 and max(found.values()) < 0.9
