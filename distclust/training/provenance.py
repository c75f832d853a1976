"""What a run says of where it came from: the code's version and the data's fingerprint."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import distclust
from distclust.training.spool import redact

MAX_DIGEST = 36  # characters of a data set's digest that MLflow takes


def code_version() -> dict[str, str]:
    """The package's version and, where it lies in a git work tree that tracks it, the commit.

    Returns:
        {"version": "0.1.0", "commit": "0123...", "modified": "true"}; the last two only inside a work tree.
    """
    version = {"version": distclust.__version__}
    init = Path(distclust.__file__)
    commands = (
        ("ls-files", "--error-unmatch", init.name),
        ("rev-parse", "HEAD"),
        ("status", "--porcelain", "."),
    )
    try:
        answers = [
            subprocess.run(
                ("git", "-C", str(init.parent), *command),
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for command in commands
        ]
    except (OSError, subprocess.SubprocessError):
        return version
    version["commit"] = answers[1]
    if answers[2]:
        version["modified"] = "true"
    return version


def dataset_record(manifest: Mapping[str, Any], path: str, fingerprint: str = "") -> dict[str, Any]:
    """A corpus as MLflow lists it among a run's inputs.

    Args:
        manifest: the corpus folder's `manifest.json`.
        path: the corpus folder or its URL.
        fingerprint: the manifest's; where absent, computed from shard hashes, features and vocabulary.

    Returns:
        A record for the spool: name, digest (the fingerprint's first characters), source, schema, profile.
    """
    if not fingerprint:
        shards = [shard.get("sha256") for shard in manifest.get("shards", [])]
        said = [shards, manifest.get("n_features"), manifest.get("vocabulary_fingerprint")]
        fingerprint = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    number = {"type": "array", "items": {"type": "float"}}
    columns: list[dict[str, Any]] = [{"name": "id", "type": "string"}]
    if manifest.get("kind") == "dense":
        columns += [{"name": "values", **number}]
    else:
        columns += [
            {"name": "indices", "type": "array", "items": {"type": "integer"}},
            {"name": "values", **number},
        ]
    profile = {
        name: manifest[name]
        for name in (
            "kind",
            "n_rows",
            "n_features",
            "n_nonzeros",
            "row_scale",
            "counts",
            "vocabulary_fingerprint",
        )
        if manifest.get(name) is not None
    }
    profile |= {"fingerprint": fingerprint, "shards": len(manifest.get("shards", []))}
    profile |= {"classes": len(manifest.get("classes") or [])}
    return {
        "type": "dataset",
        "name": Path(path.rstrip("/")).name or "corpus",
        "digest": fingerprint[:MAX_DIGEST],
        "source_type": "local" if "://" not in path else "uri",
        "source": json.dumps({"uri": redact(path)}),
        "schema": json.dumps({"mlflow_colspec": columns}),
        "profile": json.dumps(profile),
    }
