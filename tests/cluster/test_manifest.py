"""KubeRay's manifests: valid against its schemas, rendered from what users set, with what KubeRay
leaves out by default."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from cluster.manifest import RAY_VERSION, Manifest, parse
from cluster.requirements import requirements
from tests.cluster.kuberay_schema import SCHEMA, full_manifest, of_cluster, openapi_schema, used

ROOT = Path(__file__).parents[2]
RUN = ("python", "-m", "recipes.ppo", "output_dir=/shared/outputs/ppo", "data.train=[a, b]")
CRDS = os.environ.get("KUBERAY_CRDS", "")


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(SCHEMA.read_text())
    return loaded


def rayjob(**settings: Any) -> dict[str, Any]:
    manifest = Manifest(kind="rayjob", command=RUN, image="registry/image:1", **settings)
    document: dict[str, Any] = yaml.safe_load(manifest.render())
    return document


def raycluster(**settings: Any) -> dict[str, Any]:
    manifest = Manifest(kind="raycluster", image="registry/image:1", **settings)
    document: dict[str, Any] = yaml.safe_load(manifest.render())
    return document


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gpus": 0, "nodes": 5, "name": "cpu-only"},
        {"gpu_resource": "amd.com/gpu", "secret": "token", "volume": "c: {d}", "mount": "/a b"},
    ],
)
def test_manifests_are_valid(schema: dict[str, Any], settings: dict[str, Any]) -> None:
    Draft202012Validator(of_cluster(schema)).validate(raycluster(**settings))
    settings.pop("mount", None)
    Draft202012Validator(schema).validate(rayjob(**settings))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backOffLimit"), 3),
        (("spec", "preRunningDeadlineSeconds"), 0),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replica"), 2),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "volumes"), [{}]),
    ],
)
def test_the_schema_refuses_mistakes(schema: dict[str, Any], path: Any, value: Any) -> None:
    manifest = rayjob()
    target: Any = manifest
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    with pytest.raises(ValidationError):
        Draft202012Validator(schema).validate(manifest)


@pytest.mark.skipif(not CRDS, reason="KUBERAY_CRDS does not name the folder of KubeRay's CRDs")
def test_the_schema_is_that_of_kuberay(schema: dict[str, Any]) -> None:
    """Against the whole of KubeRay's own files."""
    of_jobs = openapi_schema(Path(CRDS), "rayjobs")
    assert used(of_jobs, [full_manifest()]) == schema
    of_clusters = openapi_schema(Path(CRDS), "rayclusters")
    cluster = raycluster(secret="token")
    assert (
        used(of_clusters, [cluster])["properties"]["spec"]
        == (of_cluster(schema)["properties"]["spec"])
    )


def test_what_users_set_is_in_the_manifest() -> None:
    spec = rayjob(nodes=3, gpus=4, volume="claim", mount="/shared", grace_s=200, retries=7)["spec"]
    assert tuple(shlex.split(spec["entrypoint"])) == RUN
    assert spec["backoffLimit"] == 7
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 3
    for group in (spec["rayClusterSpec"]["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "registry/image:1"
        assert pod["terminationGracePeriodSeconds"] == 200
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": "claim"}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"


def test_what_kuberay_leaves_out_by_default() -> None:
    """No retry, no end of the cluster, no notice to the run, no token for the operator."""
    job, standing = rayjob(grace_s=150)["spec"], raycluster()["spec"]
    assert job["shutdownAfterJobFinishes"] and job["backoffLimit"] == 3
    assert job["preRunningDeadlineSeconds"] == 1800
    for spec, restart in ((job["rayClusterSpec"], "Never"), (standing, "Always")):
        assert spec["authOptions"] == {"mode": "token"}
        head = spec["headGroupSpec"]["template"]["spec"]
        assert head["restartPolicy"] == restart
        assert spec["workerGroupSpecs"][0]["template"]["spec"]["restartPolicy"] == "Always"
    (container,) = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["python", "-m", "cluster.drain", "--wait", "120"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "120"} in container["env"]


def test_the_manifest_names_the_ray_that_the_image_has() -> None:
    required = [line for line in requirements(ROOT / "pyproject.toml", []) if line[:4] == "ray["]
    assert required == ["ray[default]>=2.60,<2.61"]
    assert RAY_VERSION.startswith("2.60.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name", "Ppo"), r"^name is 'Ppo'; use a-z"),
        (("--name", "a" * 48), "at most 47 characters"),
        (("--nodes", "0"), "^nodes is 0; use 1 or more"),
        (("--grace-s", "30"), "^grace_s is 30; use 90 or more"),
        (("--shm-gib", "512"), r"^shm_gib is 512, and counts towards memory_gib=512"),
        (("--", "python", "train.py"), r"^command is 'python train.py'; write -- python -m recip"),
        (("--", *RUN[:3]), r"^output_dir='': .* use output_dir=/shared/\.\.\."),
        (("--", *RUN[:3], "output_dir=outputs/ppo"), r"^output_dir='outputs/ppo': a new cluster"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    arguments = ("rayjob", "--image", "i", *arguments)
    if "--" not in arguments:
        arguments += ("--", *RUN)
    with pytest.raises(ValueError, match=message) as error:
        parse(arguments)
    assert "\n" not in str(error.value)


CONTROLLER = """
import sys, time
from pathlib import Path
from hybridflow.supervision import SUPERVISION, supervise
supervise(sys.argv[1], max_restarts=3, stale_s=60.0)
SUPERVISION.on_leave = Path(sys.argv[1], "left").touch
Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


def test_a_pod_that_ends_tells_its_run(tmp_path: Path) -> None:
    """The preStop hook, against a real supervisor: the run leaves with the status that asks for
    another start, and no other run of this machine is told anything."""
    script = tmp_path / "controller.py"
    script.write_text(CONTROLLER)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, script, tmp_path], env=env)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.1)
        hook = [sys.executable, "-m", "cluster.drain", "--wait", "30", "--run", tmp_path]
        subprocess.run(hook, cwd=ROOT, check=True, timeout=60)
        assert run.wait(10) == 75
        assert (tmp_path / "left").exists()
    finally:
        run.kill()
