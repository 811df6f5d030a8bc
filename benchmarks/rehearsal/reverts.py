"""The fixes of docs/gpu.md taken back one by one: the test that names each must fail.

    python -m benchmarks.rehearsal.reverts [NUMBER ...]        # twenty minutes on two cores

Works on a copy of the checkout. A fix is an exact piece of text; where it is not found any more, the
row says so, and the list below needs the new text.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLOWEST_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Revert:
    """A fix, the text that it replaced, and the test that shows it."""

    finding: str
    file: str
    fix: str
    before: str
    test: str


REHEARSAL = "tests/rehearsal/"
HOLLOW = "test_hollow_gpu.py::test_engines_keep_to_the_device_and_to_their_budgets"
PEAK = "test_peak_bytes.py::test_the_mapper_predicts_the_peak"
REVERTS = (
    Revert(
        finding="1 vLLM's groups use custom all-reduce",
        file="workers/generation/vllm/groups.py",
        fix="    parallel_state.set_custom_all_reduce(fast_sum)\n",
        before="",
        test=f"{REHEARSAL}test_vllm_settings.py -k without_custom_all_reduce",
    ),
    Revert(
        finding="2 make takes the CPU for granted",
        file="Makefile",
        fix="ACCEL := $(or $(INSTALLED),",
        before="ACCEL := $(or ",
        test=f"{REHEARSAL}test_environment.py -k leaves_a_cuda_environment",
    ),
    Revert(
        finding="3 CPU processes see GPUs",
        file="hybridflow/devices.py",
        fix='    "cpu": KEEP_FREED_MEMORY | HIDDEN,',
        before='    "cpu": KEEP_FREED_MEMORY,',
        test=f"{REHEARSAL}test_environment.py -k without_a_gpu_see_none",
    ),
    Revert(
        finding="4 float32 attention in TF32",
        file="workers/generation/vllm/setup.py",
        fix='        environment["TRITON_F32_DEFAULT"] = "ieee"\n',
        before="        pass\n",
        test=f"{REHEARSAL}test_vllm_settings.py -k is_not_tf32",
    ),
    Revert(
        finding="8 experts' kernels are vLLM's choice",
        file="workers/generation/vllm/setup.py",
        fix='        moe_backend="triton" if cuda else "auto",\n',
        before="",
        test=f"{REHEARSAL}test_vllm_settings.py -k what_vllm_is_told",
    ),
    Revert(
        finding="9 gloo binds where the hostname leads",
        file="hybridflow/devices.py",
        fix='        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)\n',
        before="        pass\n",
        test=f"{REHEARSAL}test_environment.py -k interface_of_their_nodes_address",
    ),
    Revert(
        finding="10 every process takes GPU 0",
        file="hybridflow/devices.py",
        fix="    return names.index(reserved[0])\n",
        before="    return 0\n",
        test=f"{REHEARSAL}test_environment.py -k takes_the_gpu_that_ray_reserved",
    ),
    Revert(
        finding="12 a large model's gradient is added up whole",
        file="workers/engines/fsdp/engine.py",
        fix="set_requires_gradient_sync(last or not self._one_group)",
        before="set_requires_gradient_sync(last)",
        test=f"-m '' '{REHEARSAL}{PEAK}[7B on 8, 10 layers]'",
    ),
    Revert(
        finding="15 DeepSpeed has the whole float32 model at once",
        file="workers/engines/deepspeed/setup.py",
        fix="if config.zero_stage == 3 or self.dtype is not torch.float32:",
        before="if config.zero_stage == 3:",
        test=f"{REHEARSAL}test_host_memory.py -k casts_layer_by_layer",
    ),
    Revert(
        finding="31 no graphs by default",
        file="workers/generation/vllm/setup.py",
        fix="return not cuda if config.enforce_eager is None",
        before="return True if config.enforce_eager is None",
        test=f"{REHEARSAL}test_vllm_settings.py -k graphs_are_the_default",
    ),
    Revert(
        finding="32 digests in steps for a CPU's cache",
        file="hybridflow/resharding/digest.py",
        fix='return _CPU_CHUNK_WORDS if device.type == "cpu" else _SUMMED_WORDS',
        before="return _CPU_CHUNK_WORDS",
        test=f"{REHEARSAL}test_digest_launches.py",
    ),
    Revert(
        finding="33 states leave through ordinary memory",
        file="workers/engines/shared/host_memory.py",
        fix="            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)\n",
        before="            buffer = torch.empty(tensor.shape, dtype=tensor.dtype)\n",
        test=f"-m '' '{REHEARSAL}{HOLLOW}[fsdp 1]'",
    ),
    Revert(
        finding="39 a copy for each tensor of a micro-batch",
        file="workers/engines/shared/together.py",
        fix="    tensors: list[Tensor] = []\n",
        before="    return moved(part, lambda tensor: tensor.to(device))\n    tensors: list[Tensor] = []\n",
        test=f"-m '' '{REHEARSAL}{HOLLOW}[fsdp 1]'",
    ),
    Revert(
        finding="39 a wait for each metric of threed",
        file="workers/engines/shared/metrics.py",
        fix="torch.stack(list(metrics.values())).cpu().tolist() if metrics else []",
        before="[float(value) for value in metrics.values()]",
        test=f"-m '' '{REHEARSAL}{HOLLOW}[threed 1]'",
    ),
    Revert(
        finding="46 the allocator's segments can't grow",
        file="hybridflow/devices.py",
        fix='    "cuda": GROWING_SEGMENTS,\n',
        before='    "cuda": {},\n',
        test=f"{REHEARSAL}test_environment.py -k segments_grow",
    ),
    Revert(
        finding="a digest's weights are copied for every box of a snapshot",
        file="hybridflow/resharding/digest.py",
        fix="@lru_cache(maxsize=1024)\ndef _rows_on(",
        before="def _rows_on(",
        test=f"-m '' '{REHEARSAL}{HOLLOW}[fsdp 1]'",
    ),
    Revert(
        finding="34 a decode step waits for the model before it draws",
        file="workers/generation/vllm/sampler.py",
        fix="(places,) = sent([torch.from_numpy(counts)], logits.device)",
        before="places = torch.from_numpy(counts).to(logits.device)",
        test=f"{REHEARSAL}test_hollow_gpu.py -k decode_step",
    ),
    Revert(
        finding="34 requests that join are copied one by one",
        file="workers/generation/vllm/sampler.py",
        fix="self.slots, self._seeds, self._first, *places = sent(tensors, device)",
        before="self.slots, self._seeds, self._first, *places = [t.to(device) for t in tensors]",
        test=f"{REHEARSAL}test_hollow_gpu.py -k decode_step",
    ),
    Revert(
        finding="a snapshot waits for each digest where moments are on the host",
        file="hybridflow/snapshots/files.py",
        fix="    for device in {total.device for total in sums}:\n",
        before="    sums = [total.to(sums[-1].device) for total in sums]\n"
        "    for device in {total.device for total in sums}:\n",
        test=f"-m '' '{REHEARSAL}{HOLLOW}[fsdp 1]'",
    ),
    Revert(
        finding="a process whose first thread has ended is left behind",
        file="hybridflow/burial.py",
        fix="            thread = _living_thread(entry)\n",
        before="            thread = entry\n",
        test="tests/runtime/test_burial.py -k last_thread",
    ),
    Revert(
        finding="a driver that is stuck ends the restart without a reason",
        file="hybridflow/burial.py",
        fix='    except subprocess.TimeoutExpired:\n        return [f"nvidia-smi',
        before='    except ZeroDivisionError:\n        return [f"nvidia-smi',
        test="tests/runtime/test_burial.py -k does_not_answer",
    ),
    Revert(
        finding="46 graphs open segments that grow",
        file="workers/generation/vllm/setup.py",
        fix="not segments_grow() and not config.release_during_training",
        before="True",
        test=f"{REHEARSAL}test_vllm_settings.py -k graphs_open_no_memory",
    ),
    Revert(
        finding="46 the older name of the allocator's settings is not heard",
        file="hybridflow/devices.py",
        fix='os.environ.get(ALLOCATOR) or os.environ.get(ALLOCATOR_BEFORE, "")',
        before='os.environ.get(ALLOCATOR, "")',
        test=f"{REHEARSAL}test_environment.py -k users_settings",
    ),
    Revert(
        finding="a ring's messages are told apart by tags",
        file="workers/engines/model/ring.py",
        fix="dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % count)",
        before="dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % count, tag=1)",
        test=f"-m '' {REHEARSAL}test_nccl_rules.py -k ranks_share",
    ),
    Revert(
        finding="3 the other build of vLLM is taken",
        file="workers/generation/vllm/build.py",
        fix="    if not kind or kind == needed:\n",
        before="    if True:\n",
        test=f"{REHEARSAL}test_environment.py -k 'installed_vllm or cpu_build'",
    ),
    Revert(
        finding="5 weights that graphs hold are replaced",
        file="workers/generation/vllm/destination.py",
        fix="        if self.engine.has_graphs:\n",
        before="        if False:\n",
        test=f"{REHEARSAL}test_vllm_settings.py -k memory_that_graphs_hold",
    ),
    Revert(
        finding="11 roles compute beside an awake generation engine",
        file="workers/actor.py",
        fix="            self.pool_memory.holders.add(self)\n",
        before="            pass\n",
        test="tests/workers/test_memory_owner.py",
    ),
    Revert(
        finding="16 all soft-capped scores at once",
        file="workers/engines/model/capped_attention.py",
        fix="    if rows * heads * time * seen <= MOST_SCORES:\n",
        before="    if True:\n",
        test="tests/engines/test_capped_attention.py",
    ),
    Revert(
        finding="17 grouped heads in float32 on CUDA",
        file="workers/engines/model/attention.py",
        fix="    if key.is_cuda and key.dtype is torch.float32:\n",
        before="    if False:\n",
        test="tests/engines/test_grouped_heads.py",
    ),
    Revert(
        finding="22 operators that do not repeat",
        file="hybridflow/devices.py",
        fix="    torch.use_deterministic_algorithms(True)\n",
        before="",
        test=f"{REHEARSAL}test_environment.py -k deterministic",
    ),
    Revert(
        finding="23 a clock that does not wait for the device",
        file="workers/weight_sync.py",
        fix="        torch.cuda.synchronize()\n",
        before="        pass\n",
        test=f"{REHEARSAL}test_kept_promises.py -k clock",
    ),
    Revert(
        finding="24 the latest bytes of a device in place of the most",
        file="workers/process_memory.py",
        fix="max(_MOST.get(device, 0), total - free)",
        before="total - free",
        test="tests/workers/test_process_memory.py -k everybody",
    ),
    Revert(
        finding="25 calibration by a CPU's sizes",
        file="recipes/calibration_config.py",
        fix="    amounts = ON_GPUS if num_gpus else ON_CPUS\n",
        before="    amounts = ON_CPUS\n",
        test="tests/recipes/test_arguments.py -k by_device",
    ),
    Revert(
        finding="27 vLLM's stream stays the current one",
        file="workers/generation/vllm/setup.py",
        fix="            torch.cuda.set_stream(stream)\n",
        before="",
        test=f"{REHEARSAL}test_kept_promises.py -k stream",
    ),
    Revert(
        finding="28 vLLM's precision of float32 products stays",
        file="workers/generation/vllm/setup.py",
        fix="        torch.set_float32_matmul_precision(matmul_precision)\n",
        before="",
        test=f"{REHEARSAL}test_kept_promises.py -k precision",
    ),
    Revert(
        finding="29 tensors of attention kernels are lost in sleep",
        file="workers/generation/vllm/memory.py",
        fix="        if kernel is not None:\n",
        before="        if False:\n",
        test="tests/generation/test_plain_tensors.py",
    ),
    Revert(
        finding="30 NCCL's watchdog comes before the report",
        file="recipes/machines.py",
        fix="(2 if config.device is Device.cuda else 0.5)",
        before="0.5",
        test=f"{REHEARSAL}test_environment.py -k watchdog",
    ),
    Revert(
        finding="35 a tensor group over two nodes goes unnoticed",
        file="hybridflow/layout.py",
        fix="            if len(group) <= most and len({nodes[rank] for rank in group}) > 1:\n",
        before="            if False:\n",
        test="tests/runtime/test_layout.py -k torn",
    ),
    Revert(
        finding="36 srun gives all hosts one core",
        file="cluster/templates/slurm.sbatch",
        fix='export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"\n',
        before="",
        test=f"{REHEARSAL}test_kept_promises.py -k slurm",
    ),
    Revert(
        finding="37 the image has no RDMA",
        file="cluster/templates/cuda.Dockerfile",
        fix="libibverbs1 ",
        before="",
        test=f"{REHEARSAL}test_kept_promises.py -k rdma",
    ),
    Revert(
        finding="37 pods may not lock memory",
        file="cluster/templates/cluster_spec.yaml.jinja",
        fix="            securityContext: {capabilities: {add: [IPC_LOCK]}}\n",
        before="",
        test=f"{REHEARSAL}test_kept_promises.py -k rdma",
    ),
    Revert(
        finding="40 tasks of rewards see GPUs",
        file="workers/reward.py",
        fix='            runtime_env={"env_vars": HIDDEN},\n',
        before="",
        test=f"{REHEARSAL}test_kept_promises.py -k rewards",
    ),
    Revert(
        finding="42 heads of any size go to the variable-length kernel",
        file="workers/engines/model/attention.py",
        fix="        and head_dim % HEAD_MULTIPLE == 0\n",
        before="",
        test=f"{REHEARSAL}test_kept_promises.py -k heads",
    ),
    Revert(
        finding="writing to a tensor of a micro-batch is writing to all",
        file="workers/engines/shared/together.py",
        fix="        result.append(view.data)\n",
        before="        result.append(view)\n",
        test="tests/engines/test_together.py -k writing",
    ),
    Revert(
        finding="a vision tower asks the device for the sizes of images",
        file="workers/engines/model/vision.py",
        fix="            options |= tower_arguments(tower, grids, pixels)\n",
        before="            options['image_grid_thw'], arguments = grids.to(pixels.device), (pixels,)\n",
        test=f"-m '' '{REHEARSAL}{HOLLOW}[fsdp 8 images]'",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", help="findings, by the first word of their names")
    arguments = parser.parse_args()
    chosen = [
        revert
        for revert in REVERTS
        if not arguments.numbers or revert.finding.split()[0] in arguments.numbers
    ]
    silent = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        for revert in chosen:
            outcome = taken_back(copy, revert)
            print(f"{revert.finding:<62} {outcome}", flush=True)
            if outcome != "fails":
                silent.append(revert.finding)
    if silent:
        raise SystemExit(f"not shown: {', '.join(silent)}")


def copied(folder: Path) -> Path:
    """A copy of the files that git knows, with this environment."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    copy = folder / "checkout"
    for name in listed.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


def taken_back(copy: Path, revert: Revert) -> str:
    """ "fails" where the test does without the fix, and passes with it."""
    file = copy / revert.file
    text = file.read_text()
    if text.count(revert.fix) != 1:
        return f"the fix is not found in {revert.file}"
    file.write_text(text.replace(revert.fix, revert.before))
    without = exit_status(copy, revert.test)
    file.write_text(text)
    if without != 1:
        return f"does not fail without it (pytest: {without})"
    with_it = exit_status(copy, revert.test)
    return "fails" if with_it == 0 else f"fails with it too (pytest: {with_it})"


def exit_status(copy: Path, selection: str) -> int:
    """pytest's exit status: 0 all pass, 1 some fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *shlex.split(selection)],
        cwd=copy,
        capture_output=True,
        check=False,
        timeout=SLOWEST_S,
    )
    return run.returncode


if __name__ == "__main__":
    main()
