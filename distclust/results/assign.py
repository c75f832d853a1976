"""Every document's cluster, to Parquet, by Ray Data or in this process.

The work is cut into parts: the shards of a corpus, or the pieces of new documents' files. A part becomes one file, written
under another name and renamed, in ``OUT.partial``; when all are there the folder gets a manifest and its name OUT. So OUT is
always whole, and what an interrupted run has finished is not done again. A document's cluster depends on the document and
the model alone: not on the batch, the part, or the number of workers.

::

    OUT/
      part-00000.parquet ...   id: string, cluster: int32, probability: float32 [, probabilities: fixed_size_list<float32>[K]]
      _manifest.json           the model, the documents, the parts in order, documents a cluster
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import sparse

from distclust import errors
from distclust.corpus import passes, readers
from distclust.corpus.prepare import start_ray
from distclust.corpus.shards import Corpus
from distclust.corpus.sources import Source, SourceConfig, open_source
from distclust.errors import ClusterError, DataError, DistclustError
from distclust.results.predict import Prediction, Predictor

logger = logging.getLogger(__name__)

MANIFEST = "_manifest.json"
PLAN = "_plan.json"
VERSION = 1
_ROWS = 16_384
_META = b"distclust"

Progress = Callable[[int, int], None]
"""Called with the parts that are done and how many there are."""


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
    """For documents that go by their row number: the number that each part begins with."""
    all_probabilities: bool = False
    device: str = "cpu"

    @property
    def n_parts(self) -> int:
        if self.source is not None:
            return len(self.source.splits)
        assert self.corpus is not None
        return len(Corpus.open(self.corpus).shard_rows)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A finished assignment folder."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def n_documents(self) -> int:
        return int(self.manifest["documents"])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(K,) documents of each cluster."""
        return np.array(self.manifest["sizes"], np.int64)

    @classmethod
    def open(cls, folder: str | Path) -> Assignment:
        """Open a finished folder.

        Raises:
            DataError: there is none, it is unfinished, or a part is missing or damaged.
        """
        root = Path(folder)
        try:
            manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
            parts = [(part["file"], part["documents"]) for part in manifest["parts"]]
        except FileNotFoundError:
            partial = _partial(root)
            hint = f"{partial} is unfinished: run the same `distclust assign` again" if partial.exists() else (
                "run `distclust assign`, or check the path"
            )  # fmt: skip
            raise DataError(f"{root} holds no assignments (it has no {MANIFEST}); {hint}.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{root / MANIFEST} cannot be read ({error!r}); remove the folder, assign again."
            ) from error
        for name, rows in parts:
            try:
                found = pq.read_metadata(root / name).num_rows
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(
                    f"{root / name} cannot be read ({error}); remove {root} and assign again."
                ) from error
            if found != rows:
                raise DataError(
                    f"{root / name} has {found} documents; expected {rows}: remove {root}, assign again."
                )
        return cls(root, manifest)

    def tables(self) -> Iterator[pa.Table]:
        """The parts in order."""
        for part in self.manifest["parts"]:
            yield pq.read_table(self.folder / part["file"])

    def clusters(self) -> NDArray[np.int32]:
        """(N,) the cluster of each document, in the order of the corpus or the files."""
        found = [
            pq.read_table(self.folder / part["file"], columns=["cluster"])["cluster"].to_numpy()
            for part in self.manifest["parts"]
        ]
        return np.concatenate(found).astype(np.int32, copy=False) if found else np.empty(0, np.int32)


# ---- what a caller uses


