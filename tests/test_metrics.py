"""Metrics: every sink read back by a reader of its own (json, TensorBoard's and wandb's file
readers, Prometheus' parser)."""

from __future__ import annotations

import io
import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from hybridflow.failures import EventLog
from hybridflow.metrics import (
    Curve,
    MetricsConfig,
    Sample,
    SamplesConfig,
    Tracker,
    WandbMode,
    draw_curves,
    read_jsonl,
    read_samples,
)
from hybridflow.metrics.console import ConsoleSink, compact, sparkline
from hybridflow.metrics.samples import SampleRows, shorten
from hybridflow.metrics.sinks import Row, labelled, prometheus_name
from hybridflow.metrics.vitals import VITALS, Vitals

RIGHT = Sample(
    prompt="2+3=\n# a [bold]",
    response="5",
    finish_reason="stop",
    weight_version=4,
    uid=17,
    scores={"reward": 1.0, "reward/format": math.nan},
)
LONG = Sample(
    prompt="count",
    response="12 " * 900,
    finish_reason="length",
    weight_version=4,
    uid=2,
    scores={"reward": 0.0},
)


def config(**fields: Any) -> MetricsConfig:
    return MetricsConfig(**{"console": False, **fields})


def test_config_is_a_structured_config_and_each_sink_is_one_line() -> None:
    schema = OmegaConf.structured(MetricsConfig)
    merged = OmegaConf.to_object(
        OmegaConf.merge(
            schema, OmegaConf.create("wandb: offline\ntensorboard: true\nconsole_metrics: [a]")
        )
    )
    assert merged == MetricsConfig(wandb=WandbMode.offline, tensorboard=True, console_metrics=["a"])


def test_jsonl_is_strict_json_and_gives_back_every_number(tmp_path: Path) -> None:
    values = {
        "a": 0.1,
        "nan": math.nan,
        "up": math.inf,
        "down": -math.inf,
        "count": 3,
        "f32": np.float32(0.5),
    }
    with Tracker(config(), tmp_path, total_steps=2) as tracker:
        tracker.log(1, values)
        tracker.log(1, {"accuracy": 1.0}, split="validation")
        tracker.summary({"seconds": {"x": math.nan}, "path": "p"})

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    first, second = read_jsonl(tmp_path / "metrics.jsonl")
    assert (first["step"], first["split"], second["split"]) == (1, "train", "validation")
    assert math.isnan(first["nan"]) and {**first, "nan": 0} | {**values, "nan": 0} == {
        **first,
        "nan": 0,
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "seconds": {"x": "NaN"},
        "path": "p",
    }


def test_resuming_drops_what_was_logged_after_the_checkpoint(tmp_path: Path) -> None:
    with Tracker(config(), tmp_path, total_steps=4) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"x": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')  # the crash came in the middle of a line
    with Tracker(config(), tmp_path, total_steps=4, start_step=2) as tracker:
        tracker.log(3, {"x": 30.0})
    assert [(row["step"], row["x"]) for row in read_jsonl(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


def test_a_run_that_goes_on_before_its_first_step_keeps_the_validation_before_it(
    tmp_path: Path,
) -> None:
    """A controller that died in its first step: the one that follows validates no second time."""
    with Tracker(config(tensorboard=True), tmp_path, total_steps=4) as tracker:
        tracker.log(0, {"x": 0.5}, split="validation")
        tracker.show(0, [RIGHT], split="validation")
        tracker.log(1, {"x": 1.0})
    with Tracker(config(tensorboard=True), tmp_path, total_steps=4, start_step=0) as tracker:
        tracker.log(1, {"x": 2.0})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["x"]) for row in rows] == [(0, 0.5), (1, 2.0)]
    assert [row["step"] for row in read_samples(tmp_path / "samples.jsonl")] == [0]
    with Tracker(config(), tmp_path, total_steps=4):
        assert not read_jsonl(tmp_path / "metrics.jsonl"), "a new run"


