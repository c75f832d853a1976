"""The tables of the papers, and our own: `python -m jobs.paper_tables builtin --out docs/results.md`.

A table is a YAML file of `jobs/tables/`. Each cell (a row, a protocol, a seed) is a run of its own below
`--runs` and in MLflow, one Ray task with one thread. A cell that is finished is never run again, one that
failed is named with its reason and tried again when the command is given again, and the others go on. The
documents of a table are prepared once for each way of preparing them. `--no-run` only writes what is there.
With `--keep` the seeds that a row of the file has, and whose runs are on another machine or gone, are not run
again: later seeds are added to them.
What was tried beside a table is a table too, `trials/NAME`, which `all` leaves out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distclust.config import from_dict, to_dict
from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError, DistclustError, near
from distclust.mixture.imports import allow_modules, allowed_modules
from distclust.results.agreement import agreement
from distclust.results.evaluate import class_numbers
from distclust.run import prepare_run, train_run
from distclust.run_folder import DONE, Done, assignments_of, write_json
from jobs._cells import (
    FAILED,
    MACHINE,
    Cell,
    Line,
    corpus_folder,
    finished_unlike,
    plan,
    read_cell,
    read_cells,
)
from jobs._markdown import Asked, Kept, check_markers, markdown, read_kept, write_between
from jobs._tables import PROTOCOLS, Table, load_table, table_names, trial_names

# ---- run


def run_cell(config: dict[str, Any], folder: str, corpus: str, not_prepared: str | None = None) -> str | None:
    """One run, from wherever its folder stands; why it failed, or None. Never raises."""
    here = Path(folder)
    try:
        if not_prepared is not None:
            raise DistclustError(not_prepared)
        here.mkdir(parents=True, exist_ok=True)
        (here / FAILED).unlink(missing_ok=True)
        parsed = from_dict(config)
        write_json(here / MACHINE, {"words": _machine(parsed.cluster.gpus_per_worker)})
        if not (here / DONE).exists():  # k-means and LSA on the rows are rows of a table, not of each cell
            done = Done(here / DONE)
            done.baselines["rows"] = {}
            done.save()
        train_run(parsed, here, corpus_root=corpus)
    except Exception as error:  # whatever it is, the other cells go on
        reason = f"{type(error).__name__}: {error}"
        _remember(here, reason)
        return reason
    return None


def prepare_cell(
    config: dict[str, Any], corpus: str, documents: dict[str, Any] | None = None, text_corpus: str = ""
) -> str | None:
    """Prepare the rows of a cell, and before them the documents whose singular directions they are.

    Returns:
        Why they could not be prepared, or None. Never raises.
    """
    try:
        parsed = from_dict(config)
        if documents is not None and not Path(parsed.source.files[0]).exists():
            prepare_run(from_dict(documents), text_corpus)
            _write_directions(text_corpus, Path(parsed.source.files[0]))
        prepare_run(parsed, corpus)
    except Exception as error:  # the cells that need them say so
        return f"{type(error).__name__}: {error}"
    return None


def _write_directions(text_corpus: str, path: Path) -> None:
    """LSA of a prepared corpus as an npz file of rows x and labels y; its name says how many directions."""
    import numpy as np
    from scipy.sparse import csr_matrix, vstack
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    corpus = Corpus.open(text_corpus)
    shards = [corpus.shard(number) for number in range(len(corpus.shard_rows))]
    width = corpus.n_features
    rows = vstack([csr_matrix((s.values, s.indices, s.offsets), (s.n_rows, width)) for s in shards])
    directions = int(path.stem.rpartition("lsa")[2])
    x = normalize(TruncatedSVD(directions, random_state=0).fit_transform(rows)).astype(np.float32)
    numbers = class_numbers(corpus)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        np.savez(partial, x=x, y=np.where(numbers < 0, np.nan, numbers))  # NaN is no label
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _remember(folder: Path, reason: str) -> None:
    with contextlib.suppress(OSError, ConfigError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FAILED, {"reason": reason})


def _machine(gpus: int) -> str:
    words = f"{datetime.date.today()} on {os.cpu_count()} cores ({platform.machine()})"
    if not gpus:
        return f"{words}, no GPU"
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU asked for, none seen"
    return f"{words}, {name}"


def _in_task(work: Callable[..., str | None], allowed: Sequence[str], *given: Any) -> str | None:
    """`work` in a process of Ray's, with one thread and the modules that were allowed to the command."""
    import torch

    torch.set_num_threads(1)
    allow_modules(allowed)
    return work(*given)


