"""The vLLM engine against transformers and against itself on other layouts; two processes run
all of cases.py once."""

import socket
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from hybridflow.layout import Layout
from tests.generation import cases, streams
from tests.ranks import run_ranks
from workers.generation.base import Generations


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("tied", "untied", "other_tied", "other_untied")):
        cases.make_model(root / name, tied="untied" not in name, seed=seed)
    return {name: str(root / name) for name in ("tied", "untied", "other_tied", "other_untied")}


@pytest.fixture(scope="module")
def results(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("results") / "results"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    run_ranks(cases.run, (port, models, str(output)), 2)
    return torch.load(f"{output}.0", weights_only=False)


def split(made: Generations) -> list[list[int]]:
    return [row.tolist() for row in np.split(made.response_ids, np.cumsum(made.lengths)[:-1])]


@pytest.mark.parametrize("name", ["plain", "cool", "filtered", "greedy"])
def test_log_probs_are_those_of_transformers_at_the_temperature(
    models: dict[str, str], results: dict[str, Any], name: str
) -> None:
    model = Qwen2ForCausalLM.from_pretrained(models["tied"])
    made, sampling = results[name], cases.SAMPLINGS[name]
    expected = []
    for prompt, response in zip(cases.rows()[0], split(made), strict=True):
        ids = torch.tensor([prompt.tolist() + response])
        with torch.no_grad():
            scores = model(ids).logits[0, len(prompt) - 1 : -1] / (
                1 if sampling.greedy else sampling.temperature
            )
        expected.append(
            scores.log_softmax(dim=-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        )
    np.testing.assert_allclose(made.log_probs, torch.cat(expected).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(cases.SAMPLINGS))
def test_the_reference_engine_draws_the_same_tokens(results: dict[str, Any], name: str) -> None:
    made, reference = results[name], results[f"hf {name}"]
    assert split(made) == split(reference)
    assert made.finish_reasons == reference.finish_reasons
    assert made.num_prompt_tokens == reference.num_prompt_tokens
    np.testing.assert_allclose(made.log_probs, reference.log_probs, rtol=0, atol=1e-5)


def test_same_seeds_give_the_same_samples_on_every_layout(results: dict[str, Any]) -> None:
    one = split(results["plain"])
    first, second = results["two_engines"]
    assert split(first) + split(second) == one
    for axis in ("tp", "pp"):
        for rank in results[axis]:
            assert split(rank) == one
            np.testing.assert_allclose(
                rank.log_probs, results["plain"].log_probs, rtol=0, atol=1e-5
            )
        assert results[f"{axis} layout"] == Layout.of(**{axis: 2})


def test_seeds_decide(results: dict[str, Any]) -> None:
    made, other = split(results["plain"]), split(results["other_seeds"])
    # Equal prompts, different seeds.
    assert all(made[row] != made[row + 1] for row in range(0, cases.ROWS, 2))
    assert made != other
    assert made[1] == other[0]  # the same prompt and the same seed, in another row


def test_responses_end_where_they_should(results: dict[str, Any]) -> None:
    limit = cases.PLAIN.max_response_tokens
    for name, ends in (
        ("plain", {cases.END}),
        ("stop_ids", {cases.END, *range(100, 130)}),
        ("ignore_eos", set()),
    ):
        for tokens, reason in zip(split(results[name]), results[name].finish_reasons, strict=True):
            assert not ends & set(tokens[:-1])
            assert reason == ("stop" if tokens[-1] in ends else "length")
            assert reason == "stop" or len(tokens) == limit
    assert "stop" in results["stop_ids"].finish_reasons
    assert set(results["ignore_eos"].finish_reasons) == {"length"}


def test_stop_strings_end_at_the_token_that_completes_them(results: dict[str, Any]) -> None:
    made = results["stop_strings"]
    for greedy, stopped, reason in zip(
        split(results["greedy"]), split(made), made.finish_reasons, strict=True
    ):
        # Token 0 is special.
        texts = [
            "".join(f"t{token}" for token in greedy[:length] if token)
            for length in range(1, len(greedy) + 1)
        ]
        found = [length for length, text in enumerate(texts, 1) if "t7" in text or "4t" in text]
        assert stopped == (greedy[: found[0]] if found else greedy)
        assert reason == ("stop" if found or greedy[-1] == cases.END else "length")


def test_no_rows_are_no_responses(results: dict[str, Any]) -> None:
    assert results["none"].lengths.shape == (0,)
    assert results["none"].log_probs.shape == (0,)


@pytest.mark.parametrize("name", ["tied", "both_names", "untied", "tp reload", "pp reload"])
def test_reloaded_weights_score_as_in_transformers(results: dict[str, Any], name: str) -> None:
    scored, expected, version = results[name]
    np.testing.assert_allclose(scored, expected, rtol=0, atol=1e-5)
    assert version == 5


def test_score_shows_a_stale_head(results: dict[str, Any]) -> None:
    scored, expected = results["stale_head"]
    assert np.abs(scored - expected).mean() > 0.5


def test_missing_weights_are_named(results: dict[str, Any]) -> None:
    assert results["missing"].startswith("ValueError")
    assert "layers.1.self_attn.qkv_proj" in results["missing"]


def test_sleep_gives_memory_back_and_demands_weights(results: dict[str, Any]) -> None:
    slept = results["sleep"]
    assert slept["cache_bytes"][0] > 1_000_000
    assert slept["cache_bytes"][1] == 0
    assert slept["cache_bytes"][2] == slept["cache_bytes"][0]
    assert slept["asleep"][0].startswith("RuntimeError: generation: sleep freed the weights")
    assert slept["asleep"][1] == -1
    assert slept["unfilled"].startswith("RuntimeError")
    assert split(slept["after"]) == split(slept["before"])
    np.testing.assert_allclose(
        slept["after"].log_probs, slept["before"].log_probs, rtol=0, atol=1e-6
    )


def test_the_host_process_stays_as_it_was(results: dict[str, Any]) -> None:
    assert results["state_kept"]
    assert results["world_kept"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", "row 1 is empty"),
        ("long", "row 2 has 57 tokens"),
        ("vocabulary", "row 0 has token id 500"),
        ("negative", "row 0 has token id -1"),
        ("temperature", "sampling.temperature=0.0"),
        ("top_p", "sampling.top_p=1.5"),
        ("max_response_tokens", "sampling.max_response_tokens=0"),
        ("seeds", "2 for 1 prompts"),
    ],
)
def test_bad_inputs_are_value_errors(results: dict[str, Any], name: str, words: str) -> None:
    assert results["errors"][name].startswith("ValueError")
    assert words in results["errors"][name]


def test_unknown_engine_and_layout_are_value_errors(models: dict[str, str]) -> None:
    from workers.generation import generation_engine_class

    with pytest.raises(ValueError, match="known: vllm, hf"):
        generation_engine_class("sglang")


def test_rows_in_flight_are_those_of_the_reference_engine(results: dict[str, Any]) -> None:
    """F12 test 9: rows of four settings at once."""
    streams.assert_equals(results["stream"], results["hf stream"])


@pytest.mark.parametrize(
    "name",
    ["limit 1", "limit 7", "preempted 1", "preempted 3", "mates", "generate and score", "slept"],
)
def test_no_disturbance_changes_a_row(results: dict[str, Any], name: str) -> None:
    """F12 tests 9 and 13, traps 39, 47 and 48; slices keep the batches, and so every bit."""
    tolerance = 0 if name.startswith("limit") else 1e-5
    streams.assert_equals(results["disturbed"][name], results["stream"], tolerance)


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_tokens_after_an_update(results: dict[str, Any], mode: str) -> None:
    """F12 test 10: every token is drawn by its version's weights over the whole prefix, but for the
    16 rows that ran at an update with keep. Rows that waited, and new rows with the prompts of old
    ones, read them by the new weights."""
    gaps = results[mode]
    assert max(gaps[16:]) < 1e-5
    assert max(gaps) < 1e-5 if mode == "recompute" else min(gaps[:16]) > 1e-2
    versions = [[1] * 5 + [2] * 7] * 16 + [[2] * 12] * 20
    assert results[f"{mode} versions"] == versions


def test_without_the_salt_new_rows_use_old_prefixes(results: dict[str, Any]) -> None:
    """F12 test 10, trap 21: prompts that fill a block of the cache are read by the old weights."""
    gaps = results["without salt"]
    assert max(gaps[::2]) < 1e-5 and min(gaps[1::2]) > 1e-2


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_versions_are_those_that_vllm_reports(results: dict[str, Any], mode: str) -> None:
    """F12 test 11."""
    assert results[f"{mode} versions"] == results[f"{mode} labels"]


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_ranks_of_a_replica_take_the_same_decisions(results: dict[str, Any], axis: str) -> None:
    """F12 test 12: every slice finishes the same rows on both ranks, as on a replica of one rank."""
    one = results["slices"]
    assert not one["cancelled"] and len(one["finished"]) > 5
    for rank in results[f"{axis} stream"]:
        first = min(min(keys) for keys in rank["finished"] if keys)
        offset = first - min(min(keys) for keys in one["finished"] if keys)
        for got, expected in zip(rank["finished"], one["finished"], strict=True):
            assert [key - offset for key in got] == expected
        assert rank["ids"] == one["ids"] and rank["versions"] == one["versions"]
        for got, expected in zip(rank["log_probs"], one["log_probs"], strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_a_thousand_rows_leave_nothing(results: dict[str, Any]) -> None:
    left = results["1000 rows"]
    assert left.pop("slots") <= 64
    assert set(left.values()) == {0}


def test_a_cache_that_is_not_forgotten_is_an_error() -> None:
    """Trap 40: vLLM answers no, and old prefixes would survive an update."""
    from workers.generation.vllm.engine import VllmEngine

    class Refusing:
        def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
            return not reset_running_requests

    engine = VllmEngine.__new__(VllmEngine)
    engine.llm = SimpleNamespace(llm_engine=Refusing())
    with pytest.raises(RuntimeError, match="did not forget its cached prefixes"):
        engine.weights_written(2)
