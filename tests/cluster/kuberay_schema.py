"""The schema of KubeRay's RayJob, cut down to what a manifest uses.

KubeRay's definitions are 2 MB of OpenAPI. kuberay_rayjob.json (from version 1.7) holds the type and
the constraints of every field that our manifests use, and the names of the fields beside them.
`python -m tests.cluster.kuberay_schema FOLDER` writes it anew from the folder with KubeRay's own
ray.io_rayjobs.yaml.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.manifest import Manifest

SCHEMA = Path(__file__).with_name("kuberay_rayjob.json")
CONSTRAINTS = (
    "type",
    "enum",
    "minimum",
    "maximum",
    "pattern",
    "required",
    "format",
    "anyOf",
    "maxLength",
)
ANY = "x-kubernetes-preserve-unknown-fields"


def openapi_schema(folder: Path, plural: str) -> dict[str, Any]:
    """The schema of version v1 in ray.io_<plural>.yaml, which may be compressed."""
    path = folder / f"ray.io_{plural}.yaml"
    text = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    definition = yaml.load(text, Loader=yaml.CSafeLoader)
    (version,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    # Kubernetes checks metadata itself; its own definition is not in the file.
    text_map = {"type": "object", "additionalProperties": {"type": "string"}}
    schema["properties"]["metadata"]["properties"] = {
        "name": {"type": "string", "maxLength": 253},
        "namespace": {"type": "string"},
        "labels": text_map,
        "annotations": text_map,
    }
    return schema


def used(schema: Mapping[str, Any], values: Sequence[Any]) -> dict[str, Any]:
    """The part of a schema that `values` are checked by, in JSON Schema; fields that the schema
    does not have are refused, as the API server refuses them."""
    result = {name: schema[name] for name in CONSTRAINTS if name in schema}
    objects = [value for value in values if isinstance(value, dict)]
    if "properties" in schema:
        result["properties"] = {}
        for name, field in schema["properties"].items():
            below = [value[name] for value in objects if name in value]
            result["properties"][name] = used(field, below) if below else {}
        result["additionalProperties"] = bool(schema.get(ANY))
    elif isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = used(schema["additionalProperties"], [])
    if "items" in schema:
        items = []
        for value in values:
            items += value if isinstance(value, list) else []
        result["items"] = used(schema["items"], items)
    return result


def full_manifest() -> dict[str, Any]:
    """A manifest with every field that the templates can have."""
    command = ("python", "-m", "recipes.ppo", "output_dir=/shared/outputs/ppo")
    job = Manifest(kind="rayjob", image="image", command=command, secret="token")
    document: dict[str, Any] = yaml.safe_load(job.render())
    return document


def of_cluster(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a RayCluster, from that of a RayJob, which has the same specification."""
    properties = schema["properties"]
    spec = properties["spec"]["properties"]["rayClusterSpec"]
    return {**schema, "properties": {**properties, "spec": spec}}


if __name__ == "__main__":
    jobs = used(openapi_schema(Path(sys.argv[1]), "rayjobs"), [full_manifest()])
    SCHEMA.write_text(json.dumps(jobs, sort_keys=True) + "\n")
