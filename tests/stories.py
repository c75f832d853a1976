"""Small text collections with topics, and runs on them that take a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from distclust.config import RunConfig, resolve

TOPICS = {
    "grain": "wheat corn harvest export tonnes barley crop soybean farmers silo".split(),
    "money": "bank rate dollar currency market loan interest bond treasury yield".split(),
    "ships": "vessel port cargo tanker strike harbour crew freight canal dock".split(),
}
COMMON = "today report year government officials week company statement".split()


def story(number: int, topic: str, seed: int = 0) -> str:
    """A dozen words, most of them of the topic."""
    rng = np.random.default_rng([seed, number])
    return " ".join([*rng.choice(TOPICS[topic], 8), *rng.choice(COMMON, 4)])


def records(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Documents with id, title, text and label, topic after topic."""
    names = list(TOPICS)
    return [
        {
            "id": f"s{i}",
            "title": f"Story {i} of {names[i % 3]}",
            "text": story(i, names[i % 3], seed),
            "label": names[i % 3],
        }
        for i in range(n)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_run(file: Path, **changes: Any) -> RunConfig:
    """`tiny_recipe`, resolved."""
    return resolve(tiny_recipe(file, **changes))


def tiny_recipe(file: Path, **changes: Any) -> dict[str, Any]:
    """damic-text on a file of stories: one process, no MLflow, a few steps a phase."""
    data: dict[str, Any] = {
        "method": "damic-text",
        "clusters": 3,
        "source": {"name": "files", "files": [str(file)]},
        "vocabulary": {"max_features": 30},
        "shards": {"rows_per_shard": 25},
        "order": {"lanes": 2, "rows_per_lane": 8},
        "model": {"hidden": [16], "code_size": 4, "gate_hidden": [16]},
        "phases": {"pretrain": {"epochs": 20}, "gate": {"epochs": 10}, "joint": {"epochs": 3}},
        "initialise": {"restarts": 2},
        "checkpoint": {"every_steps": 4},
        "cluster": {"workers": 0},
        "tracking": {"enabled": False, "log_every": 1},
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    return data


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
