"""A tokenizer of every kind that published models have, trained on the spot."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, START, END = "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"
SPECIAL = ["<unk>", BOS, EOS, PAD, START, END]
CORPUS = [
    "The capital of France is Paris. 2+2=4, and 12 * 3 = 36!",
    "yes no true false user assistant system\n\nQuestion: what is 7-5?\nAnswer: 2",
    "Größe, naïve, 中文 text  with  two spaces, (a) [b] {c} <d>",
    string.printable,
    " ".join(string.printable),
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + "
    "m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + "
    "eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + ('model' if m['role'] == "
    "'assistant' else m['role']) + '\n' + (m['content'] | trim) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}"
    "{{ eos_token }}{% endif %}"
)
ADDS_SPACES = (
    "{% for m in messages %}{{ m['role'] + ':  ' + m['content'] + ' ' + eos_token + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "phi3": PHI3,
    "adds_spaces": ADDS_SPACES,
}
ENDS = {"chatml": END, "llama2": EOS, "gemma": END, "phi3": END, "adds_spaces": EOS}
"""What ends an assistant's turn in each template."""


def byte_level(*, add_prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )


def metaspace(scheme: str) -> Tokenizer:
    """Mistral's and newer Llama-2's: a space before the first piece, or before all."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL))


def prepend() -> Tokenizer:
    """Llama-2's of old: a normalizer writes the space, also after special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL))


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=SPECIAL,
            unk_token="<unk>",
            initial_alphabet=[c for c in string.printable if not c.isspace()],
        ),
    )


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": lambda: byte_level(add_prefix_space=False),
    "byte_level_prefix": lambda: byte_level(add_prefix_space=True),
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_always": lambda: metaspace("always"),
    "prepend": prepend,
    "word_piece": word_piece,
    "unigram": unigram,
}
LOSSLESS = ("byte_level", "metaspace_first", "metaspace_always", "prepend")
"""Kinds whose tokens decode to any printable text that went in."""


@cache
def make(
    kind: str, template: str = "", *, add_bos: bool = False, add_eos: bool = False
) -> PreTrainedTokenizerFast:
    backend = KINDS[kind]()
    parts = [BOS] * add_bos + ["$A"] + [EOS] * add_eos
    ids = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    if add_bos or add_eos:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(parts), special_tokens=ids
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token="<unk>",
        extra_special_tokens=[START, END],
    )
    tokenizer.chat_template = TEMPLATES.get(template)
    return tokenizer