def run_cells(cells: Sequence[Cell]) -> dict[Path, str]:
    """Run what is not finished, as Ray tasks; why cells failed, by folder."""
    import ray

    waiting, failed = _left_to_run(cells)
    if not waiting:
        return failed
    if not ray.is_initialized():
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "local"), logging_level=logging.WARNING, log_to_driver=False
        )
    found = int(ray.cluster_resources().get("GPU", 0))
    for cell in waiting:
        if cell.config.cluster.gpus_per_worker > found:
            asked = cell.config.cluster.gpus_per_worker
            failed[cell.folder] = f"asks for {asked} GPU and this cluster has {found}; not started"
            _say(f"{cell.folder.name}: {failed[cell.folder]}")
    waiting = [cell for cell in waiting if cell.folder not in failed]
    # a task that took its process with it is named, not run over and over
    work = ray.remote(num_cpus=1, max_retries=0)(_in_task)
    allowed = allowed_modules()
    prepared: dict[Path, Any] = {}
    refs: dict[Any, Cell] = {}
    for cell in waiting:
        config = to_dict(cell.config)
        if cell.corpus not in prepared:
            documents = None if cell.documents is None else to_dict(cell.documents)
            text = (
                "" if cell.documents is None else str(corpus_folder(cell.documents, cell.corpus.parents[1]))
            )
            prepared[cell.corpus] = work.remote(
                prepare_cell, allowed, config, str(cell.corpus), documents, text
            )
        task = work.options(num_gpus=cell.config.cluster.gpus_per_worker)
        given = (config, str(cell.folder), str(cell.corpus), prepared[cell.corpus])
        refs[task.remote(run_cell, allowed, *given)] = cell
    for done, (cell, reason) in enumerate(_as_they_end(refs), start=1):
        if reason is not None:
            failed[cell.folder] = reason
        _say(f"{done}/{len(waiting)} {cell.folder.name}: {'finished' if reason is None else reason}")
    return failed


def _left_to_run(cells: Sequence[Cell]) -> tuple[list[Cell], dict[Path, str]]:
    """The cells that are not finished; and those that are damaged or other than asked for, by folder, with
    what to do."""
    waiting, damaged = [], {}
    for cell in cells:
        try:
            if not read_cell(cell)[0]:
                waiting.append(cell)
            elif unlike := finished_unlike(cell):
                damaged[cell.folder] = unlike
                _say(f"{cell.folder.name}: {unlike}")
        except ConfigError as error:
            damaged[cell.folder] = str(error)
            _say(f"{cell.folder.name}: {error}")
    return waiting, damaged


def _as_they_end(refs: dict[Any, Cell]) -> Iterator[tuple[Cell, str | None]]:
    import ray

    left = list(refs)
    while left:
        (ref,), left = ray.wait(left, num_returns=1)
        cell = refs[ref]
        try:
            yield cell, ray.get(ref)
        except ray.exceptions.RayError as error:  # its process was killed, or its node is gone
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            _remember(cell.folder, reason)
            yield cell, reason


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# ---- the command


def listing(asked: Asked, lines: Sequence[Line], kept: Kept) -> list[str]:
    """What `--list` prints of a table."""
    out = [f"{asked.table.name}: {asked.table.title} ({asked.protocol})"]
    for line in lines:
        if line.row.baseline_of is not None:
            state = f"comes with {line.row.baseline_of.row}"
        elif line.missing is not None:
            state = line.missing
        else:
            failed = f", {len(line.failures)} failed" if line.failures else ""
            hours = line.row.hours.get(asked.protocol)
            there = kept.before(asked, line)
            state = f"{len(line.summaries)} of {len(line.cells)} finished{failed}"
            state += "" if there is None else f", {len(there.seeds)} in the file"
            state += "" if hours is None else f", about {hours:g} h a seed"
        title = f"{line.section.title}: " if line.section.title else ""
        out.append(f"  {title}{line.row.label} [{line.row.method or 'baseline'}]: {state}")
    return out


