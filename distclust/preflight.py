"""What is checked before a run begins its work, beside the configuration: seconds here save hours."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch

from distclust.config import ClusterConfig, RunConfig, TrackingConfig, to_dict
from distclust.corpus.files import is_url
from distclust.corpus.shards import MANIFEST, Corpus, Manifest
from distclust.corpus.sources import open_source
from distclust.errors import ConfigError, DataError, TrackingError
from distclust.mixture.catalogue import ESTIMATORS
from distclust.mixture.gradients import check_gradients
from distclust.mixture.own import try_own_parts
from distclust.results.estimators import check_estimator
from distclust.training.blueprint import blueprint, miniature
from distclust.training.checkpoint import differences
from distclust.training.reach import reach, sqlite_file
from distclust.training.run_identity import unusable
from distclust.training.tracking import SPOOL_NAME, tracking_uri

logger = logging.getLogger(__name__)


def check_tracking(tracking: TrackingConfig, run_dir: Path) -> None:
    """Ask a tracking server whether it is there. A SQLite file is left alone: looking would make it.

    Raises:
        TrackingError: nobody answers, and `on_unreachable` is "fail".
    """
    uri = tracking_uri(tracking, run_dir)
    if not tracking.enabled or sqlite_file(uri) is not None:
        return
    try:
        reach(uri)
    except Exception as error:
        reason = unusable(uri, tracking, run_dir / SPOOL_NAME, error)
        if reason is not None:
            raise TrackingError(reason) from error


def check_prepared(manifest: Manifest, config: RunConfig, where: str) -> None:
    """Refuse a corpus behind a URL, which cannot be prepared again there, if it was prepared otherwise.

    A generated corpus has no documents that a recipe could name: it is taken as it is.

    Raises:
        DataError: the differences are listed.
    """
    if is_generated(manifest):
        return
    asked = {group: to_dict(getattr(config, group)) for group in ("source", "vocabulary", "shards")}
    unlike = differences({group: manifest.options.get(group) or {} for group in asked}, asked)
    if unlike:
        listed = "; ".join(line.replace("in the checkpoint", "there") for line in unlike)
        raise DataError(
            f"the corpus {where} was prepared otherwise: {listed}. Expected the same source, vocabulary and "
            "shards. Give those, or prepare another corpus"
        )


def check_given(corpus: str) -> None:
    """Refuse a folder that was given as a prepared corpus and is none.

    Raises:
        ConfigError: a mistyped path would have been a place for a new corpus.
    """
    if not is_url(corpus) and not (Path(corpus) / MANIFEST).exists():
        raise ConfigError(
            f"--corpus is {corpus}, where there is no prepared corpus; expected a folder with a {MANIFEST}: "
            "correct the path, make one (distclust prepare RECIPE --out FOLDER), or leave --corpus out"
        )


def is_generated(manifest: Manifest) -> bool:
    """Whether the corpus was made up (`distclust generate`)."""
    return "generated" in manifest.options


def check_device(cluster: ClusterConfig) -> None:
    """Refuse a GPU for a run in this process where there is none; with workers, Ray counts them.

    Raises:
        ConfigError: it would fail after the documents are prepared.
    """
    if cluster.gpus_per_worker and not cluster.worker_range[1] and not torch.cuda.is_available():
        raise ConfigError(
            f"cluster.gpus_per_worker is {cluster.gpus_per_worker} with cluster.workers=0, and torch sees no "
            "GPU here; expected one: set cluster.gpus_per_worker=0, or give workers on a cluster with GPUs"
        )


def check_unchanged(config: RunConfig, corpus_root: str) -> None:
    """Refuse a finished run whose documents have changed since.

    Nothing is said of what is gone, or behind a URL, where unfinished runs take the corpus as it is, too.

    Raises:
        DataError: the run has to be made anew, in another folder.
    """
    if is_url(corpus_root):
        return
    try:
        manifest = Manifest.load(corpus_root)
        found = None if is_generated(manifest) else open_source(config.source).fingerprint
    except (DataError, ConfigError, OSError):
        return
    if found is not None and found != manifest.source_fingerprint:
        raise DataError(
            f"the documents are no longer those of this finished run (their fingerprint is {found[:12]}, "
            f"that of {corpus_root} {manifest.source_fingerprint[:12]}); expected the same: give another run "
            "folder to cluster the new ones, or `distclust assign` them"
        )


def check_fits(config: RunConfig, corpus: Corpus) -> None:
    """Refuse a corpus and a configuration that do not go together, before any worker starts.

    Raises:
        ConfigError: a model that rows of this length or kind cannot have, a phase that trains what its terms
            do not reach, or scikit-learn's row on what it does not take.
        DataError: as `check_distinct`.
    """
    check_distinct(corpus, config.clusters)
    if config.method in ESTIMATORS:
        check_estimator(config, corpus)
        return
    _check_image(config, corpus)
    model = blueprint(config, corpus.n_features)
    try:
        try_own_parts(model, sparse=corpus.kind == "sparse")
        check_gradients(miniature(config, model), sparse=corpus.kind == "sparse")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if model.reads_sigmoid:
        _check_output(corpus)
    if corpus.kind == "dense" and (config.row.network != "none" or config.row.gate == "linear"):
        _tell_of_offset(corpus)


def _check_image(config: RunConfig, corpus: Corpus) -> None:
    """The corpus may know the shape of its images; another one would scramble them."""
    asked, there = list(config.model.image), corpus.manifest.options.get("image_shape")
    if asked and there and asked != list(there):
        raise ConfigError(
            f"model.image is {asked}, and the rows of {corpus.root} are images of {list(there)} (channels, "
            f"height, width); expected the same, or the pixels are scrambled: set model.image={list(there)}"
        )


_FAR = 20.0
"""Times their spread that rows may lie from 0 before somebody is told."""


def _tell_of_offset(corpus: Corpus) -> None:
    """What all rows have in common is no news, and a layer's weights are multiplied by it: far from 0 layers
    were seen to end in one cluster. The first shard with rows is looked at."""
    shard = next(corpus.shard(i) for i, rows in enumerate(corpus.shard_rows) if rows)
    rows = np.asarray(shard.dense, dtype=np.float64)
    mean = rows.mean(axis=0)
    offset, spread = float(np.linalg.norm(mean)), float(np.sqrt(np.square(rows - mean).sum(1).mean()))
    if spread > 0 and offset > _FAR * spread:
        logger.warning(
            "the rows of %s lie %.0f times their spread from 0, and a network or a linear gate learns badly "
            "there; expected columns with a mean near 0: subtract each column's mean before",
            corpus.root,
            offset / spread,
        )


_ROUNDING = 1e-4
"""How far outside [0, 1] a row may be that was divided by its largest value."""


def _check_output(corpus: Corpus) -> None:
    """Cross-entropy has no bottom for a number outside [0, 1]; the first shard with rows is looked at."""
    shard = next(corpus.shard(i) for i, rows in enumerate(corpus.shard_rows) if rows)
    values = shard.dense if shard.dense is not None else shard.values
    assert values is not None
    least, most = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if least >= -_ROUNDING and most <= 1.0 + _ROUNDING:
        return
    mend = "set model.output=linear"
    if least >= -_ROUNDING:
        now = f"it is {corpus.manifest.row_scale:.4g} now; 0.003921 suits bytes, 1.0 TF-IDF"
        mend = f"set vocabulary.scale lower ({now}), or model.output=linear"
    raise ConfigError(
        f"model.output is sigmoid, whose loss is a cross-entropy, and the first {shard.n_rows} rows of "
        f"{corpus.root} hold numbers from {least:.4g} to {most:.4g}; expected numbers in [0, 1]: {mend}"
    )


def check_distinct(corpus: Corpus, n_clusters: int) -> None:
    """Refuse more clusters than there are distinct documents; reads no further than it takes to find enough.

    Raises:
        DataError: with both numbers.
    """
    seen: set[bytes] = set()
    for number in range(len(corpus.shard_rows)):
        shard = corpus.shard(number)
        for row in range(shard.n_rows):
            if shard.dense is not None:
                content = shard.dense[row].tobytes()
            else:
                assert shard.offsets is not None
                assert shard.indices is not None
                assert shard.values is not None
                span = slice(shard.offsets[row], shard.offsets[row + 1])
                content = shard.indices[span].tobytes() + shard.values[span].tobytes()
            seen.add(hashlib.blake2b(content, digest_size=16).digest())
            if len(seen) >= n_clusters:
                return
    raise DataError(
        f"clusters is {n_clusters}, but the {corpus.n_rows} documents of {corpus.root} have only {len(seen)} "
        f"distinct rows; expected at most one cluster for each. Give clusters={max(len(seen), 2)} or fewer, "
        "more documents, or a larger vocabulary"
    )
