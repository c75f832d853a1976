"""Where documents come from: named data sets and user files, read in bounded blocks with the same columns.

`open_source` looks at names, columns and types before anything is read, and cuts the files into pieces
(`readers.Split`) that any node can read. Each piece yields tables with the columns

* ``id`` string (empty where documents have none: they are then numbered), ``labels`` list of strings,
``title`` string,
* and ``text`` string, or ``indices`` list<int32> and ``values`` list<float32>, or ``values``
fixed_size_list<float32>.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from distclust.corpus import rcv1, readers, synthetic
from distclust.corpus.arrays import load_npz
from distclust.corpus.columns import canonical, check_columns, ids_of
from distclust.corpus.files import find_files, is_url, unreadable, without_packing
from distclust.corpus.named import NAMED_SETS, Layout, check_documents, layout_of, locate
from distclust.corpus.readers import FORMATS, Split
from distclust.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# Up to this many bytes in all, files are told apart by their content; above it by size and time of change.
_HASHED_BYTES = 1 << 30
_FILES = "files"
_COLUMNS = ("text", "title", "indices", "values", "dense", "id")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Which documents, and what their columns are."""

    name: str = "builtin"
    """``builtin`` (9 topics of Reuters-21578), ``20news``, ``mnist``, ``reuters``, ``rcv1`` (all 804,414
    documents), ``rcv1-part``, ``arxiv``; ``digits`` (scikit-learn's, 8 x 8); the synthetic
    ``damic-sigmoid2``, ``damic-tanh-sigmoid``, ``damic-sigmoid-sigmoid``, ``painwheel``, ``toroidal``,
    ``moons``, ``circles``, ``simplex``; or ``files`` for files of one's own."""
    files: tuple[str, ...] = ()
    """Paths, patterns such as ``news/*.parquet``, or fsspec URLs; read in this order, patterns in order of
    name."""
    format: Literal["auto", "parquet", "jsonl", "csv", "arrow", "npz"] = "auto"
    """What the files are; ``auto`` goes by their endings."""
    text: str | None = None
    """Column with the text; several are joined by ``+``, as in ``title+abstract``. Default: ``text`` if
    there is one."""
    title: str | None = None
    """Column with a title to show. Default: ``title`` if there is one, else the first line of the text."""
    indices: str | None = None
    """Column with lists of column numbers, sorted and distinct. Default: ``indices`` if there is no text."""
    values: str | None = None
    """Column with lists of numbers, as long as those of ``indices``. Default: ``values``."""
    dense: str | None = None
    """Column with lists of numbers, all of one length."""
    id: str | None = None
    """Column that tells documents apart, text or whole numbers. Default: ``id`` if there is one, else their
    numbers from 0, through all files; with ``where``, among the documents that it leaves."""
    label: str | None = None
    """Column with the label, or a list of labels; used to score, never to train. Default: ``label`` if there
    is one. Of the named sets ``arxiv`` has ``group`` or ``primary``. ``rcv1`` and ``rcv1-part`` have
    ``root`` (the four roots) or ``topics`` (all) for all documents; with ``single-root`` only documents of
    one root are taken (the DEC recipe), with ``rcv1-20`` only those with one second-level topic that is the
    second to 21st largest (the DCN and DAMIC recipe; sizes are counted before ``where`` and ``limit``)."""
    where: str | None = None
    """Column of truth values: only documents where it is true are taken."""
    values_are: Literal["weights", "counts"] = "weights"
    """``counts`` (whole numbers) are weighed as the vocabulary options say; ``weights`` are taken as they
    are."""
    n_features: int | None = None
    """Number of columns of sparse rows. Default: the largest index plus one."""
    limit: int | None = None
    """Only the first so many rows (counted before ``where``, and before a label that leaves rows out)."""
    seed: int | None = None
    """Seed of a synthetic set, 0 unless given; apart from the recipe's own seed. Other sets take none."""
    documents: int | None = None
    """How many documents a synthetic set gets, in classes of one size. Default: as in its paper, 4,000 for
    DAMIC's and 1,000 for the others. Other sets take none."""

    def __post_init__(self) -> None:
        names = (*NAMED_SETS, _FILES)
        if self.name not in names:
            near = difflib.get_close_matches(self.name, names, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"source.name is {self.name!r}; expected one of {', '.join(names)}; {hint}For files of your "
                "own give source.name=files and source.files."
            )
        if (self.name == _FILES) != bool(self.files):
            found = "no files" if not self.files else f"{len(self.files)} files"
            raise ConfigError(
                f"source.name is {self.name!r} with {found}; expected files with the name 'files' and with "
                "no other; set source.name=files and source.files=[...], or leave out source.files."
            )
        if self.name != _FILES:
            fixed = [f for f in (*_COLUMNS, "n_features") if getattr(self, f) is not None]
            fixed += ["format"] if self.format != "auto" else []
            if fixed:
                raise ConfigError(
                    f"source.{fixed[0]} is {getattr(self, fixed[0])!r} for the data set {self.name!r}; "
                    "expected none: named sets know their columns; leave it out, or give the files with "
                    "source.name=files."
                )
            layout_of(self.name, self.label, self.values_are)
        synthetic.check(self.name, self.seed, self.documents)
        kinds = [k for k in ("text", "indices", "dense") if getattr(self, k) is not None]
        if len(kinds) > 1:
            raise ConfigError(
                f"source has both {kinds[0]} and {kinds[1]}; expected one of text, indices with values, or "
                "dense; leave out the others."
            )
        for name in ("limit", "n_features"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"source.{name} is {value}; expected 1 or more; leave it out for all of them."
                )
        for name, known in (("format", ("auto", *FORMATS.values())), ("values_are", ("weights", "counts"))):
            if getattr(self, name) not in known:
                listed = ", ".join(dict.fromkeys(known))
                raise ConfigError(
                    f"source.{name} is {getattr(self, name)!r}; expected one of {listed}; choose one."
                )


