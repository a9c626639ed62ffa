"""How this server reads conversations and their answers: by its flags and the model's chat template."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from coserve.config import ServerConfig
from coserve.server.application import reasoning
from coserve.server.application.reasoning import ReasoningFormat
from coserve.server.application.tool_calling import formats
from coserve.server.application.tool_calling.formats import ToolFormat
from coserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatSettings:
    """`tools` and `reasoning`: the formats that answers are read in, None: not at all.

    `auto_tools`: whether a model may choose to call (--enable-auto-tool-choice). `response_role`: who
    answers. `request_templates`: whether a request may bring a chat template.
    """

    tokenizer: Tokenizer
    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    auto_tools: bool = True
    response_role: str = "assistant"
    request_templates: bool = False

    @classmethod
    def of(cls, config: ServerConfig, tokenizer: Tokenizer) -> ChatSettings:
        """From flags and template; ConfigError for a parser that there isn't."""
        template = tokenizer.chat_template
        made = cls(
            tokenizer,
            formats.choose(config.tool_call_parser, template),
            reasoning.choose(config.reasoning_parser, template),
            config.enable_auto_tool_choice,
            config.response_role,
            config.trust_request_chat_template,
        )
        tools = made.tools.name if made.tools is not None else "none"
        logger.info("tool calls: %s, reasoning: %s", tools, made.reasoning.open if made.reasoning else "none")
        return made
