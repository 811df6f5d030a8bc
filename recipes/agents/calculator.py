"""Arithmetic with a calculator: `73*6-41` is answered with `=397`, which a tiny model does not know.

The tool is a typed method. Most of the demonstrations that the model imitates first give up at once;
the others call the calculator and repeat what it says. The warm start so teaches how to call and to
copy, and reinforcement that calling is what pays.
"""

from __future__ import annotations

import ast
import json
import operator
import random
from collections.abc import Callable
from typing import Any

from workers.agents.model import Model
from workers.agents.tool_calls import read_calls

OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
FRAMES = ('{"name": "calculate", "arguments": {"expression": "', '"}}')
UNKNOWN = "=?"
LOOKS = 0.35
"""The share of the demonstrations that call the calculator."""
MAX_REPLY_TOKENS = 16
MAX_TOKENS = 64


class Calculator:
    """environment=recipes.agents.calculator:Calculator"""

    def reset(self, task: dict[str, Any]) -> None:
        self.answer = str(task["answer"])

    def calculate(self, expression: str) -> str:
        """Calculates.

        Args:
            expression: Whole numbers with +, - and *, such as 12*3-4.
        """
        return str(value_of(expression))

    def reward(self, answer: str) -> float:
        return float(answer == f"={self.answer}")


async def by_hand(model: Model, task: dict[str, Any]) -> float:
    """The same task as one function: environment=recipes.agents.calculator:by_hand"""
    reply = await model.reply(task["prompt"])
    for tool_call in read_calls(reply.text):
        try:
            content = str(value_of(tool_call.arguments["expression"]))
        except (LookupError, TypeError, ValueError) as error:
            content = f"Error: {error}"
        reply = await model.reply([{"role": "tool", "content": content}])
    return float(reply.text == f"={task['answer']}")


def value_of(expression: str) -> int:
    """The value of whole numbers with +, - and *; a ValueError for anything else."""
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError:
        raise ValueError(f"{expression!r} is no expression") from None
    return _value(tree, expression)


def _value(node: ast.expr, expression: str) -> int:
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, expression), _value(right, expression))
    raise ValueError(f"{expression!r} is no sum or product of whole numbers")


def make_row(random_: random.Random) -> dict[str, Any]:
    """One question with its answer of three digits, and a demonstration: assistant's and tool's
    messages."""
    expression, value = "", 0
    while not 100 <= value <= 999:
        numbers = random_.randint(10, 99), random_.randint(2, 9), random_.randint(10, 99)
        expression = f"{numbers[0]}*{numbers[1]}{random_.choice('+-')}{numbers[2]}"
        value = value_of(expression)
    demonstration = [("assistant", UNKNOWN)]
    if random_.random() < LOOKS:
        call = {"name": "calculate", "arguments": {"expression": expression}}
        demonstration = [
            ("assistant", f"<tool_call>{json.dumps(call)}</tool_call>"),
            ("tool", str(value)),
            ("assistant", f"={value}"),
        ]
    return {
        "prompt": [{"role": "user", "content": expression}],
        "answer": str(value),
        "demonstration": demonstration,
    }