@dataclass(frozen=True, slots=True)
class Source:
    """Documents that were found readable, cut into pieces."""

    config: SourceConfig
    layout: Layout
    splits: tuple[Split, ...]
    n_documents: int | None
    """How many rows there are (before ``where``); ``None`` where only reading tells."""
    fingerprint: str
    """sha256 over the files (names, sizes, content or time of change) and how they are read."""
    image_shape: tuple[int, int, int] | None = None
    """Channels, height and width, where the documents are images; their rows are in that order."""

    @property
    def kind(self) -> Literal["text", "sparse", "dense"]:
        """What a document is."""
        return self.layout.kind

    @property
    def numbered(self) -> bool:
        """Whether documents have no id of their own and go by their number among those that are taken."""
        return self.layout.id is None

    def read_split(self, split: Split) -> Iterator[pa.Table]:
        """The documents of one piece in order, in tables of at most `readers.BLOCK_ROWS` rows.

        Raises:
            DataError: rows that cannot be used; the message names the file and the row.
        """
        layout = self.layout
        for columns, first in self._taken(split, layout):
            try:
                table = _of_kept_labels(canonical(columns, layout, first), layout.labels_kept)
            except pa.ArrowException as error:  # such as text that is not UTF-8
                raise unreadable(first, split.format, error) from error
            if layout.kind == "dense" and layout.n_features is None:  # lists: as long as the first one
                layout = replace(layout, n_features=table.schema.field("values").type.list_size)
            if table.num_rows:
                yield table

    def read_ids(self, split: Split) -> Iterator[list[str]]:
        """The ids of one piece's documents in order, a block at a time; empty texts where they are numbered.

        Raises:
            DataError: as `read_split`, for the columns that are needed.
        """
        layout = Layout(kind=self.kind, id=self.layout.id, where=self.layout.where)
        for columns, first in self._taken(split, layout):
            if layout.id is None:
                yield [""] * columns.num_rows
                continue
            try:
                yield ids_of(columns.column(layout.id), layout.id, first).to_pylist()
            except pa.ArrowException as error:
                raise unreadable(first, split.format, error) from error

    def _taken(self, split: Split, layout: Layout) -> Iterator[tuple[pa.RecordBatch, str]]:
        """What ``where`` leaves of each block, in the layout's columns, and what to call the block.

        If the layout has no column, there is one all the same, to count the rows.
        """
        for block in readers.read(split, layout.columns or self.layout.columns[:1]):
            first = f"{split.path}, counting from row {block.first}"
            if split.first_row < 0:
                first = f"{split.path}, counting from row {block.first} after byte {split.start}"
            # only some lines of JSONL were looked at before: a column's type may change behind them
            check_columns(block.columns.schema, layout, first, split.format)
            columns = block.columns
            if layout.where is not None:  # cast: a block of JSONL may have nothing but nulls
                columns = columns.filter(columns.column(layout.where).cast(pa.bool_()).fill_null(False))
            if columns.num_rows:
                yield columns, first


