"""The mapper's kind of the GPUs that a machine says it has, and what it can't be told of."""

from __future__ import annotations

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from cluster.gpus import parse_divided, parse_gpus
from hybridflow.mapping.question.cluster import Cluster
from recipes.mapping_cluster import RAY_NAMES, local_kind

MIB = 2**20


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("NVIDIA H100 80GB HBM3, 81559", "H100-80GB"),
        ("NVIDIA H100 NVL, 95830", "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB, 40960", "A100-40GB"),
        ("NVIDIA A100-PCIE-80GB, 81920", "A100-80GB"),
        ("NVIDIA L4, 23034", "L4-24GB"),
        ("NVIDIA L40S, 46068", "L40S-48GB"),
        ("NVIDIA GeForce RTX 4090, 24564", "RTX4090-24GB"),
        ("NVIDIA B200, 183359", "B200-180GB"),
    ],
)
def test_gpus_are_known_by_their_names_and_have_the_memory_that_they_say(
    line: str, kind: str
) -> None:
    devices = parse_gpus(f"{line}\n{line}\n")
    found = local_kind(devices, ())
    assert (len(devices), found.name) == (2, kind)
    assert found.memory_bytes == int(line.split(", ")[1]) * MIB
    chip = kind.partition("-")[0]
    ray_name = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(devices[0][0])
    assert ray_name == RAY_NAMES.get(chip, chip)


@pytest.mark.parametrize(
    ("lines", "divided", "message"),
    [
        ("NVIDIA GH200 480GB, 97871", "", "NVIDIA GH200 480GB is none of A100-80GB"),
        ("NVIDIA A10G, 23028", "", "NVIDIA A10G is none of"),
        ("NVIDIA GB10, [N/A]", "", "NVIDIA GB10 is none of"),
        ("Tesla V100-SXM2-32GB, 32768", "", "describe the devices in a JSON file$"),
        (
            "NVIDIA L4, 23034\nNVIDIA L40S, 46068",
            "",
            r"several kinds \(NVIDIA L4, NVIDIA L40S\); show Ray those of one kind",
        ),
        (
            "NVIDIA H100 80GB HBM3, 81559",
            "NVIDIA H100 80GB HBM3, Enabled",
            "MIG divides NVIDIA H100 80GB HBM3",
        ),
    ],
)
def test_gpus_that_the_mapper_can_not_know_are_one_line(
    lines: str, divided: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        local_kind(parse_gpus(lines), parse_divided(divided))
    assert "\n" not in str(refused.value)


def test_divided_gpus_are_those_with_mig_on() -> None:
    lines = "NVIDIA L4, [N/A]\nNVIDIA H100, Disabled\nNVIDIA A100-SXM4-40GB, Enabled\n"
    assert parse_divided(lines) == ("NVIDIA A100-SXM4-40GB",)
    assert parse_divided("") == parse_gpus("") == ()


def test_a_chip_with_one_memory_needs_no_more_than_its_name() -> None:
    assert Cluster.parse("8xH100") == Cluster.parse("8xH100-80GB")
    assert Cluster.parse("2x4xL4") == Cluster.parse("2x4xL4-24GB")
    with pytest.raises(
        ValueError, match=r"A100 comes with several memories; say A100-80GB or A100-40"
    ):
        Cluster.parse("8xA100")
