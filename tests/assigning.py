"""What tests of assignments share: a model without training, sources, and the result as one table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from distclust.corpus.shards import Corpus
from distclust.corpus.sources import SourceConfig
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.results.assignment import Assignment
from distclust.results.predict import export_model

K = 5


def random_model(corpus: Corpus, folder: Path, seed: int = 0) -> Path:
    """A model that tells rows apart, without training."""
    torch.manual_seed(seed)
    row = METHODS["damic-text"]
    settings = dataclasses.replace(row.settings, hidden=(16,), code_size=4, gate_hidden=(16,))
    model = MixtureModel(row, settings, corpus.n_features, K)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    manifest = corpus.manifest
    vocabulary = Path(corpus.root) / "vocabulary.json" if manifest.vocabulary_fingerprint else None
    return export_model(folder, model, vocabulary, {"kind": manifest.kind, "row_scale": manifest.row_scale})


def files_of(file: Path, **more: Any) -> SourceConfig:
    return SourceConfig(name="files", files=(str(file),), **more)


def table_of(assignment: Assignment) -> pa.Table:
    return pa.concat_tables(assignment.tables()).replace_schema_metadata(None).combine_chunks()
