"""A table that runs in seconds, and ways to write it otherwise and to run its cells."""

from __future__ import annotations

from pathlib import Path

from distclust.config import to_dict
from jobs._cells import Line
from jobs.paper_tables import run_cell

TINY = """
title: A small table
words: Stories of the built-in corpus.
seeds: 2
published_nmi: geometric
published_digits: 2
published_from: "Published: a paper."
paired_with: AE (l2) + k-means
recipe:
  source: {name: builtin, limit: 300}
  clusters: 3
  vocabulary: {max_features: 100}
  shards: {rows_per_shard: 64}
  order: {lanes: 4, rows_per_lane: 16}
  model: {hidden: [16], code_size: 4, gate_hidden: [8], expert_hidden: [8]}
  initialise: {restarts: 1, sample: 200}
  tracking: {enabled: false}
protocols:
  cpu: {words: one epoch in every phase., hours_from: a guess., epochs: {"*": 1}}
  paper: {words: two in pretraining., hours_from: a guess., epochs: {pretrain: 2}, recipe: {clusters: 4}}
rows:
  - {label: one, method: damic-text, hours: {cpu: 0.5}, published: {nmi: 0.5, acc: 0.6}}
  - {label: AE (l2) + k-means, baseline_of: {row: one, baseline: AE (l2) + k-means}}
"""


def changed(path: Path, old: str, new: str) -> str:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return str(path)


def run_all(lines: list[Line]) -> dict[tuple[str, int], str | None]:
    return {
        (line.row.label, cell.seed): run_cell(to_dict(cell.config), str(cell.folder), str(cell.corpus))
        for line in lines
        for cell in line.cells
    }
