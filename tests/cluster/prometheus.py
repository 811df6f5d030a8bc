"""Prometheus for tests: its server, where it is installed, and the queries of the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "cluster" / "dashboards" / "grafana.json"
CONFIGURATION = ROOT / "cluster" / "dashboards" / "prometheus.yml"
PAGE = ROOT / "docs" / "observability.md"
INSTALLED = shutil.which("prometheus") is not None


def panels() -> dict[str, str]:
    """Title -> query of the dashboard's panels."""
    dashboard = json.loads(DASHBOARD.read_text())
    return {panel["title"]: panel["targets"][0]["expr"] for panel in dashboard["panels"]}


def documented() -> set[str]:
    """The names of metrics that the page names in full."""
    return set(re.findall(r"`(ray_[a-z0-9_]*[a-z0-9])`", PAGE.read_text()))


def wanted(query: str) -> re.Pattern[str]:
    """The names of metrics that a panel's query asks for."""
    pattern = re.search(r'__name__=~"([^"]+)"', query)
    if pattern:
        return re.compile(pattern.group(1))
    (name,) = re.findall(r"ray_\w+", query)
    return re.compile(name)


class Server:
    """A Prometheus that reads Ray's list of endpoints."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that answer it now."""
        arguments = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{arguments}", timeout=10) as answer:
            result = json.load(answer)
        assert result["status"] == "success", result
        series: list[dict[str, Any]] = result["data"]["result"]
        return series


@contextmanager
def prometheus(directory: Path, endpoints: Path, port: int) -> Iterator[Server]:
    """The server with the project's configuration, but this list of endpoints."""
    text = CONFIGURATION.read_text()
    assert "/tmp/ray/prom_metrics_service_discovery.json" in text
    text = text.replace("/tmp/ray/prom_metrics_service_discovery.json", str(endpoints))
    text = text.replace("scrape_interval: 5s", "scrape_interval: 1s")
    configuration = directory / "prometheus.yml"
    configuration.write_text(text)
    command = [
        "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        server = Server(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 60
        while True:
            try:
                server.query("up")
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(30)
