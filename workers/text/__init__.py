"""Text and tokens: the one place that knows what ends a turn and a response,
makes tokens of prompt + response, and reads a response's text."""

from workers.text.beginning import Beginning, bake_options
from workers.text.continuation import PieceTokenizer
from workers.text.dates import dated, writes_the_date
from workers.text.endings import end_token_ids, save_endings, turn_ending
from workers.text.reading import ResponseReader

__all__ = [
    "Beginning",
    "PieceTokenizer",
    "ResponseReader",
    "bake_options",
    "dated",
    "end_token_ids",
    "save_endings",
    "turn_ending",
    "writes_the_date",
]
