"""Messages become tokens once: rows 1 to 5 of the traps, and the prefix property (test 17)."""

from __future__ import annotations

import pytest

from recipes.quickstart.model import CHAT_TEMPLATE, make_tokenizer
from tests.agents.chat import ENDLESS, QWEN, STRIPS
from workers.agents.outcome import EnvironmentMistake
from workers.agents.renderer import MOST_SETS, QUESTION, THOUGHT, Renderer

CONVERSATIONS = [
    [("user", "Sort 3 1 2."), ("reply", "1 2 3"), ("user", "Now backwards."), ("reply", "3 2 1")],
    [
        ("system", "Be brief."),
        ("user", "é中 <b>?"),
        ("reply", "  leading and trailing  "),
        ("tool", "42\n"),
        ("tool", ""),
        ("reply", "<tool_call>{}</tool_call>"),
        ("user", "Sort"),
        ("reply", ""),
    ],
]


def renderer(template: str) -> Renderer:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return Renderer(tokenizer)


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN, ENDLESS])
def test_pieces_are_the_template_s_text(template: str, turns: list[tuple[str, str]]) -> None:
    """All pieces together, with the replies as they were drawn, are what transformers makes of the
    whole conversation."""
    rendered, tokenizer = renderer(template), renderer(template).tokenizer
    ids: list[int] = []
    history: list[dict[str, str]] = []
    new: list[dict[str, str]] = []
    for role, content in turns:
        if role != "reply":
            new.append({"role": role, "content": content})
            continue
        if ids:
            # The template without end tokens leaves the end of a turn to be written.
            ids += rendered.extend(history, new, closed=template != ENDLESS)
        else:
            ids += rendered.start(new)
        ids += tokenizer.encode(content, add_special_tokens=False)
        if template != ENDLESS:
            ids.append(tokenizer.eos_token_id)
        history += [*new, {"role": "assistant", "content": content}]
        new = []
    whole = tokenizer.apply_chat_template(history, tokenize=False)
    assert tokenizer.decode(ids).rstrip("\n") == whole.rstrip("\n")
    expected = tokenizer.encode(whole.rstrip("\n"), add_special_tokens=False)
    assert ids == expected, "and token by token, since bytes do not merge here"


def test_a_cut_turn_gets_its_end_and_a_stopped_one_has_it() -> None:
    """Trap 5: the token that ends a turn is there once."""
    rendered = renderer(QWEN)
    end = rendered.tokenizer.eos_token_id
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    new = [{"role": "user", "content": "c"}]
    closed = rendered.extend(history, new, closed=True)
    assert rendered.extend(history, new, closed=False) == [end, *closed]
    assert rendered.tokenizer.decode(closed) == "\n<|user|>\nc<|end|>\n<|assistant|>\n"


def test_templates_that_rewrite_are_told_with_their_place() -> None:
    """Trap 2: a template that strips thoughts is no extension once a user speaks, and is one while
    tools answer."""
    strips = renderer(STRIPS)
    assert strips.check("user", thoughts=False) == ""
    assert strips.check("tool", thoughts=True) == ""
    verdict = strips.check("user", thoughts=True)
    place = strips.render([{"role": "user", "content": "How much is 2 + 2?"}])
    assert f"at character {len(place)} it has 'It is 4." in verdict
    assert repr(THOUGHT)[1:-1] in verdict and "episode.history=as_drawn" in verdict
    for template in (CHAT_TEMPLATE, QWEN, ENDLESS):
        for role in ("user", "tool"):
            assert renderer(template).check(role, thoughts=True) == ""


def test_a_template_that_rejects_the_messages_is_named() -> None:
    rejecting = renderer("{{ raise_exception('no tools here') }}")
    with pytest.raises(EnvironmentMistake, match="rejects the messages with roles user"):
        rejecting.start([{"role": "user", "content": "a"}])
    assert "no tools here" in rejecting.check("tool", thoughts=False)


NO_TOOL = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""A template that leaves out roles that it does not know, as many do."""
SYSTEM_FIRST = NO_TOOL.replace("m.role in (", "(m.role != 'system' or loop.first) and m.role in (")
RAISES = NO_TOOL.replace(
    "{% endif %}{% endfor %}",
    "{% else %}{{ raise_exception('Unknown role') }}{% endif %}{% endfor %}",
)


def role_texts(template: str, *roles: str, after: bool = False) -> str:
    """The text of messages that say their own roles, at the beginning or behind a reply."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer)
    messages = [{"role": role, "content": f"says {role}"} for role in roles]
    if not after:
        return str(tokenizer.decode(renderer.start(messages)))
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return str(tokenizer.decode(renderer.extend(history, messages)))


@pytest.mark.parametrize("template", [NO_TOOL, SYSTEM_FIRST, RAISES])
def test_a_developer_is_the_system_of_older_templates(template: str) -> None:
    text = role_texts(template, "developer", "user")
    assert "<|system|>\nsays developer<|end|>" in text and "says user" in text


def test_a_developer_stays_where_the_template_knows_it() -> None:
    assert "<|developer|>\nsays developer" in role_texts(QWEN, "developer", "user")


@pytest.mark.parametrize(
    ("template", "roles", "after", "left_out"),
    [
        (NO_TOOL, ("tool",), True, "tool"),
        (NO_TOOL, ("user", "function"), False, "function"),
        (SYSTEM_FIRST, ("system",), True, "system"),
        (SYSTEM_FIRST, ("user", "developer"), False, "developer"),
        (NO_TOOL.replace("'system', ", ""), ("developer", "user"), False, "developer"),
    ],
)
def test_a_role_that_the_template_leaves_out_is_refused(
    template: str, roles: tuple[str, ...], after: bool, left_out: str
) -> None:
    with pytest.raises(EnvironmentMistake, match=f"leaves out a message of role '{left_out}'"):
        role_texts(template, *roles, after=after)


def test_tools_need_a_template_that_writes_their_results() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NO_TOOL
    assert "leaves out a message of role 'tool'" in Renderer(tokenizer).check(
        "tool", thoughts=False
    )
    assert not Renderer(tokenizer).check("user", thoughts=False)


def test_the_last_sets_of_tools_have_a_renderer() -> None:
    """Agents may write a new tool for every request: what is kept of them is bounded."""
    plain = renderer(QWEN)
    sets = [[{"type": "function", "function": {"name": f"f{n}"}}] for n in range(MOST_SETS + 1)]
    oldest, second = plain.with_tools(sets[0]), plain.with_tools(sets[1])
    assert plain.with_tools(sets[0]) is oldest
    for tools in sets[2:]:
        assert f'"{tools[0]["function"]["name"]}"' in plain.with_tools(tools).render([QUESTION])
    assert plain.with_tools(sets[0]) is oldest and plain.with_tools(sets[1]) is not second
    assert len(plain._with_tools) == MOST_SETS
