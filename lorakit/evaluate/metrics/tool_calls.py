"""Calls of tools in answers, in the forms in which chat templates write them, compared with those of the references.

Answers are read as they are decoded, without the tokenizer's special tokens: Mistral's `[TOOL_CALLS]` is not there,
Qwen's `<tool_call>`, which is no special token, is.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.evaluate.metrics.json_answers import canonical
from lorakit.registry import METRICS


@dataclass(frozen=True)
class ToolCall:
    """The function that is called, and its arguments. Both are empty where what has the marks of a call is none."""

    name: str = ""
    arguments: Any = None


_DECODER = json.JSONDecoder()
_OPENING = re.compile(r"[\[{]")
_NAMED = re.compile(
    r"(?:function([\w-]+)\n```json\n|to=(?:functions\.)?([\w.-]+?)\s*(?:commentary)?\s*(?:json)?|(?<![\w-])([\w-]+)(?::\d+)?)(?=\{)"
)
_FUNCTION = re.compile(
    r'<(?:\w+:)?(?:function=|invoke name=)"?([^">]+)"?>(.*?)(?:</(?:\w+:)?(?:function|invoke)>|\Z)', re.DOTALL
)
_PARAMETER = re.compile(r'<(?:\w+:)?parameter(?:=| name=)"?([^">]+)"?>(.*?)</(?:\w+:)?parameter>', re.DOTALL)
_NO_VALUE = (ValueError, SyntaxError, RecursionError, MemoryError)
# A form that this share of the commonest one's references has goes before it where it stands before it in the table.
_SHARE = 0.5


@METRICS.register("tool-calls", batched=True)
def tool_calls(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """The answer calls the reference's tools with equal arguments, in any order, or calls none where that calls none.

    `called`: a call is made where the reference makes one, and none where it does not. Of references with calls:
    `name`, the same functions are called; `arguments`, the arguments are equal as JSON. A call counts in the form that
    the references have, since only that one is understood by what serves the model.
    """
    read = form_of(references)
    return [_compare(read(answer), read(reference)) for answer, reference in zip(answers, references, strict=True)]


def _compare(given: list[ToolCall], wanted: list[ToolCall]) -> dict[str, float]:
    right = {"": _same(given, wanted), "called": bool(given) == bool(wanted)}
    if wanted:
        right["name"] = _same([call.name for call in given], [call.name for call in wanted])
        right["arguments"] = _same([call.arguments for call in given], [call.arguments for call in wanted])
    return {part: float(is_right) for part, is_right in right.items()}


def _same(given: list[Any], wanted: list[Any]) -> bool:
    """Whether two lists hold the same things, in any order."""
    rest = [*given]
    for one in wanted:
        if one not in rest:
            return False
        rest.remove(one)
    return not rest


def form_of(references: Sequence[str]) -> Callable[[str], list[ToolCall]]:
    """How the calls of these texts are read: by the form that most of those with calls have. One form may look like
    another one with more around it; the table has the more definite ones first."""
    counts = {form: sum(bool(form(text)) for text in references) for form in FORMS}
    most = max(counts.values())
    return next(form for form, count in counts.items() if count >= max(1, _SHARE * most)) if most else any_form


def any_form(text: str) -> list[ToolCall]:
    """The calls of a text in whichever form it has some."""
    return next(filter(None, (form(text) for form in FORMS)), [])


def tagged(text: str) -> list[ToolCall]:
    """`<tool_call>...</tool_call>` of Hermes and Qwen around JSON, of Qwen 3.5 around tags, of GLM around pairs."""
    return [_in_tag(block) for block in re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", text, re.DOTALL)]


def _in_tag(block: str) -> ToolCall:
    call = as_call(_value_of(block))
    if call is None and "<arg_key>" in block:
        name, _, rest = block.partition("<arg_key>")
        pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", "<arg_key>" + rest, re.DOTALL)
        call = ToolCall(name.strip(), _arguments(pairs))
    if call is None and re.fullmatch(r"\s*[\w.-]+\s*", block):  # GLM's call without arguments
        call = ToolCall(block.strip(), {})
    return call or next(iter(function_tags(block)), ToolCall())


def function_tags(text: str) -> list[ToolCall]:
    """`<function=NAME><parameter=KEY>VALUE</parameter></function>`, `<invoke name="NAME">` likewise, or JSON inside."""
    calls = []
    for name, block in _FUNCTION.findall(text):
        pairs, value = _PARAMETER.findall(block), _value_of(block)
        arguments = canonical(value) if isinstance(value, Mapping) and not pairs else _arguments(pairs)
        calls.append(ToolCall(name, arguments))
    return calls


def colon_calls(text: str) -> list[ToolCall]:
    """Gemma 4's `call:NAME{key:<|"|>text<|"|>,other:3}`."""
    calls = []
    for name, block in re.findall(r"call:([\w.-]+)(\{.*?)(?=call:[\w.-]+\{|\Z)", text, re.DOTALL):
        # Texts first: what stands in them is no key.
        quoted = re.sub(
            r'<\|"\|>(.*?)<\|"\|>|([\w-]+)(?=:)|\b(None)\b',
            lambda part: "null" if part[3] else json.dumps(part[2] or part[1]),
            block,
            flags=re.DOTALL,
        )
        value = _first_value(quoted, 0)[0]
        calls.append(ToolCall(name, canonical(value) if isinstance(value, Mapping) else block.strip()))
    return calls


