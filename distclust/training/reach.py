"""Is the tracking server there, and how long do we wait for it."""

from __future__ import annotations

import fcntl
import os
import socket
import sqlite3
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def reach(uri: str, *, attempts: int = 4, timeout_s: float = 3.0) -> None:
    """Return when something answers at `uri`; MLflow's own client would try for minutes.

    A refusal is tried again (servers are restarted), silence is not.

    Raises:
        OSError: nothing answers, or a server in trouble.
        sqlite3.Error: the file is no database, or cannot be written.
    """
    for attempt in range(attempts):
        try:
            _reach_once(uri, timeout_s)
            return
        except OSError as error:
            silent = isinstance(error, TimeoutError) or isinstance(
                getattr(error, "reason", None), TimeoutError
            )
            if silent or attempt + 1 == attempts:
                raise
            time.sleep(0.5 * (attempt + 1))


def _reach_once(uri: str, timeout_s: float) -> None:
    parts = urlsplit(uri)
    kind = parts.scheme.split("+")[0]
    file = sqlite_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=timeout_s)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    elif kind in ("http", "https"):
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
        try:
            # an opener of its own: the shared one keeps the proxies of whenever it was first used
            opener = urllib.request.build_opener()
            with opener.open(f"{kind}://{host}{port}{parts.path.rstrip('/')}/health", timeout=timeout_s):
                pass
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # MLflow has settings of its own for certificates
                raise
    elif kind in _PORTS and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or _PORTS[kind]), timeout_s).close()


@contextmanager
def sole_maker(uri: str) -> Iterator[None]:
    """One process at a time on a SQLite file: MLflow makes its tables in steps, and two makers collide."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(file.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sqlite_file(uri: str) -> Path | None:
    """The file of a `sqlite:///...` address; None for other addresses and for databases in memory."""
    scheme, found, rest = uri.partition(":///")
    path = unquote(rest.partition("?")[0])
    return Path(path) if found and scheme.split("+")[0] == "sqlite" and path not in ("", ":memory:") else None


class _Limits:
    """MLflow's HTTP client takes its patience from the environment only, for the whole process.

    What the user has set there stays; what is not set holds our values while one of our calls runs, and is
    then removed.
    """

    NAMES = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[tuple[int, int]] = []
        self._ours: set[str] = set()

    @contextmanager
    def __call__(self, *, timeout_s: int, retries: int) -> Iterator[None]:
        mine = (timeout_s, retries)
        with self._lock:
            self._running.append(mine)
            self._set()
        try:
            yield
        finally:
            with self._lock:
                self._running.remove(mine)
                self._set()

    def _set(self) -> None:
        for place, name in enumerate(self.NAMES):
            if self._running and (name in self._ours or name not in os.environ):
                os.environ[name] = str(max(values[place] for values in self._running))
                self._ours.add(name)
            elif name in self._ours:
                self._ours.discard(name)
                os.environ.pop(name, None)


limits = _Limits()
"""`with limits(timeout_s=20, retries=0): ...` bounds each of MLflow's HTTP requests inside."""
