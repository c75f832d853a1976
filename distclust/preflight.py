"""What is checked before a run begins its work, beside the configuration: seconds here save hours."""

from __future__ import annotations

import hashlib
from pathlib import Path

from distclust.config import RunConfig, TrackingConfig, to_dict
from distclust.corpus.shards import Corpus, Manifest
from distclust.errors import DataError, TrackingError
from distclust.training.checkpoint import differences
from distclust.training.reach import reach, sqlite_file
from distclust.training.run_identity import unusable
from distclust.training.tracking import SPOOL_NAME, tracking_uri


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

    Raises:
        DataError: the differences are listed.
    """
    asked = {group: to_dict(getattr(config, group)) for group in ("source", "vocabulary", "shards")}
    unlike = differences({group: manifest.options.get(group) or {} for group in asked}, asked)
    if unlike:
        listed = "; ".join(line.replace("in the checkpoint", "there") for line in unlike)
        raise DataError(
            f"the corpus {where} was prepared otherwise: {listed}. Expected the same source, vocabulary and "
            "shards. Give those, or prepare another corpus"
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
