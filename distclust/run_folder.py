"""A run's folder: who holds it, and what it was started with.

::

    runs/NAME/
      lock            who works here now
      config.json     the configuration that the run was started with, and the fingerprints of its data
      done.json       what is done after training, with the seconds that each part took
      corpus/  checkpoints/  model/  assignments/  mlflow.json  summary.json
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distclust.config import RunConfig, from_dict, to_dict
from distclust.corpus.files import is_url
from distclust.errors import ConfigError
from distclust.training.checkpoint import differences

log = logging.getLogger(__name__)

LOCK = "lock"
CONFIG = "config.json"
DONE = "done.json"
SUMMARY = "summary.json"
ASSIGNMENTS = "assignments"
BEAT_S = 15.0
"""Seconds between two signs of life of a holder."""
DEAD_AFTER_S = 120.0
"""A holder on another machine without a sign of life for so long is dead."""

# These may differ from one start to the next; everything else makes another run.
_FREE = ("cache", "checkpoint", "cluster", "stream", "tracking")


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold the run folder, made if need be: one process at a time.

    The lock file is locked in the kernel's sense too, so the lock of a process that died on this machine is
    free at once. Machines that share the folder may not share such locks: there the file's own word counts,
    and its time, which a holder renews.

    Raises:
        ConfigError: another process holds it; it is named.
    """
    made = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the run folder {run_dir} cannot be made ({error}); give another with --run"
        ) from error
    path = run_dir / LOCK
    handle = _take(path, run_dir)
    beat = threading.Event()

    def renew() -> None:
        while not beat.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=renew, name="distclust-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        beat.set()
        path.unlink(missing_ok=True)
        os.close(handle)
        if made:  # a run that ended before it had anything leaves nothing
            with contextlib.suppress(OSError):
                run_dir.rmdir()


def _take(path: Path, run_dir: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error}); give another run folder with --run"
            ) from error
        held, locked = False, True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        except OSError:  # a file system without such locks
            locked = False
        holder = _read(handle)
        if not held and holder:
            if holder.get("host") != socket.gethostname():
                held = _now_on(run_dir) - os.fstat(handle).st_mtime < DEAD_AFTER_S
            elif not locked:
                held = _alive(holder.get("pid"))
        if held:
            os.close(handle)
            raise ConfigError(_held(run_dir, holder))
        if _same_file(handle, path):
            break
        os.close(handle)  # its holder ended, and removed it, between our calls
    if holder:
        log.warning(
            "taking over %s from process %s on %s, which died", run_dir, holder.get("pid"), holder.get("host")
        )
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(mine) + "\n").encode(), 0)
    return handle


