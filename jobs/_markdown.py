"""A table as Markdown: what was measured, what was not and why, and the rows that an earlier table has."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distclust.errors import ConfigError
from jobs._cells import Line
from jobs._tables import Table

SCORES = ("nmi_geometric", "nmi_arithmetic", "ari", "acc")
PAIRED_SCORE = "nmi_arithmetic"


@dataclass(frozen=True, slots=True)
class Asked:
    """A table under a protocol with so many seeds."""

    table: Table
    protocol: str
    seeds: int
    given: str
    """The table as the command was given it: its name, or a path."""

    @property
    def name(self) -> str:
        """What its markers in a file are called."""
        return f"{self.table.name} {self.protocol}"


@dataclass(frozen=True, slots=True)
class Before:
    """What a file has of a row."""

    cells: list[str]
    seeds: frozenset[int]
    pair: list[str]
    """The cells of its line of differences; empty where it has none."""


@dataclass(slots=True)
class Kept:
    """Lines of the table that a file has already, by section and label."""

    rows: dict[tuple[str, str], str] = field(default_factory=dict)
    paired: dict[tuple[str, str], str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    """What each section says of its size."""
    machines: frozenset[str] = frozenset()

    def before(self, asked: Asked, line: Line) -> Before | None:
        """What there is of a row, where its columns are those of now.

        Raises:
            ConfigError: which seeds it has cannot be read.
        """
        key = line.section.title, _plain(line.row.label)
        cells = _cells_of(self.rows.get(key, ""))
        if len(cells) != len(_columns(asked.table)):
            return None
        return Before(cells, _seeds_in(cells[1]), _cells_of(self.paired.get(key, "")))

    def seeds(self, asked: Asked, line: Line) -> frozenset[int]:
        """The seeds that need not be run, because others can be added to them."""
        before = self.before(asked, line)
        return frozenset() if before is None or asked.table.agreement else before.seeds


def read_kept(path: Path, name: str) -> Kept:
    """The lines between the markers of `name`; none where the file or the markers are not there."""
    kept = Kept()
    if not path.exists():
        return kept
    block = path.read_text(encoding="utf-8").partition(f"<!-- table {name} -->")[2]
    section, lines = "", kept.rows
    for text in block.partition(f"<!-- end {name} -->")[0].splitlines():
        title = re.match(r"\*\*(.+?)\.\*\*", text)
        section = title[1] if title else section
        size = re.search(r"Measured on .* K = \d+\.", text)
        if size is not None:
            kept.documents[section] = size[0]
        measured = re.search(r"`, measured (.+?); mean ± ", text)
        if measured:
            kept.machines = frozenset(measured[1].split("; "))
        if text.startswith("| method |"):
            lines = kept.paired if " | less, in " in text else kept.rows
        elif text.startswith("| ") and (lines is kept.paired or text.split(" | ")[1] != "0"):
            lines[section, _cells_of(text)[0]] = text
    return kept


def _cells_of(text: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", text)[1:-1]]


def markdown(asked: Asked, lines: Sequence[Line], kept: Kept | None = None) -> str:
    """The table with everything that is needed to read it.

    Args:
        asked: which.
        lines: its rows, with what is finished of them here.
        kept: lines of an earlier table, whose seeds are counted where they are not here.
    """
    kept = kept or Kept()
    out: list[str] = [asked.table.words.strip()]
    from_here: list[Line] = []
    n_kept = 0
    for section in asked.table.sections:
        rows = [line for line in lines if line.section is section]
        head = f"**{section.title}.** " if section.title else ""
        size = _documents(rows) or kept.documents.get(section.title, "")
        about = " ".join(part for part in (section.words.strip(), size) if part)
        if head or about:
            out += ["", (head + about).strip()]
        names = _columns(asked.table)
        used = {line.row.label: before for line in rows if (before := _needed(asked, kept, line))}
        n_kept += len(used)
        for line in rows:
            before = used.get(line.row.label)
            if before is None or _added(asked, before, line):
                from_here.append(line)
        out += ["", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        out += [_row(asked, line, used.get(line.row.label)) for line in rows]
        paired = _paired(asked, rows, used)
        if paired:
            out += ["", *paired]
    notes = _notes(asked, from_here, kept.machines if n_kept else frozenset())
    if n_kept:
        have = "1 row has" if n_kept == 1 else f"{n_kept} rows have"
        notes.append(
            f"* {have} seeds whose runs are not here any more (`--keep`); later seeds, if any, were added to "
            "their three digits, where a median of seconds counts once for each of its seeds."
        )
    return "\n".join([*out, "", *notes])


def _needed(asked: Asked, kept: Kept, line: Line) -> Before | None:
    """What the file has of a row, unless there are as many seeds without it."""
    before = kept.before(asked, line)
    if before is None:
        return None
    together = before.seeds.union(_added(asked, before, line))
    return before if len(together) > len(line.summaries) else None


def _added(asked: Asked, before: Before, line: Line) -> list[int]:
    """The seeds of a row that are here and not in the file; none where seeds are compared with each other."""
    return [] if asked.table.agreement else sorted(set(line.summaries) - before.seeds)


def _documents(rows: Sequence[Line]) -> str:
    found = {
        (s["n_documents"], s["scored"], s["n_clusters"])
        for line in rows
        if line.row.baseline_of is None
        for s in line.summaries.values()
    }
    return " ".join(f"Measured on {n:,} rows, {scored:,} scored, K = {k}." for n, scored, k in sorted(found))


def _columns(table: Table) -> list[str]:
    names = ["method", "seeds", "NMI (geometric)", "NMI (arithmetic)", "ARI", "ACC", "seconds"]
    if table.agreement:
        names += ["agreement of seeds", "NMI of the seed nearest to the others"]
    if table.published_nmi is not None:
        names += [f"published NMI ({table.published_nmi})", "published ARI", "published ACC"]
    return names


def _row(asked: Asked, line: Line, before: Before | None) -> str:
    table = asked.table
    if before is not None and not _added(asked, before, line):
        cells = list(before.cells)
        cells[1] = _of(before.seeds, asked.seeds)
        return f"| {' | '.join(cells)} |"
    cells = [_plain(line.row.label), *_measured(line, asked, before)]
    if table.agreement:
        cells += _agreed(line)
    if table.published_nmi is not None:
        figures = line.row.published
        shown = figures is not None and asked.protocol in figures.protocols
        for name in ("nmi", "ari", "acc"):
            value = getattr(figures, name) if shown else None
            cells.append("" if value is None else f"{value:.{table.published_digits}f}")
    return f"| {' | '.join(cells)} |"


def _agreed(line: Line) -> list[str]:
    """How far the seeds agree, and what the one is worth that agrees most with the others."""
    if line.agreement is None:
        return ["", ""]
    nearest = line.summaries[sorted(line.summaries)[line.agreement.nearest]][PAIRED_SCORE]
    tells_apart = len(line.summaries) > 2 and nearest is not None  # two agree with each other equally
    return [f"{line.agreement.mean:.3f}", f"{nearest:.3f}" if tells_apart else ""]


def _measured(line: Line, asked: Asked, before: Before | None) -> list[str]:
    if not line.summaries:
        return ["0", _not_run(line, asked.protocol), "", "", "", ""]
    old, seeds = [""] * 5, frozenset[int]()
    if before is not None:
        old, seeds = before.cells[2:7], before.seeds
    found = [summary for seed, summary in sorted(line.summaries.items()) if seed not in seeds]
    scores = [[s[name] for s in found if s[name] is not None] for name in SCORES]
    seconds = [s["seconds"]["train"] for s in found if "train" in s["seconds"]]
    seconds += [float(old[4])] * len(seeds) if old[4] else []
    return [
        _of(seeds.union(line.summaries), asked.seeds),
        *(_mean(values, text, len(seeds)) for values, text in zip(scores, old[:4], strict=True)),
        f"{statistics.median(seconds):.0f}" if seconds else "",
    ]


def _of(found: frozenset[int], asked: int) -> str:
    """How many seeds; and which, where they are not the first."""
    number = str(len(found)) if len(found) >= asked else f"{len(found)} of {asked}"
    which = ", ".join(map(str, sorted(found)))
    return number if found == set(range(len(found))) else f"{number} ({which})"


def _seeds_in(text: str) -> frozenset[int]:
    """What `_of` wrote."""
    found = re.fullmatch(r"(\d+)(?: of \d+)?(?: \(([\d, ]+)\))?", text)
    if found is None:
        raise ConfigError(
            f"a row of the file has {text!r} as its seeds; expected '5', '2 of 5' or '2 of 5 (0, 3)': mend "
            "the file, or leave out --keep"
        )
    return frozenset(map(int, found[2].split(", ")) if found[2] else range(int(found[1])))


def _not_run(line: Line, protocol: str) -> str:
    if line.missing is not None:
        return f"not run ({_short(line.missing)})"
    if line.failures:
        return f"failed: {_short(next(iter(line.failures.values())))}"
    if line.row.baseline_of is not None:
        return f"not run (comes with {_plain(line.row.baseline_of.row)})"
    hours = line.row.hours.get(protocol)
    return "not run" if hours is None else f"not run (about {hours:g} h)"


def _mean(values: Sequence[float], old: str = "", n_old: int = 0) -> str:
    """Mean ± population standard deviation of values, and of `n_old` others of which `old` says the same."""
    figures = re.fullmatch(r"(-?[\d.]+)(?: ± ([\d.]+))?", old)
    if figures is None:
        n_old = 0
    if not values and not n_old:
        return "no labels"
    mean, spread = (float(figures[1]), float(figures[2] or 0)) if figures else (0.0, 0.0)
    n = n_old + len(values)
    centre = (n_old * mean + sum(values)) / n
    if n == 1:
        return f"{centre:.3f}"
    squares = n_old * (spread**2 + (mean - centre) ** 2) + sum((value - centre) ** 2 for value in values)
    return f"{centre:.3f} ± {(squares / n) ** 0.5:.3f}"


def _paired(asked: Asked, rows: Sequence[Line], used: Mapping[str, Before]) -> list[str]:
    """Each row's NMI less that of its reference on the same seed: the same autoencoder where there is one."""
    out = []
    by_label = {line.row.label: line for line in rows}
    for line in rows:
        before = used.get(line.row.label)
        seeds = sorted(line.summaries) if before is None else _added(asked, before, line)
        whose, gains = _gains(line, seeds, line.row.paired_with or asked.table.paired_with, by_label)
        if before is not None and before.pair:
            if not gains:
                out.append(f"| {' | '.join(before.pair)} |")
                continue
            # where there are fewer differences than seeds their order is known, and their seeds are not
            old = zip(sorted(before.seeds), map(float, before.pair[2].split()), strict=False)
            gains = dict(sorted({**dict(old), **gains}.items()))
        if gains:
            each = " ".join(f"{gain:+.3f}" for gain in gains.values())
            mean = f"{statistics.mean(gains.values()):+.3f}"
            out.append(f"| {_plain(line.row.label)} | {whose} | {each} | {mean} |")
    if not out:
        return []
    return ["| method | less, in NMI (arithmetic) | per seed | mean |", "|---|---|---|---|", *out]


