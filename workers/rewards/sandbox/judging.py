"""Assertions over a program that runs in another process: the program answers calls, the judge holds
the tests.

    judge                                       program
    assert add(1, 2) == 3     -> call add(1, 2) -> runs it
    compares 3 with 3        <-       3        <-

Plain data (numbers, text, lists, dicts, sets, ...) cross by value, as exactly
these types, so that no object of the program is ever compared with what a test expects. Any other
object stays where it is, and a Remote stands for it: calls, attributes, and operators go to the
program. It never equals plain data, and operators with plain data may not turn it into some. What the
program gets of the tests is the arguments of its functions; functions among them can be called, and
instances of the tests' own classes read and written.

Files beside it are not imported; neither is the project.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import operator
import os
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

SEQUENCES: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}
MAPPINGS: dict[str, Any] = {"dict": dict, "Counter": Counter, "OrderedDict": OrderedDict}
TEXTS: dict[str, Any] = {"Decimal": Decimal, "Fraction": Fraction}
NAMES = {kind: name for kinds in (SEQUENCES, MAPPINGS, TEXTS) for name, kind in kinds.items()}
PLAIN = (type(None), bool, int, float, str)
SHARED = (
    *("abs", "all", "any", "ascii", "bin", "bool", "bytes", "chr", "complex", "dict", "divmod"),
    *("enumerate", "filter", "float", "format", "frozenset", "hash", "hex", "int", "isinstance"),
    *("len", "list", "map", "max", "min", "oct", "ord", "pow", "range", "repr", "reversed"),
    *("round", "set", "slice", "sorted", "str", "sum", "tuple", "zip"),
)
"""Built-in functions that may cross by name; none of them runs code or reaches other objects."""
SHORT_NAMES = {"np": "numpy", "pd": "pandas"}
TESTS = "tests"
"""The module of what the tests define."""
BUILTIN = "_builtin_named_function_of_the_program_"

COMPARISONS = ("lt", "le", "gt", "ge")
ARITHMETIC = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and_", "or_", "xor", "lshift", "rshift"),
)
OPERATIONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in (*COMPARISONS, *ARITHMETIC, "eq", "neg", "pos", "invert", "index")
}
OPERATIONS |= {
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "contains": operator.contains,
    "getattr": getattr,
    "setattr": setattr,
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "isinstance": isinstance,
    **{kind.__name__: kind for kind in (bool, int, float, complex, str, repr, bytes)},
    **{kind.__name__: kind for kind in (len, iter, next, reversed, hash, abs, round)},
}
for _name in ("__enter__", "__exit__"):
    OPERATIONS[_name] = operator.methodcaller(_name, *[None] * 3 * (_name == "__exit__"))


class NotJudged(Exception):
    """A test that can't be judged in this way."""


