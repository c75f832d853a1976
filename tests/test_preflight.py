"""What is checked before a run begins: generated corpora, documents that changed, a GPU that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distclust.corpus.generate import GenerateConfig, generate_corpus
from distclust.errors import ConfigError, DataError
from distclust.run import train_run
from stories import records, tiny_run, write_jsonl


def test_a_generated_corpus_is_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "made"
    generate_corpus(root, GenerateConfig(rows=120, terms=200, nonzeros=20))
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    config = tiny_run(write_jsonl(tmp_path / "unused.jsonl", records(3)))
    summary = train_run(config, tmp_path / "run", corpus_root=root)
    assert summary["n_documents"] == 120
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before
    assert train_run(config, tmp_path / "run", corpus_root=root) == summary


def test_a_finished_run_sees_that_its_documents_changed(tmp_path: Path) -> None:
    file, run = write_jsonl(tmp_path / "a.jsonl", records(60)), tmp_path / "run"
    summary = train_run(tiny_run(file), run)
    assert train_run(tiny_run(file), run) == summary
    write_jsonl(file, records(60, seed=1))
    with pytest.raises(DataError, match="no longer those of this finished run.*expected"):
        train_run(tiny_run(file), run)
    file.unlink()
    assert train_run(tiny_run(file), run) == summary, "what is gone cannot be compared"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed_before_any_work(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", records(60))
    config = tiny_run(file, cluster={"workers": 0, "gpus_per_worker": 1})
    with pytest.raises(ConfigError, match=r"gpus_per_worker is 1 .*torch sees no GPU"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