def _gains(
    line: Line, seeds: Sequence[int], name: str | None, by_label: Mapping[str, Line]
) -> tuple[str, dict[int, float]]:
    """The reference in words, and the difference to it by seed."""
    gains: dict[int, float] = {}
    if name is None or name == line.row.label or line.row.baseline_of is not None:
        return "", gains
    own, other = True, by_label.get(name)
    for seed in seeds:
        summary = line.summaries[seed]
        reference = summary.get("baselines", {}).get(name)
        if reference is None and other is not None:
            own, reference = False, other.summaries.get(seed)
        if reference is not None:
            gains[seed] = summary[PAIRED_SCORE] - reference[PAIRED_SCORE]
    return f"{_plain(name)}{', of its own network' if own else ''}", gains


def _notes(asked: Asked, lines: Sequence[Line], others: frozenset[str]) -> list[str]:
    table, protocol = asked.table, asked.protocol
    general = table.protocols[protocol]
    command = f"python -m jobs.paper_tables {asked.given} --protocol {protocol} --seeds {asked.seeds}"
    machines = sorted(others.union(*(line.machines for line in lines)))
    measured = f"measured {'; '.join(machines)}" if machines else "nothing of it is run yet"
    notes = [
        f"Protocol `{protocol}`: {general.words.strip()}",
        f"`{command}`, {measured}; mean ± population standard deviation over seeds, every labelled row "
        "scored after the last epoch; seconds: training with all its phases, median, one core a run.",
    ]
    if any(line.agreement is not None for line in lines) or (others and table.agreement):
        notes.append(
            "Agreement of seeds: mean NMI (arithmetic) between the clusters of every two runs of a row, "
            "without any label, and 0 with a run that has all documents in one cluster. Beside it the NMI "
            "(arithmetic) of the seed that agrees most with the others, which is the one to take where there "
            "are no labels (`distclust agree`)."
        )
    if any(line.cells and not line.summaries for line in lines):
        notes.append(f"Hours of what was not run are for one seed: {general.hours_from.strip()}")
    if table.published_from:
        notes.append(table.published_from.strip())
    for line in lines:
        for seed, reason in sorted(line.failures.items()) if line.summaries else ():
            notes.append(f"{_plain(line.row.label)}, seed {seed}: {_short(reason)}")
    return [f"* {note}" for note in notes]


