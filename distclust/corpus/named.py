"""The data sets that are known by name: where they are, what their columns mean, how they are fetched."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from distclust.corpus import rcv1, synthetic
from distclust.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the columns of a source are."""

    kind: Literal["text", "sparse", "dense"]
    text: tuple[str, ...] = ()
    """Text columns, joined by line ends."""
    title: str | None = None
    indices: str | None = None
    values: str | None = None
    dense: str | None = None
    id: str | None = None
    label: str | None = None
    where: str | None = None
    """A column of truth values: only rows where it holds are taken."""
    labels_among: tuple[str, ...] | None = None
    """Only these labels are taken, the others are as if they were not there."""
    labels_kept: tuple[str, ...] | None = None
    """Only documents with exactly one label (of ``labels_among``), and that one of these, are taken."""
    values_are: Literal["weights", "counts"] = "weights"
    n_features: int | None = None
    divide_by: float = 1.0
    """Dense values are divided by this."""
    mail: bool = False
    """Texts have mail headers: the subject is the title."""

    @property
    def columns(self) -> list[str]:
        """All columns that are read, each once."""
        named = (
            *self.text,
            self.title,
            self.indices,
            self.values,
            self.dense,
            self.id,
            self.label,
            self.where,
        )
        return list(dict.fromkeys(name for name in named if name is not None))

    @property
    def unlabelled(self) -> Layout:
        """Without titles, and without labels unless they tell which documents are taken."""
        return replace(self, title=None, label=self.label if self.labels_kept else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSet:
    """One data set that has a name."""

    place: str
    """File or pattern below ``DISTCLUST_DATA``."""
    layout: Layout
    labels: tuple[str, ...] = ()
    """What ``source.label`` may be, the default first; empty where there is no choice."""
    documents: int | None = None
    """How many it must have, where another number would be another data set."""
    fetch: Callable[[Path], None] | None = None
    """Writes the file of ``place`` with one of scikit-learn's fetchers."""
    made: bool = False
    """Its rows are computed: there is no file."""


def data_dir() -> Path | None:
    """The folder with local copies, from ``DISTCLUST_DATA``."""
    folder = os.environ.get("DISTCLUST_DATA")
    return Path(folder).expanduser() if folder else None


def cache_dir() -> Path:
    """Where fetched sets are kept: ``DISTCLUST_CACHE``, else ``~/.cache/distclust``."""
    return Path(os.environ.get("DISTCLUST_CACHE", "~/.cache/distclust")).expanduser()


def locate(name: str, seed: int | None = None, documents: int | None = None) -> list[str]:
    """The files of a named set, fetched if need be; of a set that is made, its address.

    Args:
        name: of the set.
        seed: of a set that is made.
        documents: how many of a set that is made.

    Raises:
        DataError: there is no local copy, and it cannot be fetched; the message names the place to put it.
    """
    if name == "builtin":
        return [str(resources.files("distclust.corpus") / "builtin" / "reuters9.parquet")]
    known = NAMED_SETS[name]
    if known.made:
        return [synthetic.address(name, seed, documents)]
    for folder in (data_dir(), cache_dir()):
        files = sorted(glob.glob(str(folder / known.place))) if folder else []
        if files:
            return files
    wanted = f"$DISTCLUST_DATA/{known.place}"
    found = os.environ.get("DISTCLUST_DATA")
    state = f"DISTCLUST_DATA is {found}" if found else "DISTCLUST_DATA is not set"
    if known.fetch is None:
        raise DataError(
            f"The data set {name!r} was not found ({state}); expected {wanted}; set DISTCLUST_DATA to the "
            "folder that has it: it cannot be fetched by name."
        )
    target = cache_dir() / known.place
    logger.info("Fetching %s to %s", name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"part-{os.getpid()}-{target.name}")
        try:
            known.fetch(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except DataError:
        raise
    except Exception as error:  # network, archive and parser errors of several libraries
        raise DataError(
            f"The data set {name!r} was not found locally ({state}) and could not be fetched ({error}); "
            f"expected {wanted} or a connection to its server; fetch it on a machine that has one and copy "
            f"{target} from there."
        ) from error
    return [str(target)]


def layout_of(name: str, label: str | None, values_are: Literal["weights", "counts"]) -> Layout:
    """The columns of a named set under the two options that named sets have.

    Which topics ``rcv1-20`` keeps depends on the documents: `rcv1.recipe` tells.

    Raises:
        ConfigError: the set has no such label or no such values.
    """
    known = NAMED_SETS[name]
    layout = known.layout
    choices = known.labels or ((layout.label,) if layout.label else ())
    if label is not None and label not in choices:
        raise ConfigError(
            f"source.label is {label!r} for the data set {name!r}; expected "
            f"{' or '.join(map(repr, choices))}; leave it out for the first."
        )
    if known.labels == rcv1.LABELS:
        layout = replace(layout, labels_among=rcv1.topics_of(label or known.labels[0]))
    elif label is not None:
        layout = replace(layout, label=label)
    if values_are == "counts":
        if known.labels != rcv1.LABELS:
            raise ConfigError(
                f"source.values_are is 'counts' for the data set {name!r}, which has "
                f"{'text' if layout.kind == 'text' else 'weights'}; expected 'weights'; counts are known for "
                "'rcv1', 'rcv1-part' and files of counts."
            )
        layout = replace(layout, values="tf", values_are="counts")
    return layout


def _fetch_20news(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn.datasets import fetch_20newsgroups

    texts: list[str] = []
    names: list[str] = []
    for subset in ("train", "test"):
        bunch = fetch_20newsgroups(
            subset=subset, shuffle=False, data_home=str(cache_dir() / "scikit-learn"), n_retries=1, delay=0.5
        )
        texts += bunch.data
        names += [bunch.target_names[label] for label in bunch.target]
    pq.write_table(pa.table({"text": texts, "label_name": names}), path)


def _fetch_mnist(path: Path) -> None:
    import numpy as np
    from sklearn.datasets import fetch_openml

    bunch = fetch_openml(
        "mnist_784",
        version=1,
        as_frame=False,
        data_home=str(cache_dir() / "scikit-learn"),
        n_retries=1,
        delay=0.5,
    )
    with path.open("wb") as file:
        np.savez_compressed(file, x=bunch.data.astype(np.uint8), y=bunch.target.astype(np.uint8))


def _fetch_rcv1(path: Path) -> None:
    from sklearn.datasets import fetch_rcv1

    home = str(cache_dir() / "scikit-learn")
    rcv1.write_rcv1(fetch_rcv1(subset="all", shuffle=False, data_home=home, n_retries=1, delay=0.5), path)


def check_documents(name: str, rows: int) -> None:
    """Refuse a set of another size than the one the name stands for.

    Raises:
        DataError: it has another number of documents.
    """
    expected = NAMED_SETS[name].documents
    if expected is not None and rows != expected:
        raise DataError(
            f"The data set {name!r} has {rows:,} documents here; expected {expected:,}: it is another "
            "collection or a part; remove the file so that it is fetched again"
            + (", or choose 'rcv1-part' for the part." if name == "rcv1" else ".")
        )


NAMED_SETS: dict[str, NamedSet] = {
    "builtin": NamedSet(
        place="",
        layout=Layout(kind="text", text=("title", "text"), title="title", id="id", label="topic"),
        documents=7_160,
    ),
    "20news": NamedSet(
        place="20news/20news_bydate.parquet",
        layout=Layout(kind="text", text=("text",), label="label_name", mail=True),
        documents=18_846,
        fetch=_fetch_20news,
    ),
    "mnist": NamedSet(
        place="mnist/mnist.npz",
        layout=Layout(kind="dense", dense="x", label="y", divide_by=255.0),
        documents=70_000,
        fetch=_fetch_mnist,
    ),
    "reuters": NamedSet(
        place="reuters21578/reuters21578.parquet",
        layout=Layout(kind="text", text=("title", "text"), title="title", id="id", label="topics"),
        documents=21_578,
    ),
    "rcv1": NamedSet(
        place="rcv1-full/rcv1.parquet",
        layout=Layout(
            kind="sparse", indices="indices", values="tfidf", id="doc", label="topics", n_features=rcv1.TERMS
        ),
        labels=rcv1.LABELS,
        documents=rcv1.DOCUMENTS,
        fetch=_fetch_rcv1,
    ),
    "rcv1-part": NamedSet(
        place="rcv1/part-*.parquet",
        layout=Layout(
            kind="sparse", indices="indices", values="tfidf", id="doc", label="topics", n_features=rcv1.TERMS
        ),
        labels=rcv1.LABELS,
    ),
    "arxiv": NamedSet(
        place="arxiv/part-*.parquet",
        layout=Layout(kind="text", text=("title", "abstract"), title="title", id="id", label="group"),
        labels=("group", "primary"),
    ),
    **{
        name: NamedSet(place="", layout=Layout(kind="dense", dense="x", label="y"), made=True)
        for name in synthetic.GENERATORS
    },
    synthetic.DIGITS: NamedSet(
        place="",
        layout=Layout(kind="dense", dense="x", label="y", divide_by=16.0),
        documents=1_797,
        made=True,
    ),
}
"""Every set by its name. Numbers of documents are those of scikit-learn's fetchers and of the collections."""
