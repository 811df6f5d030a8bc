"""The report and the trace of a run: what people look at, read back by parsers of their own."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hybridflow.calls import CallRecord
from hybridflow.failures import EventLog
from hybridflow.recovery.events import Failure, Kind
from hybridflow.trace_file import TraceFile
from recipes.report.__main__ import report
from recipes.report.charts import Series, line_chart, thinned
from recipes.report.page import effective_time, page, phases
from recipes.report.run_record import RunRecord


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three steps of 2 s between validations of 1 s; steps 2 and 3 were lost once, which took 6 s."""
    rows: list[dict[str, Any]] = [
        {"step": 0, "split": "validation", "time_s": 101.0, "reward/mean": 0.25}
        | {"seconds/validation": 1.0},
    ]
    for step, at in ((1, 103.0), (2, 111.0), (3, 113.0)):
        rows.append(
            {"step": step, "split": "train", "time_s": at, "reward/mean": step / 10}
            | {"seconds/step": 2.0, "seconds/actor.update_actor": 1.5, "odd/metric": "NaN"}
        )
    rows.append(
        {"step": 3, "split": "validation", "time_s": 114.0, "reward/mean": 0.75}
        | {"seconds/validation": 1.0}
    )
    write_lines(tmp_path / "metrics.jsonl", rows)
    lost = [
        {"step": 2, "split": "train", "time_s": 105.0, "reward/mean": 0.9, "seconds/step": 2.0},
    ]
    write_lines(tmp_path / "lost" / "attempt-1.jsonl", lost)
    sample = {"step": 3, "split": "validation", "prompt": "<b>2+3</b>", "uid": 1, "reward": 1.0}
    sample |= {"response": "</pre><script>alert(1)</script>", "finish_reason": "stop"}
    write_lines(tmp_path / "samples.jsonl", [sample])
    events = EventLog(tmp_path, attempt=1)
    events.write("started", step=0, pid=7, pids={"main": [8, 9]})
    failure = Failure(
        kind=Kind.died,
        pool="main",
        role="actor",
        rank=1,
        method="update_actor",
        cause="killed by signal 9",
        step=2,
    )
    events.write("failure", **asdict(failure), evidence="File actor.py, line 3", gives_up="")
    seconds = {"total_s": 6.0, "quiesce_s": 0.5, "rebuild_s": 5.0, "restore_s": 0.5}
    events.write("recovered", step=1, lost_steps=1, pools=["main"], pids={}, **seconds)
    controller = replace(failure, pool="", role="controller", rank=None, method="", step=3)
    events.write("failure", **asdict(controller), evidence="", then="it is started again")
    (tmp_path / "config.yaml").write_text("max_response_tokens: 7\nwandb_api_key: abc123\n")
    (tmp_path / "environment.json").write_text('{"torch": "2.13.0"}')
    (tmp_path / "summary.json").write_text('{"reward_before": 0.25, "reward_after": 0.75}')
    return tmp_path


