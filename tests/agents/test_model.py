"""A conversation with the policy, and its limits."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import numpy as np
import pytest
import torch

from tests.agents.chat import STRIPS, conversation, drawn, saying
from workers.agents.config import EpisodeConfig, History
from workers.agents.model import Drawn, Model, Request
from workers.agents.outcome import EnvironmentMistake, LimitReached

HELLO = [{"role": "user", "content": "Hello"}]


def ask(model: Model, *new: object) -> list[str]:
    """The finish reasons of replies to each of `new`, the limit's at the end."""

    async def talk() -> list[str]:
        reasons = []
        for message in new:
            try:
                reasons.append((await model.reply(message)).finish_reason)  # type: ignore[arg-type]
            except LimitReached as limit:
                reasons.append(f"limit {limit.reason}")
        return reasons

    return asyncio.run(talk())


def test_the_transcript_has_every_token_once() -> None:
    model = conversation(saying(["Hi", "Bye"]))
    reasons = ask(model, HELLO, [{"role": "user", "content": "And?"}])
    assert reasons == ["stop", "stop"]
    tokenizer = model.renderer.tokenizer
    assert tokenizer.decode(model.ids) == (
        "<|user|>\nHello<|end|>\n<|assistant|>\nHi<|end|>"
        "\n<|user|>\nAnd?<|end|>\n<|assistant|>\nBye<|end|>"
    )
    sampled = [
        token for token, sampled in zip(model.ids, model.transcript.sampled, strict=True) if sampled
    ]
    assert tokenizer.decode(sampled) == "Hi<|end|>Bye<|end|>"
    assert [turn.length for turn in model.transcript.turns] == [3, 4]


def test_whole_conversations_are_taken_as_what_is_new_of_them() -> None:
    first, other = conversation(saying("ab")), conversation(saying("ab"))
    further = [{"role": "user", "content": "More"}]

    async def talk() -> None:
        reply = await first.reply(HELLO)
        await first.reply([*HELLO, reply.message, *further])

    asyncio.run(talk())
    ask(other, HELLO, further)
    assert first.ids == other.ids
    assert first.messages == other.messages


def test_what_was_said_can_not_be_rewritten() -> None:
    model = conversation(saying("ab"))
    with pytest.raises(EnvironmentMistake, match="can't be rewritten"):
        ask(model, HELLO, [*HELLO, {"role": "assistant", "content": "other"}, *HELLO])
    with pytest.raises(EnvironmentMistake, match="nothing new"):
        ask(conversation(saying("ab")), HELLO, [])


def test_each_limit_has_its_reason() -> None:
    """Traps 18 and 19: of turns, of tokens in all, of a reply, of the context."""
    turns = conversation(saying("abc"), config=EpisodeConfig(max_turns=2))
    assert ask(turns, HELLO, HELLO, HELLO) == ["stop", "stop", "limit turns"]
    assert turns.finish_reason == "turns"
    tokens = conversation(saying(["long enough", "x"]), sampled_tokens=5)
    assert ask(tokens, HELLO, HELLO) == ["length", "limit length"]
    reply = conversation(saying(["long enough", "x"]), reply_tokens=5)
    assert ask(reply, HELLO, HELLO) == ["length", "stop"], "a long reply does not end the episode"
    text = reply.renderer.tokenizer.decode(reply.ids)
    assert text.endswith(
        "<|assistant|>\nlong <|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nx<|end|>"
    )
    assert reply.transcript.num_sampled == len("long ") + len("x") + 1, (
        "the end of a cut turn is masked"
    )
    start = len(conversation(saying("")).renderer.start(HELLO))
    context = conversation(saying(["long enough"]), context_tokens=start + 3)
    assert ask(context, HELLO, HELLO) == ["context", "limit context"]
    assert len(context.ids) == start + 3


def test_an_observation_that_does_not_fit_ends_the_episode() -> None:
    start = len(conversation(saying("")).renderer.start(HELLO))
    model = conversation(saying(["a"]), context_tokens=start + 10)
    assert ask(model, HELLO, [{"role": "user", "content": "x" * 50}]) == ["stop", "limit context"]
    assert len(model.ids) == start + 2, "nothing behind the last reply"
    first = conversation(saying(["a"]), context_tokens=8)
    assert ask(first, HELLO) == ["limit context"]
    assert len(first.ids) == 8 and not first.transcript.turns


@pytest.mark.parametrize("opening", [[], [HELLO]])
def test_a_conversation_goes_on_behind_what_did_not_fit(opening: list[object]) -> None:
    """With less, as if nothing else had been said; also where the first message did not fit."""
    refused = conversation(saying("ab"), context_tokens=90)
    plain = conversation(saying("ab"), context_tokens=90)
    reasons = ask(refused, *opening, [{"role": "user", "content": "x" * 500}], HELLO)
    assert reasons == [*["stop"] * len(opening), "limit context", "stop"]
    ask(plain, *opening, HELLO)
    assert refused.ids == plain.ids
    assert refused.transcript.sampled == plain.transcript.sampled
    assert refused.messages == plain.messages
    assert refused.finish_reason == "stop"