def open_source(config: SourceConfig, *, labels: bool = True) -> Source:
    """Find the files, check columns and types, cut them into pieces.

    Args:
        config: which documents.
        labels: whether labels and titles are read. Without them their columns may be missing, or hold what
            is refused otherwise; the fingerprint stays the same.

    Raises:
        ConfigError: the options contradict each other.
        DataError: a file or column is missing, a column has the wrong type, a file cannot be read, or there
            are no documents.
    """
    if config.name == _FILES:
        files = find_files(config.files)
    else:
        files = locate(config.name, config.seed, config.documents)
    format_ = readers.MADE if readers.is_made(files[0]) else _format_of(files, config.format)
    fields = ("indices", "values", "dense", "id", "where", *(("title", "label") if labels else ()))
    named = [*(config.text or "").split("+"), *(getattr(config, field) for field in fields)]
    named = [name.strip() for name in named if name]
    schemas = {file: readers.schema_of(file, format_, named) for file in files}
    # a JSONL file without lines has no columns to look at
    schemas = {file: schema for file, schema in schemas.items() if schema.names or format_ != "jsonl"}
    if not schemas:
        raise _no_documents(files)
    if config.name == _FILES:
        layout = _layout_of_files(config, schemas, format_)
    else:
        layout = layout_of(config.name, config.label, config.values_are)
        layout = layout if config.where is None else replace(layout, where=config.where)
        if config.label in rcv1.PUBLISHED:
            layout = replace(layout, labels_kept=_kept_labels(config, files))
    if layout.where is not None and layout.id is None:
        logger.warning(
            "Documents have no id: they are numbered from 0 among those where %r is true, not by their row; "
            "name a column with source.id to tell which is which",
            layout.where,
        )
    widths = {}
    for file, schema in schemas.items():
        check_columns(schema, layout if labels else layout.unlabelled, file, format_)
        if layout.dense and pa.types.is_fixed_size_list(schema.field(layout.dense).type):
            widths[schema.field(layout.dense).type.list_size] = file
    if 0 in widths:
        raise DataError(f"{widths[0]} has rows of no numbers; expected at least one; name another column.")
    if len(widths) > 1:
        (a, one), (b, other) = list(widths.items())[:2]
        raise DataError(
            f"{other} has rows of {b} numbers; expected {a} as in {one}; prepare them as two corpora."
        )
    if widths:
        width = next(iter(widths))
        if layout.n_features not in (None, width):
            raise DataError(
                f"{files[0]} has rows of {width} numbers; expected source.n_features={layout.n_features}; "
                "leave n_features out."
            )
        layout = replace(layout, n_features=width)
    elif format_ == "npz" and layout.kind == "sparse" and layout.n_features is None:
        layout = replace(layout, n_features=max(load_npz(file).n_features for file in files))
    image = _image_shape(schemas, layout)
    splits, total = _plan(files, format_, config.limit)
    if config.limit is None and config.name != _FILES and total is not None:
        check_documents(config.name, total)
    if not splits or total == 0:
        raise _no_documents(files)
    fingerprint = _fingerprint(files, layout, config.limit, image)
    layout = layout if labels else layout.unlabelled  # after the fingerprint, which is of the documents
    return Source(config, layout, tuple(splits), total, fingerprint, image)


def _of_kept_labels(table: pa.Table, kept: tuple[str, ...] | None) -> pa.Table:
    """The rows with exactly one label that is one of these; all where nothing is said."""
    if kept is None:
        return table
    labels = table["labels"].combine_chunks()
    single = pc.equal(pc.list_value_length(labels), 1)
    table = table.filter(single)
    return table.filter(pc.is_in(labels.filter(single).flatten(), value_set=pa.array(kept, pa.string())))


def _kept_labels(config: SourceConfig, files: list[str]) -> tuple[str, ...]:
    assert config.label is not None
    found = rcv1.recipe(files, config.label)
    if config.name == "rcv1":
        rcv1.check_published(config.label, found)
    logger.info("source.label=%s keeps %s", config.label, ", ".join(found.topics))
    return found.topics


def _image_shape(schemas: dict[str, pa.Schema], layout: Layout) -> tuple[int, int, int] | None:
    if layout.kind != "dense":
        return None
    shapes = {(schema.metadata or {}).get(readers.IMAGE, b""): file for file, schema in schemas.items()}
    if len(shapes) > 1:
        (a, one), (b, other) = list(shapes.items())[:2]
        raise DataError(
            f"{other} has images of shape {b.decode() or '(none)'} and {one} of {a.decode() or '(none)'} "
            "(channels, height, width); expected one shape; prepare them as two corpora."
        )
    (text,) = shapes
    if not text:
        return None
    channels, height, width = map(int, text.split(b","))
    logger.info("The documents are images of %d x %d x %d (channels, height, width)", channels, height, width)
    return channels, height, width


