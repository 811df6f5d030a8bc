"""Launch templates: what can be checked without the machines that they are for."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.requirements import requirements
from hybridflow.metrics.sinks import prometheus_name

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "cluster" / "templates"
SCRIPTS = [*TEMPLATES.glob("*.sh"), *TEMPLATES.glob("*.sbatch"), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_the_first_error(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


def test_ray_accepts_its_cluster_file() -> None:
    config = prepare_config(yaml.safe_load((TEMPLATES / "ray-cluster.yaml").read_text()))
    validate_config(config)
    with pytest.raises(Exception, match="provider"):
        validate_config({name: value for name, value in config.items() if name != "provider"})


def kube(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((TEMPLATES / name).read_text())
    return document


def test_the_kubernetes_files_describe_the_same_cluster() -> None:
    job, cluster = kube("rayjob.yaml"), kube("raycluster.yaml")
    assert (job["apiVersion"], job["kind"], cluster["kind"]) == (
        "ray.io/v1",
        "RayJob",
        "RayCluster",
    )
    assert job["spec"]["entrypoint"].startswith("python -m recipes.")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_every_pod_has_the_token_shared_memory_and_the_shared_files() -> None:
    spec = kube("raycluster.yaml")["spec"]
    (ray_requirement,) = (
        line for line in requirements(ROOT / "pyproject.toml", []) if line.startswith("ray[")
    )
    assert spec["rayVersion"] == "2.60.0" and ray_requirement == "ray[default]>=2.60,<2.61"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        env = {entry["name"]: entry for entry in container["env"]}
        assert (
            env["RAY_AUTH_MODE"]["value"] == "token"
            and "secretKeyRef" in env["RAY_AUTH_TOKEN"]["valueFrom"]
        )
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {
            "/shared",
            "/dev/shm",
        }
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_images_install_with_the_makefile_before_they_copy_the_code(accelerator: str) -> None:
    lines = (TEMPLATES / f"{accelerator}.Dockerfile").read_text().splitlines()
    install = next(
        index for index, line in enumerate(lines) if f"make install ACCEL={accelerator}" in line
    )
    assert install < lines.index("COPY . .")
    for line in lines:
        if line.startswith("COPY ") and line != "COPY . .":
            assert all((ROOT / name).exists() for name in line.split()[1:-1])
    assert ".venv" in (ROOT / ".dockerignore").read_text().split()


def test_the_dashboard_asks_for_gauges_of_the_runs_own_prefix() -> None:
    dashboard = json.loads((ROOT / "cluster" / "dashboards" / "grafana.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids) > 5
    queries = {panel["title"]: panel["targets"][0]["expr"] for panel in dashboard["panels"]}
    for title, metric in {
        "Reward": "train/reward/mean",
        "KL": "train/actor/kl_mean",
        "Seconds per phase": "train/seconds/sync",
    }.items():
        (pattern,) = re.findall(r'__name__=~"([^"]+)"', queries[title])
        assert re.fullmatch(pattern, f"ray_{prometheus_name(metric)}")
    assert yaml.safe_load((ROOT / "cluster" / "dashboards" / "prometheus.yml").read_text())[
        "scrape_configs"
    ]
