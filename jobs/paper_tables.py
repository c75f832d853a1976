"""Tables of results over seeds: `python -m jobs.paper_tables builtin --seeds 5 --out docs/results.md`.

Every cell is a run of its own under `--runs`, one Ray task with one thread; a cell that is finished is not
run again. Runs are tracked in MLflow under the experiment of the table's name.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

RECIPES = ("damic", "damic-text", "dmae-text", "dmae-text-mahalanobis")
SCORES = ("nmi_geometric", "nmi_arithmetic", "ari", "acc")
HEADER = "| method | NMI (geometric) | NMI (arithmetic) | ARI | ACC | largest cluster |"


def run_cell(recipe: str, seed: int, runs: str) -> dict[str, Any]:
    """One training; returns its summary."""
    import torch

    from distclust.config import load_recipe
    from distclust.run import train_run

    torch.set_num_threads(1)
    overrides = [f"seed={seed}", "cluster.workers=0", "tracking.experiment=table-builtin"]
    return train_run(load_recipe(recipe, overrides), Path(runs) / f"{recipe}-{seed}")


def line(name: str, rows: list[dict[str, Any]], share: str = "") -> str:
    """A row of the table: mean ± population standard deviation over seeds."""
    cells = [
        f"{statistics.mean(v):.3f} ± {statistics.pstdev(v):.3f}"
        for v in ([r[s] for r in rows] for s in SCORES)
    ]
    return f"| {name} | {' | '.join(cells)} | {share} |"


def table(cells: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table in Markdown, methods first, then the baselines of the text recipe's runs."""
    lines = [HEADER, "|---|---|---|---|---|---|"]
    for recipe, rows in cells.items():
        largest = [max(c["share"] for c in r["clusters"]) for r in rows]
        lines.append(line(f"**{recipe}**", rows, f"{statistics.mean(largest):.2f}"))
    for recipe in ("damic-text", "damic"):
        for name in cells[recipe][0]["baselines"] if recipe in cells else ():
            if recipe == "damic" and not name.startswith(("AE", "gate")):
                continue  # the same rows, the same k-means
            label = name if recipe == "damic-text" else f"{name} (of `damic`: raw codes, its own autoencoder)"
            lines.append(line(label, [r["baselines"][name] for r in cells[recipe]]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["builtin"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", default="runs/table-builtin")
    parser.add_argument(
        "--out", default=None, help="write the table between the markers of this Markdown file"
    )
    options = parser.parse_args()
    import ray

    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS", "local"), logging_level="warning", log_to_driver=False)
    task = ray.remote(num_cpus=1)(run_cell)
    runs = str(Path(options.runs).absolute())
    asked = {r: [task.remote(r, seed, runs) for seed in range(options.seeds)] for r in RECIPES}
    cells = {recipe: ray.get(refs) for recipe, refs in asked.items()}
    seconds = {
        r: statistics.median(sum(row["seconds"].get("train", 0) for row in [x]) for x in rows)
        for r, rows in cells.items()
    }
    command = f"python -m jobs.paper_tables {options.table} --seeds {options.seeds}"
    about = [
        f"`{command}`, {datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}), no GPU; "
        f"mean ± population standard deviation over {options.seeds} seeds, all documents scored.",
        "Seconds of training, median, one thread each, two runs side by side: "
        + ", ".join(f"{r} {s:.0f}" for r, s in seconds.items())
        + ".",
    ]
    text = "\n".join([*table(cells), "", *about])
    if options.out is None:
        sys.stdout.write(text + "\n")
        return
    path = Path(options.out)
    before, _, rest = path.read_text().partition("<!-- table builtin -->")
    _, _, after = rest.partition("<!-- end -->")
    path.write_text(f"{before}<!-- table builtin -->\n{text}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
