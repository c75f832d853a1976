"""The corpus folder while it is prepared: who works there, what is there, how the new takes its place."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distclust.corpus.passes import HOLDER, STAGED
from distclust.corpus.shards import MANIFEST, Corpus, Manifest, clear_unfinished, write_manifest
from distclust.corpus.sources import Source
from distclust.corpus.vocabulary import VOCABULARY_FILE
from distclust.errors import DataError

logger = logging.getLogger(__name__)
_WORK = ".work"


def already_there(folder: Path, source: Source, options: dict[str, Any], overwrite: bool) -> Manifest | None:
    """The manifest of a whole corpus of this very content; None if there is work to do."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = Manifest.load(folder)
    except DataError:
        if overwrite:
            return None
        raise
    if overwrite:  # the same content too: a shard that was changed is not found out by its size
        return None
    lines = _differences(manifest, source, options)
    if lines:
        raise DataError(
            f"{folder} holds a corpus of other content; expected the same or none. It differs in: "
            f"{'; '.join(lines)}. Choose another folder, or replace it (distclust prepare --overwrite)."
        )
    try:
        Corpus.open(folder)
    except DataError as error:
        logger.warning("%s is prepared again, because it is damaged: %s", folder, error)
        return None
    logger.info("%s already holds this corpus (%d documents); nothing to do", folder, manifest.n_rows)
    return manifest


def _differences(manifest: Manifest, source: Source, options: dict[str, Any]) -> list[str]:
    lines = []
    for group in ("source", "vocabulary", "shards"):
        old, new = manifest.options.get(group), options[group]
        if group == "source" and manifest.source_fingerprint == source.fingerprint:
            continue
        if not isinstance(old, dict) or not isinstance(new, dict):
            lines += [f"{group}: {_short(old)} there, {_short(new)} asked"] if old != new else []
            continue
        lines += [
            f"{group}.{name}: {_short(old.get(name))} there, {_short(new.get(name))} asked"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
    if manifest.source_fingerprint != source.fingerprint and not any(
        line.startswith("source") for line in lines
    ):
        lines.append("the content of the source's files")
    return lines


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A work folder inside the corpus folder, cleared away in the end; with it a corpus folder that stayed
    empty."""
    work = folder / _WORK
    holder = work / HOLDER
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        other = json.loads(holder.read_text())
    except (OSError, ValueError):
        other = None
    if (
        other
        and other["host"] == socket.gethostname()
        and other["pid"] != os.getpid()
        and _alive(other["pid"])
    ):
        raise DataError(
            f"{folder} is being prepared by process {other['pid']} on {other['host']}; expected nobody; "
            "wait for it, stop it, or choose another folder."
        )
    shutil.rmtree(work, ignore_errors=True)
    try:
        try:
            (work / STAGED).mkdir(parents=True)
            holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        except OSError as error:
            raise DataError(
                f"{folder} cannot be written ({error}); expected a folder with write access; choose another."
            ) from error
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def publish(staged: Path, folder: Path, manifest: Manifest) -> None:
    """Put the new corpus in the place of whatever is there; without a manifest in between, so never half of
    each."""
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / VOCABULARY_FILE).unlink(missing_ok=True)
        clear_unfinished(folder)
        for file in sorted(staged.iterdir()):
            os.replace(file, folder / file.name)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error}); expected a folder with write access; choose another."
        ) from error
    write_manifest(folder, manifest)
