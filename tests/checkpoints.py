"""Checkpoints that hold one number, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from distclust.training.checkpoint import CheckpointStore

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "COMMIT"]


def value(store: CheckpointStore, path: str | None) -> int:
    """The number that `save_number` put everywhere into the checkpoint."""
    assert path is not None
    tensors, state = store.load(path)
    assert set(tensors) == {"model", "optimizer"}
    assert tensors["model"]["w"][0, 0] == tensors["optimizer"]["step"] == state["step"]
    return state["step"]


def save_number(store: CheckpointStore, number: int, name: str | None = None) -> str:
    tensors = {"model": {"w": torch.full((3, 4), float(number))}, "optimizer": {"step": torch.tensor(number)}}
    return store.save(name or f"step-{number:09d}", tensors, {"step": number})


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
