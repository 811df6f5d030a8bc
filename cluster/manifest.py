"""Prints a manifest for KubeRay: one run (rayjob), or a cluster that stays (raycluster).

    python -m cluster.manifest rayjob --name ppo --image IMAGE --nodes 2 --gpus 8 --volume CLAIM \\
        -- python -m recipes.ppo output_dir=/shared/outputs/ppo ... | kubectl apply -f -

The command begins with `python -m recipes.NAME`: its first process is the supervisor, which starts
the run again. Everything that a new cluster has to find again lies on the volume.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"
RAY_VERSION = "2.60.0"
LONGEST_NAME = {"rayjob": 47, "raycluster": 63}
"""KubeRay derives the names of pods and services from the manifest's."""
LEAST = {
    "nodes": 1,
    "gpus": 0,
    "cpus": 1,
    "memory_gib": 2,
    "shm_gib": 1,
    "head_cpus": 1,
    "head_memory_gib": 2,
    "grace_s": 90,  # the supervisor gives a run 60 s to leave, and Ray ends after it
    "retries": 0,
    "start_minutes": 1,
}
ENTRY_POINT = "python -m recipes."
OUTPUT = "output_dir="
SEPARATOR = "--"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """print(Manifest(kind="raycluster", image="registry.example.com/hybridflow:cuda").render())"""

    kind: str
    """rayjob or raycluster."""
    command: tuple[str, ...] = ()
    """The run of a rayjob: python -m recipes.NAME and its settings."""
    image: str
    """Built from cluster/templates/cuda.Dockerfile or cpu.Dockerfile."""
    name: str = "hybridflow"
    nodes: int = 1
    """Worker pods; the head has no devices."""
    gpus: int = 8
    """GPUs of each worker; 0: none."""
    gpu_resource: str = "nvidia.com/gpu"
    """The resource by which Kubernetes counts them."""
    cpus: int = 64
    """Cores of each worker."""
    memory_gib: int = 512
    """Memory of each worker; /dev/shm counts towards it."""
    shm_gib: int = 64
    """/dev/shm of each worker: Ray's object store, NCCL, and snapshots (24 bytes for each trained
    parameter that the worker holds)."""
    head_cpus: int = 4
    head_memory_gib: int = 16
    volume: str = "hybridflow"
    """A persistent volume claim that all pods may mount: models, data, outputs."""
    mount: str = "/shared"
    """The directory where the pods see it."""
    secret: str = ""
    """A secret whose auth_token is the cluster's token; empty: KubeRay generates one."""
    grace_s: int = 120
    """Seconds between the notice that a pod ends and its SIGKILL."""
    retries: int = 3
    """How often a rayjob gets a new cluster after its run failed."""
    start_minutes: int = 30
    """A rayjob whose run has not started by then has failed."""

    def __post_init__(self) -> None:
        longest = LONGEST_NAME.get(self.kind)
        if longest is None:
            raise ValueError(f"kind is {self.kind!r}; use {' or '.join(LONGEST_NAME)}")
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", self.name) or len(self.name) > longest:
            raise ValueError(
                f"name is {self.name!r}; use a-z, 0-9 and -, a letter first, at most {longest} "
                "characters"
            )
        for name, least in LEAST.items():
            if vars(self)[name] < least:
                raise ValueError(f"{name} is {vars(self)[name]}; use {least} or more")
        if self.shm_gib >= self.memory_gib:
            raise ValueError(
                f"shm_gib is {self.shm_gib}, and counts towards memory_gib={self.memory_gib}; "
                "leave memory for the processes"
            )
        self._check_command()

    def _check_command(self) -> None:
        if self.kind == "raycluster":
            if self.command:
                raise ValueError("a raycluster runs no command; use rayjob, or ray job submit")
            return
        if not shlex.join(self.command).startswith(ENTRY_POINT):
            raise ValueError(
                f"command is {shlex.join(self.command)!r}; write -- python -m recipes.NAME ..., "
                "which starts the run under its supervisor"
            )
        outputs = [part for part in self.command if part.startswith(OUTPUT)]
        path = "".join(outputs[-1:]).removeprefix(OUTPUT)
        if not PurePosixPath(path).is_relative_to(self.mount):
            raise ValueError(
                f"output_dir={path!r}: a new cluster finds only what is on the volume; use "
                f"output_dir={self.mount}/..."
            )

    def render(self) -> str:
        """The YAML document, with comments."""
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["quoted"] = json.dumps  # JSON is YAML
        values = asdict(self) | {
            "entrypoint": shlex.join(self.command),
            "ray_version": RAY_VERSION,
            "head_restart": "Never" if self.kind == "rayjob" else "Always",
            "head_resources": resources(self.head_cpus, self.head_memory_gib),
            "worker_resources": resources(self.cpus, self.memory_gib)
            | ({self.gpu_resource: str(self.gpus)} if self.gpus else {}),
        }
        return environment.get_template(f"{self.kind}.yaml.jinja").render(values)


def resources(cpus: int, memory_gib: int) -> dict[str, str]:
    """As Kubernetes writes them."""
    return {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}


def parse(arguments: Sequence[str]) -> Manifest:
    """The manifest that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.manifest",
        usage="python -m cluster.manifest {rayjob,raycluster} --image IMAGE [options] [-- COMMAND]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=list(LONGEST_NAME))
    for field in fields(Manifest):
        if field.name in ("kind", "command"):
            continue
        options: dict[str, Any] = {"required": True}
        if field.name != "image":
            options = {
                "default": field.default,
                "type": type(field.default),
                "help": f"default: {field.default}",
            }
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
    words = [*arguments, SEPARATOR]
    at = words.index(SEPARATOR)
    command = tuple(arguments[at + 1 :])
    return Manifest(**vars(parser.parse_args(words[:at])), command=command)


def main() -> None:
    try:
        print(parse(sys.argv[1:]).render())
    except ValueError as error:
        print(f"python -m cluster.manifest: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
