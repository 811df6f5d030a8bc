"""A language model as the reward: a judge that reads question and answer in a prompt and says
whether the answer is good.

JudgeWorker takes the probability that the judge would say yes, by a forward pass; VerdictWorker
lets it write and reads the verdict from the text. Both are Rewards, so an algorithm can use either,
or a function.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.seeds import combine_seed
from workers.engines.base import Head
from workers.engines.model.loading import position_limit
from workers.generation import generation_engine_class
from workers.layouts import generation_layout, training_layout
from workers.model_worker import ModelWorker
from workers.precision import with_native_precision
from workers.role_config import JudgeConfig, JudgeRoleConfig, VerdictKind
from workers.roles import Reward
from workers.sequences import Sequences
from workers.text import Beginning, PieceTokenizer, ResponseReader, end_token_ids
from workers.tokenizer import dated_tokenizer, load_tokenizer

LOGGER = logging.getLogger(__name__)


class Questions:
    """questions = Questions(config); questions(batch)   # the judge's prompt of every row, as
    tokens"""

    def __init__(self, config: JudgeRoleConfig) -> None:
        self.config = config
        self.policy_tokenizer = load_tokenizer(config.policy)
        self.read_responses = ResponseReader(
            self.policy_tokenizer,
            end_token_ids(config.policy, tokenizer=self.policy_tokenizer),
            special_tokens=config.special_tokens,
        )
        self.tokenizer = dated_tokenizer(config.model, config.date)
        self.tokens = PieceTokenizer(self.tokenizer)
        self.beginning = Beginning(self.tokenizer)

    def __call__(self, batch: Batch) -> list[list[int]]:
        return [self.ask(row) for row in self.rows(batch)]

    def answered(self, batch: Batch, words: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """The judge's prompt of every row with each of the words that may follow it."""
        pieces = []
        for row in self.rows(batch):
            text = self.text(row)
            pieces += [[text, word] for word in words]
        return [(self.begun(question), word) for question, word in self.tokens(pieces)]

    def begun(self, ids: list[int]) -> list[int]:
        """The tokens of a question, which the chat template begins where there is one."""
        return ids if self.tokenizer.chat_template else self.beginning.before(ids)

    def rows(self, batch: Batch) -> list[dict[str, Any]]:
        """The columns that the template may ask for, of every row."""
        prompts = self.policy_tokenizer.batch_decode(
            batch.ragged("prompt_ids").unbind(), skip_special_tokens=True
        )
        responses = self.read_responses(
            row.tolist() for row in batch.ragged("response_ids").unbind()
        )
        extras = batch.objects("extras") if "extras" in batch else [{}] * len(batch)
        return [
            {**columns, "prompt": p, "response": r}
            for p, r, columns in zip(prompts, responses, extras, strict=True)
        ]

    def ask(self, row: dict[str, Any]) -> list[int]:
        """The tokens of the question about a row."""
        ((ids,),) = self.tokens([[self.text(row)]])
        return self.begun(ids)

    def text(self, row: dict[str, Any]) -> str:
        """The template filled in, as a user's message where the judge's tokenizer has a chat
        template."""
        missing = [name for name in self.config.template_fields if row.get(name) is None]
        if missing:
            present = ", ".join(sorted(name for name, value in row.items() if value is not None))
            raise ValueError(
                f"judge.template asks for {missing}, which the data has not, or has as null; it "
                f"has {present}"
            )
        text = self.config.template.format(**row)
        if self.tokenizer.chat_template is None:
            return text
        message = {"role": "user", "content": text}
        return str(
            self.tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            )
        )


