"""The manifests: valid by schema, and their shell lines started with what the operators inject. No cluster is there."""

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

kubernetes_validate = pytest.importorskip("kubernetes_validate")
jsonschema = pytest.importorskip("jsonschema")
yaml = pytest.importorskip("yaml")

FOLDER = Path(__file__).resolve().parents[2] / "launch" / "kubernetes"
SCHEMAS = json.loads(Path(__file__).with_name("job_schemas.json").read_text())

# What a pod of the second node finds in its environment: Volcano's plugin counts pods, the Ascend operator NPUs.
INJECTED = {
    "volcano": {"MASTER_ADDR": "pangu-master-0.pangu", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": "1"},
    "ascend_operator": {
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "2222",
        "WORLD_SIZE": "16",
        "RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "LOCAL_RANK": "0,1,2,3,4,5,6,7",
    },
}
MANIFESTS = sorted(INJECTED)


def manifest(name: str) -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return result


def check(document: dict[str, Any]) -> None:
    jsonschema.validate(document, {**SCHEMAS[document["kind"]], "$defs": SCHEMAS["$defs"]})
    for template in templates(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = document["spec"]
    parts = spec["tasks"] if "tasks" in spec else spec["replicaSpecs"].values()
    return [part["template"] for part in parts]


def replicas(document: dict[str, Any]) -> int:
    spec = document["spec"]
    return sum(part["replicas"] for part in (spec["tasks"] if "tasks" in spec else spec["replicaSpecs"].values()))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_valid(name: str) -> None:
    document = manifest(name)
    check(document)
    spec = document["spec"]
    scheduling = spec if name == "volcano" else spec["runPolicy"]["schedulingPolicy"]
    assert scheduling["minAvailable"] == replicas(document), "all nodes start together or none"
    for template in templates(document):
        (container,) = template["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in template["spec"]["volumes"]
        }


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("where", ["job", "pod", "container"])
def test_a_field_that_is_not_one_is_found(name: str, where: str) -> None:
    document = copy.deepcopy(manifest(name))
    pod = templates(document)[0]["spec"]
    {"job": document["spec"], "pod": pod, "container": pod["containers"][0]}[where]["minAvailible"] = 2
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(document)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_becomes_the_node_of_its_rank(name: str, tmp_path: Path) -> None:
    """The container's own shell line, with `pangu` replaced by something that prints its arguments."""
    (tmp_path / "pangu").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "pangu").chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **INJECTED[name]}
    for template in templates(manifest(name)):
        container = template["spec"]["containers"][0]
        started = subprocess.run(
            [*container["command"], *container["args"]], env=environment, capture_output=True, text=True, check=True
        )
        words = started.stdout.splitlines()
        assert words[: words.index("train")] == [
            *("launch", "--nproc", "8", "--nnodes", "2", "--node-rank", "1"),
            *("--master-addr", INJECTED[name]["MASTER_ADDR"], "--master-port", INJECTED[name]["MASTER_PORT"]),
            *("--max-restarts", "3"),
        ]
        assert words[words.index("train") :] == ["train", "/job/config.toml", "--output", "/job/run", "--resume"]
