"""Model: the policy as an episode sees it, one conversation with it."""

from __future__ import annotations

import asyncio
import copy
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from workers.agents.config import EpisodeConfig, History
from workers.agents.outcome import EnvironmentMistake, LimitReached, shortened
from workers.agents.renderer import END_OF_THOUGHT, Message, Renderer
from workers.agents.transcript import Transcript
from workers.text import ResponseReader


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One turn of the policy.

    Reply(text="4", message={"role": "assistant", "content": "4"}, ids=[19, 2],
    log_probs=[-0.2, -0.1], finish_reason="stop")
    """

    text: str
    """Without the token that ended it."""
    message: Message
    """The text as the assistant's message."""
    ids: list[int]
    """The tokens as they were drawn, the one that ended them included."""
    log_probs: list[float]
    """Those with which they were drawn."""
    finish_reason: str
    """stop; length: cut at the most tokens of a reply or of the episode; context: cut at the end of
    the context."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """The generation engine's answer to a request."""

    ids: list[int]
    log_probs: list[float]
    stopped: bool
    weight_versions: list[int]
    """The version of the weights that drew each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A reply that is wanted: `limit` tokens at most after `ids`."""

    row: int
    ids: list[int]
    limit: int
    num_drawn: int
    """Tokens that the policy drew before in this episode."""


