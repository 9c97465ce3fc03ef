"""A tokenizer's chat template as transformers compiles it, rendered within bounds of time and memory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

from lorakit.bounds import TooLong, bounded
from lorakit.data.chat_template.template_probe import TOOL, TemplateMessage
from lorakit.data.rows import RowError
from lorakit.data.template_source import compile_bounded
from lorakit.errors import UserError

# A template writes a conversation in milliseconds.
_SECONDS, _MEMORY = 10, 2 << 30
# Characters that it may write besides what the messages say, and how often it may write that (as JSON, with thoughts).
_AROUND, _TIMES = 1 << 20, 8
REFUSED = "the chat template refuses the conversation"
_FIX = "Fix the template, or write another."
_NO_TEMPLATE = (
    "model.base: it has no chat template, which conversations need. Give one with model.chat_template, a .jinja file "
    "such as {% for m in messages %}{{ m['content'] + ('\\n' if m['role'] != 'assistant' else eos_token) }}{% endfor %}"
    ", or train documents (data.format: text)."
)


class NoChatTemplate(UserError):
    """Conversations are to be rendered, and the model has no chat template."""


@dataclass(frozen=True)
class Renderer:
    """A tokenizer's template, and the values that it is given besides each conversation."""

    tokenizer: Any
    values: Mapping[str, Any]

    def write(
        self,
        messages: list[TemplateMessage],
        ask: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """As `ChatTemplate.write`."""
        try:
            with bounded(_SECONDS, _MEMORY):
                compiled, known = self.with_tools if tools else self.without_tools
                given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": ask}
                given = {**known, **self.values, **(variables or {}), **given}
                # As Template.render does it, without gathering the names that every template knows anew each time.
                text = "".join(compiled.root_render_func(compiled.new_context(given, shared=True)))
                size = len(json.dumps([messages, tools], default=str)) if len(text) > _AROUND else 0
        except TooLong as error:
            raise UserError(
                f"model.chat_template: it computes for more than {_SECONDS} s to write {len(messages)} messages, and "
                f"may never end. {_FIX}"
            ) from error
        except MemoryError as error:
            raise UserError(
                f"model.chat_template: it takes more than {_MEMORY >> 30} GiB of memory to write {len(messages)} "
                f"messages. {_FIX}"
            ) from error
        except TemplateSyntaxError as error:
            raise UserError(
                f"model.chat_template: not valid Jinja: {error.message}, line {error.lineno}. {_FIX}"
            ) from error
        except TemplateError as error:
            raise RowError(REFUSED, str(error)) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise RowError("the chat template fails", f"{type(error).__name__}: {error}") from error
        if len(text) > _AROUND + _TIMES * size:
            raise UserError(f"model.chat_template: it writes {len(text):,} characters for messages of {size:,}. {_FIX}")
        return text

    @property
    def source(self) -> str:
        """The text of the template for conversations without tools."""
        return str(self.tokenizer.get_chat_template())

    @cached_property
    def without_tools(self) -> tuple[Template, dict[str, Any]]:
        """The compiled template, and the values that it knows: transformers' functions and the special tokens."""
        return self._compile(None)

    @cached_property
    def with_tools(self) -> tuple[Template, dict[str, Any]]:
        """The same for conversations with tools, for which some tokenizers have a second template."""
        return self._compile([TOOL])

    def _compile(self, tools: list[dict[str, Any]] | None) -> tuple[Template, dict[str, Any]]:
        if not self.tokenizer.chat_template:
            names = ", ".join(getattr(self.tokenizer, "named_templates", ()))
            others = f" Its tokenizer has {names}, and no default: put one of these into a file." if names else ""
            raise NoChatTemplate(_NO_TEMPLATE + others)
        source = self.tokenizer.get_chat_template(tools=tools)
        if "*" in source:  # never compiled without these bounds: jinja computes constants while it compiles
            compiled = compile_bounded(_compile_jinja_template("").environment, source)
        else:
            compiled = _compile_jinja_template(source)
        return compiled, {**compiled.globals, **self.tokenizer.special_tokens_map}
