"""Launch templates: what can be checked without the machines that they are for."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

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
        "Seconds per phase": "train/seconds/actor.sync_weights",
    }.items():
        (pattern,) = re.findall(r'__name__=~"([^"]+)"', queries[title])
        assert re.fullmatch(pattern, f"ray_{prometheus_name(metric)}")
    assert yaml.safe_load((ROOT / "cluster" / "dashboards" / "prometheus.yml").read_text())[
        "scrape_configs"
    ]
