"""prepare(): the quickstart's model and data in a directory. python -m recipes.quickstart.prepare
--directory outputs/quickstart

Makes what a user would bring: a Hugging Face model directory and two parquet files. A second call
with the same settings finds them there.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import logging as transformers_logging

from recipes.quickstart import model as model_module
from recipes.quickstart import task as task_module
from recipes.quickstart import warm_start as warm_start_module
from recipes.quickstart.model import ModelShape, make_model, make_tokenizer
from recipes.quickstart.task import TaskConfig, make_examples, write_parquet
from recipes.quickstart.warm_start import WarmStartConfig, greedy_accuracy, warm_start
from workers.quiet import quiet

RECORD = "prepared.json"


@dataclass(kw_only=True)
class PrepareConfig:
    task: TaskConfig = field(default_factory=TaskConfig)
    shape: ModelShape = field(default_factory=ModelShape)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The files that prepare() left in the directory."""

    model_path: Path
    """Hugging Face directory: config, safetensors, tokenizer with chat template, generation
    config."""
    train_path: Path
    test_path: Path
    """Held-out questions; none of them is in the training data."""
    accuracy: float
    """Greedy, on the held-out questions, after the warm start."""
    num_parameters: int
    seconds: float
    """That the preparation took."""


def prepare(
    directory: Path | str,
    seed: int = 0,
    config: PrepareConfig | None = None,
    console: Console | None = None,
) -> Prepared:
    """Makes data and model in `directory`, or finds them there if they were made with the same
    seed and settings."""
    config, console, directory = config or PrepareConfig(), console or Console(), Path(directory)
    settings = {"seed": seed, **asdict(config), "code": _digest_of_code()}
    earlier = _find(directory, settings)
    if earlier:
        console.print(
            f"Model and data are in {directory} already (held-out accuracy {earlier.accuracy:.1%})."
        )
        return earlier
    return _make(directory, seed, config, settings, console)


def _make(
    directory: Path, seed: int, config: PrepareConfig, settings: dict[str, object], console: Console
) -> Prepared:
    started = time.perf_counter()
    (directory / RECORD).unlink(missing_ok=True)
    shutil.rmtree(directory / "model", ignore_errors=True)
    (directory / "data").mkdir(parents=True, exist_ok=True)
    train, test = make_examples(config.task, seed)
    train_path = directory / "data" / "train.parquet"
    test_path = directory / "data" / "test.parquet"
    write_parquet(train, train_path)
    write_parquet(test, test_path)

    transformers_logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, config.shape, seed)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{len(train)} training and {len(test)} held-out questions; Qwen2 model of "
        f"{num_parameters / 1e6:.1f} M parameters"
    )
    with _progress(console, config.warm_start.num_steps) as on_step:
        warm_start(model, tokenizer, train, config.warm_start, seed, on_step)
    accuracy = greedy_accuracy(model, tokenizer, test)
    with quiet():
        model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")

    prepared = Prepared(
        model_path=directory / "model",
        train_path=train_path,
        test_path=test_path,
        accuracy=accuracy,
        num_parameters=num_parameters,
        seconds=time.perf_counter() - started,
    )
    console.print(
        f"Warm start: held-out greedy accuracy {accuracy:.1%}, {prepared.seconds:.0f} s, saved in "
        f"{prepared.model_path}"
    )
    result = {"accuracy": accuracy, "num_parameters": num_parameters, "seconds": prepared.seconds}
    (directory / RECORD).write_text(
        json.dumps({"settings": settings, "result": result}, indent=2) + "\n"
    )
    return prepared


def _find(directory: Path, settings: dict[str, object]) -> Prepared | None:
    """The result of an earlier call with these settings; the record is written last, so it stands
    for everything."""
    if not (directory / RECORD).is_file():
        return None
    record = json.loads((directory / RECORD).read_text())
    if record["settings"] != settings:
        return None
    data = directory / "data"
    return Prepared(
        model_path=directory / "model",
        train_path=data / "train.parquet",
        test_path=data / "test.parquet",
        **record["result"],
    )


def _digest_of_code() -> str:
    """A digest of the code that decides the result, so that nobody finds what older code wrote."""
    source = "".join(map(inspect.getsource, (task_module, model_module, warm_start_module)))
    return hashlib.sha256(source.encode()).hexdigest()


@contextmanager
def _progress(console: Console, num_steps: int) -> Iterator[Callable[[int, float], None]]:
    columns = (
        TextColumn("Warm start"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("warm start", total=num_steps, loss=float("nan"))
        yield lambda step, loss: progress.update(task, completed=step, loss=loss)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's model and data.")
    parser.add_argument("--directory", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prepare(arguments.directory, arguments.seed)


if __name__ == "__main__":
    main()
