"""Every document's cluster, to Parquet, by Ray Data or in this process.

The work is cut into parts: the shards of a corpus, or the pieces of new documents' files. A part becomes one
file of the folder (see assignment.py). A document's cluster depends on the document and the model alone: not
on the batch, the part, or the number of workers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from distclust import errors
from distclust.corpus import passes
from distclust.corpus.files import is_url
from distclust.corpus.prepare import start_ray
from distclust.corpus.shards import Corpus
from distclust.corpus.sources import Source, SourceConfig, open_source
from distclust.errors import ClusterError, DataError, DistclustError
from distclust.mixture.imports import allow_modules, allowed_modules
from distclust.results.assignment import (
    PLAN,
    Assignment,
    find_finished,
    part_name,
    partial_of,
    publish,
    take_up,
    write_part,
)
from distclust.results.blocks import of_new_documents, of_shard
from distclust.results.predict import Prediction, Predictor

logger = logging.getLogger(__name__)

VERSION = 1

Progress = Callable[[int, int], None]
"""Called with the parts that are done and how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignConfig:
    """How the work is done; the labels do not depend on it."""

    workers: int = 0
    """Tasks of Ray Data at a time; 0 works in this process, without Ray."""
    gpus_per_worker: float = 0
    """GPUs that a task takes; more than 0 predicts on the GPU."""
    all_probabilities: bool = False
    """Write the probabilities of all K clusters too."""
    replace: bool = False
    """Whether assignments of another model in the folder are made anew, and not refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every task of one assignment needs to know; small enough to send with each."""

    model: str
    """The model folder."""
    out: str
    """The folder that the parts are written to, which every node must see."""
    corpus: str | None = None
    """A prepared corpus, or"""
    source: Source | None = None
    """new documents."""
    first_rows: tuple[int, ...] = ()
    """For new documents: the row number that each part begins with."""
    all_probabilities: bool = False
    device: str = "cpu"
    allow_modules: tuple[str, ...] = ()
    """Modules of the user's own that the model may import."""


# ---- what a caller uses