def _alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _now_on(folder: Path) -> float:
    """The time by the clock that stamps the folder's files."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b".")
        file.flush()
        return os.fstat(file.fileno()).st_mtime


def _read(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _held(run_dir: Path, holder: Mapping[str, Any]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('start', '?')}"
    return (
        f"the run folder {run_dir} is held by {who}; expected one process at a time. Wait for it, or give "
        f"another folder with --run; if that machine is gone, its hold ends {DEAD_AFTER_S:.0f} s after its "
        "last sign of life"
    )


# ---- files that are whole or not there


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in place of `path`, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ConfigError(
            f"{path} cannot be written ({error}); free some space, or check the rights"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where there is no such file.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except NotADirectoryError as error:
        raise ConfigError(f"{path.parent} is a file; expected a run folder: give another") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); expected what an earlier run wrote. Restore it, or take "
            "another run folder"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} holds {type(found).__name__}; expected a JSON object. Take another run folder"
        )
    return found


# ---- the same run, or another one


def check_same_run(run_dir: Path, config: RunConfig) -> bool:
    """Whether the folder holds a run already; it must be the one that `config` describes.

    Raises:
        ConfigError: it was started with another configuration; the differences are listed.
    """
    stored = read_json(run_dir / CONFIG).get("config")
    if stored is None:
        return False
    # settings that are newer than the run get their defaults
    unlike = differences(_binding(to_dict(from_dict(stored))), _binding(to_dict(config)))
    if unlike:
        raise ConfigError(_another_run(run_dir, unlike))
    return True


def check_same_data(run_dir: Path, data: Mapping[str, str]) -> None:
    """Refuse data other than the run was started with.

    Args:
        run_dir: the folder.
        data: fingerprints of the corpus, `{"corpus": ..., "vocabulary": ...}`.

    Raises:
        ConfigError: naming what differs.
    """
    stored = read_json(run_dir / CONFIG).get("data")
    if stored is None:
        return
    unlike = differences(dict(stored), dict(data))
    if unlike:
        raise ConfigError(_another_run(run_dir, unlike))


def remember_run(run_dir: Path, config: RunConfig, data: Mapping[str, str]) -> None:
    """Write config.json: from here on the folder belongs to this configuration and this data."""
    write_json(run_dir / CONFIG, {"config": to_dict(config), "data": dict(data)})


def stored_config(run_dir: Path) -> dict[str, Any]:
    """The configuration of the run in the folder, as plain data.

    Raises:
        ConfigError: there is no run in it.
    """
    stored = read_json(run_dir / CONFIG).get("config")
    if not isinstance(stored, dict):
        raise ConfigError(
            f"{run_dir} holds no run: it has no {CONFIG}. Expected a folder that `distclust train` made"
        )
    return stored


def _binding(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _FREE}


def _another_run(run_dir: Path, unlike: list[str]) -> str:
    listed = "; ".join(line.replace("in the checkpoint", "there") for line in unlike)
    return (
        f"{run_dir} holds a run that was started otherwise: {listed}. Expected the same configuration and "
        "data. Give those to continue it, or another folder with --run"
    )


# ---- what is done


@dataclass
class Done:
    """What done.json says: parts of the job with their results and seconds."""

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.content = {"finished": False, "seconds": {}, "baselines": {}} | read_json(self.path)

    @property
    def seconds(self) -> dict[str, float]:
        found: dict[str, float] = self.content["seconds"]
        return found

    @property
    def baselines(self) -> dict[str, Any]:
        found: dict[str, Any] = self.content["baselines"]
        return found

    def add_seconds(self, part: str, seconds: float) -> None:
        self.seconds[part] = round(self.seconds.get(part, 0.0) + seconds, 3)

    def save(self) -> None:
        write_json(self.path, self.content)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Seconds of a part, summed over the starts of a run; saved with what the part left in `content`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add_seconds(part, time.monotonic() - start)
        self.save()


# ---- what there is left to do


def is_finished(run_dir: str | Path) -> bool:
    """Whether the run in the folder is over, in every part."""
    return bool(read_json(Path(run_dir) / DONE).get("finished"))


def nothing_left(run_dir: str | Path, baselines: bool = True) -> bool:
    """Whether another start of the run would do nothing: it is over, its summary is there, and so are the
    baselines if they are wanted now and can still be made."""
    folder = Path(run_dir)
    summary = read_json(folder / SUMMARY)
    if not is_finished(folder) or not summary:
        return False
    made = not summary.get("scored") or bool(Done(folder / DONE).baselines)
    return made or not baselines or lost_baselines(folder)


def lost_baselines(run_dir: str | Path) -> bool:
    """Whether a finished run has no baselines and its checkpoints are gone: making them would train it all
    again."""
    folder = Path(run_dir)
    summary = read_json(folder / SUMMARY)
    kept = summary.get("checkpoint")
    without = bool(summary.get("scored")) and not Done(folder / DONE).baselines
    return without and kept is not None and not (folder / kept).exists()


# ---- what is found in it


def assignments_of(folder: Path) -> Path:
    """The assignments of a finished run, or the folder itself where it is none."""
    return folder / ASSIGNMENTS if (folder / SUMMARY).exists() else folder


def stored_path(path: str, folder: Path) -> str:
    """How summary.json names a path: as seen from the run folder where it lies in it, else the whole of it; a
    URL as it is."""
    if is_url(path):
        return path
    whole = Path(path).absolute()
    return str(whole.relative_to(folder.absolute()) if whole.is_relative_to(folder.absolute()) else whole)


def corpus_of(assignments: Path) -> str:
    """The corpus of the run that is, or has, the assignments: a path, or a URL.

    Raises:
        ConfigError: they are of no run, or of one that does not say.
    """
    for folder in (assignments, assignments.parent):
        stored = read_json(folder / SUMMARY).get("corpus")
        if stored is not None:
            return stored if is_url(stored) else str(folder / stored)
    raise ConfigError(
        f"{assignments} is not of a run with a corpus; expected --corpus with the labelled corpus"
    )
