"""The folder of assignments: what is in it, and how it comes about whole.

A part is written under another name and renamed, in ``OUT.partial``; when all are there, the folder gets a
manifest and its name OUT. So OUT is always whole, and what an interrupted run has finished is not done again.

::

    OUT/
      part-00000.parquet ...   id: string, cluster: int32, probability: float32, and where asked for
                               probabilities: fixed_size_list<float32>[K]
      _manifest.json           the model, the documents, the parts in order, documents of each cluster
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distclust.errors import DataError

logger = logging.getLogger(__name__)

MANIFEST = "_manifest.json"
PLAN = "_plan.json"
_META = b"distclust"
_WRITING = ".writing-"


@dataclass(frozen=True, slots=True)
class Assignment:
    """A finished folder. Use :meth:`open`."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def n_documents(self) -> int:
        """Documents in all parts."""
        return int(self.manifest["documents"])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(K,) documents of each cluster."""
        return np.array(self.manifest["sizes"], np.int64)

    @property
    def files(self) -> list[Path]:
        """The parts, in the order of the documents."""
        return [self.folder / part["file"] for part in self.manifest["parts"]]

    @classmethod
    def open(cls, folder: str | Path) -> Assignment:
        """Open a finished folder.

        Raises:
            DataError: there is none, it is unfinished, or a part is missing or damaged (named).
        """
        root = Path(folder)
        try:
            manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
            rows = [int(part["documents"]) for part in manifest["parts"]]
            opened = cls(root, manifest)
            files = opened.files
        except FileNotFoundError:
            raise DataError(_no_manifest(root)) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{root / MANIFEST} cannot be read ({error!r}); {_again(root)}") from error
        for path, expected in zip(files, rows, strict=True):
            try:
                found = pq.read_metadata(path).num_rows
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(f"{path} cannot be read ({error}); {_again(root)}") from error
            if found != expected:
                raise DataError(f"{path} has {found} documents; expected {expected}: {_again(root)}")
        return opened

    def clusters(self) -> NDArray[np.int32]:
        """(N,) the cluster of each document, in the order of the corpus or the files."""
        found = [pq.read_table(path, columns=["cluster"])["cluster"].to_numpy() for path in self.files]
        return np.concatenate(found) if found else np.empty(0, np.int32)

    def tables(self) -> Iterator[pa.Table]:
        """The parts in order, with all their columns."""
        return (pq.read_table(path) for path in self.files)


def _no_manifest(root: Path) -> str:
    if partial_of(root).exists():
        return f"{root} is not finished ({partial_of(root)} is there): give the same command again."
    return f"{root} holds no assignments: it has no {MANIFEST}; check the path, or run `distclust assign`."


def _again(root: Path) -> str:
    return f"remove {root} and assign again."


# ---- how it comes about


def partial_of(out: Path) -> Path:
    """Where the parts are until all are there."""
    if out.name in ("", ".."):  # "." and its like: the folder has a name all the same
        return Path(f"{os.path.abspath(out)}.partial")
    return out.with_name(f"{out.name}.partial")


def part_name(part: int) -> str:
    """File name of a part."""
    return f"part-{part:05d}.parquet"


def find_finished(out: Path, plan: dict[str, Any], replace: bool = False) -> Assignment | None:
    """The assignments in OUT, if they are those of the plan; None if there is nothing yet.

    Args:
        out: the folder.
        plan: what the assignments are made from.
        replace: whether others are removed, and not refused: for a folder that is a run's own.

    Raises:
        DataError: they are others, or OUT is something else.
    """
    if not out.exists():
        return None
    if not (out / MANIFEST).exists():
        if out.is_dir() and not any(out.iterdir()):
            _refuse_own_folder(out)
            return None
        raise DataError(
            f"{out} exists and holds no assignments; expected a new folder: give another with --out."
        )
    found = Assignment.open(out)
    unlike = [key for key, value in plan.items() if key != "parts" and found.manifest.get(key) != value]
    if unlike:
        names = {"model": "another model", "data": "other documents", "all_probabilities": "other columns"}
        what = ", ".join(names.get(key, f"another {key}") for key in unlike)
        if replace:
            _refuse_own_folder(out)
            logger.info("%s holds assignments of %s; starting anew", out, what)
            shutil.rmtree(out)
            return None
        raise DataError(
            f"{out} holds assignments of {what}; expected the same or none: give another folder with --out, "
            "or remove this one."
        )
    return found


def _refuse_own_folder(out: Path) -> None:
    """The folder that takes this one's place would be another than the one that the shell is in."""
    if os.path.samefile(out, os.curdir):
        raise DataError(
            f"{out} is the folder that the command was given in; expected one that can be replaced: give a "
            "new name with --out."
        )


def take_up(partial: Path, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Make the partial folder; returns the counts of the parts that an interrupted run left there.

    Raises:
        DataError: it cannot be written.
    """
    try:
        stored = json.loads((partial / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    try:
        if stored != plan:
            if partial.exists():
                logger.info("%s is of other documents or another model; starting anew", partial)
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            write_text(partial / PLAN, json.dumps(plan, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{partial} cannot be written ({error}); give another folder with --out.") from error
    kept = []
    for path in sorted(partial.iterdir()):
        if path.name.startswith(_WRITING):
            path.unlink(missing_ok=True)
        elif path.suffix == ".parquet":
            try:
                kept.append(json.loads(pq.read_metadata(path).metadata[_META]))
            except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
                logger.warning("%s is damaged, and is made again", path)
                path.unlink(missing_ok=True)
    return kept


def write_part(path: Path, table: pa.Table, counts: dict[str, Any]) -> None:
    """Write a part whole or not at all, with its counts inside."""
    table = table.replace_schema_metadata({_META: json.dumps(counts)})
    partial = _temporary(path)
    try:
        pq.write_table(table, partial, compression="zstd")
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, out: Path, plan: dict[str, Any], counts: list[dict[str, Any]]) -> None:
    """All parts are there: write the manifest and give the folder its name.

    Args:
        partial: the folder.
        out: its name to be.
        plan: what the parts were made from.
        counts: of each part, in order: part, documents, empty, ambiguous, sizes.

    Raises:
        DataError: it cannot be done; the parts stay.
    """
    manifest = {
        **plan,
        **{key: sum(c[key] for c in counts) for key in ("documents", "empty", "ambiguous")},
        "sizes": np.sum([c["sizes"] for c in counts], axis=0).tolist(),
        "parts": [{"file": part_name(c["part"]), "documents": c["documents"]} for c in counts],
    }
    try:
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (partial / PLAN).unlink(missing_ok=True)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise DataError(
            f"{partial} cannot be renamed to {out} ({error}); free some space, check the rights, and give "
            "the same again."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    partial = _temporary(path)
    try:
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_WRITING}{socket.gethostname()}-{os.getpid()}-{path.name}")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