class Elements(HTMLParser):
    """Every tag with its attributes; all of them are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_by_itself(run: Path) -> None:
    text = report(run, run / "report.html").read_text()
    elements = Elements(text)
    assert not elements.open
    assert "script" not in {tag for tag, _ in elements.tags}, "no script, not even a sample's"
    for _, attributes in elements.tags:
        assert not {"src", "href", "onclick"} & set(attributes), "nothing is fetched"
    assert not re.search(r"https?://|url\(|@import", text)
    assert "Finished after 3 steps. Mean reward of the validation: 0.25 before, 0.75 after." in text
    assert "step 2: actor rank 1 of pool main in update_actor died" in text
    assert "killed by signal 9" in text and "File actor.py, line 3" in text
    assert "recovered in 6 s: pools main restarted, 1 steps trained again from step 1 on" in text
    assert "step 3: controller died" in text and "it is started again" in text
    assert "2.13.0" in text
    assert "abc123" not in text and "max_response_tokens: 7" in text, "secrets are hidden"
    assert "&lt;b&gt;2+3&lt;/b&gt;" in text
    lost = [attributes for tag, attributes in elements.tags if attributes.get("class") == "lost"]
    assert len(lost) == 5, "the legend, and in two charts a line with its marker"


def test_samples_without_a_number_come_last_and_episodes_show_their_turns(run: Path) -> None:
    """A reward that is NaN is a string in the file."""
    turns = [
        {"role": "policy", "text": "call", "num_tokens": 3, "reward": 0.5},
        {"role": "environment", "text": "an <answer>", "seconds": 0.25},
    ]
    samples = []
    for uid, reward in enumerate(("NaN", 0.5, 2.0)):
        sample = {"step": 3, "split": "validation", "prompt": f"prompt {uid}", "uid": uid}
        samples.append(sample | {"reward": reward, "response": "", "finish_reason": "stop"})
    samples[1]["turns"] = turns
    write_lines(run / "samples.jsonl", samples)
    text = page(RunRecord.read(run))
    places = [text.index(f"prompt {uid}") for uid in (2, 1, 0)]
    assert places == sorted(places)
    assert "reward nan" in text and "an &lt;answer&gt;" in text and "0.25 s" in text


def test_failures_are_lines_by_themselves_and_bad_gradients_are_shown(run: Path) -> None:
    """Two failures, twenty steps apart: their lost steps are not joined."""
    lost = []
    for step in (2, 3, 22, 23):
        lost.append({"step": step, "split": "train", "time_s": 1.0 * step, "reward/mean": 0.1})
    write_lines(run / "lost" / "attempt-1.jsonl", lost)
    events = EventLog(run, attempt=1)
    events.write("not_finite", step=3, roles=["actor"], uids=[4, 4, 5])
    events.write("rewound", step=2, total_s=1.5, lost_steps=1)
    text = page(RunRecord.read(run))
    lines = re.findall(r'<polyline class="lost" points="([^"]*)"', text)
    assert [len(line.split()) for line in lines] == [2, 2]
    assert "step 3: the gradient of actor is not finite" in text
    assert "2 rows are passed over (bad/step-00000003)" in text
    assert "back to step 2 in 1.5 s" in text


def test_the_share_of_time_that_counts(run: Path) -> None:
    """3 steps of 2 s and 2 validations of 1 s, from second 100 to 114."""
    assert effective_time(RunRecord.read(run)) == pytest.approx(8 / 14)


def test_phases_beside_what_was_predicted(run: Path) -> None:
    calls = [{"call": "actor.update_actor", "start_s": 0.5, "end_s": 1.75}]
    (run / "mapping.json").write_text(json.dumps({"calls": calls, "pools": []}))
    record = RunRecord.read(run)
    (phase,) = phases(record)
    assert (phase.name, phase.seconds, phase.share) == ("actor.update_actor", 1.5, 1.0)
    assert phase.predicted == 1.25
    assert "1.25 s" in page(record)


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "tr')
    assert "Not finished: 0 steps so far" in page(RunRecord.read(tmp_path))


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics.jsonl, so this is no run's output_dir"):
        RunRecord.read(tmp_path)


def test_charts_are_to_scale() -> None:
    """Markers lie where their values are: equal steps and values are equal distances apart."""
    points = [(0.0, -2.0), (1.0, 0.0), (2.0, 2.0), (4.0, float("nan"))]
    svg = line_chart([Series(label="train", points=points)], description="a & b")
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    places = [(float(x), float(y)) for x, y in circles]
    assert len(places) == 3
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.2)
    assert places[0][1] - places[1][1] == pytest.approx(places[1][1] - places[2][1], abs=0.2)
    assert "step 4: nan" in svg, "what is not a number is seen"
    assert not line_chart([Series(label="train", points=points[3:])], description="")


def test_long_series_keep_their_mean() -> None:
    points = [(float(step), step % 7 * 1.0) for step in range(6000)]
    few = thinned(points, most=600)
    assert len(few) == 600
    assert sum(value for _, value in few) / 600 == pytest.approx(
        sum(value for _, value in points) / 6000
    )


def call(role: str, pool: str, *ranks: tuple[float, float], method: str = "work") -> CallRecord:
    return CallRecord(role=role, method=method, pool=pool, ranks=ranks)


def trace_events(path: Path) -> list[dict[str, Any]]:
    """As a viewer reads an array that was never closed."""
    events: list[dict[str, Any]] = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    return events


def test_a_trace_has_a_lane_for_every_rank_and_nests(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path, receiver="generation") as trace:
        trace.calls([call("actor", "policy", (1.0, 2.0), (1.1, 2.1))])
        trace.calls([call("actor", "policy", (2.1, 3.0), (2.2, 3.0))])
        trace.calls(
            [
                call("generation", "samples", (3.0, 3.6), method="sync_weights"),
                call("actor", "policy", (3.0, 3.5), (3.0, 3.4), method="sync_weights"),
            ]
        )
        trace.span("step 1", 0.5, 3.7, {"tokens_per_s": 12.0})
    with TraceFile(path, receiver="generation", start_step=1) as trace:
        trace.span("step 2", 3.7, 4.0)
        trace.failure("actor died", 3.9, {"rank": 1})
    events = trace_events(path)
    lanes = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(lanes) == 4, "two ranks of the policy, one of the samples, the loop"
    for slices in lanes.values():
        for (_, end), (begin, _) in pairwise(slices):
            assert begin >= end, "slices of a lane do not overlap"
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"policy", "samples", "controller", "rank 0", "rank 1", "loop"}
    (source,) = (event for event in events if event["ph"] == "s")
    (target,) = (event for event in events if event["ph"] == "f")
    assert source["id"] == target["id"] and source["ts"] < target["ts"]
    pools = {event["args"]["name"]: event["pid"] for event in events if event["ph"] == "M"}
    assert (source["pid"], target["pid"]) == (pools["policy"], pools["samples"])
    (counter,) = (event for event in events if event["ph"] == "C")
    assert counter["args"] == {"tokens_per_s": 12.0}
    assert [event["name"] for event in events if event["ph"] == "i"] == ["actor died"]


def test_an_event_that_was_cut_off_is_removed_by_the_next_controller(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path) as trace:
        trace.span("step 1", 0.0, 1.0)
        trace.span("step 2", 1.0, 2.0)
    whole = path.read_bytes()
    for length in range(2, len(whole) + 1):
        path.write_bytes(whole[:length])
        with TraceFile(path, start_step=1) as trace:
            trace.span("step 3", 2.0, 3.0)
        spans = [event["name"] for event in trace_events(path) if event["ph"] == "X"]
        assert spans[-1] == "step 3" and spans[:-1] == ["step 1", "step 2"][: len(spans) - 1]


def test_a_long_trace_keeps_its_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path, most_bytes=2000) as trace:
        for step in range(100):
            trace.span(f"step {step}", step, step + 1.0)
    assert path.stat().st_size < 2500 and path.with_name("trace-earlier.json").stat().st_size < 2500
    assert [event["name"] for event in trace_events(path) if event["ph"] == "X"][-1:] == ["step 99"]


def test_the_page_shows_the_last_steps_of_every_rank(run: Path) -> None:
    with TraceFile(run / "trace.json") as trace:
        for step in range(6):
            trace.calls([call("actor", "main", (step + 0.1, step + 0.8), (step + 0.1, step + 0.9))])
            trace.span(f"step {step}", step, step + 1.0)
    text = page(RunRecord.read(run))
    shown = re.findall(r"actor\.work on (main rank \d)", text)
    assert sorted(shown) == ["main rank 0"] * 3 + ["main rank 1"] * 3


def test_the_page_has_every_host_and_says_which_is_slow(run: Path) -> None:
    """Two looks: rank 1 falls to half the others' speed, and the kernel ends a process on its node."""
    usual = {"pool": "main", "node": "10.0.0.7", "individual": 1.0, "resident_bytes": 10**9}
    usual |= {"peak_bytes": 2 * 10**9, "used_bytes": 7 * 10**9, "limit_bytes": 8 * 10**9}
    looks = []
    for step, relative, kills in ((1, 0.9, 4), (2, 0.5, 5)):
        first = usual | {"rank": 0, "relative": 1.0, "oom_kills": kills}
        second = usual | {"rank": 1, "relative": relative, "oom_kills": kills}
        looks.append(json.dumps({"step": step, "time_s": 1.0 * step, "hosts": [first, second]}))
    (run / "hosts.jsonl").write_text("\n".join(looks) + "\n")
    text = page(RunRecord.read(run))
    rows = re.findall(r"<tr><td>main rank \d.*?</tr>", text)
    assert [("slow" in row, ">1</td>" in row) for row in rows] == [(False, True), (True, True)]
    assert "50 %, slow" in rows[1] and "7 GB" in rows[1]
