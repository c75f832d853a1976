"""The cluster files against the schemas of those who read them, and against what we promise of them."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from distclust.config import load_recipe

ROOT = Path(__file__).parents[2]
AWS = ROOT / "cluster_configs" / "aws-gpu.yaml"
KUBERAY = ROOT / "cluster_configs" / "kuberay-rayjob.yaml"


def rayjob() -> dict[str, Any]:
    found: dict[str, Any]
    *_, found = yaml.safe_load_all(KUBERAY.read_text())
    return found


def rayjob_schema() -> dict[str, Any]:
    """Ours, or the whole CRD's where KUBERAY_CRD names its file."""
    crd = os.environ.get("KUBERAY_CRD")
    if crd is None:
        ours: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("rayjob.schema.yaml").read_text())
        return ours
    versions = yaml.safe_load(Path(crd).read_text())["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    schema["properties"]["metadata"]["x-kubernetes-preserve-unknown-fields"] = True
    return closed(schema)


def closed(schema: Any) -> Any:
    """A CRD's schema with unknown fields refused, as `kubectl apply` does with strict validation."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if (
        result.get("type") == "object"
        and "properties" in result
        and not result.get("x-kubernetes-preserve-unknown-fields")
    ):
        result.setdefault("additionalProperties", False)
    return result


def test_ray_s_launcher_takes_the_aws_file() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = util.prepare_config(yaml.safe_load(AWS.read_text()))
    util.validate_config(config)
    wrong = config | {"max_worker": 2}
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        util.validate_config(wrong)


def test_the_aws_cluster_needs_a_token_and_has_no_open_port() -> None:
    config = yaml.safe_load(AWS.read_text())
    starts = [
        c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c
    ]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        assert "0.0.0.0" not in command
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    assert "IpPermissions" not in config["provider"]["security_group"]
    commands = config["setup_commands"] + config["head_setup_commands"] + starts
    for command in commands:  # a stray `#` in YAML would have cut one short
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0, command


def test_kuberay_takes_the_rayjob() -> None:
    jsonschema.validate(rayjob(), rayjob_schema())


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "shutDownAfterJobFinishes"),
        ("spec", "rayClusterSpec", "authOption"),
        ("spec", "rayClusterSpec", "headGroupSpec", "service"),
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplica"),
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMount"),
    ],
)
def test_a_field_that_kuberay_does_not_know_is_refused(path: tuple[str | int, ...]) -> None:
    job = copy.deepcopy(rayjob())
    place: Any = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = {}
    with pytest.raises(jsonschema.ValidationError, match=str(path[-1])):
        jsonschema.validate(job, rayjob_schema())


def test_the_rayjob_is_closed_to_strangers_and_ends() -> None:
    claim, policy, job = yaml.safe_load_all(KUBERAY.read_text())
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert policy["kind"] == "NetworkPolicy"
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]
        assert chosen.items() <= pod["metadata"]["labels"].items()
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        claims = {
            v["name"]: v["persistentVolumeClaim"]["claimName"]
            for v in pod["spec"]["volumes"]
            if len(v) == 2 and "persistentVolumeClaim" in v
        }
        assert set(claims.values()) == {claim["metadata"]["name"]}
        for container in pod["spec"]["containers"]:
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert "ReadWriteMany" in claim["spec"]["accessModes"]


def test_no_token_is_written_in_a_file() -> None:
    for path in (AWS, KUBERAY):
        assert not re.search(r"RAY_AUTH_TOKEN\s*[=:]\s*\S", path.read_text()), path


@pytest.mark.parametrize("path", [AWS, KUBERAY])
def test_the_commands_in_the_files_are_ours(path: Path) -> None:
    """Recipe and overrides parse; the run folder is on the shared storage; GPUs and pods agree."""
    text = re.sub(r"\\\n#\s*", " ", path.read_text())
    entry = rayjob()["spec"]["entrypoint"] if path == KUBERAY else ""
    line = entry or next(one for one in text.splitlines() if "python -m jobs.train" in one)
    words = shlex.split(line[line.index("python -m jobs.train") :])[3:]
    run = words[words.index("--run") + 1]
    assert run.startswith("/shared/")
    config = load_recipe(words[0], [word for word in words[1:] if "=" in word])
    assert config.cluster.gpus_per_worker == 1
    if path == KUBERAY:
        (group,) = rayjob()["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"]) * group["replicas"]
        cpus = int(container["resources"]["limits"]["cpu"]) * group["replicas"]
        assert config.cluster.workers == gpus == 8
        assert config.cluster.cpus_per_worker * 8 < cpus  # some are left for preparing and assigning
