"""Settings of phases: what they compute, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from distclust.mixture.settings import OptimizerConfig, Phase


def test_a_step_size_decays_to_its_floor() -> None:
    config = OptimizerConfig(learning_rate=2e-3, decay=0.9, decay_epochs=10, floor=2e-4)
    assert [config.rate(e) for e in (0, 9, 10, 20)] == pytest.approx([2e-3, 2e-3, 1.8e-3, 1.62e-3])
    assert config.rate(1000) == 2e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 1, "trains": ("network",)}, "no term"),
        ({"epochs": 1}, "nothing that they change"),
        ({"epochs": 1, "trains": ("newtork",), "terms": (("min", 1.0),)}, "newtork"),
        ({"epochs": 0, "stop_label_change": 0.1}, "teacher"),
    ],
)
def test_phases_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase(name="joint", **fields)
