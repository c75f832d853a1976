"""A whole collection, from documents to a corpus folder, on Ray Data or in one process.

Neither the text nor the matrix is ever held. How the source is cut into parts depends on the source alone,
each part is worked on by itself, and what is added up over parts is whole numbers: so the corpus is the same
to the last bit on one core and on a cluster. Nothing appears in the folder before everything has been
checked and written beside it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from distclust import errors
from distclust.corpus import passes
from distclust.corpus.columns import check_classes
from distclust.corpus.passes import Job
from distclust.corpus.shards import (
    Manifest,
    RowCounts,
    ShardConfig,
    ShardInfo,
    corpus_schema,
)
from distclust.corpus.sources import Source, SourceConfig, open_source
from distclust.corpus.vocabulary import (
    VOCABULARY_FILE,
    Vocabulary,
    VocabularyConfig,
    choose_columns,
    idf_of,
    passing_df,
)
from distclust.corpus.workspace import already_there, publish, workspace
from distclust.errors import ClusterError, ConfigError, DataError, DistclustError

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the stage ("read", "rank" or "write"), how many of its parts are done, and of how many."""
_Task = Callable[[int], dict[str, Any]]
_Mapper = Callable[[_Task, int], Iterator[dict[str, Any]]]


def prepare(
    source: SourceConfig,
    vocabulary: VocabularyConfig | Vocabulary | None,
    shards: ShardConfig,
    out: str | Path,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Turn documents into a corpus folder, in parallel on Ray Data.

    Ray is started on this machine unless it runs already or ``RAY_ADDRESS`` is set, and is left running. On
    a cluster, ``out`` and the source's files must be where every node sees them.

    Args:
        source: which documents.
        vocabulary: how texts (or counts) become rows; a `Vocabulary` is used unchanged, for new documents;
        ``None``
            stands for the defaults. Of input that is neither text nor counts only the row scale is applied.
        shards: how the corpus is cut into files.
        out: the corpus folder. Preparing the same again does nothing; a half-written one is cleared away.
        progress: called as work gets done.
        overwrite: replace a corpus of other content, which is refused otherwise.

    Returns:
        The manifest, as it stands in the folder.

    Raises:
        ConfigError: options that contradict each other or the source.
        DataError: documents that cannot be used, or a folder with another corpus; nothing half-made is left.
        ClusterError: a node does not see the storage.
    """
    return _prepare(source, vocabulary, shards, out, progress, overwrite, _on_ray)


def prepare_local(
    source: SourceConfig,
    vocabulary: VocabularyConfig | Vocabulary | None,
    shards: ShardConfig,
    out: str | Path,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Manifest:
    """`prepare` in this process, without Ray; the corpus is the same to the last bit."""
    return _prepare(source, vocabulary, shards, out, progress, overwrite, _in_a_loop)


def _prepare(
    source: SourceConfig,
    vocabulary: VocabularyConfig | Vocabulary | None,
    shards: ShardConfig,
    out: str | Path,
    progress: Progress | None,
    overwrite: bool,
    mapper: _Mapper,
) -> Manifest:
    if "://" in str(out):
        raise ConfigError(
            f"The corpus folder is {out}; expected a folder of this machine or of shared storage; prepare "
            "there and copy the folder to the address."
        )
    folder = Path(out).expanduser().absolute()
    opened = open_source(source)
    vocabulary = _fitting(opened, vocabulary)
    options = _options(source, vocabulary, shards)
    if opened.image_shape:
        options["image_shape"] = list(opened.image_shape)
    done = already_there(folder, opened, options, overwrite)
    if done is not None:
        return done
    with workspace(folder) as work:
        job = Job(
            source=opened,
            work=str(work),
            config=vocabulary.config if isinstance(vocabulary, Vocabulary) else vocabulary,
            fixed=isinstance(vocabulary, Vocabulary),
            rows_per_shard=shards.rows_per_shard,
        )
        if isinstance(vocabulary, Vocabulary):
            vocabulary.save(work / passes.STAGED / VOCABULARY_FILE)
        run = functools.partial(_run, mapper, progress)
        job = _first_pass(job, run)
        if job.weighed:
            if not isinstance(vocabulary, Vocabulary):
                vocabulary = _choose_vocabulary(job, run)
                vocabulary.save(work / passes.STAGED / VOCABULARY_FILE)
            job = replace(job, n_features=vocabulary.n_features)
            weighed_by, scale = vocabulary.fingerprint, vocabulary.config.scale
        else:
            weighed_by, scale = "", vocabulary.scale if isinstance(vocabulary, VocabularyConfig) else 1.0
        manifest = _second_pass(replace(job, scale=scale), run)
        manifest = replace(
            manifest,
            row_scale=scale,
            source_fingerprint=opened.fingerprint,
            vocabulary_fingerprint=weighed_by,
            options=options,
        )
        publish(work / passes.STAGED, folder, manifest)
    _report(manifest, folder)
    return manifest


# ---- before the work


def _fitting(
    source: Source, vocabulary: VocabularyConfig | Vocabulary | None
) -> VocabularyConfig | Vocabulary | None:
    """The vocabulary or options that this source is to be prepared with."""
    weighed = source.kind == "text" or source.layout.values_are == "counts"
    if not isinstance(vocabulary, Vocabulary):
        if weighed:
            return vocabulary or VocabularyConfig()
        if vocabulary is not None:
            logger.info(
                "The documents are %s weights: of the vocabulary options only scale=%g is applied",
                source.kind,
                vocabulary.scale,
            )
        return vocabulary
    wanted = {"text": "words"}.get(source.kind, "columns")
    if not weighed or vocabulary.of != wanted:
        found = "weights" if not weighed else "texts" if source.kind == "text" else "counts"
        raise ConfigError(
            f"The vocabulary numbers {vocabulary.of} but the documents are {found}; expected a vocabulary "
            "made from the same kind of documents; leave the vocabulary out, or give the documents as it "
            "expects them."
        )
    return vocabulary


def _options(
    source: SourceConfig, vocabulary: VocabularyConfig | Vocabulary | None, shards: ShardConfig
) -> dict[str, Any]:
    how: Any
    if isinstance(vocabulary, Vocabulary):
        how = {"given": vocabulary.fingerprint}
    else:
        how = None if vocabulary is None else asdict(vocabulary)
    options = {"source": asdict(source), "vocabulary": how, "shards": asdict(shards)}
    loaded: dict[str, Any] = json.loads(json.dumps(options))  # as it is read back from the manifest
    return loaded


# ---- the work


def _run(
    mapper: _Mapper, progress: Progress | None, stage: str, task: _Task, count: int
) -> list[dict[str, Any]]:
    """Run a task for 0 .. count-1 and return the results in that order."""
    results: dict[int, dict[str, Any]] = {}
    for result in mapper(functools.partial(_guarded, task), count):
        if "error" in result:
            kind = getattr(errors, result["error"], DistclustError)
            raise kind(result["message"])
        results[result["item"]] = result
        if progress is not None:
            progress(stage, len(results), count)
    return [results[item] for item in range(count)]


def _guarded(task: _Task, item: int) -> dict[str, Any]:
    """The result with its number; an error that a user can mend as a result, so that it comes back without a
    trace."""
    try:
        return {"item": item, **task(item)}
    except DistclustError as error:
        return {"item": item, "error": type(error).__name__, "message": str(error)}
    except MemoryError as error:
        where = socket.gethostname()
        return {
            "item": item,
            "error": ClusterError.__name__,
            "message": f"The node {where} ran out of memory ({error}); use smaller files or fewer CPUs.",
        }
    except OSError as error:
        where = socket.gethostname()
        return {
            "item": item,
            "error": DataError.__name__,
            "message": f"Reading or writing failed on {where}: {error}; expected readable files and room on "
            "disk; free some space or check the rights.",
        }


def _first_pass(job: Job, run: Any) -> Job:
    """Read everything once; returns the job with the rows of the parts and, unless it is weighed, the
    features."""
    results = run("read", functools.partial(passes.count_part, job), len(job.source.splits))
    job = replace(job, part_rows=tuple(result["rows"] for result in results))
    files = [split.path for split in job.source.splits]
    if sum(job.part_rows) == 0:
        raise DataError(
            "There are no documents: "
            f"{files[0]}{' and the other files have' if len(set(files)) > 1 else ' has'} no rows that are "
            "taken; expected at least one; check source.files and source.where."
        )
    repeat = passes.find_repeats(job)
    if repeat is not None:
        name, places, number = repeat
        raise DataError(
            f"The id {name!r} appears {len(places)} times (in {' and '.join(dict.fromkeys(places[:2]))}); "
            f"{number} ids are repeated; expected each once; drop the repeats, or name another id column "
            f"than {job.source.layout.id!r}."
        )
    if job.source.kind == "dense":
        widths = {r["width"]: file for r, file in zip(results, files, strict=True) if r["rows"]}
        if len(widths) > 1:
            (a, one), (b, other) = list(widths.items())[:2]
            raise DataError(
                f"{other} has rows of {b} numbers and {one} of {a}; expected one length; make them equal."
            )
        return replace(job, n_features=next(iter(widths)))
    if job.source.kind == "sparse":
        given = job.source.layout.n_features
        found = max(result["max_index"] for result in results) + 1
        if given is None:
            logger.info("The documents have %d columns (the largest index plus one)", found)
        if given is None and found == 0:
            raise DataError(
                "No document has any entry, so the number of columns is not known; expected entries, or "
                "source.n_features; check the column of indices."
            )
        return replace(job, n_columns=given or found, n_features=given or found)
    return job


def _choose_vocabulary(job: Job, run: Any) -> Vocabulary:
    config = job.config
    assert config is not None
    table = passes.merge_terms(job)
    n_documents = sum(job.part_rows)
    df, ranks = table["df"].to_numpy(), table["tf"].to_numpy()
    mask = passing_df(config, df, n_documents)

    def made_of(columns: np.ndarray) -> Vocabulary:
        return Vocabulary(
            terms=passes.unique_terms(table["term"].take(columns)),
            df=df[columns],
            idf=idf_of(df[columns], n_documents),
            n_documents=n_documents,
            config=config,
            of="words" if job.source.kind == "text" else "columns",
        )

    passing = np.flatnonzero(mask)
    if config.rank_by == "tfidf" and config.max_features is not None and len(passing) > config.max_features:
        made_of(passing).save(Path(job.work) / passes.CANDIDATES)
        run("rank", functools.partial(passes.rank_part, job), len(job.part_rows))
        ranks = np.zeros(len(df), np.int64)
        ranks[passing] = passes.merge_scores(job, len(passing))
    vocabulary = made_of(choose_columns(config, mask, ranks))
    logger.info(
        "The vocabulary has %d of %d terms (%d within min_df and max_df)",
        vocabulary.n_features,
        len(df),
        len(passing),
    )
    return vocabulary


def _second_pass(job: Job, run: Any) -> Manifest:
    """Write the shards into the staged folder; returns the manifest without what only the caller knows."""
    count = -(-sum(job.part_rows) // job.rows_per_shard)
    results = run("write", functools.partial(passes.write_part_of_corpus, job), count)
    shards = tuple(ShardInfo(**result["shard"]) for result in results)
    counts = RowCounts()
    for result in results:
        counts = counts + RowCounts(**{**result["counts"], "classes": set(result["counts"]["classes"])})
    check_classes(counts.classes, "the documents")  # a block may have had -1 alone
    kind = "dense" if job.source.kind == "dense" else "sparse"
    return Manifest(
        kind=kind,
        n_rows=sum(shard.rows for shard in shards),
        n_features=job.n_features,
        n_nonzeros=sum(shard.nonzeros for shard in shards),
        shards=shards,
        dtypes={field.name: str(field.type) for field in corpus_schema(kind, job.n_features)},
        **counts.as_manifest(),
    )


def _report(manifest: Manifest, folder: Path) -> None:
    counts = manifest.counts
    logger.info(
        "%s: %d documents in %d shards, %d features, %.1f non-zeros a document; %d empty (all-zero rows), "
        "%d without a label, %d with several labels",
        folder,
        counts["documents"],
        len(manifest.shards),
        manifest.n_features,
        manifest.n_nonzeros / max(manifest.n_rows, 1),
        counts["empty"],
        counts["unlabelled"],
        counts["multi_labelled"],
    )


# ---- where the tasks run


def _in_a_loop(task: _Task, count: int) -> Iterator[dict[str, Any]]:
    return map(task, range(count))


def start_ray() -> None:
    """Start Ray on this machine unless it runs already; with ``RAY_ADDRESS`` set, connect to that cluster."""
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"Ray cannot be reached or started at {address!r} ({error}); expected a running cluster, or "
            "none asked for; check RAY_ADDRESS, or unset it to work on this machine."
        ) from error


def _on_ray(task: _Task, count: int) -> Iterator[dict[str, Any]]:
    """The results of the tasks as they come, one Ray Data task each."""
    import ray

    start_ray()
    items = ray.data.from_items([{"item": item} for item in range(count)], override_num_blocks=count)
    items.context.enable_progress_bars = False
    # results travel as JSON: Arrow would guess a type for each field from the rows it happens to see first
    rows = items.map(functools.partial(_as_row, task), num_cpus=1)
    # after the data set is made, which sets Ray's own levels the first time
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it reports what is off
    for row in rows.iter_rows():
        yield json.loads(row["result"])


def _as_row(task: _Task, row: dict[str, Any]) -> dict[str, str]:
    return {"result": json.dumps(task(int(row["item"])))}
