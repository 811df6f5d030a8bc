"""A server of the Model Context Protocol as tools (package mcp, 2.x).

    async def episode(model, task):
        async with McpTools("npx", "-y", "@modelcontextprotocol/server-memory") as tools:
            answer = await tools.answer(model, task["prompt"])
        return float(answer == task["answer"])

A server of its own is started for every episode, spoken to over its standard input and output, and
ended with the block. Leaves out servers by URL, resources and prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from workers.agents.model import Model
from workers.agents.renderer import Message
from workers.agents.tools import Toolbox, converse

INVALID_PARAMS = -32602
"""JSON-RPC's code for arguments that the server does not take."""


class McpTools:
    """async with McpTools(command, *arguments) as tools: answer = await tools.answer(model, prompt)"""

    def __init__(self, command: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        """env: further environment variables of the server."""
        self.command, self.arguments, self.env = command, list(arguments), env
        self.schemas: list[Message] = []
        """The tools as the chat template is given them, in the order of their names."""
        self._session: Any = None
        self._open = AsyncExitStack()

    async def __aenter__(self) -> McpTools:
        from mcp import ClientSession, StdioServerParameters, stdio_client

        env = None
        if self.env is not None:
            env = dict(self.env)
        server = StdioServerParameters(command=self.command, args=self.arguments, env=env)
        async with AsyncExitStack() as opening:
            reads, writes = await opening.enter_async_context(stdio_client(server))
            self._session = await opening.enter_async_context(ClientSession(reads, writes))
            await self._session.initialize()
            listed = await self._session.list_tools()
            self._open = opening.pop_all()
        for tool in sorted(listed.tools, key=_name):
            described = tool.model_dump(by_alias=True)
            function = {
                "name": described["name"],
                "description": described.get("description") or "",
                "parameters": described["inputSchema"],
            }
            self.schemas.append({"type": "function", "function": function})
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._open.aclose()

    async def answer(self, model: Model, prompt: str | Sequence[Message]) -> str:
        """The policy's last words after as many calls as it wants; empty where a limit came before
        them."""
        model.use_tools(self.schemas)
        return await converse(Toolbox(call=self.call, owner=self), model, prompt)

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The text of a tool's result; a LookupError or ValueError for a mistake of the policy's."""
        from mcp import MCPError

        names = [schema["function"]["name"] for schema in self.schemas]
        if name not in names:
            raise LookupError(f"there is no tool {name!r}; there are {', '.join(names)}")
        try:
            result = await self._session.call_tool(name, arguments)
        except MCPError as error:
            if error.code == INVALID_PARAMS:
                raise ValueError(error.message) from error
            raise
        described = result.model_dump(by_alias=True)
        text = "\n".join(_text(part) for part in described["content"])
        if described.get("isError"):
            raise ValueError(text)
        return text


def _name(tool: Any) -> str:
    return str(tool.name)


def _text(part: Mapping[str, Any]) -> str:
    """A part of a result as text; an image or a sound as its kind."""
    if part["type"] == "text":
        return str(part["text"])
    return f"[{part['type']}]"
