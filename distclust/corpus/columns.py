"""Columns as files have them -> the columns that a corpus has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distclust.corpus.named import Layout
from distclust.corpus.rows import conform
from distclust.errors import DataError

TITLE_LENGTH = 120
MAX_COUNTED = 1 << 27
"""Columns of counts at most: 1 GB a process, 8 bytes for each."""


_WHOLE = re.compile(r"-?[0-9]+")


def is_text(kind: pa.DataType) -> bool:
    """Text in any of Arrow's forms."""
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_list(kind: pa.DataType, *of: Callable[[pa.DataType], bool], fixed: bool = False) -> bool:
    """Lists (of one length too, where ``fixed``) of one of these types."""
    types = pa.types
    lists = types.is_list(kind) or types.is_large_list(kind) or (fixed and types.is_fixed_size_list(kind))
    return bool(lists) and (types.is_null(kind.value_type) or any(good(kind.value_type) for good in of))


def is_label(kind: pa.DataType) -> bool:
    """What can be a label, or a list of labels."""
    types = pa.types
    inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    return bool(
        is_text(inner)
        or types.is_integer(inner)
        or types.is_boolean(inner)
        or types.is_floating(inner)
        or types.is_null(inner)
    )


def check_columns(schema: pa.Schema, layout: Layout, path: str, format_: str) -> None:
    """Refuse a file, or a block of one, that lacks a column of the layout or has it in another type.

    Raises:
        DataError: which column, and which there are.
    """
    for name in layout.columns:
        count = schema.names.count(name)
        if count != 1:
            near = difflib.get_close_matches(name, schema.names, n=1)
            hint = f"; did you mean {near[0]!r}" if near else ""
            found = f"no column {name!r}" if count == 0 else f"{count} columns named {name!r}"
            raise DataError(
                f"{path} has {found}; expected it among its columns, which are "
                f"{', '.join(schema.names) or 'none'}{hint}; correct the name, or the file: a column that "
                "one file has, all must have."
            )
    types = pa.types
    numbers = (types.is_integer, types.is_floating)
    for field, wanted, good in (
        *((name, "text", is_text) for name in layout.text),
        (layout.title, "text", is_text),
        (layout.id, "text or whole numbers", lambda t: is_text(t) or types.is_integer(t)),
        (layout.label, "text, whole numbers, or lists of them", is_label),
        (layout.where, "true or false", types.is_boolean),
        (layout.indices, "lists of whole numbers", lambda t: is_list(t, types.is_integer)),
        (layout.values, "lists of numbers", lambda t: is_list(t, *numbers)),
        (layout.dense, "lists of numbers of one length", lambda t: is_list(t, *numbers, fixed=True)),
    ):
        if field is None:
            continue
        found_type = schema.field(field).type
        if not (good(found_type) or types.is_null(found_type)):
            hint = (
                "CSV has no such columns: write Parquet, JSONL or Arrow"
                if format_ == "csv"
                else ("convert the column or name another")
            )
            raise DataError(f"{path}: column {field!r} holds {found_type}; expected {wanted}; {hint}.")


def canonical(columns: pa.RecordBatch, layout: Layout, where: str) -> pa.Table:
    """Rows as a file has them -> the columns that the head of `sources` lists, checked.

    Args:
        columns: (n,) rows with the columns that the layout names.
        layout: what they are.
        where: the file and first row, for messages.

    Raises:
        DataError: a row cannot be used.
    """
    rows, name = columns.num_rows, layout.id
    out: dict[str, pa.Array] = {
        "id": pa.repeat("", rows) if name is None else ids_of(columns.column(name), name, where),
        "labels": _labels(
            None if layout.label is None else columns.column(layout.label), rows, layout.labels_among
        ),
    }
    classes = pc.unique(out["labels"].flatten()).to_pylist()
    if classes != ["-1"]:  # of two classes, -1 and 1, a block may have the one alone
        check_classes(classes, where)
    title = None if layout.title is None else columns.column(layout.title)
    if layout.kind == "text":
        texts = [columns.column(name).cast(pa.string()) for name in layout.text]
        text = (
            texts[0] if len(texts) == 1 else pc.binary_join_element_wise(*texts, "\n", null_handling="skip")
        )
        out["title"] = _titles(text if title is None else title, title is None, layout.mail)
        return pa.table(out | {"text": text.fill_null("")})
    out["title"] = pa.nulls(rows, pa.string()) if title is None else _titles(title, False, False)
    if layout.kind == "dense":
        assert layout.dense is not None
        dense = _fixed(columns.column(layout.dense), layout.n_features, layout.dense, where)
        table = conform(pa.table(out | {"values": dense}), "dense", dense.type.list_size, where)
        return table if layout.divide_by == 1.0 else _divided(table, layout.divide_by)
    out["indices"], out["values"] = columns.column(layout.indices), columns.column(layout.values)
    for name in ("indices", "values"):
        if pa.types.is_null(out[name].type) or pa.types.is_null(out[name].type.value_type):
            out[name] = out[name].cast(pa.list_(pa.int32()))
    _check_range(out["indices"], layout, where)
    return _without_zeros(
        conform(pa.table(out), "sparse", layout.n_features, where), layout.values_are, where
    )


def _check_range(column: pa.Array, layout: Layout, where: str) -> None:
    """Refuse column numbers beyond 32 bits, which could not even be compared with the number of columns; and
    of counts, whose columns are added up in memory, what would not fit there."""
    limit = 2**31 if layout.values_are == "weights" else MAX_COUNTED
    low, high = pc.min_max(column.flatten()).as_py().values()
    if high is not None and not -(2**31) <= low <= high < limit:
        found = high if high >= limit else low
        raise DataError(
            f"{where}: a row has index {found}; expected 0 to {limit - 1}; number the columns from 0."
        )


