"""Text <-> ids: tokenizer, chat format, incremental decoding, export. No torch here."""

from internlm2.tokenizer.chat.format import ChatTokens
from internlm2.tokenizer.chat.message import CodeCall, Message, PluginCall, Tool
from internlm2.tokenizer.chat.parse import (
    AssistantParser,
    AssistantTextParser,
    AssistantTurn,
    InvalidCall,
    parse_text,
)
from internlm2.tokenizer.stream import StopStrings, StreamDecoder
from internlm2.tokenizer.tokenizer import Tokenizer

__all__ = [
    "AssistantParser",
    "AssistantTextParser",
    "AssistantTurn",
    "ChatTokens",
    "CodeCall",
    "InvalidCall",
    "Message",
    "PluginCall",
    "StopStrings",
    "StreamDecoder",
    "Tokenizer",
    "Tool",
    "parse_text",
]
