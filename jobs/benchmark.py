"""Speed and memory beside other people's work, on the machine it runs on.

    python -m jobs.benchmark [PART ...] [--json FILE] [--quick]

Prints one table; `--json` writes the same rows as a list of {name, ours, peer, ratio, unit, ...}. Without
parts all run, in some fifteen minutes on two cores; `--quick` measures less of each. Peers that are not
installed (`pip install 'distclust[bench]'`) are said to be so. It needs no cluster, and is a job like the
others: `ray job submit --working-dir . -- python -m jobs.benchmark --json /nfs/benchmark.json`.

Only ratios are to be trusted, and only those of one run: ours and the peer take turns, and the ratio is the
median over the turns. docs/performance.md says what each part means and what limits it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jobs.benchmarks.measure import Row

PARTS = {
    "peak": "compute:peak",
    "step": "compute:step",
    "experts": "compute:experts",
    "topm": "topm:topm",
    "stream": "stream:stream",
    "kmeans": "kmeans:kmeans",
    "text": "text:text",
    "assign": "assigning:assign",
    "workers": "workers:workers",
    "clustpy": "clustpy_peer:clustpy",
    "growth": "growth:growth",
    "estimate": "model:model",
    "memory": "memory:memory",
    "gpu": "gpu:gpu",
}
"""Module and function of each part; imported when it runs, so that `step` needs torch alone."""


def run_part(part: str, quick: bool) -> list[Row]:
    """The rows of one part."""
    module, function = PARTS[part].split(":")
    rows: list[Row] = getattr(importlib.import_module(f"jobs.benchmarks.{module}"), function)(quick)
    return rows


def line(row: Row) -> str:
    """A row as the table prints it."""
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    about = "; ".join(filter(None, (row.peer_name and f"peer: {row.peer_name}", row.note)))
    if row.spread:
        about += f"{'; ' if about else ''}spread {100 * row.spread:.0f} %"
    return f"{row.name:<66} {_number(row.ours):>10} {_number(row.peer):>10} {row.unit:<8} {ratio:>7}  {about}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def machine() -> str:
    """Cores, processor and load, for the head of the table."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [ln.split(":", 1)[1].strip() for ln in cpuinfo.read_text().splitlines() if "model name" in ln]
        name = names[0] if names else name
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return (
        f"{os.cpu_count()} cores of {name}, {gpu}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 1 when one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--quick", action="store_true", help="measure less of each part")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part named {', '.join(unknown)}; expected some of: {', '.join(PARTS)}")
    write = sys.stdout.write
    write(f"{machine()}\n{'what':<66} {'ours':>10} {'peer':>10} {'unit':<8} {'ratio':>7}\n")
    rows: list[Row] = []
    failed = False
    for part in given.parts or PARTS:
        started = time.perf_counter()
        try:
            found = run_part(part, given.quick)
        except Exception as error:  # one part's failure is not the others'
            failed = True
            write(f"{part} failed: {type(error).__name__}: {error}\n")
            continue
        rows += found
        write("".join(f"{line(row)}\n" for row in found))
        write(f"  ({part}: {time.perf_counter() - started:.0f} s)\n")
        sys.stdout.flush()
        if given.json is not None:
            given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