def test_a_reply_that_was_cancelled_is_asked_for_again() -> None:
    """An agent with a time-out of its own: what it had said is not there twice."""
    told: list[int] = []

    async def draw(request: Request) -> Drawn:
        told.append(len(request.ids))
        if len(told) == 2:
            await asyncio.sleep(60)
        return drawn("a")

    async def talk(model: Model, limit_s: float) -> None:
        await model.reply(HELLO)
        with suppress(TimeoutError):
            await asyncio.wait_for(model.reply(HELLO), limit_s)
        if limit_s < 1:
            await model.reply(HELLO)

    late, plain = conversation(draw), conversation(saying("aa"))
    asyncio.run(talk(late, 0.02))
    asyncio.run(talk(plain, 60.0))
    assert len(told) == 3 and told[1] == told[2]
    assert late.ids == plain.ids and late.messages == plain.messages


def test_thoughts_that_the_template_drops() -> None:
    thinking = ["<think>x</think>yes", "yes"]
    refused = conversation(saying(thinking), template=STRIPS, reply_tokens=99)
    with pytest.raises(EnvironmentMistake, match="writes earlier turns differently"):
        ask(refused, HELLO, HELLO)
    config = EpisodeConfig(history=History.as_drawn)
    drawn = conversation(saying(thinking), template=STRIPS, config=config, reply_tokens=99)
    assert ask(drawn, HELLO, HELLO) == ["stop", "stop"]
    assert "<think>x</think>yes<|end|>\n<|user|>" in drawn.renderer.tokenizer.decode(drawn.ids)


def test_text_and_ids_are_taken_as_they_are() -> None:
    model = conversation(saying(["1", "2"]))
    assert ask(model, "one plus", " two") == ["stop", "stop"]
    assert model.renderer.tokenizer.decode(model.ids) == "one plus1<|end|> two2<|end|>"
    by_ids = conversation(saying(["1"]))
    assert ask(by_ids, [70, 71]) == ["stop"]
    assert by_ids.ids[:2] == [70, 71]


def test_arguments_of_a_reply() -> None:
    """A stop may be one text or none; ids may be an array or a tensor; what is none is refused."""
    model = conversation(saying(["one, two", "a", "b"]))
    reply = asyncio.run(model.reply("x", stop=", "))
    assert reply.text == "one"
    asyncio.run(model.reply(np.array([5, 6]), stop=None))  # type: ignore[arg-type]
    asyncio.run(model.reply(torch.tensor([7])))  # type: ignore[arg-type]
    observed = [
        token for token, drawn in zip(model.ids, model.transcript.sampled, strict=True) if not drawn
    ]
    assert observed[-3:] == [5, 6, 7]
    with pytest.raises(EnvironmentMistake, match="takes messages, token ids or text, not None"):
        asyncio.run(model.reply(None))  # type: ignore[arg-type]
    refused = {"stop": [""]}, {"stop": ""}, {"stop": [3]}, {"max_tokens": "3"}, {"max_tokens": 0}
    for options in refused:
        with pytest.raises(EnvironmentMistake, match=next(iter(options))):
            asyncio.run(model.reply("x", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("token_id", [-1, 5000, 10**20, np.int64(5000)])
def test_ids_outside_the_vocabulary_are_named(token_id: int) -> None:
    model = conversation(saying(["1"]))
    most = len(model.renderer.tokenizer) - 1
    told = (
        rf"^model\.reply: token 1 is \S*{token_id}\S*, and the vocabulary has the ids 0 to {most};"
    )
    with pytest.raises(EnvironmentMistake, match=told):
        ask(model, [5, token_id])
    assert ask(model, [5, most]) == ["stop"] and model.ids[:2] == [5, most]


def test_what_code_does_to_the_messages_is_named() -> None:
    """model.messages is read; adding to it says nothing, unless all of it is the next message."""
    model = conversation(saying("abc"))
    ask(model, HELLO)
    model.messages.clear()
    for new in (HELLO, "More", []):
        with pytest.raises(
            EnvironmentMistake, match=r"^model\.messages was changed by the episode"
        ):
            ask(model, new)
    begun = conversation(saying("abc"))
    begun.messages += HELLO
    with pytest.raises(EnvironmentMistake, match=r"^model\.messages was changed by the episode"):
        ask(begun, [{"role": "user", "content": "other"}])
    assert ask(begun, begun.messages) == ["stop"]
    begun.messages.append({"role": "user", "content": "More"})
    assert ask(begun, begun.messages) == ["stop"]
    plain = conversation(saying("abc"))
    ask(plain, HELLO, [{"role": "user", "content": "More"}])
    assert begun.ids == plain.ids and begun.messages == plain.messages
