"""What a checkpoint makes of a corpus, in this process: its model, the labels and the codes of all rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distclust.config import RunConfig
from distclust.corpus.shards import Corpus
from distclust.corpus.vocabulary import VOCABULARY_FILE
from distclust.errors import DataError
from distclust.mixture.model import MixtureModel
from distclust.mixture.sparse import Rows, SparseRows
from distclust.results.predict import BLOCK_ROWS, Predictor, export_model
from distclust.training.checkpoint import CheckpointStore


def load_model(checkpoint: str, config: RunConfig, corpus: Corpus) -> MixtureModel:
    """The model as it stands in a checkpoint.

    Args:
        checkpoint: its path or URL.
        config: the run's.
        corpus: the run's.

    Raises:
        CheckpointError: a file of it is missing or damaged (named).
    """
    groups, _ = CheckpointStore(os.path.dirname(checkpoint)).load(checkpoint)
    model = MixtureModel(config.row, config.model, corpus.n_features, config.clusters)
    model.load_state_dict(groups["model"])
    return model.eval()


def export_checkpoint(checkpoint: str, config: RunConfig, corpus: Corpus, folder: Path) -> Path:
    """Write the model folder of a checkpoint; see `predict.export_model`.

    Raises:
        DataError: the corpus was prepared with a vocabulary that is not there any more.
    """
    manifest = corpus.manifest
    info = {
        "kind": manifest.kind,
        "row_scale": manifest.row_scale,
        "seed": config.seed,
        "corpus": manifest.fingerprint,
        "vocabulary": manifest.vocabulary_fingerprint,
        "image_shape": manifest.options.get("image_shape") or list(config.model.image),
    }
    model = load_model(checkpoint, config, corpus)
    if not manifest.vocabulary_fingerprint:
        return export_model(folder, model, None, info)
    content = corpus.read_file(VOCABULARY_FILE)
    if content is None:
        raise DataError(
            f"{corpus.root} has lost its {VOCABULARY_FILE}; expected the one it was prepared with: restore "
            "it, or prepare the corpus again"
        )
    # the corpus may lie behind a URL, a vocabulary is read from a file
    copy = folder.parent / f".{folder.name}-{VOCABULARY_FILE}"
    try:
        copy.write_bytes(content)
        return export_model(folder, model, copy, info)
    finally:
        copy.unlink(missing_ok=True)


def predict_corpus(model: MixtureModel, corpus: Corpus) -> NDArray[np.int64]:
    """The model's cluster (N,) of each row."""
    predictor = Predictor(model, {"kind": corpus.kind, "row_scale": corpus.manifest.row_scale})
    found = []
    for number in range(len(corpus.shard_rows)):
        shard = corpus.shard(number)
        if shard.dense is not None:
            found.append(predictor.predict_dense(shard.dense).clusters)
        else:
            rows: Any = (shard.offsets, shard.indices, np.array(shard.values))
            found.append(predictor.predict_rows(*rows).clusters)
    return np.concatenate(found)


@torch.no_grad()
def encode_corpus(model: MixtureModel, corpus: Corpus) -> NDArray[np.float32]:
    """The codes (N, J) of undisturbed rows, as the encoder gives them: not scaled to length 1."""
    codes = np.empty((corpus.n_rows, model.code_size), np.float32)
    at = 0
    for rows, size in _blocks(corpus):
        codes[at : at + size] = model.network.encode(rows).numpy()
        at += size
    return codes


def _blocks(corpus: Corpus) -> Iterator[tuple[Rows, int]]:
    """All rows in order, in blocks."""
    for number in range(len(corpus.shard_rows)):
        shard = corpus.shard(number)
        for start in range(0, shard.n_rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, shard.n_rows)
            if shard.dense is not None:
                yield torch.tensor(shard.dense[start:stop]), stop - start
                continue
            assert shard.offsets is not None
            assert shard.indices is not None
            assert shard.values is not None
            span = slice(shard.offsets[start], shard.offsets[stop])
            offsets = shard.offsets[start : stop + 1].astype(np.int64) - shard.offsets[start]
            indices = torch.from_numpy(shard.indices[span].astype(np.int64))
            values = torch.from_numpy(shard.values[span].copy())
            yield SparseRows(torch.from_numpy(offsets), indices, values, corpus.n_features), stop - start