def assign_corpus(
    model: str | Path,
    corpus: str | Path,
    out: str | Path,
    config: AssignConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Assignment:
    """Assign every document of a prepared corpus.

    Args:
        model: a model folder (`predict.export_model`).
        corpus: the corpus, a folder or URL.
        out: where the assignments go. The same again does nothing; others that are there are refused.
        config: workers and columns.
        progress: called as parts get done.

    Raises:
        DataError: model and corpus do not fit, or a shard is damaged.
        ClusterError: a node does not see the storage, or Ray cannot be reached.
    """
    opened = Corpus.open(corpus)
    predictor = Predictor.load(model)
    _check_corpus(predictor, opened)

    def job(options: dict[str, Any]) -> Job:
        root = str(corpus)
        return Job(corpus=root if is_url(root) else str(Path(root).absolute()), **options)

    data = {"data": opened.manifest.fingerprint, "parts": len(opened.shard_rows)}
    return _assign(predictor, job, data, _Call(Path(model), Path(out), config or AssignConfig(), progress))


def assign_documents(
    model: str | Path,
    source: SourceConfig,
    out: str | Path,
    config: AssignConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Assignment:
    """Assign new documents from their files, through the vocabulary of the model; see `assign_corpus`.

    Raises:
        DataError: files, columns or rows that cannot be used; repeated ids; no documents.
    """
    opened = open_source(source, labels=False)  # no label or title decides about a cluster
    predictor = Predictor.load(model)
    _check_source(predictor, opened)

    def job(options: dict[str, Any]) -> Job:
        return Job(source=opened, first_rows=_look_through(opened), **options)

    data = {"data": opened.fingerprint, "parts": len(opened.splits)}
    return _assign(predictor, job, data, _Call(Path(model), Path(out), config or AssignConfig(), progress))


# ---- the way through


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments that both kinds of documents share."""

    model: Path
    out: Path
    config: AssignConfig
    progress: Progress | None


def _assign(
    predictor: Predictor, make_job: Callable[[dict[str, Any]], Job], data: dict[str, Any], call: _Call
) -> Assignment:
    plan = {
        "version": VERSION,
        "model": fingerprint(predictor),
        "clusters": predictor.model.n_clusters,
        "all_probabilities": call.config.all_probabilities,
        **data,
    }
    done = find_finished(call.out, plan, call.config.replace)
    if done is not None:
        logger.info("%s holds these assignments already (%d documents)", call.out, done.n_documents)
        return done
    partial = partial_of(call.out)
    job = make_job(
        {
            "model": str(call.model.absolute()),
            "out": str(partial.absolute()),
            "all_probabilities": call.config.all_probabilities,
            "device": "cuda" if call.config.gpus_per_worker else "cpu",
            "allow_modules": tuple(allowed_modules()),
        }
    )
    counts = {int(part["part"]): part for part in take_up(partial, plan)}
    if counts:
        logger.info("%s: %d of %d parts are there already", partial, len(counts), plan["parts"])
    missing = [part for part in range(plan["parts"]) if part not in counts]
    for result in (_on_ray if call.config.workers else _in_a_loop)(job, missing, call.config):
        if "error" in result:
            raise getattr(errors, result["error"], DistclustError)(result["message"])
        counts[int(result["part"])] = result
        if call.progress is not None:
            call.progress(len(counts), plan["parts"])
    publish(partial, call.out, plan, [counts[part] for part in range(plan["parts"])])
    return Assignment.open(call.out)


def _in_a_loop(job: Job, parts: Sequence[int], config: AssignConfig) -> Iterator[dict[str, Any]]:
    return map(PartAssigner(job).guarded, parts)


def _on_ray(job: Job, parts: Sequence[int], config: AssignConfig) -> Iterator[dict[str, Any]]:
    """The results as they come, a Ray Data task a part. A part is the same whoever makes it, so Ray may
    repeat one.

    Tasks, not actors: a process that Ray keeps for them keeps its predictor too (see `_assigner`), and a
    process or node that is lost takes nothing along.
    """
    import ray

    if not parts:
        return
    start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    items = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    results = items.map(
        _assign_in_task,  # type: ignore[arg-type]
        fn_args=(job,),
        compute=ray.data.TaskPoolStrategy(size=min(config.workers, len(parts))),
        num_cpus=1,
        num_gpus=config.gpus_per_worker or None,
        max_calls=0,  # by default a process with a GPU ends after one task
    )
    for row in results.iter_rows():
        yield json.loads(row["result"])


def _assign_in_task(row: dict[str, Any], job: Job) -> dict[str, str]:
    """{"part": number} -> {"result": JSON}: Arrow would guess a type for each field of a result."""
    torch.set_num_threads(1)
    return {"result": json.dumps(_assigner(job).guarded(int(row["part"])))}


@functools.lru_cache(maxsize=1)
def _assigner(job: Job) -> PartAssigner:
    """This process' assigner for the job, with its predictor loaded."""
    return PartAssigner(job)


# ---- does it fit


def fingerprint(predictor: Predictor) -> str:
    """sha256 (hex) of what decides the labels that a model gives."""
    keys = ("version", "method", "settings", "n_features", "n_clusters", "kind", "row_scale", "files")
    text = json.dumps({key: predictor.about[key] for key in keys}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_corpus(predictor: Predictor, corpus: Corpus) -> None:
    manifest, about = corpus.manifest, predictor.about
    vocabulary = predictor.vocabulary.fingerprint if predictor.vocabulary is not None else ""
    for what, found, expected in (
        ("kind", manifest.kind, about["kind"]),
        ("number of features", manifest.n_features, about["n_features"]),
        ("vocabulary", manifest.vocabulary_fingerprint[:12], vocabulary[:12]),
        ("row scale", manifest.row_scale, about["row_scale"]),
    ):
        if found != expected:
            raise DataError(
                f"the corpus {corpus.root} has another {what} than the model ({found!r}, not {expected!r}); "
                "expected a corpus that was prepared with the model's vocabulary. Give the documents' "
                "files: they go through it"
            )
    _check_image(predictor, manifest.options.get("image_shape"))


def _check_image(predictor: Predictor, shape: Sequence[int] | None) -> None:
    """Pixels of another shape may be as many, in other places."""
    known = predictor.about.get("image_shape") or predictor.model.settings.image
    if shape and known and list(shape) != list(known):
        raise DataError(
            f"the documents are images of {list(shape)} (channels, height, width), the model was trained on "
            f"images of {list(known)}; expected the same: turn or scale the images"
        )


def _check_source(predictor: Predictor, source: Source) -> None:
    found = "counts" if source.layout.values_are == "counts" else source.kind
    if found != predictor.input:
        raise DataError(
            f"the documents are {found}, the model was trained on {predictor.input}; expected the same. Name "
            "the right columns (source.text, source.indices and source.values with source.values_are, or "
            "source.dense)"
        )
    width, d = source.layout.n_features, predictor.model.n_features
    if found in ("sparse", "dense") and width not in (None, d):
        raise DataError(
            f"the documents have {width} columns, the model was trained on {d}; expected the same features "
            "in the same order"
        )
    _check_image(predictor, source.image_shape)


# ---- one part


class PartAssigner:
    """Assigns parts, one after another; each process that works has one, with its predictor."""

    def __init__(self, job: Job):
        self.job = job
        self._predictor: Predictor | None = None
        self._corpus: Corpus | None = None

    def guarded(self, part: int) -> dict[str, Any]:
        """`assign`; an error that a user can mend comes back as a result, without a trace."""
        try:
            return self.assign(part)
        except DistclustError as error:
            return {"part": part, "error": type(error).__name__, "message": str(error)}
        except OSError as error:
            message = f"{socket.gethostname()} cannot read or write: {error}; free space or check the rights"
            return {"part": part, "error": DataError.__name__, "message": message}

    def assign(self, part: int) -> dict[str, Any]:
        """Write one part.

        Returns:
            ``part``, ``documents``, ``empty`` (all-zero rows), ``ambiguous`` (rounding decides between two
            clusters) and ``sizes`` (documents of each cluster).

        Raises:
            ClusterError: this node does not see the storage.
            DataError: rows that cannot be used.
        """
        path = Path(self.job.out) / part_name(part)
        if not (path.parent / PLAN).exists():
            raise ClusterError(
                f"the node {socket.gethostname()} does not see {path.parent / PLAN}; expected storage that "
                "all nodes share: put model, corpus and output there, or work without workers"
            )
        if self._predictor is None:
            allow_modules(self.job.allow_modules)
            self._predictor = Predictor.load(self.job.model, self.job.device)
        k = self._predictor.model.n_clusters
        documents = empty = ambiguous = 0
        sizes = np.zeros(k, np.int64)
        tables = []
        for ids, found, zero in self._predicted(part):
            tables.append(_table(ids, found, self.job.all_probabilities))
            documents += len(ids)
            empty += zero
            ambiguous += int(found.ambiguous.sum())
            sizes += np.bincount(found.clusters, minlength=k)
        if not tables:
            nothing = Prediction(np.empty(0, np.int64), np.empty((0, k), np.float32), np.empty(0, np.bool_))
            tables = [_table(pa.array([], pa.string()), nothing, self.job.all_probabilities)]
        counts = {
            "part": part,
            "documents": documents,
            "empty": empty,
            "ambiguous": ambiguous,
            "sizes": sizes.tolist(),
        }
        write_part(path, pa.concat_tables(tables), counts)
        return counts

    def _predicted(self, part: int) -> Iterator[tuple[pa.Array, Prediction, int]]:
        """Ids (n,), what the model says of them and how many rows are all zeros, a block at a time."""
        assert self._predictor is not None
        if self.job.source is not None:
            yield from of_new_documents(self._predictor, self.job.source, part, self.job.first_rows[part])
            return
        if self._corpus is None:
            assert self.job.corpus is not None
            self._corpus = Corpus.open(self.job.corpus)
        yield from of_shard(self._predictor, self._corpus, part)


def _table(ids: pa.Array, found: Prediction, all_probabilities: bool) -> pa.Table:
    n, k = found.probabilities.shape
    columns = {
        "id": ids,
        "cluster": pa.array(found.clusters.astype(np.int32)),
        "probability": pa.array(found.probabilities[np.arange(n), found.clusters]),
    }
    if all_probabilities:
        columns["probabilities"] = pa.FixedSizeListArray.from_arrays(
            pa.array(found.probabilities.reshape(-1)), k
        )
    return pa.table(columns)


# ---- before new documents are assigned: their ids


def _look_through(source: Source) -> tuple[int, ...]:
    """The row number that each part begins with, from the id column alone.

    Raises:
        DataError: an id appears twice, or no row is taken.
    """
    rows, marks = [], []
    for split in source.splits:
        rows.append(0)
        for ids in source.read_ids(split):
            rows[-1] += len(ids)
            marks.append(np.frombuffer(b"".join(map(passes.hash_id, ids)), np.uint64))
    if sum(rows) == 0:
        raise DataError(
            f"There are no documents: {source.splits[0].path} has no rows that are taken; expected at least "
            "one; check the files and source.where."
        )
    if not source.numbered:
        _refuse_repeats(source, np.sort(np.concatenate(marks)))
    return tuple(int(first) for first in np.cumsum([0, *rows[:-1]]))


def _refuse_repeats(source: Source, marks: NDArray[np.uint64]) -> None:
    suspects = {mark.tobytes() for mark in np.unique(marks[1:][marks[1:] == marks[:-1]])}
    seen: dict[str, str] = {}
    for split in source.splits if suspects else ():
        for ids in source.read_ids(split):
            for name in ids:
                if passes.hash_id(name) in suspects and name in seen:
                    where = " and ".join(dict.fromkeys((seen[name], split.path)))
                    raise DataError(
                        f"The id {name!r} appears more than once (in {where}); expected each once; drop the "
                        f"repeats, or name another id column than {source.layout.id!r}."
                    )
                if passes.hash_id(name) in suspects:
                    seen[name] = split.path