def _plain(text: str) -> str:
    """Text that does not break a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _short(reason: str) -> str:
    """A reason on one line, without the machine's folders."""
    reason = _plain(re.sub(r"(?<![\w:/.~])/(?:[^\s/'\"]+/)+", "", reason))
    return reason if len(reason) <= 200 else reason[:197] + "..."


def check_markers(path: Path, name: str) -> None:
    """Refuse a file in which a table begins and does not end."""
    first, last = f"<!-- table {name} -->", f"<!-- end {name} -->"
    _, found, rest = (path.read_text(encoding="utf-8") if path.exists() else "").partition(first)
    if found and last not in rest:
        raise ConfigError(f"{path} has {first!r} without {last!r} behind it; put the second back")


def write_between(path: Path, name: str, text: str, title: str) -> None:
    """Put the text between the markers of `name`; where there are none, a section at the end is made."""
    check_markers(path, name)
    first, last = f"<!-- table {name} -->", f"<!-- end {name} -->"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    new = f"{first}\n{text}\n{last}"
    before, found, rest = old.partition(first)
    if not found:
        whole = f"{old.rstrip()}\n\n## {title}\n\n{new}\n".lstrip()
    else:
        after = rest.partition(last)[2]
        whole = f"{before}{new}{after}"
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(whole, encoding="utf-8")
    partial.replace(path)