def make(table: Table, options: argparse.Namespace) -> bool:
    """Run and write one table; whether every row asked for is right and none of its cells failed."""
    seeds = options.seeds or table.seeds
    given = table.name if options.table == "all" else options.table
    given = Path(given).name if Path(given).is_absolute() else given  # folders of this machine mean nothing
    asked = Asked(table, options.protocol, seeds, given)
    lines = plan(table, options.protocol, seeds, Path(options.runs).absolute())
    read_cells(lines)
    kept = _kept(asked, options)
    if options.list:
        sys.stdout.write("\n".join(listing(asked, lines, kept)) + "\n")
        return not any(line.wrong for line in lines)
    wanted = [line for line in lines if not options.only or line.row.label in options.only]
    for line in wanted:
        if line.missing is not None:
            _say(f"{table.name}, {line.row.label}: not run: {line.missing}")
    to_run = [c for line in wanted for c in line.cells if c.seed not in kept.seeds(asked, line)]
    failed = {} if options.no_run else run_cells(to_run)
    read_cells(lines)
    if table.agreement:
        _compare_seeds(lines)
    text = markdown(asked, lines, _kept(asked, options))  # read again: it took hours
    if options.out is None:
        sys.stdout.write(text + "\n")
    else:
        write_between(Path(options.out), asked.name, text, f"{table.title} ({options.protocol})")
    return not failed and not any(line.wrong for line in wanted)


def _kept(asked: Asked, options: argparse.Namespace) -> Kept:
    return read_kept(Path(options.out), asked.name) if options.keep else Kept()


def _compare_seeds(lines: Sequence[Line]) -> None:
    for line in lines:
        cells = [cell for cell in line.cells if cell.seed in line.summaries]
        try:
            line.agreement = agreement([assignments_of(c.folder) for c in cells]) if len(cells) > 1 else None
        except DistclustError as error:  # the assignments were moved away: the rest stands
            _say(f"{line.row.label}: no agreement of seeds: {error}")


def _check_options(options: argparse.Namespace, tables: Sequence[Table]) -> None:
    """Refuse what would be found out after hours, or never."""
    if options.seeds is not None and options.seeds < 1:
        raise ConfigError(f"--seeds is {options.seeds}; expected at least 1, or leave it out")
    if options.keep and options.out is None:
        raise ConfigError("--keep takes rows over from a Markdown file; name it with --out")
    labels = [row.label for table in tables for _, row in table.rows()]
    for name in options.only:
        if name in labels:
            continue
        if options.table == "all":
            raise ConfigError(
                f"--only {name!r} is a row of no table{near(name, labels) or '; --list names them all'}"
            )
        raise ConfigError(f"--only {name!r} is no row of {tables[0].name}; its rows: {', '.join(labels)}")
    if options.out is not None and (Path(options.out).is_dir() or not Path(options.out).parent.is_dir()):
        raise ConfigError(
            f"--out {options.out}: expected a Markdown file in a folder that is there; make the folder, or "
            "give another file"
        )
    for table in tables if options.out is not None else ():
        check_markers(Path(options.out), f"{table.name} {options.protocol}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when all is well, 1 when a cell failed or the recipe of a row is wrong (the others are
    run), 2 for a wrong table or option (nothing is run)."""
    parser = argparse.ArgumentParser(prog="python -m jobs.paper_tables", description=__doc__)
    names = [*table_names(), *trial_names()]
    parser.add_argument("table", help=f"a YAML file, all, or one of: {', '.join(names)}")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="cpu")
    parser.add_argument("--seeds", type=int, help="seeds 0 to N-1; by default as many as the table says")
    parser.add_argument("--runs", default="runs/tables", help="where runs and prepared documents are kept")
    parser.add_argument("--out", help="write between the table's markers in this Markdown file")
    parser.add_argument(
        "--only", action="append", default=[], metavar="ROW", help="run this row; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="check the tables and say what is finished")
    parser.add_argument(
        "--keep", action="store_true", help="seeds that a row of --out has are not run; others are added"
    )
    parser.add_argument("--no-run", action="store_true", help="only write what is finished")
    options = parser.parse_args(arguments)
    try:
        names = table_names() if options.table == "all" else [options.table]
        tables = [load_table(name) for name in names]
        _check_options(options, tables)
        well = [make(table, options) for table in tables]
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