def ids_of(column: pa.Array, name: str, where: str) -> pa.Array:
    """(n,) ids as text.

    Args:
        column: text or whole numbers.
        name: of the column, for messages.
        where: the file and first row, for messages.

    Raises:
        DataError: a document has none.
    """
    column = column.cast(pa.string())  # before the nulls are counted: a dictionary may hold one
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise DataError(
            f"{where}: row {row} has no id (null in {name!r}); expected one for each document; fill it in, "
            "or name no id column."
        )
    return column


def _labels(column: pa.Array | None, rows: int, among: tuple[str, ...] | None) -> pa.Array:
    """list<string>: null, empty text and NaN are no label."""
    if column is None or pa.types.is_null(column.type):
        return pa.ListArray.from_arrays(pa.array(np.zeros(rows + 1, np.int32)), pa.array([], pa.string()))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        values = column.flatten()
        row_of = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    else:
        values, row_of = column, np.arange(rows)
    if pa.types.is_floating(values.type):  # what a table of whole numbers with gaps often became
        numbers = values.to_numpy(zero_copy_only=False)
        values = pa.array(
            [None if x != x else f"{x:.0f}" if x.is_integer() else str(x) for x in numbers.tolist()],
            pa.string(),
        )
    values = values.cast(pa.string())
    good = pc.and_(values.is_valid(), pc.not_equal(values, "")).fill_null(False)
    if among is not None:
        good = pc.and_(good, pc.is_in(values, value_set=pa.array(among)))
    kept = good.to_numpy(zero_copy_only=False)
    bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of[kept], minlength=rows))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(bounds), values.filter(good))


def check_classes(classes: Collection[str], where: str) -> None:
    """Refuse -1 among whole numbers, which scikit-learn and HDBSCAN write where there is no label; beside 1
    alone it is one of two classes.

    Args:
        classes: the labels of some rows, or of all.
        where: the rows, for the message.

    Raises:
        DataError: -1 would be scored as a class.
    """
    others = {name for name in classes if name != "-1"}
    if len(others) == len(classes) or others == {"1"} or not all(_WHOLE.fullmatch(name) for name in others):
        return
    some = f"among {', '.join(sorted(others, key=int)[:3])} and other whole numbers" if others else "alone"
    raise DataError(
        f"{where}: the label -1 {some}, which scikit-learn writes for 'no "
        "label' and which would be scored as a class; expected nothing in its place (null, an empty text; "
        "NaN in an npz), or a word where -1 is a class: write the labels so."
    )


def _titles(texts: pa.Array, first_line: bool, mail: bool) -> pa.Array:
    titles: list[str | None] = []
    for text in pc.utf8_slice_codeunits(texts.cast(pa.string()), 0, 4000 if mail else 600).to_pylist():
        text = text or ""
        if mail:
            lines = text.split("\n\n", 1)[0].split("\n")
            text = next((line[8:] for line in lines if line[:8].lower() == "subject:"), text)
        if first_line:
            text = text.lstrip().split("\n", 1)[0]
        titles.append(" ".join(text.split())[:TITLE_LENGTH] or None)
    return pa.array(titles, pa.string())


def _fixed(column: pa.Array, width: int | None, name: str, where: str) -> pa.Array:
    if pa.types.is_fixed_size_list(column.type):
        return column
    if pa.types.is_null(column.type):
        column = column.cast(pa.list_(pa.float32()))
    lengths = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
    width = int(lengths[0]) if width is None else width
    if width < 1 or (lengths != width).any():
        row = int(np.flatnonzero(lengths != width)[0]) if width > 0 else 0
        raise DataError(
            f"{where}: row {row} has {max(lengths[row], 0)} numbers in {name!r}; expected "
            f"{width if width > 0 else 'at least one'}, as many as the other rows; make them equal."
        )
    return pa.FixedSizeListArray.from_arrays(column.flatten(), width)


def _divided(table: pa.Table, by: float) -> pa.Table:
    column = table["values"].combine_chunks()
    values = column.flatten().to_numpy() / np.float32(by)
    rows = pa.FixedSizeListArray.from_arrays(pa.array(values), column.type.list_size)
    return table.set_column(table.schema.get_field_index("values"), "values", rows)


def _without_zeros(table: pa.Table, values_are: str, where: str) -> pa.Table:
    column, indices = table["values"].combine_chunks(), table["indices"].combine_chunks()
    values = column.flatten().to_numpy()
    row_of = pc.list_parent_indices(column).to_numpy()
    # a count between 0 and 1 has a negative logarithm, and sums of fractions depend on where the blocks end
    if values_are == "counts" and (bad := (values < 0) | (values != np.rint(values))).any():
        at = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{where}: row {row_of[at]} has the count {values[at]:g}; expected a whole number, 0 or more; "
            "correct the row, or set source.values_are=weights."
        )
    kept = values != 0
    if kept.all():
        return table
    bounds = pa.array(
        np.concatenate([[0], np.cumsum(np.bincount(row_of[kept], minlength=len(table)))]).astype(np.int32)
    )
    lists = {"indices": indices.flatten().to_numpy()[kept], "values": values[kept]}
    for name, flat in lists.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.ListArray.from_arrays(bounds, pa.array(flat)))
    return table