def assign_corpus(
    model: str | Path,
    corpus: str | Path,
    out: str | Path,
    *,
    workers: int = 1,
    all_probabilities: bool = False,
    gpus_per_worker: float = 0,
    progress: Progress | None = None,
) -> Assignment:
    """Assign every document of a prepared corpus.

    Args:
        model: a model folder (`predict.export_model`).
        corpus: the corpus folder.
        out: where the assignments go. The same again does nothing; one of another model is refused.
        workers: actors of Ray Data; 0 works in this process, without Ray.
        all_probabilities: write those of all K clusters too.
        gpus_per_worker: GPUs that an actor takes.
        progress: called as parts get done.

    Raises:
        DataError: model and corpus do not fit, or a shard is damaged.
        ClusterError: a node does not see the storage, or Ray cannot be reached.
    """
    opened = Corpus.open(corpus)
    predictor = Predictor.load(model)
    _check_corpus(predictor, opened)
    job = Job(
        model=str(Path(model).absolute()),
        out=str(_partial(Path(out)).absolute()),
        corpus=_absolute(str(corpus)),
        all_probabilities=all_probabilities,
        device="cuda" if gpus_per_worker else "cpu",
    )
    plan = {"documents_of": opened.manifest.fingerprint, "parts": len(opened.shard_rows)}
    return _assign(job, Path(out), plan, predictor, _Run(workers, gpus_per_worker, progress))


def assign_documents(
    model: str | Path,
    source: SourceConfig,
    out: str | Path,
    *,
    workers: int = 1,
    all_probabilities: bool = False,
    gpus_per_worker: float = 0,
    progress: Progress | None = None,
) -> Assignment:
    """Assign new documents, straight from their files, by the vocabulary of the model; see `assign_corpus`.

    Raises:
        DataError: files, columns or rows that cannot be used; repeated ids; no documents.
    """
    opened = open_source(source)
    predictor = Predictor.load(model)
    _check_source(predictor, opened)
    job = Job(
        model=str(Path(model).absolute()),
        out=str(_partial(Path(out)).absolute()),
        source=opened,
        all_probabilities=all_probabilities,
        device="cuda" if gpus_per_worker else "cpu",
    )
    plan = {"documents_of": opened.fingerprint, "parts": len(opened.splits)}
    run = _Run(workers, gpus_per_worker, progress)
    if _finished(Path(out), _whole_plan(plan, predictor, job)) is None:
        job = replace(job, first_rows=_look_through(opened))
    return _assign(job, Path(out), plan, predictor, run)


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
                f"the corpus {corpus.root} has another {what} than the model: {found!r}, not {expected!r}; expected a "
                "corpus that was prepared with the model's vocabulary. Give the documents' files instead: they go "
                "through it"
            )


def _check_source(predictor: Predictor, source: Source) -> None:
    found = "counts" if source.layout.values_are == "counts" else source.kind
    if found != predictor.input:
        raise DataError(
            f"the documents are {found}, the model was trained on {predictor.input}; expected the same. Name the right "
            "columns (source.text, source.indices and source.values with source.values_are, or source.dense)"
        )
    width = source.layout.n_features
    if found in ("sparse", "dense") and width is not None and width != predictor.about["n_features"]:
        raise DataError(
            f"the documents have {width} columns, the model was trained on {predictor.about['n_features']}; expected "
            "the same. Give the same features in the same order"
        )


# ---- the way through


@dataclass(frozen=True, slots=True)
class _Run:
    workers: int
    gpus: float
    progress: Progress | None


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _absolute(path: str) -> str:
    return path if readers.is_url(path) else str(Path(path).absolute())


def _whole_plan(plan: dict[str, Any], predictor: Predictor, job: Job) -> dict[str, Any]:
    return {
        "version": VERSION,
        "model": fingerprint(predictor),
        "clusters": predictor.model.n_clusters,
        "all_probabilities": job.all_probabilities,
        **plan,
    }


