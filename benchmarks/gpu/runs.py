"""The runs of python -m benchmarks.gpu (docs/gpu.md): speeds, memory and log-prob gaps that no
rehearsal can know. Several GPUs, predicted seconds and other systems are left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.gpu.installed import describe
from benchmarks.gpu.training import CASES
from benchmarks.rehearsal.training_step import hf_config
from hybridflow.mapping.question.zoo import MODELS
from recipes.quickstart.model import ModelShape, make_model, make_tokenizer
from recipes.quickstart.task import TaskConfig, make_examples, write_parquet
from workers.generation.vllm.build import installed_kind

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 540.0
"""Of one case."""
LEAST_S = 60.0
"""With less time no case starts."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of recipes.grpo."""

    engine: str
    generator: str
    precision: str
    eager: bool = True
    release: bool = False
    large: bool = False
    """Qwen2.5-0.5B's shape, 32 prompts x 8 samples of 256 tokens, in place of the quickstart's."""
    on_ray: bool = False

    @property
    def name(self) -> str:
        words = [self.engine, self.generator, self.precision]
        more = {"graphs": not self.eager, "release": self.release, "0.5B": self.large}
        more["ray"] = self.on_ray
        return " ".join([*words, *(word for word, there in more.items() if there)])

    def settings(self) -> list[str]:
        settings = [
            f"actor.train.engine={self.engine}",
            f"actor.generation.engine={self.generator}",
        ]
        settings += [f"actor.train.precision={self.precision}"]
        settings += [f"actor.generation.precision={self.precision}"]
        settings += [f"reference.train.precision={self.precision}"]
        if self.generator == "vllm":
            settings.append(f"actor.generation.enforce_eager={str(self.eager).lower()}")
            settings.append(f"actor.generation.release_during_training={str(self.release).lower()}")
        settings.append(f"runtime={'ray' if self.on_ray else 'local'}")
        batch, samples, tokens = (32, 8, 256) if self.large else (8, 4, 16)
        settings += [f"data.batch_size={batch}", f"algorithm.samples_per_prompt={samples}"]
        settings.append(f"actor.generation.sampling.max_response_tokens={tokens}")
        return settings


def cases(device: str) -> Iterator[Case]:
    """What is installed for the device."""
    generators = ["hf"]
    if installed_kind() == device:
        generators.append("vllm")
    engines = ["fsdp", "threed"]
    if find_spec("deepspeed") is not None and find_spec("ray") is not None:
        engines.append("deepspeed")
    for engine in engines:
        for generator in generators:
            for precision in ("bf16", "fp32"):
                yield Case(engine=engine, generator=generator, precision=precision)
    if device == "cuda" and "vllm" in generators:
        yield Case(engine="fsdp", generator="vllm", precision="bf16", eager=False)
        yield Case(engine="fsdp", generator="vllm", precision="bf16", release=True)
        best = Case(engine="fsdp", generator="vllm", precision="bf16", eager=False, large=True)
        yield replace(best, eager=True)
        yield best
        yield replace(best, release=True)
        yield replace(best, engine="threed")
        if find_spec("ray") is not None:
            yield Case(engine="fsdp", generator="vllm", precision="bf16", on_ray=True)


def machine(device: str) -> dict[str, Any]:
    """Speeds of the device by itself, and its memory that torch does not count."""
    size = 8192 if device == "cuda" else 512
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = fastest(lambda: left @ left, device)
    buffer = torch.empty(1 << (30 if device == "cuda" else 24), dtype=torch.uint8, device=device)
    copy_s = fastest(lambda: buffer.clone(), device)
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "matmul_tflops": 2 * size**3 / seconds / 1e12,
        "copy_gb_per_s": 2 * buffer.nbytes / copy_s / 1e9,
    }
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        facts["name"] = torch.cuda.get_device_name()
        facts["memory_gb"] = total / 1e9
        facts["outside_torch_gb"] = (total - free - torch.cuda.memory_reserved()) / 1e9
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        host_s = fastest(lambda: host.to("cuda", non_blocking=True), device)
        facts["from_pinned_host_gb_per_s"] = host.nbytes / host_s / 1e9
    return facts


def fastest(action: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Seconds of the fastest repetition after a first one."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def prepare(directory: Path) -> None:
    """A random model and arithmetic questions."""
    tokenizer = make_tokenizer()
    make_model(tokenizer, ModelShape(), 0).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    train, _ = make_examples(TaskConfig(), 0)
    write_parquet(train, directory / "train.parquet")


def prepare_large(directory: Path) -> None:
    """A model of Qwen2.5-0.5B's shape with random weights and the small one's tokenizer."""
    spec, tokenizer = MODELS["qwen2.5-0.5b"], make_tokenizer()
    config = hf_config(Qwen2Config, spec)
    config.bos_token_id = None
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory / "large")
    tokenizer.save_pretrained(directory / "large")
    del model
    torch.cuda.empty_cache()


