"""Chat templates: those that the installed trl carries, damaged. Each row is rendered exactly, dropped with its reason,
or the template is refused as a user's; none runs without end or takes all memory."""

import json
import random
import re
from pathlib import Path
from typing import Any

import trl

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.examples import examples_of
from lorakit.errors import UserError
from lorakit.model.resolve import resolve_base
from lorakit.model.tokenizer import load_tokenizer
from lorakit.progress import Silent
from lorakit.recipe.schema import Data
from tools.torture.cases import BrokenPromiseError, Part
from tools.torture.command import call_in_fork
from tools.torture.mutate import mutate_bytes, mutate_text
from tools.torture.workshop import CHATML, make_base, messages

_PIECES = [
    *("{%", "%}", "{{", "}}", "{#", "#}", "{% raw %}", "{% endfor %}", "{% endif %}", "{% break %}", "{% continue %}"),
    *("{{ messages }}", "{{ messages[0] }}", "{{ message.content }}", "{{ nothing.of.it }}", "{{ 1 / 0 }}"),
    *("{{ raise_exception('no') }}", "{{ strftime_now('%d %B %Y') }}", "{{ tools | tojson }}", "{{ bos_token }}"),
    *("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "{{ 'x' * 999999999 }}"),
    *("{% for a in range(9999999) %}{{ a }}{% endfor %}", "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__ }}"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% include 'x' %}", "{% import '/etc/passwd' as x %}"),
    *("{{ 2 ** 99999999 }}", "{{ '%999999999d' | format(1) }}", "{{ 'a' | center(999999999) }}", "{{ self }}"),
    *("{% set x = messages.append(1) %}", "{% set ns = namespace(a=1) %}", "{{ [1] | batch(0) | list }}", "<|im_end|>"),
    *("{%- generation -%}", "{% endgeneration %}", "{{ lipsum(9999) }}", "{{ '\\ud800' }}", "\x00", "(" * 300),
]


def _prepare(folder: Path) -> tuple[Path, list[str]]:
    call_in_fork(lambda: _make(folder / "base"))
    carried = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    return folder / "base", [CHATML, *(path.read_text(encoding="utf-8") for path in carried)]


def _make(folder: Path) -> None:
    make_base(folder)


def _rows(chance: random.Random) -> list[dict[str, Any]]:
    system = {"role": "system", "content": "Answer in JSON."}
    rows = []
    for number in range(6):
        talk = messages(number)["messages"]
        if number % 3 == 1:
            talk = [system, *talk]
        if number % 3 == 2:
            talk = [*talk, *messages(number + 50)["messages"]]
        rows.append({"messages": talk})
    return rows


def _run(shared: tuple[Path, list[str]], chance: random.Random, place: Path, number: int) -> str:
    folder, templates = shared
    text = chance.choice(templates)
    if chance.random() < 0.85:
        text = mutate_text(chance, text, _PIECES, 2)
    raw = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.15:
        raw = mutate_bytes(chance, raw)
    path = place / "own.jinja"
    path.write_bytes(raw)
    rows = _rows(chance)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        base = resolve_base(str(folder), "main", Silent())
        tokenizer = load_tokenizer(base, str(path))
        words = sorted({*re.findall(r"<\|[^|<>\n]{1,30}\|>|</?[a-z_]{1,20}>|\[/?[A-Z_]{2,20}\]", text)})
        tokenizer.add_tokens(words, special_tokens=True)
        stops = [word for word in words if re.search("end|eot|</s>|im_end", word)] or ["<|im_end|>"]
        template = ChatTemplate(tokenizer, "assistant", None, tuple(stops))
        data = Data(train=str(place / "rows.jsonl"), broken=chance.choice(["drop", "drop", "error"]), max_length=8192)
        train, _ = examples_of(data, template, Silent())
    except UserError as error:
        if not str(error).strip():
            raise BrokenPromiseError("an empty message") from error
        return "refused"
    if train.report.read != len(rows):
        raise BrokenPromiseError(f"{len(rows)} rows in the file, {train.report.read} accounted for")
    return "trained, some dropped" if train.report.dropped.total else "trained"


PART = Part("templates", 400, _prepare, _run, seconds=60, memory=3 << 30)