def _assign(job: Job, out: Path, plan: dict[str, Any], predictor: Predictor, run: _Run) -> Assignment:
    plan = _whole_plan(plan, predictor, job)
    done = _finished(out, plan)
    if done is not None:
        logger.info("%s holds these assignments already (%d documents); nothing to do", out, done.n_documents)
        return done
    partial = Path(job.out)
    kept = _take_up(partial, plan)
    results = {int(result["part"]): result for result in kept}
    missing = [part for part in range(plan["parts"]) if part not in results]
    if kept:
        logger.info("%s: %d of %d parts are there already", partial, len(kept), plan["parts"])
    mapper = _in_a_loop if run.workers == 0 else _on_ray
    for result in mapper(job, missing, run):
        _raise(result)
        results[int(result["part"])] = result
        if run.progress is not None:
            run.progress(len(results), plan["parts"])
    ordered = [results[part] for part in range(plan["parts"])]
    manifest = {
        **plan,
        "documents": sum(r["documents"] for r in ordered),
        "empty": sum(r["empty"] for r in ordered),
        "close": sum(r["close"] for r in ordered),
        "sizes": np.sum([r["sizes"] for r in ordered], axis=0).tolist(),
        "files": [{"file": part_name(r["part"]), "documents": r["documents"]} for r in ordered],
    }
    # `parts` counts them in the plan, and lists them in the manifest
    manifest["parts"] = manifest.pop("files")
    _publish(partial, out, manifest)
    if manifest["empty"]:
        logger.info(
            "%d documents have no word of the vocabulary: all-zero rows, assigned like any other",
            manifest["empty"],
        )
    return Assignment.open(out)


def _finished(out: Path, plan: dict[str, Any]) -> Assignment | None:
    """The assignment in OUT if it is this one, None if there is nothing.

    Raises:
        DataError: it is another one, or OUT is something else.
    """
    if not out.exists():
        return None
    if not (out / MANIFEST).exists():
        if out.is_dir() and not any(out.iterdir()):
            return None
        raise DataError(
            f"{out} exists and holds no assignments; expected a new folder. Choose another with --out."
        )
    done = Assignment.open(out)
    unlike = [key for key, value in plan.items() if key != "parts" and done.manifest.get(key) != value]
    if unlike:
        words = {
            "model": "another model",
            "documents_of": "other documents",
            "all_probabilities": "other columns",
        }
        found = ", ".join(dict.fromkeys(words.get(key, f"another {key}") for key in unlike))
        raise DataError(
            f"{out} holds assignments of {found}; expected the same or none. Choose another folder with --out, or "
            "remove it."
        )
    return done