class JudgeWorker(ModelWorker, Reward):
    """P(yes) / (P(yes) + P(no)) after the judge's prompt, each the probability of the whole
    word."""

    config: JudgeRoleConfig

    def __init__(self, config: JudgeRoleConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.build(self.config.model, self.config.train, Head.lm, context, trains=False)
        self.questions = Questions(config)
        self.limit = position_limit(config.model, Head.lm)
        """Tokens that the judge can read."""

    @classmethod
    def layouts(cls, config: JudgeConfig, world_size: int) -> dict[str, Layout]:
        return {"train": training_layout(config.train, world_size, "judge")}

    def compute_reward(self, batch: Batch) -> Batch:
        rows = self.questions.answered(batch, (self.config.yes, self.config.no))
        longest = max((len(question) + len(word) for question, word in rows), default=0)
        if longest > self.limit:
            raise ValueError(
                f"judge: a question and its verdict have {longest} tokens, and the limit of "
                f"judge.model.path={self.model.path!r} is {self.limit}; shorten judge.template, "
                "lower actor.generation.sampling.max_response_tokens, or use another judge"
            )
        self.to_training()
        outputs = self.engine.forward(_answered(rows))
        if outputs is None or outputs.log_probs is None:
            return Batch.of(rewards=torch.empty(0), reward_metrics=[])
        lengths = [len(word) for _, word in rows]
        log_probs = torch.zeros(len(rows))
        for row, part in enumerate(outputs.log_probs.cpu().split(lengths)):
            log_probs[row] = part.sum()
        yes, no = log_probs.view(-1, 2).unbind(1)
        known = (yes.exp() + no.exp()).tolist()
        return Batch.of(
            rewards=torch.sigmoid(yes - no),
            reward_metrics=[{"verdict_probability": value} for value in known],
        )


def _answered(rows: Sequence[tuple[list[int], list[int]]]) -> Sequences:
    """The sequences question + word, the word scored."""
    tokens: list[int] = []
    lengths, scored_lengths = [], []
    for question, word in rows:
        tokens += question + word
        lengths.append(len(question) + len(word))
        scored_lengths.append(len(word))
    return Sequences(
        token_ids=torch.tensor(tokens, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        scored_lengths=torch.tensor(scored_lengths, dtype=torch.int64),
    )


class VerdictWorker(Reward):
    """The verdict that the judge writes after as many thoughts as judge.generation.sampling allows.

    Where it draws, it draws for the text that is judged: equal questions get equal verdicts, on
    whichever rank.
    """

    config: JudgeRoleConfig

    def __init__(self, config: JudgeRoleConfig, context: RankContext) -> None:
        super().__init__(with_native_precision(config, context.device), context)
        self.questions = Questions(config)
        engine = generation_engine_class(config.generation.engine)
        layout = self.layouts(config, context.world_size)["train"]
        self.generator = engine(
            model=config.model, config=self.config.generation, context=context, layout=layout
        )

    @classmethod
    def layouts(cls, config: JudgeConfig, world_size: int) -> dict[str, Layout]:
        layout = generation_layout(config.generation, world_size, "judge")
        return {"train": layout, "generation": layout}

    def compute_reward(self, batch: Batch) -> Batch:
        questions = [np.asarray(question, dtype=np.int64) for question in self.questions(batch)]
        answers = self.generator.generate(
            questions, _seeds(questions, self.config.seed), self.config.generation.sampling
        )
        written: list[np.ndarray] = []
        if questions:
            written = np.split(answers.response_ids, np.cumsum(answers.lengths)[:-1])
        texts = self.questions.tokenizer.batch_decode(
            [part.tolist() for part in written], skip_special_tokens=True
        )
        rewards, metrics, unreadable = [], [], []
        for text, reason in zip(texts, answers.finish_reasons, strict=True):
            reward, readable = read_verdict(text, self.config)
            rewards.append(reward)
            if not readable:
                unreadable.append(text)
            metrics.append(
                {"unreadable": float(not readable), "cut_short": float(reason == "length")}
            )
        if unreadable:
            LOGGER.warning(
                "judge: %d of %d verdicts can't be read and count as judge.unreadable_reward=%s; "
                "the first: %r",
                len(unreadable),
                len(texts),
                self.config.unreadable_reward,
                unreadable[0][:200],
            )
        return Batch.of(rewards=torch.tensor(rewards, dtype=torch.float32), reward_metrics=metrics)

    def close(self) -> None:
        self.generator.close()


def _seeds(questions: Sequence[NDArray[np.int64]], seed: int) -> NDArray[np.int64]:
    """[rows], from judge.seed and the tokens of each question alone."""
    seeds = np.empty(len(questions), dtype=np.int64)
    for row, question in enumerate(questions):
        digest = hashlib.blake2b(question.tobytes(), digest_size=8).digest()
        seeds[row] = combine_seed(seed, int.from_bytes(digest, "little")) >> 1
    return seeds


def read_verdict(text: str, config: JudgeConfig) -> tuple[float, bool]:
    """(reward, whether the text has a verdict): 1 for the judge's yes, 0 for its no, whichever
    stands last; a number where the pattern finds one."""
    yes, no = config.yes.strip().lower(), config.no.strip().lower()
    matches = re.findall(
        config.pattern or rf"(?i)(?<!\w)(?:{re.escape(yes)}|{re.escape(no)})(?!\w)", text
    )
    if matches:
        word = matches[-1].strip().lower()
        if word in (yes, no):
            return float(word == yes), True
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number, True
    if config.unreadable_reward is None:
        raise RuntimeError(
            f"judge: no verdict in {text[:200]!r}; change judge.template or judge.pattern, raise "
            "judge.generation.sampling.max_response_tokens, or set judge.unreadable_reward to the "
            "reward of such rows"
        )
    return config.unreadable_reward, False


def judge_worker(config: JudgeConfig) -> type[Reward]:
    """The worker for judge.verdict."""
    return {VerdictKind.probability: JudgeWorker, VerdictKind.written: VerdictWorker}[
        config.verdict
    ]
