"""Chat templates that a tool has by name, as the text around each turn, and as Jinja."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_PLACE = re.compile(r"\{\{(content|trimmed|bos|eos)\}\}")
_JINJA = {"content": "content", "trimmed": "(content | trim)", "bos": "bos_token", "eos": "eos_token"}


@dataclass(frozen=True)
class TurnTemplate:
    """The text of a user's turn, up to where the answer begins, of an answer, and of a system prompt, with {{content}},
    {{bos}} and {{eos}} in them; {{trimmed}} is the content without white space around it. `joined`: the system prompt
    stands in the first user's turn. `between` follows each answer but the last. `thought`: what stands before and
    behind an answer's thought, both of which an answer without one begins with."""

    user: str
    assistant: str = "{{content}}{{eos}}"
    system: str = "{{content}}"
    prefix: str = ""
    default_system: str = ""
    joined: bool = False
    between: str = ""
    thought: tuple[str, str] | None = None

    @property
    def end_of_turn(self) -> str:
        """The token with which an answer ends; empty where it is the tokenizer's own."""
        tail = _PLACE.split(self.assistant)[-1].strip()
        return tail if re.fullmatch(r"<[^<>\s]+>|\[[^\[\]\s]+\]", tail) else ""


def turn_template(tool: str, name: str) -> TurnTemplate | None:
    """The template that a tool has by this name; None where it is not one of turns, each with its own text."""
    entry = _tables().get(tool, {}).get(name)
    return TurnTemplate(**entry) if entry else None


@cache
def _tables() -> Any:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def to_jinja(template: TurnTemplate, thinks: bool = True) -> str:
    """The template for messages without tools. `thinks`: an answer without a thought is trained to begin with an empty
    one; else each answer is, its thought taken away."""
    system, assistant = _expression(template.system), _expression(template.assistant)
    user = _expression(template.user)
    parts = [
        "{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}",
        f"{{%- set system = system or {_quote(template.default_system)} -%}}",
        f"{{{{- {_expression(template.prefix)} -}}}}",
        f"{{%- if system %}}{{% set content = system %}}{{{{- {system} }}}}{{% endif -%}}",
        "{%- for message in messages if message['role'] != 'system' -%}{%- set content = message['content'] -%}",
        f"{{%- if message['role'] == 'user' -%}}{{{{- {user} -}}}}",
        f"{{%- elif message['role'] == 'assistant' -%}}{_thought(template, thinks)}{{{{- {assistant} -}}}}",
        f"{{%- if not loop.last -%}}{{{{- {_quote(template.between)} -}}}}{{%- endif -%}}" if template.between else "",
        "{%- else -%}{{- raise_exception('this template has no turn of the role ' + message['role']) -}}{%- endif -%}",
        "{%- endfor -%}",
    ]
    if template.joined:
        parts[3] = ""
        joined = (
            f"{{%- if loop.first and system -%}}{{%- set content = {_expression(template.system, 'system')} + content"
        )
        parts[4] += joined + " -%}{%- endif -%}"
    if template.thought and not thinks:
        empty = _quote("".join(template.thought))
        parts.append(f"{{%- if add_generation_prompt -%}}{{{{- {empty} -}}}}{{%- endif -%}}")
    return "".join(parts)


def _thought(template: TurnTemplate, thinks: bool) -> str:
    if template.thought is None:
        return ""
    first, last = map(_quote, template.thought)
    begins, ends = (_quote(word.strip()) for word in template.thought)
    if thinks:
        missing = f"{begins} not in content and {ends} not in content"
        return f"{{%- if {missing} -%}}{{%- set content = {first} + {last} + content -%}}{{%- endif -%}}"
    cut = f"(content.split({first})[0] + content.split({last}, 1)[1]).lstrip('\\n')"
    removed = f"{{%- if {first} in content and {last} in content -%}}{{%- set content = {cut} -%}}{{%- endif -%}}"
    return f"{removed}{{%- set content = {first} + {last} + content -%}}"


def _expression(text: str, content: str = "content") -> str:
    """A text with places as an expression of Jinja's."""
    pieces = _PLACE.split(text)  # texts and the words of places, in turn
    terms = [_quote(piece) if at % 2 == 0 else _JINJA[piece] for at, piece in enumerate(pieces)]
    terms = [term.replace("content", content) if at % 2 else term for at, term in enumerate(terms)]
    return " ~ ".join(term for at, term in enumerate(terms) if at % 2 or term != '""') or '""'


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
