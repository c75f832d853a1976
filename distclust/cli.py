"""The command line: `distclust prepare | train | assign | evaluate | agree | demo | methods | estimate |
generate | replay`.

Everything is done by `run.py`; here are the words around it. Errors that a user can mend are printed as one
paragraph: exit code 2 for a configuration or documents that cannot be used, 1 for everything else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from distclust.console import display, duration, out, print_summary, reporting_errors, scored_line
from distclust.errors import ConfigError

# what needs torch, Ray or scikit-learn is imported by the command that uses it: `--help` is quick

app = typer.Typer(
    name="distclust",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Cluster large collections of documents with deep mixture models.\n\n"
        "A first look: `distclust demo`. Own documents: write a recipe (or take a packaged one), then "
        "`distclust train RECIPE`. `distclust COMMAND --help` explains each command."
    ),
)
RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A packaged recipe's name (demo, smoke, damic-text, damic, "
        "dmae-text, ...), or the path of a YAML file.",
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the recipe, such as clusters=20 source.name=20news phases.joint.epochs=5 "
        "cluster.workers=4. A key that does not exist is refused, and the nearest one named.",
    ),
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the trace of an error, and all log messages.")
]
AllowOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-module",
        metavar="MODULE",
        help="A module of your own that the model names by an import path; it is refused otherwise.",
        show_default=False,
    ),
]
WorkersOption = Annotated[
    int,
    typer.Option("--workers", min=0, help="Processes that work side by side, by Ray; 0 works in this one."),
]


@app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    to: Annotated[Path, typer.Option("--out", help="The corpus folder to make.")] = Path("corpus"),
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a corpus of other documents or options in that folder."),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Turn documents into a corpus folder: words to TF-IDF rows in sharded Arrow files.

    `train` does this by itself; prepare once by hand where several runs share one corpus. Only the recipe's
    source, vocabulary and shards matter here. Doing it again with the same documents and options does
    nothing.

    Example: distclust prepare damic-text source.name=files source.files=[news/*.csv] source.text=body
    """
    with reporting_errors(debug):
        from distclust.config import load_recipe
        from distclust.run import prepare_run

        config = load_recipe(recipe, overrides or [])
        with display() as listener:
            listener.stage("prepare")
            manifest = prepare_run(config, to, listener=listener, overwrite=overwrite)
        counts = manifest.counts
        out.print(
            f"{to}: {manifest.n_rows:,} documents in {len(manifest.shards)} shards, {manifest.n_features:,} "
            f"features, {manifest.n_nonzeros / manifest.n_rows:.1f} non-zeros a document.\n"
            f"{counts.get('empty', 0):,} documents are empty rows, {counts.get('unlabelled', 0):,} have no "
            f"label, {counts.get('multi_labelled', 0):,} have several labels: all are clustered, the last "
            "two are not scored.",
            soft_wrap=True,
        )


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="The run folder; runs/RECIPE by default.", show_default=False)
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus",
            help="A prepared corpus to use; by default the run folder gets its own.",
            show_default=False,
        ),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            help="Score k-means, LSA + k-means and autoencoder + k-means on the same documents; a finished "
            "run that has none gets them."
        ),
    ] = True,
    debug: DebugOption = False,
) -> None:
    """Do the whole job: prepare, train, assign every document, score, report.

    The run folder gets the model (model/), the cluster of each document (assignments/) and summary.json;
    MLflow gets the configuration, the metrics and the model. If it is interrupted in whatever way, the same
    command goes on where it was.

    Example: distclust train damic-text source.name=20news clusters=20 cluster.workers=2 --run runs/20news
    """
    with reporting_errors(debug):
        from distclust.config import load_recipe

        config = load_recipe(recipe, overrides or [])
        folder = run if run is not None else Path("runs") / Path(recipe).stem
        _train(config, folder, corpus, baselines)


@app.command()
def demo(
    overrides: OverridesArgument = None,
    run: Annotated[Path, typer.Option("--run", help="The run folder.")] = Path("runs/demo"),
    debug: DebugOption = False,
) -> None:
    """Cluster 7,160 Reuters stories with two workers, the whole way, in a few minutes on two cores.

    The same as `distclust train demo`. It needs no data and no network. Given again it prints the tables of
    the finished run.
    """
    with reporting_errors(debug):
        from distclust.config import load_recipe

        _train(load_recipe("demo", overrides or []), run, None, True)