def _no_documents(files: list[str]) -> DataError:
    names = ", ".join(files[:3]) + (" and more" if len(files) > 3 else "")
    return DataError(
        f"There are no documents: {names} without rows; expected at least one; check source.files."
    )


def _plan(files: list[str], format_: str, limit: int | None) -> tuple[list[Split], int | None]:
    splits: list[Split] = []
    total: int | None = 0
    for file in files:
        if limit is not None and total is not None and total >= limit:
            break
        left = None if limit is None or total is None else limit - total
        pieces, rows = readers.plan(file, format_, left)
        splits += pieces
        total = None if rows is None or total is None else total + rows
    return splits, total


def _format_of(files: list[str], asked: str) -> str:
    if asked != "auto":
        return asked
    formats = {}
    for file in files:
        ending = os.path.splitext(without_packing(file))[1].lower()
        if ending not in FORMATS:
            raise ConfigError(
                f"{file} ends in {ending or 'nothing'!r}, which tells no format; expected one of "
                f"{', '.join(FORMATS)}; set source.format."
            )
        formats[FORMATS[ending]] = file
    if len(formats) > 1:
        raise ConfigError(
            f"The files are of several formats ({', '.join(f'{k}: {v}' for k, v in formats.items())}); "
            "expected one; "
            "prepare them one by one or convert them."
        )
    return next(iter(formats))


def _layout_of_files(config: SourceConfig, schemas: dict[str, pa.Schema], format_: str) -> Layout:
    path, schema = next(iter(schemas.items()))
    names = schema.names
    # a column that any file has: of one that the first has not, the others would lose theirs unsaid
    anywhere = {name for other in schemas.values() for name in other.names}

    def named(field: str, *defaults: str) -> str | None:
        given: str | None = getattr(config, field)
        return given or next((name for name in defaults if name in anywhere), None)

    text: tuple[str, ...] = ()
    indices = values = None
    dense = config.dense
    if config.text is not None:
        text = (
            (config.text,) if config.text in names else tuple(part.strip() for part in config.text.split("+"))
        )
    elif dense is None and config.indices is None and config.values is None:
        fixed = [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]
        if "text" in names:
            text = ("text",)
        elif not {"indices", "values"} <= set(names):
            if len(fixed) != 1:
                raise DataError(
                    f"{path} has the columns {', '.join(names) or '(none)'}; expected one named text, two "
                    "named indices and values, or one of fixed-size lists; say which with source.text, "
                    "source.indices and source.values, or source.dense."
                )
            dense = fixed[0]
    if not text and dense is None:
        indices, values = config.indices or "indices", config.values or "values"
    kind: Literal["text", "sparse", "dense"] = "text" if text else "dense" if dense else "sparse"
    if config.values_are == "counts" and kind != "sparse":
        raise ConfigError(
            f"source.values_are is 'counts' but the documents are {kind}; expected 'weights'; only sparse "
            "columns can be counts."
        )
    return Layout(
        kind=kind,
        text=text,
        indices=indices,
        values=values,
        dense=dense,
        title=named("title", "title"),
        id=named("id", "id"),
        label=named("label", "label", *(("y",) if format_ == "npz" else ())),
        where=config.where,
        values_are=config.values_are,
        n_features=config.n_features,
    )


def _fingerprint(
    files: list[str], layout: Layout, limit: int | None, image: tuple[int, int, int] | None
) -> str:
    parts: list[list[object]] = []
    infos = [_info(file) for file in files]
    hashed = sum(size for size, _ in infos) <= _HASHED_BYTES
    for file, (size, changed) in zip(files, infos, strict=True):
        mark = changed
        if hashed and not is_url(file):
            with open(file, "rb") as stream:
                mark = hashlib.file_digest(stream, "sha256").hexdigest()
        parts.append([os.path.basename(file), size, mark])
    how = asdict(layout)
    if layout.labels_kept is None:  # a later addition: without it a source stays the one it was
        del how["labels_kept"]
    content: dict[str, object] = {"files": parts, "layout": how, "limit": limit}
    if image is not None and image[0] > 1:  # of one channel, the order of the values is that of the file
        content["image"] = image
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _info(file: str) -> tuple[int, str]:
    """Size, and whatever changes when the content does."""
    if readers.is_made(file):
        return 0, f"generators {synthetic.VERSION}"
    if not is_url(file):
        status = os.stat(file)
        return status.st_size, str(status.st_mtime_ns)
    fs, path = fsspec.core.url_to_fs(file)
    info = fs.info(path)
    marks = [
        str(info[key])
        for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
        if key in info
    ]
    return int(info.get("size") or 0), " ".join(marks)
