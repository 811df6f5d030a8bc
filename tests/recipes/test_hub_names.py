"""Models by a name of the hub: what its cache has is judged as a directory is, and a name that is
nowhere is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from recipes.python_api import dry_run, run
from tests.tiny import by_length, tiny_grpo
from workers import hub


@pytest.mark.parametrize("offline", ["0", "1"])
@pytest.mark.parametrize("fault", ["none", "another shape", "one file of two", "no weights"])
def test_a_model_in_the_hubs_cache_is_judged_before_the_start(
    fault: str, offline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a directory is; in place of the hub, a closed port of this machine."""
    values = tiny_grpo(tmp_path)
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / commit
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    snapshot.parent.mkdir()
    shutil.move(tmp_path / "model", snapshot)
    match fault:
        case "another shape":
            settings = json.loads((snapshot / "config.json").read_text())
            (snapshot / "config.json").write_text(json.dumps(settings | {"intermediate_size": 300}))
        case "one file of two":
            model = AutoModelForCausalLM.from_pretrained(snapshot)
            (snapshot / "model.safetensors").unlink()
            model.save_pretrained(snapshot, max_shard_size="100KB")
            next(snapshot.glob("model-00002-of-*.safetensors")).unlink()
        case "no weights":
            (snapshot / "model.safetensors").unlink()
    expected = {
        "another shape": r"model\.path is 'owner/tiny'.*down_proj\.weight is \[128, 256\] in its files",
        "one file of two": r"'owner/tiny': model-00002-of-.* is missing",
        "no weights": r"'owner/tiny': the hub can't be asked for its weights, and the cache .* has none",
    }
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline == "1")
    values |= {"model.path": "owner/tiny", "output_dir": tmp_path / "out"}
    if fault == "none":
        dry_run("grpo", values, reward=by_length)
        return
    start = run if fault == "no weights" else dry_run
    with pytest.raises(ValueError, match=expected[fault]) as raised:
        start("grpo", values, reward=by_length)
    assert "\n" not in str(raised.value)


def test_a_name_that_is_nowhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for offline, reason in ((False, "does not answer"), (True, "")):
        monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
        settings = tiny_grpo(tmp_path) | {"model.path": "owner/tiny"}
        with pytest.raises(ValueError, match=rf"'owner/tiny'.*{reason}") as raised:
            dry_run("grpo", settings, reward=by_length)
        assert "\n" not in str(raised.value)
        assert "model.path" in str(raised.value)
