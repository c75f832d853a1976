"""``manifest.json``: what a corpus folder holds, with a hash of every shard."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from distclust.corpus import cache
from distclust.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
KINDS = ("sparse", "dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard as the manifest lists it."""

    file: str
    """Path relative to the corpus folder."""
    rows: int
    nonzeros: int
    """Stored values: non-zeros of a sparse shard, rows x features of a dense one."""
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What ``manifest.json`` says of a corpus."""

    version: int = FORMAT_VERSION
    kind: str
    """"sparse" or "dense"."""
    n_rows: int
    n_features: int
    n_nonzeros: int
    row_scale: float = 1.0
    """The factor that the stored values already contain."""
    shards: tuple[ShardInfo, ...]
    counts: dict[str, int] = field(default_factory=dict)
    """documents, empty, unlabelled, multi_labelled."""
    dtypes: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    """The distinct labels of documents that have exactly one, sorted."""
    source_fingerprint: str = ""
    vocabulary_fingerprint: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what defines the data: two corpora with the same one train the same model."""
        defining = {
            "kind": self.kind,
            "n_features": self.n_features,
            "row_scale": self.row_scale,
            "shards": [[s.sha256, s.rows] for s in self.shards],
            "vocabulary": self.vocabulary_fingerprint,
        }
        return hashlib.sha256(json.dumps(defining, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, root: str | os.PathLike[str]) -> Manifest:
        """Read and check the manifest of the corpus at ``root`` (a folder or an fsspec URL).

        Raises:
            DataError: no corpus there, a half-written one, or a damaged manifest.
        """
        where = cache.join(root, MANIFEST)
        try:
            text = cache.read_bytes(where)
        except FileNotFoundError:
            raise DataError(_no_manifest(root)) from None
        except DataError:
            raise
        except Exception as error:  # every file system has exceptions of its own
            raise DataError(f"cannot read {where}: {error}. Check that this machine may read it.") from error
        return cls.parse(text, where)

    @classmethod
    def parse(cls, text: bytes | str, where: str = MANIFEST) -> Manifest:
        """The manifest in ``text``; ``where`` is named in errors."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where} is not readable JSON ({error}). {_AGAIN}") from None
        if not isinstance(raw, dict) or raw.get("version") != FORMAT_VERSION:
            found = raw.get("version") if isinstance(raw, dict) else type(raw).__name__
            raise DataError(
                f"{where} has format version {found!r}; expected {FORMAT_VERSION}: "
                "prepare the corpus again with this version of distclust."
            )
        try:
            shards = tuple(ShardInfo(**s) for s in raw.pop("shards"))
            manifest = cls(**{**raw, "shards": shards, "classes": tuple(raw.pop("classes", ()))})
        except (KeyError, TypeError) as error:
            raise DataError(f"{where} lacks a field or has an unknown one ({error}). {_AGAIN}") from None
        manifest.check(where)
        return manifest

    def check(self, where: str) -> None:
        """Raise DataError, naming ``where``, for an impossible field or a path that leaves the folder."""

        def refuse(found: str) -> DataError:
            return DataError(f"{where}: {found}. {_AGAIN}")

        if self.kind not in KINDS:
            raise refuse(f"kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        scale = self.row_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise refuse(f"row_scale is {scale!r}; expected a positive number")
        if not all(isinstance(name, str) for name in self.classes):
            raise refuse("a class name is no text; expected a list of strings")
        if not isinstance(self.counts, dict) or not isinstance(self.options, dict):
            raise refuse("counts or options is no table; expected names and values")
        counts = [
            ("n_rows", self.n_rows, 0),
            ("n_features", self.n_features, 1),
            ("n_nonzeros", self.n_nonzeros, 0),
        ]
        for shard in self.shards:
            if not isinstance(shard.file, str) or not _stays_inside(shard.file):
                raise refuse(
                    f"the shard path {shard.file!r} leaves the corpus folder; expected a plain relative name"
                )
            counts += [(f"{shard.file}: {f}", getattr(shard, f), 0) for f in ("rows", "nonzeros", "bytes")]
            if not isinstance(shard.sha256, str) or len(shard.sha256) != 64:
                raise refuse(f"{shard.file} has sha256 {shard.sha256!r}; expected 64 hexadecimal digits")
        for name, value, least in counts:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise refuse(f"{name} is {value!r}; expected a whole number of at least {least}")
        if len({s.file for s in self.shards}) != len(self.shards):
            raise refuse("a shard is listed twice; expected each file once")
        for name, total, parts in (
            ("n_rows", self.n_rows, sum(s.rows for s in self.shards)),
            ("n_nonzeros", self.n_nonzeros, sum(s.nonzeros for s in self.shards)),
        ):
            if total != parts:
                raise refuse(f"{name} is {total} but the shards add up to {parts}")


_AGAIN = "The folder is damaged: prepare the corpus again."


def _no_manifest(root: str | os.PathLike[str]) -> str:
    try:
        names = cache.list_names(root)
    except OSError:
        names = None
    if names is None:
        return (
            f"there is no folder {root}; expected a prepared corpus: "
            "check the path, or run `distclust prepare`."
        )
    if any(name.endswith(".arrow") for name in names):
        return (
            f"{root} has shards but no {MANIFEST}: preparing it did not finish, and it is not read as a "
            "whole one. Run the same `distclust prepare` again."
        )
    return f"{root} has no {MANIFEST}, so it is no corpus: check the path, or run `distclust prepare`."


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = bool(name) and "\\" not in name and ":" not in name and "\0" not in name
    return plain and not path.is_absolute() and ".." not in path.parts and path.name not in ("", ".")
