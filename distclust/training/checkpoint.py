"""Checkpoints that are whole or not there: safetensors, JSON, and a COMMIT file written last.

On disk, under the root of a run (a local path or any fsspec URL)::

    step-000000123/
      model.safetensors       one file a group of tensors
      optimizer.safetensors
      state.json              everything else that resumes: plain JSON
      COMMIT                  JSON, written last: bytes and sha256 of each file, and its own

A checkpoint is valid when COMMIT is there and every file that it lists is there and matches. Files that it
does not list are never read; nothing is unpickled. Saving under a name that exists writes files with a new
generation in their names (``model.2.safetensors``) beside the old ones, then replaces COMMIT: the name is
valid throughout. Local files are written under a temporary name, flushed to the disk and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import fsspec
import safetensors
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from distclust.errors import CheckpointError
from distclust.mixture.settings import FILE_NAME
from distclust.training.differences import differences
from distclust.training.tensor_bytes import safetensors_pieces

__all__ = ["CheckpointStore", "differences"]

logger = logging.getLogger(__name__)

COMMIT = "COMMIT"
_VERSION = 1
_PIECE = 16 * 2**20
_GROUP = re.compile(r"[A-Za-z0-9_-]+")
_DATA_FILE = re.compile(r"(?:state(?:\.\d+)?\.json|[A-Za-z0-9_-]+(?:\.\d+)?\.safetensors)")
_OUR_FILE = re.compile(rf"(?:COMMIT|{_DATA_FILE.pattern})(?:\.part)?")


class CheckpointStore:
    """The checkpoints of one run. One process writes (rank 0), any process reads."""

    def __init__(self, root: str) -> None:
        """Open a store; nothing is created before the first save.

        Args:
            root: folder, as a path or an fsspec URL.
        """
        self._fs, self._root = fsspec.core.url_to_fs(root)
        # name -> sha256 of its COMMIT, where this process wrote or verified it: prune need not hash again
        self._known: dict[str, str] = {}

    def save(self, name: str, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> str:
        """Write a checkpoint and return its path (absolute, or a URL), as `load` takes it.

        Args:
            name: of the folder; names sort by time (``step-000000123``). One of that name is replaced.
            tensors: groups of named dense tensors, any device, strides and sharing; an empty group is kept.
            state: JSON values only: dict with text keys, list or tuple (read back as list), str, int, float,
                bool, None.

        Raises:
            CheckpointError: an impossible name or state, or a failed write (disk full): what was written is
                removed, and older checkpoints, one of the same name included, stay as they are.
        """
        self._check_names(name, tensors)
        text = _to_json(state, what=f"the state of checkpoint {name}")
        folder = posixpath.join(self._root, name)
        written: list[str] = []
        existed, commit = True, b""
        try:
            existed = self._fs.exists(folder)
            generation = self._generation(folder) + 1
            suffix = "" if generation == 1 else f".{generation}"
            self._make_folder(folder)
            listed: dict[str, dict[str, Any]] = {}
            for group, named in tensors.items():
                written.append(f"{group}{suffix}.safetensors")
                pieces = safetensors_pieces(_plain(named, group))
                listed[written[-1]] = self._write(folder, written[-1], *pieces)
            written.append(f"state{suffix}.json")
            listed[written[-1]] = self._write(folder, written[-1], text.encode())
            commit = _commit_bytes(generation, listed)
            written += [COMMIT] if generation == 1 else []
            self._write(folder, COMMIT, commit)
        except BaseException as error:
            # an interrupt, or a storage that complains on closing, may come after COMMIT took effect
            if not (commit and self._is_committed(folder, commit)):
                self._clean(folder, written, remove_folder=not existed)
            if not isinstance(error, Exception) or isinstance(error, CheckpointError):
                raise
            raise CheckpointError(_write_failed(self._show(folder), tensors, error)) from error
        self._known[name] = hashlib.sha256(commit).hexdigest()
        self._drop_unlisted(folder, listed)
        return self._show(folder)

    def latest(self) -> str | None:
        """Path of the newest valid checkpoint by name, or None; every byte of it was verified.

        Folders without COMMIT (a write that was cut off) are passed over; a damaged one gives a warning that
        names the file, and the one before it is taken.

        Raises:
            CheckpointError: the storage cannot be read (permission, network): that is no damage.
        """
        damaged = 0
        for name in reversed(self._committed()):
            folder = posixpath.join(self._root, name)
            damage = self._damage(folder)
            if damage is None:
                return self._show(folder)
            damaged += 1
            logger.warning("%s; falling back to the checkpoint before it", damage)
        if damaged:
            logger.warning("none of the %d checkpoints in %s is whole", damaged, self._show(self._root))
        return None

    def load(self, path: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Read a checkpoint: groups of tensors on the CPU, and the state.

        Each file is verified against COMMIT before anything parses it.

        Args:
            path: as `save` or `latest` returned it.

        Raises:
            CheckpointError: absent, partial or damaged; the file is named.
        """
        fs, folder = fsspec.core.url_to_fs(path)
        folder = folder.rstrip("/")
        tensors: dict[str, dict[str, Tensor]] = {}
        state: dict[str, Any] = {}
        try:
            commit, _ = _read_commit(fs, folder)
            for file, expected in commit["files"].items():
                data = b"".join(_verified(fs, posixpath.join(folder, file), expected))
                if file.endswith(".json"):
                    state = json.loads(data)
                else:
                    tensors[file.split(".")[0]] = safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{posixpath.join(folder, file)} matches COMMIT but does not parse: {error}; "
                "expected a file that distclust wrote: take another checkpoint"
            ) from error
        except _DamageError as damage:
            raise CheckpointError(
                f"{damage}; expected the bytes that were saved: take an earlier checkpoint"
            ) from None
        return tensors, state

    def prune(self, keep: int, keep_names: Collection[str] = ()) -> None:
        """Remove all but the newest valid checkpoints, and what cut-off writes left.

        Damaged ones do not count, and those newer than the oldest kept stay for whoever wants to look.
        Failing to delete is a warning: it must not end a training.

        Args:
            keep: how many valid ones stay, 1 or more.
            keep_names: these stay too, whatever their age.
        """
        if keep < 1:
            raise ValueError(
                f"keep={keep}; expected 1 or more: the last checkpoint is what a run resumes from"
            )
        committed = self._committed()
        for name in self._folders():
            if name not in committed and name not in keep_names and self._is_ours(name):
                self._remove(name)
        kept = 0
        for name in reversed(committed):
            if kept >= keep:
                if name not in keep_names:
                    self._remove(name)
            elif self._still_known(name) or self._damage(posixpath.join(self._root, name)) is None:
                kept += 1

    # --- writing

    def _check_names(self, name: str, groups: Collection[str]) -> None:
        if not FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"checkpoint name {name!r}; expected letters, digits, '-', '_' and '.' only"
            )
        for group in groups:
            if not _GROUP.fullmatch(group):
                raise CheckpointError(f"tensor group {group!r}; expected letters, digits, '-' and '_' only")

    def _generation(self, folder: str) -> int:
        """Of the checkpoint that is there, or 0; an unreadable COMMIT protects nothing and is removed."""
        try:
            commit, _ = _read_commit(self._fs, folder)
            return int(commit["generation"])
        except _DamageError:
            path = posixpath.join(folder, COMMIT)
            if self._fs.exists(path):
                self._fs.rm_file(path)
            return 0

    def _make_folder(self, folder: str) -> None:
        self._fs.makedirs(folder, exist_ok=True)
        if self._local:
            _sync_folder(os.path.dirname(folder))

    def _write(self, folder: str, file: str, *data: bytes | memoryview) -> dict[str, Any]:
        path, digest = posixpath.join(folder, file), hashlib.sha256()
        views = [memoryview(part) for part in data]
        pieces = (view[at : at + _PIECE] for view in views for at in range(0, len(view), _PIECE))
        if self._local:
            part = path + ".part"
            with open(part, "wb") as out:
                out.writelines(pieces)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, path)
            _sync_folder(folder)
        else:
            with self._fs.open(path, "wb") as out:
                for piece in pieces:
                    out.write(bytes(piece))
        for view in views:
            digest.update(view)
        return {"bytes": sum(map(len, views)), "sha256": digest.hexdigest()}

    def _is_committed(self, folder: str, commit: bytes) -> bool:
        try:
            return _read_all(self._fs, posixpath.join(folder, COMMIT)) == commit
        except (_DamageError, CheckpointError, OSError):
            return False

    def _clean(self, folder: str, written: Sequence[str], remove_folder: bool) -> None:
        paths = [posixpath.join(folder, file) for file in written]
        paths += [path + ".part" for path in {*paths, posixpath.join(folder, COMMIT)}]
        try:
            for path in paths:
                if self._fs.exists(path):
                    self._fs.rm_file(path)
            if remove_folder and self._fs.exists(folder):
                self._fs.rm(folder, recursive=True)
        except Exception as error:  # noqa: BLE001 - a storage may raise anything
            logger.warning("could not remove what a failed write left in %s: %s", self._show(folder), error)

    def _drop_unlisted(self, folder: str, listed: Collection[str]) -> None:
        """Files of an older generation or of a write that was cut off; a stranger's file stays."""
        try:
            for file in _listing(self._fs, folder):
                if file != COMMIT and file not in listed and _OUR_FILE.fullmatch(file):
                    self._fs.rm_file(posixpath.join(folder, file))
        except Exception as error:  # noqa: BLE001 - a storage may raise anything
            logger.warning("could not remove older files in %s: %s", self._show(folder), error)

    # --- looking

    @property
    def _local(self) -> bool:
        return isinstance(self._fs, LocalFileSystem)

    def _show(self, path: str) -> str:
        return path if self._local else str(self._fs.unstrip_protocol(path))

    def _folders(self) -> list[str]:
        try:
            return sorted(
                name for name, kind in _listing(self._fs, self._root).items() if kind == "directory"
            )
        except OSError as error:
            raise CheckpointError(
                f"could not list the checkpoints in {self._show(self._root)}: {error}; "
                "expected a readable folder: check the storage and its rights"
            ) from error

    def _committed(self) -> list[str]:
        return [name for name in self._folders() if self._fs.exists(posixpath.join(self._root, name, COMMIT))]

    def _damage(self, folder: str) -> str | None:
        """What is wrong, in words, after reading every byte; None when nothing is."""
        try:
            commit, digest = _read_commit(self._fs, folder)
            for file, expected in commit["files"].items():
                for _ in _verified(self._fs, posixpath.join(folder, file), expected):
                    pass
        except _DamageError as damage:
            return str(damage)
        self._known[posixpath.basename(folder)] = digest
        return None

    def _still_known(self, name: str) -> bool:
        if name not in self._known:
            return False
        folder = posixpath.join(self._root, name)
        try:
            commit, digest = _read_commit(self._fs, folder)
            files = commit["files"].items()
            sizes = all(
                self._fs.size(posixpath.join(folder, file)) == expected["bytes"] for file, expected in files
            )
        except (_DamageError, OSError):
            return False
        return sizes and digest == self._known[name]

    def _is_ours(self, name: str) -> bool:
        """Whether a folder holds nothing but what `save` writes: the folders of others are never removed."""
        try:
            files = _listing(self._fs, posixpath.join(self._root, name))
        except OSError:
            return False
        return all(kind == "file" and _OUR_FILE.fullmatch(file) for file, kind in files.items())

    def _remove(self, name: str) -> None:
        folder = posixpath.join(self._root, name)
        self._known.pop(name, None)
        try:
            # COMMIT first: what is left of an interrupted removal is then partial, not damaged
            path = posixpath.join(folder, COMMIT)
            if self._fs.exists(path):
                self._fs.rm_file(path)
            self._fs.rm(folder, recursive=True)
        except Exception as error:  # noqa: BLE001 - a storage may raise anything
            logger.warning("could not remove the old checkpoint %s: %s", self._show(folder), error)