Draw = Callable[[Request], Awaitable[Drawn]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Most tokens of one reply, of all replies, and of the conversation."""

    reply_tokens: int
    sampled_tokens: int
    context_tokens: int


@dataclass(kw_only=True)
class Segments:
    """The contexts of one episode, which do not see one another: there is more than one where its
    history was rewritten, or where it holds several conversations."""

    transcripts: list[Transcript] = field(default_factory=list)
    finish_reason: str = ""
    """How the last reply ended, or the limit that the episode reached."""
    tool_s: float = 0.0
    """Seconds that tools took."""

    @property
    def num_turns(self) -> int:
        return sum(len(transcript.turns) for transcript in self.transcripts)

    @property
    def num_sampled(self) -> int:
        return sum(transcript.num_sampled for transcript in self.transcripts)


@dataclass(kw_only=True)
class Model:
    """reply = await model.reply([{"role": "user", "content": "How much is 2 + 2?"}])
    reply = await model.reply([{"role": "user", "content": "And 3 + 3?"}])     # only what is new
    """

    row: int
    draw: Draw
    renderer: Renderer
    read: ResponseReader
    end_token_ids: frozenset[int]
    config: EpisodeConfig
    limits: Limits
    vocab_size: int
    """The policy draws ids below it."""
    segments: Segments = field(default_factory=Segments)
    transcript: Transcript = field(default_factory=Transcript)
    """The tokens of the present segment."""
    messages: list[Message] = field(default_factory=list)
    """The conversation so far, the policy's replies included; to be read."""
    _said: list[Message] = field(default_factory=list)
    """The same, which no code of an episode has changed."""
    one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One for all conversations of the episode, held while a reply is drawn: replies that are asked for
    side by side are drawn one after the other, each with noise of its own."""
    _closed: bool = True
    """Whether the last reply ended with a token that ends turns."""
    _ended: str = ""
    """The limit behind which there is no further reply."""
    _is_cut: bool = False
    """Whether the transcript has nothing but the beginning of a prompt that was too long."""

    def __post_init__(self) -> None:
        self.segments.transcripts.append(self.transcript)

    @property
    def ids(self) -> list[int]:
        """All tokens so far, of the present segment."""
        return list(self.transcript.ids)

    @property
    def finish_reason(self) -> str:
        """How the episode's last reply ended, or the limit that it reached."""
        return self.segments.finish_reason

    def fork(self) -> Model:
        """A further conversation of the same episode, which begins empty: that of a sub-agent, or
        one whose history the agent rewrote. The limits of turns and of sampled tokens hold for all
        of them together, and what the policy says in each is trained on."""
        return replace(
            self,
            transcript=Transcript(),
            messages=[],
            _said=[],
            _closed=True,
            _ended="",
            _is_cut=False,
        )

    async def reply(
        self,
        new: Sequence[Message] | Sequence[int] | str,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Reply:
        """The policy's next turn.

        new: what came since its last one: messages; or text or token ids, which are put behind
        what stands there as they are. A list of messages may also be the whole conversation, which
        must go on from `model.messages`. max_tokens: of this reply, under
        actor.generation.sampling.max_response_tokens. stop: texts before which the reply's text
        ends; of what was drawn, the tokens up to such a text's last one stay. Raises LimitReached
        where the episode has no turn, token or context left. Whatever it raises, the conversation is
        then as it was before: one that is too long may be gone on with by less.
        """
        async with self.one_at_a_time:
            if self._is_cut:
                self.transcript.drop_observation(0)
                self._is_cut = False
            transcript, length, said = self.transcript, len(self.transcript), self._said
            try:
                reply = await self._reply(new, max_tokens, stop)
                self.messages = [dict(message) for message in self._said]
                return reply
            except BaseException:
                self.transcript, self._said = transcript, said
                if not self._is_cut:
                    transcript.drop_observation(length)
                raise

    async def _reply(
        self,
        new: Sequence[Message] | Sequence[int] | str,
        max_tokens: int | None,
        stop: str | Sequence[str] | None,
    ) -> Reply:
        segments = self.segments
        stop = _texts(stop)
        left = self.limits.sampled_tokens - segments.num_sampled
        if not self._ended and segments.num_turns == self.config.max_turns:
            self._ended = "turns"
        elif not self._ended and left < 1:
            self._ended = "length"
        if self._ended:
            raise self._limit(self._ended)
        encoded = self._encoded(new)
        transcript = self.transcript
        transcript.observe(encoded)
        if not transcript.ids:
            raise EnvironmentMistake(
                "the episode asked for a reply to nothing; give model.reply a message, text or ids"
            )
        space = self.limits.context_tokens - len(transcript)
        if space < 1:
            transcript.drop_observation(self.limits.context_tokens)
            self._is_cut = not transcript.turns
            self.segments.finish_reason = "context"
            raise LimitReached("context")
        limit = min(space, left, self.limits.reply_tokens)
        if max_tokens is not None:
            if not isinstance(max_tokens, int) or max_tokens < 1:
                raise EnvironmentMistake(f"model.reply: max_tokens={max_tokens!r}; use at least 1")
            limit = min(limit, max_tokens)
        answer = await self.draw(
            Request(
                row=self.row,
                ids=list(transcript.ids),
                limit=limit,
                num_drawn=segments.num_sampled,
            )
        )
        return self._taken(answer, space=space, left=left, stop=stop)

    def use_tools(self, schemas: Sequence[Message]) -> None:
        """Gives the chat template these tools, from the first message on."""
        if self.transcript.ids:
            raise EnvironmentMistake(
                "model.use_tools: the conversation has begun, and its beginning names the tools; "
                "call it before the first reply"
            )
        self.renderer = self.renderer.with_tools(schemas)

    def _taken(self, answer: Drawn, *, space: int, left: int, stop: Sequence[str]) -> Reply:
        """The drawn tokens as a turn, and how it ended."""
        number = self.segments.num_turns
        answer, text = self._until(answer, stop)
        self.transcript.reply(answer.ids, answer.log_probs, answer.weight_versions, number)
        reason = "length"
        if answer.stopped:
            reason = "stop"
        elif len(answer.ids) == space:
            reason = self._ended = "context"
        self.segments.finish_reason = reason
        if not self._ended and len(answer.ids) == left:
            self._ended = "length"
        self._closed = answer.ids[-1] in self.end_token_ids
        message = {"role": "assistant", "content": text}
        self._said = [*self._said, message]
        return Reply(
            text=text,
            message=dict(message),
            ids=list(answer.ids),
            log_probs=list(answer.log_probs),
            finish_reason=reason,
        )

    def _until(self, answer: Drawn, stop: Sequence[str]) -> tuple[Drawn, str]:
        """The draw up to the first token that completes one of the texts, and the text before it;
        all of it where none does. Where a draw stops may depend on what was drawn."""
        (text,) = self.read([answer.ids])
        found = [text.index(end) for end in stop if end in text]
        if not found:
            return answer, text

        def has_end(length: int) -> bool:
            (part,) = self.read([answer.ids[:length]])
            return any(end in part for end in stop)

        length = 1 + bisect_left(range(1, len(answer.ids) + 1), True, key=has_end)
        cut = Drawn(
            ids=answer.ids[:length],
            log_probs=answer.log_probs[:length],
            stopped=True,
            weight_versions=answer.weight_versions[:length],
        )
        return cut, text[: min(found)]

    def _limit(self, reason: str) -> LimitReached:
        self.segments.finish_reason = self._ended = reason
        return LimitReached(reason)

    def _encoded(self, new: Sequence[Message] | Sequence[int] | str) -> list[int]:
        """The tokens of what is new."""
        if self.messages != self._said and not self._is_whole(new):
            raise EnvironmentMistake(
                "model.messages was changed by the episode's code, and what was said can't be "
                "rewritten; give model.reply what is new, or begin another conversation with "
                "model.fork()"
            )
        if isinstance(new, str):
            if not self.transcript.ids:
                return self.renderer.text(new)
            before = self.renderer.tokenizer.decode(self.transcript.ids[-1:])
            return self.renderer.further_text(str(before), new)
        if not isinstance(new, Iterable):
            raise EnvironmentMistake(
                f"model.reply takes messages, token ids or text, not {shortened(new)}"
            )
        items: list[Any] = new.tolist() if isinstance(new, np.ndarray | Tensor) else list(new)
        if all(isinstance(item, dict) for item in items):
            return self._of_messages(items)
        if all(isinstance(item, int | np.integer) for item in items):
            return self._checked([int(item) for item in items])
        raise EnvironmentMistake(
            f"model.reply takes messages, token ids or text, not {shortened(new)}"
        )

    def _is_whole(self, new: Any) -> bool:
        """Whether it is the whole conversation and what follows."""
        if not isinstance(new, list | tuple):
            return False
        if not self._said:
            return list(new) == self.messages
        return list(new[: len(self._said)]) == self._said

    def _checked(self, ids: list[int]) -> list[int]:
        for place, token_id in enumerate(ids):
            if not 0 <= token_id < self.vocab_size:
                raise EnvironmentMistake(
                    f"model.reply: token {place} is {shortened(token_id)}, and the vocabulary has the ids "
                    f"0 to {self.vocab_size - 1}; give ids of the policy's own tokenizer"
                )
        return ids

    def _of_messages(self, messages: list[Message]) -> list[int]:
        history = self._said
        if history and messages[: len(history)] == history:
            messages = messages[len(history) :]
        if not history:
            if not messages:
                return []
            self._said = copy.deepcopy(messages)
            if self.transcript.ids:
                raise EnvironmentMistake(
                    "the episode began with text or token ids, and goes on with messages; use one "
                    "of the two"
                )
            return self.renderer.start(messages, self.limits.context_tokens)
        if not messages:
            raise EnvironmentMistake(
                "the episode asked for a reply with nothing new since the last one; give "
                "model.reply the messages that followed it"
            )
        thoughts, rewritten = END_OF_THOUGHT in history[-1]["content"], False
        for message in messages:
            role = str(message.get("role"))
            if role == "assistant":
                raise EnvironmentMistake(
                    "model.reply was given an assistant's message that the policy did not write "
                    "at that place; what it said before can't be rewritten"
                )
            if self.config.history is not History.as_drawn and role in ("user", "tool"):
                verdict = self.renderer.check(role, thoughts=thoughts)
                if verdict and self.config.history is History.checked:
                    raise EnvironmentMistake(verdict)
                rewritten = rewritten or bool(verdict)
        if rewritten:
            return self._in_a_new_segment([*history, *messages])
        space = max(0, self.limits.context_tokens - len(self.transcript))
        ids = self.renderer.extend(history, messages, closed=self._closed, most=space)
        self._said = [*history, *copy.deepcopy(messages)]
        return ids

    def _in_a_new_segment(self, messages: list[Message]) -> list[int]:
        """The tokens of the whole conversation as the template writes it now."""
        self.transcript = Transcript()
        self.segments.transcripts.append(self.transcript)
        self._said = copy.deepcopy(messages)
        return self.renderer.start(messages, self.limits.context_tokens)


def _texts(stop: str | Sequence[str] | None) -> Sequence[str]:
    """The texts before which a reply ends."""
    if stop is None:
        return ()
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple) or not all(isinstance(end, str) for end in texts):
        raise EnvironmentMistake(f"model.reply: stop={shortened(stop)}; give texts")
    if not all(texts):
        raise EnvironmentMistake("model.reply: stop has an empty text; leave it out")
    return texts
