"""Agents: a model, tools, and the loop between them. See docs/agents.md.

Nothing here loads torch until `EngineModel` is asked for.
"""

from typing import TYPE_CHECKING

from internlm2.agent.agent import Agent, Session
from internlm2.agent.backends.endpoint import EndpointModel
from internlm2.agent.function.define import tool
from internlm2.agent.limits import Limits
from internlm2.agent.model import Ask, Model, Reply, ScriptedModel, ToolCall
from internlm2.agent.record.render import Renderer
from internlm2.agent.record.rerun import Difference, Replay, replay
from internlm2.agent.record.transcript import Transcript, TranscriptWriter
from internlm2.agent.run import Outcome
from internlm2.agent.tool_type import Picture, Tool, ToolError, ToolResult
from internlm2.agent.tools.calculator import calculator
from internlm2.agent.tools.files import FolderReader
from internlm2.agent.tools.mcp import McpServer, McpTools
from internlm2.agent.tools.python import PythonTool

if TYPE_CHECKING:
    from internlm2.agent.backends.engine import EngineModel

__all__ = [
    "Agent",
    "Ask",
    "Difference",
    "EndpointModel",
    "EngineModel",
    "FolderReader",
    "Limits",
    "McpServer",
    "McpTools",
    "Model",
    "Outcome",
    "Picture",
    "PythonTool",
    "Renderer",
    "Replay",
    "Reply",
    "ScriptedModel",
    "Session",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "Transcript",
    "TranscriptWriter",
    "calculator",
    "replay",
    "tool",
]


def __getattr__(name: str) -> object:
    if name == "EngineModel":
        from internlm2.agent.backends.engine import EngineModel

        return EngineModel
    raise AttributeError(f"module 'internlm2.agent' has no attribute {name!r}")