class _DamageError(Exception):
    """A file of a checkpoint that is missing or not what was saved."""


def _to_json(state: Mapping[str, Any], what: str) -> str:
    _check_plain(state, what, "")
    return json.dumps(state, indent=1)


def _check_plain(value: Any, what: str, path: str) -> None:
    # numbers of numpy and keys that are no text would come back as something else, or not at all
    if value is None or type(value) in (str, int, float, bool):
        return
    if isinstance(value, Mapping):
        for key, below in value.items():
            if type(key) is not str:
                raise CheckpointError(
                    f"{what} has the key {key!r} at '{path}'; expected text keys: use str(key)"
                )
            _check_plain(below, what, f"{path}.{key}" if path else key)
        return
    if isinstance(value, (list, tuple)):
        for place, below in enumerate(value):
            _check_plain(below, what, f"{path}[{place}]")
        return
    raise CheckpointError(
        f"{what} holds a {type(value).__module__}.{type(value).__qualname__} at '{path}'; "
        "expected JSON values: make it a plain number, text or list, or put it among the tensors"
    )


def _plain(named: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """Contiguous on the CPU and without shared memory, as safetensors wants them."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(
                f"'{name}' of group '{group}' is {kind}; expected a dense tensor: convert it"
            )
        ready = tensor.detach().to("cpu").contiguous()
        if ready.untyped_storage().data_ptr() in seen:
            ready = ready.clone()
        seen.add(ready.untyped_storage().data_ptr())
        plain[name] = ready
    return plain


def _write_failed(shown: str, tensors: Mapping[str, Mapping[str, Tensor]], error: Exception) -> str:
    size = sum(tensor.nbytes for named in tensors.values() for tensor in named.values()) / 2**20
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free space or choose another storage" if full else "check the storage and its rights"
    return (
        f"could not write checkpoint {shown} ({size:.1f} MiB): {error}; what was written was removed, and "
        f"the checkpoints before it are as they were: {advice}, then run again"
    )


def _commit_bytes(generation: int, listed: Mapping[str, Mapping[str, Any]]) -> bytes:
    content = {"version": _VERSION, "generation": generation, "files": listed}
    # its own digest too: a flipped bit in a file name would else load a group under another name
    return json.dumps({**content, "sha256": _digest(content)}, indent=1).encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_commit(fs: Any, folder: str) -> tuple[dict[str, Any], str]:
    """The checked content of COMMIT, and the sha256 of its bytes."""
    path = posixpath.join(folder, COMMIT)
    try:
        data = _read_all(fs, path)
    except FileNotFoundError:
        raise _DamageError(f"{path} is missing: the checkpoint was never finished, or is none") from None
    try:
        content = json.loads(data)
        whole = content.pop("sha256") == _digest(content)
        version = content["version"]
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise _DamageError(f"{path} is damaged: it is not the JSON that was written")
    if version != _VERSION:
        raise CheckpointError(
            f"{path} is of format version {version}; this distclust reads version {_VERSION}: "
            "use the version that wrote it"
        )
    # the digest guards against accidents only: a made-up COMMIT must not lead outside its folder
    files = content.get("files")
    strange = (
        [file for file in files if not _DATA_FILE.fullmatch(file)] if isinstance(files, dict) else [files]
    )
    if strange:
        raise _DamageError(
            f"{path} lists {strange[0]!r}: expected files of this folder, safetensors and JSON only"
        )
    return content, hashlib.sha256(data).hexdigest()


def _read_all(fs: Any, path: str) -> bytes:
    return b"".join(_pieces(fs, path))


def _pieces(fs: Any, path: str) -> Iterator[bytes]:
    """The bytes of a file; a disk that cannot read a place is damage, a storage that refuses is an error."""
    try:
        with fs.open(path, "rb") as source:
            while piece := source.read(_PIECE):
                yield piece
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.EIO:
            raise _DamageError(f"{path} cannot be read: {error}") from error
        raise CheckpointError(
            f"could not read {path}: {error}; expected a readable file: check the storage and its rights"
        ) from error


def _verified(fs: Any, path: str, expected: Mapping[str, Any]) -> Iterator[bytes]:
    """The bytes of a file; raises at the end where they are not those that COMMIT lists."""
    digest, size = hashlib.sha256(), 0
    try:
        found = fs.size(path)
        if found != expected["bytes"]:
            raise _DamageError(f"{path} is damaged: {found} bytes, {expected['bytes']} were saved")
        for piece in _pieces(fs, path):
            digest.update(piece)
            size += len(piece)
            yield piece
    except FileNotFoundError:
        raise _DamageError(f"{path} is missing") from None
    if size != expected["bytes"] or digest.hexdigest() != expected["sha256"]:
        raise _DamageError(f"{path} is damaged: its sha256 is not the one that was saved")


def _listing(fs: Any, folder: str) -> dict[str, str]:
    """Names in a folder with 'file' or 'directory', asked anew; empty where there is no folder."""
    fs.invalidate_cache(folder)
    try:
        entries = fs.ls(folder, detail=True)
    except FileNotFoundError:
        return {}
    return {posixpath.basename(entry["name"].rstrip("/")): entry["type"] for entry in entries}


def _sync_folder(folder: str) -> None:
    """Make a rename last through a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        logger.debug("could not flush the folder %s: %s", folder, error)
    finally:
        os.close(handle)