@app.command()
def assign(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run folder, or the model folder in it.")],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE", help="New documents: Parquet, JSONL, CSV, Arrow or npz; patterns allowed."
        ),
    ] = None,
    to: Annotated[
        Path, typer.Option("--out", help="The folder to make; Parquet files and a manifest.")
    ] = Path("assignments"),
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="A prepared corpus in place of files.", show_default=False)
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            metavar="KEY=VALUE",
            help="What the files' columns are, as in a recipe's source: text=body, id=number, format=jsonl, "
            "... or name=20news for a named set. May be given several times.",
            show_default=False,
        ),
    ] = None,
    workers: WorkersOption = 0,
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities", help="Write the probabilities of all clusters, not only the best one's."
        ),
    ] = False,
    allow_module: AllowOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the cluster of every document: those of a corpus, or new ones from text.

    New documents go through the vocabulary of the model, unchanged. The result has the columns id, cluster
    and probability. Documents without an id column are numbered from 0 through all files; with --source
    where=COLUMN, only those that are taken. The result does not depend on --workers. If it is interrupted,
    the same command goes on where it was.

    Examples: distclust assign runs/demo news/*.jsonl --source text=body --out assigned

              distclust assign runs/demo --corpus runs/demo/corpus --probabilities --out all
    """
    with reporting_errors(debug):
        from distclust.mixture.imports import allow_modules
        from distclust.results.assign import AssignConfig
        from distclust.run import assign_run

        allow_modules(allow_module or [])
        documents = _documents(files or [], corpus, source or [])
        with display() as listener:
            listener.stage("assign")
            config = AssignConfig(workers=workers, all_probabilities=probabilities)
            done = assign_run(model, documents, to, config, listener=listener)
        sizes = done.sizes
        empty, close = done.manifest["empty"], done.manifest["ambiguous"]
        out.print(
            f"{to}: {done.n_documents:,} documents in {int((sizes > 0).sum())} of {len(sizes)} clusters, the "
            f"largest with {int(sizes.max()):,}. {empty:,} had nothing that the model knows (all-zero rows); "
            f"{close:,} were so close between two clusters that rounding decides.",
            soft_wrap=True,
        )


@app.command()
def evaluate(
    assignments: Annotated[
        Path,
        typer.Argument(
            metavar="ASSIGNMENTS", help="What `assign` or `train` wrote, or Parquet with id and cluster."
        ),
    ],
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus",
            help="The labelled corpus; that of the run by default, if a run is given.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Score assignments against the labels of a corpus: NMI (both normalisations), ARI and ACC.

    Documents are matched by id. Only those with exactly one label are scored; how many are not is printed.

    Example: distclust evaluate runs/demo
    """
    with reporting_errors(debug):
        from distclust.results.report import SCORE_NAMES, score_table
        from distclust.run import evaluate_run
        from distclust.run_folder import corpus_of

        found = evaluate_run(assignments, corpus if corpus is not None else corpus_of(assignments))
        if as_json:
            out.print(json.dumps(found, indent=1), soft_wrap=True, markup=False)
            return
        out.print(score_table(str(assignments), {key: found[key] for key in SCORE_NAMES}, {}))
        out.print(
            f"{scored_line(found)} {found['clusters']} clusters, {found['classes']} classes.", soft_wrap=True
        )


@app.command()
def agree(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN RUN [...]", help="Runs, or what `assign` wrote, or Parquet with id and cluster."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every pair.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say how far runs agree on the same documents (NMI), and which of them agrees most with the others.

    It takes no label. Of several settings, each run with some seeds, take the one whose seeds agree most; of
    the seeds, the run that agrees most with the others. It compares settings of one method, and does not
    choose between methods. Documents are matched by id.

    Example: distclust agree runs/seed-0 runs/seed-1 runs/seed-2
    """
    with reporting_errors(debug):
        from distclust.console import print_agreement
        from distclust.results.agreement import agreement
        from distclust.run_folder import assignments_of

        found = agreement([assignments_of(run) for run in runs])
        print_agreement(found, [str(run) for run in runs], as_json)


@app.command()
def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="One row, in full: its slots, settings and phases.", show_default=False
        ),
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", help="One line a row.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with all settings and phases.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Print the table of methods: what each puts in its slots, its paper, and what is not in the table.

    A method is a choice in each slot. A recipe names one (method=NAME) and may change its settings (model.*,
    or estimator.* for scikit-learn's) and its schedule (phases.PHASE.*). Each row is also described by the
    building blocks of Aljalbout et al. 2018 (architecture to after training), read off its slots and
    phases.

    Examples: distclust methods --brief

              distclust methods idec
    """
    with reporting_errors(debug):
        from distclust.config import table_row
        from distclust.console import print_method, print_methods
        from distclust.mixture.methods import METHODS
        from distclust.mixture.taxonomy import row_data, table_data

        row = None if name is None else table_row(name)
        if as_json:
            data: Any = table_data(METHODS.values())
            if row is not None:
                data = row if isinstance(row, dict) else row_data(row)
            out.print(json.dumps(data, indent=1), soft_wrap=True, markup=False)
        elif row is not None:
            print_method(row if isinstance(row, dict) else row_data(row), brief)
        else:
            print_methods(table_data(METHODS.values()), brief)


@app.command()
def estimate(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    documents: Annotated[
        float, typer.Option("--documents", min=1, help="How many documents, such as 100e6.")
    ] = 1e6,
    gpus: Annotated[
        int, typer.Option("--gpus", min=0, help="GPUs; 0 takes the recipe's workers, one core each.")
    ] = 1,
    network: Annotated[
        str, typer.Option("--network", help="Between two workers, such as 25Gb (bits a second) or 800Mb.")
    ] = "25Gb",
    nonzeros: Annotated[
        float, typer.Option("--nonzeros", min=1, help="Terms of a document in the mean.")
    ] = 77.0,
    terms: Annotated[
        int | None,
        typer.Option("--terms", min=1, help="Columns; the recipe's by default.", show_default=False),
    ] = None,
    teraflops: Annotated[
        float | None,
        typer.Option(
            "--teraflops",
            help="What a device sustains, as `python -m jobs.benchmark peak step` finds it; 30 for a GPU, "
            "0.05 for a core.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say on paper what a run would need: memory, bytes over the network, a floor of the time, what binds.

    Nothing is run. docs/performance.md says how far measured steps are from it.

    Example: distclust estimate dmae --documents 100e6 --gpus 8 --network 25Gb
    """
    with reporting_errors(debug):
        from dataclasses import asdict, replace

        from distclust.config import load_recipe
        from distclust.results.estimate import Machine, describe, parse_bits
        from distclust.results.estimate import estimate as on_paper

        config = load_recipe(recipe, overrides or [])
        workers = max(config.cluster.worker_range[1], 1)
        speed = parse_bits(network) / 8
        machine = Machine(devices=gpus, network=speed) if gpus else Machine.cpu(workers, speed)
        if teraflops is not None:
            machine = replace(machine, flops=teraflops * 1e12)
        found = on_paper(config, _whole(documents, "--documents"), machine, nonzeros=nonzeros, terms=terms)
        if as_json:
            phases = [asdict(p) | {"binds": p.binds} for p in found.phases]
            data = asdict(found) | {"phases": phases, "seconds": found.seconds}
            out.print(json.dumps(data, indent=1), soft_wrap=True, markup=False)
        else:
            out.print(describe(found, machine), soft_wrap=True, markup=False, highlight=False)


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where the corpus goes; a URL will do.")],
    documents: Annotated[float, typer.Option("--documents", min=1, help="How many, such as 10e6.")],
    terms: Annotated[int, typer.Option("--terms", min=2, help="Columns: 47,236 as RCV1, or 2,000.")] = 47_236,
    topics: Annotated[int, typer.Option("--topics", min=1, help="Topics; each document has one.")] = 20,
    nonzeros: Annotated[float, typer.Option("--nonzeros", min=1, help="Terms of a document.")] = 77.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same documents.")] = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes.")] = 1,
    debug: DebugOption = False,
) -> None:
    """Write made-up documents of any number, shaped like RCV1, as a prepared corpus: for trials of size.

    Zipf frequencies, topics as labels, rows as TF-IDF. One shard is held at a time, whatever the number.

    Example: distclust generate /nfs/big --documents 10e6 --workers 8

             distclust train damic-text --corpus /nfs/big clusters=20
    """
    with reporting_errors(debug):
        from distclust.corpus.generate import GenerateConfig, generate_corpus

        config = GenerateConfig(
            rows=_whole(documents, "--documents"), terms=terms, topics=topics, nonzeros=nonzeros, seed=seed
        )
        manifest = generate_corpus(folder, config, workers=workers)
        out.print(f"{manifest.n_rows:,} documents of {terms:,} terms are in {folder}.", highlight=False)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its file of unsent metrics.")],
    uri: Annotated[str, typer.Argument(metavar="URI", help="The tracking server, such as http://host:5000.")],
    debug: DebugOption = False,
) -> None:
    """Send what a tracking server did not take while it was away.

    What the server has already is not sent again; the file is removed when all is there.

    Example: distclust replay runs/damic-text http://mlflow.example:5000
    """
    with reporting_errors(debug):
        from distclust.training.tracking import replay as send

        out.print(f"The MLflow run {send(run, uri)} has everything now.", highlight=False)


# ---- what commands share


def _whole(number: float, option: str) -> int:
    """A count that was given as 10e6."""
    if not number.is_integer():
        raise ConfigError(f"{option} is {number}; expected a whole number, such as 10e6")
    return int(number)


def _train(config: Any, folder: Path, corpus: str | None, baselines: bool) -> None:
    from distclust.preflight import check_given
    from distclust.run import train_run
    from distclust.run_folder import nothing_left

    if corpus is not None:
        check_given(corpus)
    start, before = time.monotonic(), nothing_left(folder, baselines)
    with display() as listener:
        summary = train_run(config, folder, corpus_root=corpus, listener=listener, baselines=baselines)
    print_summary(summary, folder)
    took = duration(time.monotonic() - start)
    out.print("The run was finished before; nothing was done." if before else f"This took {took}.")


def _documents(files: Sequence[str], corpus: str | None, source: Sequence[str]) -> Any:
    from distclust.config import apply_overrides, resolve

    if corpus is not None:
        if files or source:
            raise ConfigError("both files and --corpus are given; expected one of them: leave out the other")
        return corpus
    given = apply_overrides({}, source)
    if files:
        given = {"name": "files", "files": list(files), **given}
    if not given:
        raise ConfigError("no documents are given; expected files, or --corpus with a prepared corpus")
    return resolve({"method": "damic-text", "clusters": 2, "source": given}).source


def main() -> None:
    """The entry point."""
    sys.exit(app(prog_name="distclust"))


if __name__ == "__main__":
    main()