def _take_up(partial: Path, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Make the partial folder; what an interrupted run of the same plan left in it is kept."""
    try:
        stored = json.loads((partial / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    if stored != plan and partial.exists():
        logger.info("%s is of other documents or another model; starting anew", partial)
        shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if stored != plan:
            write_atomically(partial / PLAN, json.dumps(plan, indent=1) + "\n")
    except OSError as error:
        raise DataError(
            f"{partial} cannot be written ({error}); choose another folder with --out."
        ) from error
    kept = []
    for path in partial.iterdir():
        if path.name.startswith(".writing-"):
            path.unlink(missing_ok=True)
        elif path.suffix == ".parquet":
            try:
                kept.append(json.loads(pq.read_metadata(path).metadata[_META]))
            except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
                logger.warning("%s is damaged, and is made again", path)
                path.unlink(missing_ok=True)
    return kept


def _publish(partial: Path, out: Path, manifest: dict[str, Any]) -> None:
    try:
        write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (partial / PLAN).unlink(missing_ok=True)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise DataError(
            f"{partial} cannot be given its name {out} ({error}); free some space, check the rights, run it again."
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    partial = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ---- one part


def part_name(part: int) -> str:
    """File name of a part."""
    return f"part-{part:05d}.parquet"


class PartAssigner:
    """Assigns parts, one after another; an actor of Ray Data has one, with its predictor."""

    def __init__(self, job: Job):
        self.job = job
        self._predictor: Predictor | None = None
        self._corpus: Corpus | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """The row of a Ray data set {"part": number} -> {"result": JSON}."""
        return {"result": json.dumps(self.guarded(int(row["part"])))}

    def guarded(self, part: int) -> dict[str, Any]:
        """`assign`; an error that a user can mend comes back as a result, without a trace."""
        try:
            return self.assign(part)
        except DistclustError as error:
            return {"part": part, "error": type(error).__name__, "message": str(error)}
        except OSError as error:
            message = f"reading or writing failed on {socket.gethostname()}: {error}; free some space, check the rights"
            return {"part": part, "error": DataError.__name__, "message": message}

    def assign(self, part: int) -> dict[str, Any]:
        """Write one part; returns its counts."""
        path = Path(self.job.out) / part_name(part)
        if not (path.parent / PLAN).exists():
            raise ClusterError(
                f"the node {socket.gethostname()} does not see {path.parent / PLAN}; expected storage that all nodes "
                "share. Put model, corpus and output there, or give workers=0"
            )
        if self._predictor is None:
            self._predictor = Predictor.load(self.job.model, self.job.device)
        k = self._predictor.model.n_clusters
        counts: dict[str, Any] = {"part": part, "documents": 0, "empty": 0, "close": 0, "sizes": np.zeros(k, np.int64)}
        tables = []
        for ids, found, empty in self._predicted(part):
            clusters = found.clusters
            columns: dict[str, Any] = {
                "id": ids,
                "cluster": pa.array(clusters.astype(np.int32)),
                "probability": pa.array(found.probabilities[np.arange(len(clusters)), clusters]),
            }
            if self.job.all_probabilities:
                flat = pa.array(found.probabilities.reshape(-1))
                columns["probabilities"] = pa.FixedSizeListArray.from_arrays(flat, k)
            tables.append(pa.table(columns))
            counts["documents"] += len(ids)
            counts["empty"] += empty
            counts["close"] += int(found.ambiguous.sum())
            counts["sizes"] += np.bincount(clusters, minlength=k)
        counts["sizes"] = counts["sizes"].tolist()
        table = pa.concat_tables(tables) if tables else self._schema(k).empty_table()
        self._write(path, table, counts)
        return counts

    def _schema(self, k: int) -> pa.Schema:
        fields = [("id", pa.string()), ("cluster", pa.int32()), ("probability", pa.float32())]
        if self.job.all_probabilities:
            fields.append(("probabilities", pa.list_(pa.float32(), k)))
        return pa.schema(fields)

    def _write(self, path: Path, table: pa.Table, counts: dict[str, Any]) -> None:
        table = table.replace_schema_metadata({_META: json.dumps(counts)})
        partial = path.with_name(f".writing-{socket.gethostname()}-{os.getpid()}-{path.name}")
        try:
            pq.write_table(table, partial, compression="zstd")
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _predicted(self, part: int) -> Iterator[tuple[pa.Array, Prediction, int]]:
        """Ids (n,), what the model says of them and how many rows are all zeros, a block at a time."""
        assert self._predictor is not None
        if self.job.source is not None:
            yield from self._new_documents(self.job.source, part)
            return
        if self._corpus is None:
            assert self.job.corpus is not None
            self._corpus = Corpus.open(self.job.corpus)
        shard = self._corpus.shard(part)
        ids = pa.array(shard.ids(), pa.string())
        for at in range(0, shard.n_rows, _ROWS):
            stop = min(at + _ROWS, shard.n_rows)
            if shard.dense is not None:
                rows = shard.dense[at:stop]
                yield ids[at:stop], self._predictor.predict_dense(rows), _all_zero(rows)
                continue
            assert shard.offsets is not None
            assert shard.indices is not None
            assert shard.values is not None
            bounds = shard.offsets[at : stop + 1]
            span = slice(bounds[0], bounds[-1])
            found = self._predictor.predict_rows(bounds - bounds[0], shard.indices[span], shard.values[span].copy())
            yield ids[at:stop], found, int((np.diff(bounds) == 0).sum())

    def _new_documents(self, source: Source, part: int) -> Iterator[tuple[pa.Array, Prediction, int]]:
        assert self._predictor is not None
        number = self.job.first_rows[part]
        for table in source.read_split(source.splits[part]):
            batch = table.combine_chunks().to_batches()[0]
            ids = batch.column("id")
            if source.numbered:
                ids = pa.array(np.arange(number, number + len(batch))).cast(pa.string())
                number += len(batch)
            yield ids, *_predict_new(self._predictor, batch)


def _predict_new(predictor: Predictor, batch: pa.RecordBatch) -> tuple[Prediction, int]:
    """Documents as their files have them, through the vocabulary and the row scale of the model."""
    if predictor.input == "text":
        assert predictor.vocabulary is not None
        rows = predictor.vocabulary.transform(batch.column("text"))
        found = predictor.predict_rows(rows.indptr, rows.indices, rows.data)
        return found, int((np.diff(rows.indptr) == 0).sum())
    if predictor.input == "dense":
        column = batch.column("values")
        dense = column.flatten().to_numpy().reshape(len(batch), column.type.list_size)
        return predictor.predict_matrix(dense), _all_zero(dense)
    bounds, indices, values = passes.csr_of(batch)
    width = max(predictor.model.n_features, int(indices.max(initial=-1)) + 1)
    matrix = sparse.csr_matrix((values, indices, bounds), shape=(len(batch), width))
    return predictor.predict_matrix(matrix), int((np.diff(bounds) == 0).sum())


def _all_zero(rows: NDArray[Any]) -> int:
    return int((~rows.any(axis=1)).sum())


# ---- before new documents are assigned: their ids


def _look_through(source: Source) -> tuple[int, ...]:
    """The row number that each part begins with, read from the id column alone.

    Raises:
        DataError: an id appears twice, or no row is taken.
    """
    counts, hashes = [], []
    for split in source.splits:
        rows = 0
        for ids in _ids_of(source, split):
            rows += len(ids)
            hashes.append(np.frombuffer(b"".join(map(passes.hash_id, ids)), np.uint64))
        counts.append(rows)
    if sum(counts) == 0:
        raise DataError(
            f"There are no documents: {source.splits[0].path} has no rows that are taken; expected at least one; "
            "check the files and source.where."
        )
    if not source.numbered:
        _refuse_repeats(source, np.sort(np.concatenate(hashes)))
    return tuple(int(first) for first in np.concatenate([[0], np.cumsum(counts)[:-1]]))


def _refuse_repeats(source: Source, marks: NDArray[np.uint64]) -> None:
    suspects = {mark.tobytes() for mark in np.unique(marks[1:][marks[1:] == marks[:-1]])}
    seen: dict[str, str] = {}
    for split in source.splits if suspects else ():
        for ids in _ids_of(source, split):
            for name in ids:
                if passes.hash_id(name) not in suspects:
                    continue
                if name in seen:
                    raise DataError(
                        f"The id {name!r} appears more than once (in "
                        f"{' and '.join(dict.fromkeys((seen[name], split.path)))}); expected each once; drop the "
                        f"repeats, or name another id column than {source.layout.id!r}."
                    )
                seen[name] = split.path


def _ids_of(source: Source, split: readers.Split) -> Iterator[list[str]]:
    """The ids of a piece's documents, a block at a time; empty texts where they go by their number."""
    layout = source.layout
    wanted = [name for name in (layout.id, layout.where) if name is not None] or layout.columns[:1]
    for block in readers.read(split, wanted):
        columns = block.columns
        if layout.where is not None:
            columns = columns.filter(columns.column(layout.where).fill_null(False))
        if layout.id is None:
            yield [""] * columns.num_rows
            continue
        ids = columns.column(layout.id)
        if ids.null_count:
            raise DataError(
                f"{split.path} has a document without an id (null in {layout.id!r}); expected one for each; fill it in, "
                "or name no id column."
            )
        yield ids.cast(pa.string()).to_pylist()


# ---- where the parts are worked on


def _in_a_loop(job: Job, parts: list[int], run: _Run) -> Iterator[dict[str, Any]]:
    return map(PartAssigner(job).guarded, parts)


def _on_ray(job: Job, parts: list[int], run: _Run) -> Iterator[dict[str, Any]]:
    """The results as they come, from a pool of Ray Data actors that each hold a predictor."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    if not parts:
        return
    start_ray()
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    items = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    results = items.map(
        PartAssigner,
        fn_constructor_args=(job,),
        compute=ActorPoolStrategy(size=min(run.workers, len(parts))),
        num_cpus=1,
        num_gpus=run.gpus or None,
    )
    for row in results.iter_rows():
        yield json.loads(row["result"])


def _raise(result: dict[str, Any]) -> None:
    if "error" in result:
        raise getattr(errors, result["error"], DistclustError)(result["message"])