def python_calls(text: str) -> list[ToolCall]:
    """A list of calls as in Python, `[NAME(key="text", other=3)]`, of LFM 2 and Llama 4."""
    match = re.search(r"\[\s*[A-Za-z_][\w.]*\(.*\)\s*\]", text, re.DOTALL)
    try:
        node: Any = ast.parse(match[0], mode="eval").body if match else None
    except _NO_VALUE:
        return []
    nodes = node.elts if isinstance(node, ast.List) else []
    calls = []
    for call in nodes:
        if not isinstance(call, ast.Call):
            return []
        pairs = {str(at): value for at, value in enumerate(call.args)}
        pairs |= {str(one.arg): one.value for one in call.keywords}
        arguments = {key: canonical(_python_value(value)) for key, value in pairs.items()}
        calls.append(ToolCall(ast.unparse(call.func), arguments))
    return calls


def _python_value(node: Any) -> Any:
    """The value of a literal, in which JSON's words are values too; the text of any other expression."""
    match node:
        case ast.Name(id="true" | "false" | "null" as word):
            return _value_of(word)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_python_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {str(_python_value(key)): _python_value(value) for key, value in zip(keys, values, strict=True)}
    try:
        return ast.literal_eval(node)
    except _NO_VALUE:
        return ast.unparse(node)


def json_calls(text: str) -> list[ToolCall]:
    """Objects, or lists of them, with a name and arguments, of Llama 3, Mistral, Command R, Granite and others."""
    calls: list[ToolCall] = []
    start = 0
    while match := _OPENING.search(text, start):
        value, start = _first_value(text, match.start())
        calls += filter(None, map(as_call, value if isinstance(value, list) else [value]))
    return calls


def named_objects(text: str) -> list[ToolCall]:
    """A name with the object of its arguments after it, of Mistral from its tokenizer v11 on, DeepSeek and gpt-oss."""
    calls: list[ToolCall] = []
    start = 0
    while match := _NAMED.search(text, start):
        value, start = _first_value(text, match.end())
        if isinstance(value, Mapping):
            calls.append(ToolCall(match[1] or match[2] or match[3], canonical(value)))
    return calls


FORMS = (tagged, function_tags, colon_calls, python_calls, json_calls, named_objects)
"""The forms in which chat templates write calls."""


def as_call(value: Any) -> ToolCall | None:
    """The call that a JSON value is: an object with a name and arguments under the words that templates have for them,
    or one with such an object as its `function`."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping):
        return None
    name = next((value[key] for key in ("name", "tool_name") if isinstance(value.get(key), str)), None)
    arguments = next((value[key] for key in ("arguments", "parameters") if key in value), None)
    if isinstance(arguments, str):
        arguments = _value_of(arguments)
    return ToolCall(name, canonical(arguments)) if name is not None and isinstance(arguments, Mapping) else None


def _arguments(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Arguments that are written without quotes: a value is JSON where it is JSON, or Python's word for one, as Jinja
    writes it, else a text."""
    words = {"True": True, "False": False, "None": None}
    return {key.strip(): canonical(words.get(value.strip(), _value_of(value))) for key, value in pairs}


def _value_of(text: str) -> Any:
    """The JSON value that a text is, or the text."""
    try:
        return json.loads(text)
    except _NO_VALUE:
        return text.strip()


def _first_value(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, None where none does, and where to go on."""
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError:  # nested more deeply than any call is: so is what begins inside
        return None, len(text)
    except ValueError:
        return None, start + 1