class Link:
    """One end: asks the other end, and answers it meanwhile."""

    def __init__(self, reads: int, writes: int, *, judge: bool) -> None:
        self.reader = os.fdopen(reads, "r", encoding="utf-8")
        self.writer = os.fdopen(writes, "w", encoding="utf-8")
        self.judge = judge
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}
        self.space: dict[str, Any] = {}
        self.exceptions: dict[str, type[BaseException]] = {}

    def send(self, message: Any) -> None:
        self.writer.write(json.dumps(message) + "\n")
        self.writer.flush()

    def ask(self, operation: str, *arguments: Any, named: dict[str, Any] | None = None) -> Any:
        self.send({"ask": operation, "with": self.pack([arguments, named or {}])})
        while True:
            answer = self.receive()
            if "ask" in answer:
                self.answer(answer)
                continue
            for original, changed in zip(arguments, answer.get("after", ()), strict=False):
                overwrite(original, self.unpack(changed))
            if "raised" in answer:
                self.throw(answer["raised"], answer["text"])
            return self.unpack(answer["value"])

    def receive(self) -> dict[str, Any]:
        line = self.reader.readline()
        if not line:
            raise EOFError("the program has ended")
        message: dict[str, Any] = json.loads(line)
        return message

    def answer(self, message: dict[str, Any]) -> None:
        """Carries out what the other end asks; whatever it raises goes back."""
        operation = message["ask"]
        try:
            arguments, named = self.unpack(message["with"])
            if operation == "name":
                reply: dict[str, Any] = {"value": self.named(arguments[0])}
            else:
                if self.judge:
                    self.allow(operation, arguments)
                value = OPERATIONS[operation](*arguments, **named)
                reply = {"value": self.pack(value)}
                if operation == "call":
                    reply["after"] = [self.pack(argument) for argument in arguments]
        except NotJudged:
            raise
        except BaseException as error:
            # Also SystemExit: a function of the program has raised, its process goes on.
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = {"raised": kinds, "text": str(error)[:1000]}
        self.send(reply)

    def allow(self, operation: str, arguments: tuple[Any, ...]) -> None:
        """Refuses the judge's objects to a program, but for those that the tests pass to it: their
        functions may be called, instances of their classes read and written, by public names."""
        value, rest = arguments[0], arguments[1:]
        passed = any(value is other for other in self.objects.values())
        if passed and operation in ("call", "iter", "next", "len", "bool", "eq", "hash"):
            return
        named = operation in ("getattr", "setattr")
        public = named and type(rest[0]) is str and not rest[0].startswith("_")
        if passed and type(value).__module__ == TESTS and (public or not named):
            return
        raise PermissionError(f"{operation} of a test's {type(value).__name__}")

    def named(self, name: str) -> Any:
        """A global name of the program."""
        if name not in self.space:
            return {"nothing": True}
        value = self.space[name]
        if isinstance(value, type(sys)):
            return {"module": value.__name__}
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": [kind.__name__ for kind in value.__mro__]}
        return self.pack(value)

    def throw(self, kinds: list[str], text: str) -> NoReturn:
        raise self.exception(kinds)(text)

    def exception(self, kinds: list[str]) -> type[BaseException]:
        """The built-in exception, or one of its name above those that it is made of."""
        name = kinds[0]
        known = getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, BaseException):
            return known
        if name not in self.exceptions:
            self.exceptions[name] = type(name, (self.exception(kinds[1:]),), {})
        return self.exceptions[name]

    def pack(self, value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind in SEQUENCES.values():
            return {NAMES[kind]: [self.pack(item) for item in value]}
        if kind is defaultdict:
            kind = dict
        if kind in MAPPINGS.values():
            return {NAMES[kind]: [[self.pack(key), self.pack(value[key])] for key in value]}
        if kind in TEXTS.values():
            return {NAMES[kind]: str(value)}
        if kind in (bytes, bytearray):
            return {kind.__name__: value.hex()}
        if kind is complex:
            return {"complex": [value.real, value.imag]}
        if kind is range:
            return {"range": [value.start, value.stop, value.step]}
        if kind is Remote:
            return {"yours": value._number}
        name = name_of(value)
        if name in SHARED and vars(builtins)[name] is value:
            return {"builtin": name}
        if self.judge and not (callable(value) or kind.__module__ == TESTS):
            raise NotJudged(
                f"a test passes a {kind.__module__}.{kind.__name__} to the program; pass plain data"
            )
        number = self.numbers.setdefault(id(value), len(self.numbers))
        self.objects[number] = value
        return {"mine": number}

    def unpack(self, packed: Any) -> Any:
        if type(packed) in PLAIN:
            return packed
        if type(packed) is list:
            return [self.unpack(item) for item in packed]
        ((kind, value),) = packed.items()
        if kind in SEQUENCES:
            return SEQUENCES[kind](self.unpack(item) for item in value)
        if kind in MAPPINGS:
            return MAPPINGS[kind]({self.unpack(key): self.unpack(item) for key, item in value})
        if kind in TEXTS:
            return TEXTS[kind](value)
        match kind:
            case "bytes":
                return bytes.fromhex(value)
            case "bytearray":
                return bytearray.fromhex(value)
            case "complex":
                return complex(*value)
            case "range":
                return range(*value)
            case "builtin" if value in SHARED:
                return vars(builtins)[value]
            case "yours":
                return self.objects[value]
            case "mine":
                return Remote(self, value)
        raise ValueError(f"no such data: {kind}")


class Remote:
    """An object of the other end."""

    __slots__ = ("_link", "_number")

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return self._link.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("setattr", self, name, value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._link.ask("call", self, *arguments, named=named)

    def __instancecheck__(self, value: Any) -> bool:
        return type(value) is Remote and bool(self._link.ask("isinstance", value, self))

    def __eq__(self, other: object) -> bool:
        if type(other) is not Remote:
            return False
        return self._link.ask("eq", self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return int(self._link.ask("hash", self))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._link.ask("iter", self)
        while True:
            try:
                yield self._link.ask("next", iterator)
            except StopIteration:
                return

    def __next__(self) -> Any:
        return self._link.ask("next", self)

    def __contains__(self, item: Any) -> bool:
        return bool(self._link.ask("contains", self, item))

    def __exit__(self, *_: object) -> None:
        self._link.ask("__exit__", self)


def _forward(name: str) -> Callable[..., Any]:
    def operation(self: Remote, *arguments: Any) -> Any:
        return self._link.ask(name, self, *arguments)

    return operation


def _binary(name: str, *, swapped: bool = False) -> Callable[..., Any]:
    def operation(self: Remote, other: Any) -> Any:
        operands = (other, self) if swapped else (self, other)
        result = self._link.ask(name, *operands)
        if self._link.judge and type(other) is not Remote and type(result) is not Remote:
            raise TypeError("an object of the program met plain data in an operator")
        return result

    return operation


for _name in ("bool", "int", "float", "complex", "str", "repr", "bytes", "len", "reversed", "abs"):
    setattr(Remote, f"__{_name}__", _forward(_name))
for _name in ("round", "getitem", "setitem", "delitem", "neg", "pos", "invert", "index", "enter"):
    setattr(Remote, f"__{_name}__", _forward("__enter__" if _name == "enter" else _name))
for _name in (*COMPARISONS, *ARITHMETIC):
    setattr(Remote, f"__{_name.strip('_')}__", _binary(_name))
for _name in ARITHMETIC:
    setattr(Remote, f"__r{_name.strip('_')}__", _binary(_name, swapped=True))


def name_of(value: Any) -> str:
    try:
        return str(value.__name__)
    except AttributeError:
        return ""


def overwrite(original: Any, changed: Any) -> None:
    """Gives a mutable argument the content that it has after the call."""
    if type(original) in (list, bytearray):
        original[:] = changed
    elif type(original) in (dict, set, deque, Counter, OrderedDict):
        original.clear()
        add = original.extend if type(original) is deque else original.update
        add(changed)


# The two processes.


def serve(reads: int, writes: int) -> None:
    """Runs program.py, then answers the judge until it hangs up."""
    sys.set_int_max_str_digits(0)
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    code = compile(Path("program.py").read_text(encoding="utf-8"), "program.py", "exec")
    link = Link(reads, writes, judge=False)
    link.space = vars(module)
    exec(code, link.space)
    link.send({"ready": True})
    while True:
        try:
            message = link.receive()
        except EOFError:
            return
        link.answer(message)


class Space(dict[str, Any]):
    """The tests' global names; those that they do not define are the program's."""

    def __init__(self, link: Link) -> None:
        super().__init__(__name__=TESTS, __builtins__=builtins)
        self.link = link

    def __missing__(self, name: str) -> Any:
        own = name.removeprefix(BUILTIN)
        if name == own and hasattr(builtins, name):
            raise KeyError(name)
        packed = self.ask(own)
        if isinstance(packed, dict):
            if "nothing" in packed:
                if name != own:
                    return getattr(builtins, own)
                raise KeyError(name)
            if "exception" in packed:
                return self.link.exception(packed["exception"])
            if "module" in packed:
                if packed["module"] not in (name, SHORT_NAMES.get(name)):
                    raise KeyError(name)  # the program may not choose what the judge imports
                return importlib.import_module(packed["module"])
        return self.link.unpack(packed)

    def ask(self, name: str) -> Any:
        """The program's answer about a global name of its own."""
        self.link.send({"ask": "name", "with": self.link.pack([(name,), {}])})
        return self.link.receive()["value"]


class BuiltinNames(ast.NodeTransformer):
    """A function of the program may be called sum; then sum(1, 2) of a test is the program's. With
    anything but literals in it, it is Python's own, or a program could judge itself by its abs."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and hasattr(builtins, node.func.id):
            try:
                for part in (*node.args, *(keyword.value for keyword in node.keywords)):
                    ast.literal_eval(part)
            except ValueError:
                return node
            node.func = ast.copy_location(ast.Name(BUILTIN + node.func.id, ast.Load()), node.func)
        return node


def judge(reads: int, writes: int, verdict: int) -> None:
    """Runs the tests (on stdin, after a line with the nonce) and writes the nonce once all of them
    have passed; "?" and a reason where they can't be judged."""
    sys.set_int_max_str_digits(0)
    nonce, _, source = sys.stdin.read().partition("\n")
    link = Link(reads, writes, judge=True)
    try:
        link.receive()  # the program has run to its end
        tree = ast.fix_missing_locations(BuiltinNames().visit(ast.parse(source)))
        space = Space(link)
        exec(compile(tree, TESTS, "exec"), space)
        space.ask("__name__")  # and is still there
    except NotJudged as error:
        os.write(verdict, f"?{error}".encode())
        return
    except (AssertionError, EOFError):
        return
    except BaseException:
        # Whatever else a test raises, it has not passed.
        return
    os.write(verdict, nonce.encode())