def run(
    case: Case, device: str, steps: int, directory: Path, output: Path, timeout_s: float
) -> dict[str, Any]:
    """The summary of one run, or its error."""
    if not (directory / "train.parquet").exists():
        prepare(directory)
    if case.large and not (directory / "large" / "tokenizer_config.json").exists():
        prepare_large(directory)
    command = [sys.executable, "-m", "recipes.grpo", *case.settings()]
    command += [f"model.path={directory / ('large' if case.large else 'model')}"]
    command += [f"data.train={directory / 'train.parquet'}"]
    command += [f"device={device}", f"output_dir={output}", f"loop.num_steps={steps}"]
    command += ["reward.function=benchmarks.gpu.reward:varied", "loop.checkpoint_every=0"]
    row, _ = finished(case.name, command, timeout_s)
    if "error" in row:
        return row
    summary = json.loads((output / "summary.json").read_text())
    return row | {
        "phase_s": summary["phase_s"],
        "tokens_per_s": summary["tokens"] / summary["train_s"],
        "log_prob_gap_max": summary["largest"].get("actor/log_prob_gap_max"),
        "largest": summary["largest"],
        # Without what the first step compiles and captures.
        "last_step": json.loads((output / "metrics.jsonl").read_text().splitlines()[-1]),
    }


def train(name: str, device: str, directory: Path, timeout_s: float) -> dict[str, Any]:
    """The row of a case of training.py, or its error."""
    command = [sys.executable, "-m", "benchmarks.gpu.training", str(directory / "training"), name]
    row, text = finished(f"training {name}", [*command, "--device", device], timeout_s)
    if "error" not in row:
        row |= {key: value for key, value in json.loads(text).items() if key != "case"}
    return row


def finished(name: str, command: list[str], timeout_s: float) -> tuple[dict[str, Any], str]:
    """A row of the command's seconds, and of its error where it has one; its last line."""
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            # Its own processes too: they would keep the device's memory from the next case.
            os.killpg(process.pid, signal.SIGKILL)
            return {"case": name, "error": f"not finished within {timeout_s:.0f} s"}, ""
    row: dict[str, Any] = {"case": name, "seconds": time.perf_counter() - started}
    if process.returncode:
        lines = (errors or printed).strip().splitlines()
        reason = "\n".join(lines[-5:]) or f"ended with status {process.returncode}"
        return row | {"error": reason}, ""
    return row, (printed.strip().splitlines() or [""])[-1]


def attempted(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row of a case; its error where the case, or what this process does for it, fails."""
    try:
        return measure()
    except Exception as error:  # whatever a device answers with: the next case starts
        return {"case": name, "error": f"{type(error).__name__}: {error}"}


def rows_of(json_file: Path | None) -> list[dict[str, Any]]:
    """The rows of an earlier call that have no error; SystemExit in one line for a file that can't be
    written, or is no such file."""
    if json_file is None:
        return []
    if not json_file.resolve().parent.is_dir():
        raise SystemExit(f"--json is {json_file}, whose directory does not exist; make it")
    if not json_file.exists():
        return []
    try:
        rows = json.loads(json_file.read_text())["runs"]
        return [row for row in rows if "error" not in row]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"--json is {json_file}, which is no file of this script's ({error}); name another"
        ) from None


def write(json_file: Path | None, result: dict[str, Any]) -> None:
    """Whole or not at all, as a call may be killed."""
    if json_file is not None:
        unfinished = json_file.with_name(json_file.name + ".new")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        unfinished.replace(json_file)


def training_cases(device: str) -> Iterator[str]:
    """Names of training.py's cases, what is known best first."""
    for name, case in CASES.items():
        is_installed = case.engine != "deepspeed" or find_spec("deepspeed") is not None
        if is_installed and case.tiny == (device == "cpu"):
            yield name


def run_all(device: str, steps: int, only: str, json_file: Path | None, seconds: float) -> None:
    """Prints the machine and a line for each case; `json_file` holds what is known so far, and what it
    held before is not measured again."""
    if device == "cuda" and not torch.cuda.is_available():
        build = "this PyTorch has no CUDA" if torch.version.cuda is None else "no CUDA device"
        raise SystemExit(f"{build}: run it on a GPU, or with --device cpu")
    known_rows = rows_of(json_file)
    end = time.monotonic() + seconds
    print(describe(device, installed_kind()), flush=True)
    facts = attempted("machine", lambda: machine(device))
    result: dict[str, Any] = {"machine": facts, "runs": known_rows}
    print(json.dumps(facts), flush=True)
    known = {row["case"] for row in known_rows}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        measures: dict[str, Callable[[float], dict[str, Any]]] = {}
        for name in training_cases(device):
            measures[f"training {name}"] = partial(train, name, device, directory)
        for number, case in enumerate(cases(device)):
            measures[case.name] = partial(
                run, case, device, steps, directory, directory / f"run{number}"
            )
        left = [name for name in measures if only in name and name not in known]
        while left and end - time.monotonic() > LEAST_S:
            name = left.pop(0)
            timeout_s = min(TIMEOUT_S, end - time.monotonic())
            row = attempted(name, partial(measures[name], timeout_s))
            result["runs"].append(row)
            print(json.dumps(row), flush=True)
            write(json_file, result)
    if left:
        print(f"left for the next call: {', '.join(left)}", flush=True)
    failed = [row["case"] for row in result["runs"] if "error" in row]
    if failed:
        print(f"failed, and tried again by the next call: {', '.join(failed)}", flush=True)