def test_samples_are_written_whole_and_go_back_to_the_checkpoint_with_the_metrics(
    tmp_path: Path,
) -> None:
    with Tracker(config(), tmp_path, total_steps=4) as tracker:
        tracker.show(0, [RIGHT], split="validation")
        tracker.show(2, [RIGHT, LONG])
        tracker.show(3, [RIGHT])
    with Tracker(config(), tmp_path, total_steps=4, start_step=2) as tracker:
        tracker.show(4, [LONG], split="validation")
        tracker.show(4, [])
    rows = read_samples(tmp_path / "samples.jsonl")
    assert [(row["step"], row["split"], row["uid"]) for row in rows] == [
        (0, "validation", 17),
        (2, "train", 17),
        (2, "train", 2),
        (4, "validation", 2),
    ]
    assert rows[0] == {
        "step": 0,
        "split": "validation",
        "prompt": RIGHT.prompt,
        "response": "5",
        "reward": 1.0,
        "reward/format": "NaN",
        "finish_reason": "stop",
        "weight_version": 4,
        "uid": 17,
    }
    assert rows[2]["response"] == LONG.response and "reward/format" not in rows[2]


def test_settings_of_samples_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"metrics\.samples\.train_every is -1; use 0 or more"):
        SamplesConfig(train_every=-1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("loss", "0.1", "loss is a str"), ("step", 1.0, "'step' is taken")],
)
def test_what_is_not_a_metric_is_refused(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    with (
        Tracker(config(), tmp_path, total_steps=1) as tracker,
        pytest.raises(ValueError, match=message),
    ):
        tracker.log(1, {name: value})


def test_sinks_that_cannot_work_fail_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"metrics\.wandb: online, but nobody is logged in"):
        Tracker(config(wandb=WandbMode.online), tmp_path, total_steps=1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to"):
        Tracker(config(), tmp_path / "file" / "below", total_steps=1)


def test_a_sink_that_breaks_later_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    class FullDisk(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    tracker = Tracker(config(), tmp_path, total_steps=3)
    tracker._sinks.append(ConsoleSink(["x"], 3, 0, Console(file=FullDisk())))
    tracker.log(1, {"x": 1.0})
    tracker.log(2, {"x": 2.0})
    tracker.close()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert "metrics/failed_sinks" not in rows[0] and rows[1]["metrics/failed_sinks"] == 1.0
    assert "ConsoleSink failed and is switched off" in caplog.text


def test_tensorboard_holds_every_point(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(config(tensorboard=True), tmp_path, total_steps=2) as tracker:
        tracker.log(1, {"reward/mean": 0.25, "loss": math.nan})
        tracker.log(2, {"reward/mean": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/reward/mean")] == [
        (1, 0.25),
        (2, 0.5),
    ]
    assert math.isnan(events.Scalars("train/loss")[0].value)


def test_tensorboard_shows_samples_as_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(config(tensorboard=True), tmp_path, total_steps=2) as tracker:
        tracker.show(1, [RIGHT, LONG], split="validation")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("validation/samples/text_summary")
    (text,) = event.tensor_proto.string_val
    assert event.step == 1
    assert "    2+3=\n    # a [bold]\n" in text.decode(), "indented: code, not a heading"
    assert "- reward: 1.0" in text.decode() and LONG.response in text.decode()


def leveldb_records(data: bytes, offset: int) -> Iterator[bytes]:
    """The records of a LevelDB log, the format of a .wandb file behind its 7 bytes of header."""
    start, record = 0, b""
    while start < len(data):
        left = 32768 - (start + offset) % 32768
        if left < 7:
            start += left
            continue
        length, kind = struct.unpack("<HB", data[start + 4 : start + 7])
        record += data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def test_wandb_offline_writes_a_run_that_holds_every_point_and_continues_under_its_id(
    tmp_path: Path,
) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    for start in (0, 1):
        time.sleep(start)  # wandb's directories are named by the second
        with Tracker(
            config(wandb=WandbMode.offline, run="nightly"),
            tmp_path,
            total_steps=2,
            start_step=start,
        ) as tracker:
            tracker.log(start + 1, {"reward/mean": 0.25})
            tracker.summary({"accuracy_after": 0.9})
    points, ids = [], set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()[7:], offset=7):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.display_name))
            if record.WhichOneof("record_type") == "history":
                items = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                points.append((items["step"], items["train/reward/mean"]))
    assert points == [(1, 0.25), (2, 0.25)]
    assert ids == {((tmp_path / "wandb_id.txt").read_text(), "nightly")}


def test_wandb_offline_writes_samples_as_a_table_of_their_step(tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    with Tracker(config(wandb=WandbMode.offline), tmp_path, total_steps=2) as tracker:
        tracker.show(1, [RIGHT, LONG], split="validation")
        tracker.show(2, [LONG], split="validation")
    tables = []
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        for data in leveldb_records(path.read_bytes()[7:], offset=7):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                file = path.parent / "files" / items["validation/samples/path"]
                tables.append((items["step"], json.loads(file.read_text())))
    (first, table), (second, later) = tables
    assert (first, second) == (1, 2)
    columns = [
        "prompt",
        "response",
        "reward",
        "reward/format",
        "finish_reason",
        "weight_version",
        "uid",
    ]
    assert table["columns"] == columns and len(later["data"]) == 1
    assert table["data"][0][:3] == [RIGHT.prompt, "5", 1.0]
    assert table["data"][1] == ["count", LONG.response, 0.0, None, "length", 4, 2]


def test_whose_number_it_is_becomes_labels() -> None:
    resident = ("host/resident_bytes", {"pool": "policy", "rank": "1"})
    assert labelled("host/policy/1/resident_bytes") == resident
    assert labelled("node/10.0.0.7/oom_kills") == ("node/oom_kills", {"node": "10.0.0.7"})
    for name in ("loss", "host/loss", "seconds/step", "actor/router/load", "node/a/b/c"):
        assert labelled(name) == (name, {})


def test_prometheus_names_are_legal_and_need_ray(tmp_path: Path) -> None:
    """Gauges on a real endpoint: tests/cluster/test_job.py."""
    assert prometheus_name("validation/kl (k3)") == "hybridflow_validation_kl_k3"
    script = "import sys; from pathlib import Path; from hybridflow.metrics import *\n"
    script += "Tracker(MetricsConfig(prometheus=True), Path(sys.argv[1]), total_steps=1)"
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "ValueError: metrics.prometheus: true needs a Ray runtime; set runtime=ray" in run.stderr


def test_console_prints_one_line_a_step_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    sink = ConsoleSink(
        ["reward/mean", "kl/mean"], 9, 0, Console(file=out, width=40, soft_wrap=True)
    )
    sink.log(
        Row(
            step=3,
            split="train",
            time_s=0,
            metrics={"reward/mean": math.nan, "other": 1, "seconds/step": 2, "seconds/sync": 0.5},
        )
    )
    sink.log(Row(step=3, split="validation", time_s=0, metrics={"accuracy": 0.5}))
    assert out.getvalue().splitlines() == [
        "step 3/9 | reward/mean nan | 2.00 s (sync 0.50)",
        "validation after step 3 | accuracy 0.5",
    ]


def test_console_shows_one_sample_in_three_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    sink = ConsoleSink([], 9, 0, Console(file=out, width=40, soft_wrap=True))
    sink.show(SampleRows(step=3, split="validation", time_s=0, samples=[RIGHT, LONG]))
    assert out.getvalue().splitlines() == [
        (
            "sample of validation after step 3 | reward 1 | reward/format nan | finish stop | "
            "weights 4"
        ),
        r"  prompt    2+3=\n# a [bold]",
        "  response  5",
    ]


def test_console_draws_a_sample_in_a_terminal() -> None:
    out = io.StringIO()
    sink = ConsoleSink(
        [], 9, 0, Console(file=out, width=60, force_terminal=True, color_system=None)
    )
    sink.show(SampleRows(step=3, split="train", time_s=0, samples=[RIGHT]))
    text = out.getvalue()
    assert "sample of step 3" in text and "# a [bold]" in text and "reward/format nan" in text


def test_long_texts_keep_both_ends() -> None:
    text = shorten("start " + "x" * 500 + " end", 40)
    assert text.startswith("start x") and text.endswith("x end") and len(text) <= 41
    assert shorten("  short\n", 40) == "short"


def test_console_draws_a_panel_in_a_terminal() -> None:
    out = io.StringIO()
    sink = ConsoleSink(
        ["reward/mean"], 2, 0, Console(file=out, width=80, force_terminal=True, color_system=None)
    )
    for step, reward in ((1, 0.0), (2, 1.0)):
        sink.log(
            Row(
                step=step,
                split="train",
                time_s=0,
                metrics={"reward/mean": reward, "seconds/step": 2.0},
            )
        )
    sink.summary({"accuracy": {"after": 0.93}})
    sink.close()
    text = out.getvalue()
    assert "▁█" in text and "2/2" in text and "accuracy.after" in text


def test_numbers_stay_readable() -> None:
    assert [compact(value) for value in (0.012345, 12345.6, 3.0, math.inf, 1e-9)] == [
        "0.01235",
        "12,346",
        "3",
        "inf",
        "1e-09",
    ]
    assert (
        sparkline([0.0, math.nan, 1.0, 0.5]) == "▁!█▅"
        and sparkline([math.nan]) == "!"
        and sparkline([2.0, 2.0]) == "▁▁"
    )


def test_curves_become_a_png_and_an_unknown_metric_is_named(tmp_path: Path) -> None:
    with Tracker(config(), tmp_path, total_steps=40) as tracker:
        for step in range(1, 41):
            tracker.log(step, {"reward/mean": step / 40})
        tracker.log(40, {"accuracy": 0.9}, split="validation")
    curves = [
        Curve(metric="reward/mean"),
        Curve(metric="accuracy", split="validation", percent=True),
    ]
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "plots" / "curves.png", curves, title="run")
    assert (tmp_path / "plots" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(
        ValueError, match="no train/accuracy; it has train/reward/mean, validation/accuracy"
    ):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "x.png", [Curve(metric="accuracy")])


def test_vitals_are_counted_on_over_the_lives_of_controllers(tmp_path: Path) -> None:
    """A worker's failure (6 s, 2 steps lost), then the controller's, 10 s before the next one
    trains; another reader of the same file counts the same."""
    log, vitals = EventLog(tmp_path, attempt=1), Vitals()
    lines = [
        {"event": "started", "time_s": 100.0},
        {"event": "failure", "time_s": 110.0, "role": "actor"},
        {"event": "recovered", "time_s": 116.0, "total_s": 6.0, "lost_steps": 2},
        {"event": "rewound", "time_s": 118.0, "total_s": 1.0, "lost_steps": 1},
        {"event": "failure", "time_s": 120.0, "role": "controller"},
        {"event": "started", "time_s": 130.0},
        {"event": "failure", "time_s": 140.0, "role": "critic"},
    ]
    log.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for event in log.read():
        vitals.count(event)
    assert set(vitals.values) == set(VITALS)
    expected = {"starts": 2, "failures": 3, "recoveries": 2, "recovery_seconds": 10}
    expected |= {"recovery_seconds_sum": 16, "lost_steps": 3, "staged_step": -1}
    assert {name: vitals.values[name] for name in expected} == expected


class Watching(ConsoleSink):
    """Remembers what it was told of the run as a whole."""

    def __init__(self) -> None:
        super().__init__([], 1, 0, Console(file=io.StringIO()))
        self.seen: list[dict[str, float]] = []

    def watch(self, values: Mapping[str, float]) -> None:
        self.seen.append(dict(values))


def test_sinks_hear_of_vitals_when_they_change(tmp_path: Path) -> None:
    with Tracker(config(), tmp_path, total_steps=1) as tracker:
        sink = Watching()
        tracker._sinks.append(sink)
        values = {"failures": 0.0}
        tracker.watch(values)
        tracker.watch(values)
        values["failures"] = 1.0
        tracker.watch(values)
    assert sink.seen == [{"failures": 0.0}, {"failures": 1.0}]
