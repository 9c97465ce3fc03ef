"""What a server answers to the rows, asked as chat messages: its own chat template and stop tokens are what is tested.

Answers of a server are not kept for other commands, since another model may stand behind its address tomorrow. While
one command asks, its answers go into the cache, and they leave it when the last one is there: a try that broke off goes
on where it was.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lorakit.data.answers import after_thought
from lorakit.data.chat_prompts import ChatPrompt, prompt_before, read_conversations
from lorakit.distributed.processes import on_first
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.inference import EvalModel, digest, open_cache
from lorakit.evaluate.models import EvalModelSpec, ModelSet
from lorakit.evaluate.rendering import RenderedRows, data_section, row_template
from lorakit.model.endpoint import Endpoint
from lorakit.model.endpoint_requests import ServerReply, post_all
from lorakit.prepare import GivenRows
from lorakit.progress import Progress
from lorakit.recipe.problem import one_line

PROMPT = "chat"
"""The key of a row's `ChatPrompt`, in rows that a server is asked."""
_CHAT = "/chat/completions"


@dataclass(frozen=True)
class ServedAnswer:
    """One answer: its text as it came, whether the model ended it, how many tokens the server counts in the prompt
    (None where it does not say), and what it calls its own state."""

    text: str
    ended: bool
    prompt_tokens: int | None
    fingerprint: str | None


@dataclass(frozen=True, eq=False)
class ServedAnswers:
    """A server's answers to the rows with an answer, in their order."""

    endpoint: Endpoint
    answers: list[ServedAnswer]

    def texts(self, tokenizer: Any) -> list[str]:
        """The answers without the thoughts before them, where the server leaves these in the text."""
        after = [after_thought(one.text, tokenizer) for one in self.answers]
        return [one.text if text is None else text.lstrip() for one, text in zip(self.answers, after, strict=True)]

    def identity(self) -> dict[str, Any]:
        fingerprints = sorted({one.fingerprint for one in self.answers if one.fingerprint})
        return self.endpoint.identity() | {"system_fingerprints": fingerprints}


def add_chat_prompts(
    whole: Sequence[RenderedRows], model_set: ModelSet, file: Path | GivenRows | None, progress: Progress
) -> tuple[list[RenderedRows], list[str]]:
    """The renderings, in which rows have the messages that a server is asked, and notes. Rows that no chat request can
    ask for are left out for every model. Without a server among the models nothing changes."""
    number = next((at for at, spec in enumerate(model_set.specs) if spec.endpoint), None)
    if number is None:
        return list(whole), []
    rendered = whole[number]
    data, source = data_section(model_set, file)
    template = row_template(rendered.tokenizer, None, model_set.prepared)
    places = {rendered.rows[at]["where"] for at in rendered.with_answer}
    conversations = read_conversations(data, template, places, progress)
    prompts: dict[int, ChatPrompt] = {}
    for at, tokens, reference in zip(rendered.with_answer, rendered.prompts, rendered.references, strict=True):
        conversation = conversations.get(rendered.rows[at]["where"])
        prompt = prompt_before(conversation, tokens, reference) if conversation else None
        if prompt:
            prompts[at] = prompt
    lost = {*rendered.with_answer} - prompts.keys()
    if lost and len(lost) == len(rendered.rows):
        raise UserError(
            f"{source}: a chat request can ask for none of these rows: they are token ids, their answers call tools, "
            "or their answers' beginnings are given. Leave the server out, or give other rows with --data FILE."
        )
    notes = []
    if lost:
        what = "token ids, answers that call tools, or answers whose beginning is given"
        notes.append(f"{len(lost):,} rows are left out for every model, since no chat request asks for them: {what}")
    remaining = [at for at in range(len(rendered.rows)) if at not in lost]
    changed: dict[int, RenderedRows] = {}
    for one in whole:
        rows = [one.rows[at] | ({PROMPT: prompts[at]} if at in prompts else {}) for at in remaining]
        changed.setdefault(id(one), replace(one, rows=rows))
    return [changed[id(one)] for one in whole], notes


def ask_for_rows(eval_model: EvalModel, max_new_tokens: int) -> ServedAnswers:
    """A server's answers to the rows that have one. Of several processes the first one asks."""
    rows = [eval_model.rendered.rows[at] for at in eval_model.rendered.with_answer]
    prompts, places = [row[PROMPT] for row in rows], [row["where"] for row in rows]
    spec, cache, progress = eval_model.spec, eval_model.cache, eval_model.progress
    assert spec.endpoint
    # The answers alone go to the others: the endpoint holds the key to its server.
    answers = on_first(lambda: ask_server(spec, prompts, places, max_new_tokens, cache, progress).answers)
    return ServedAnswers(spec.endpoint, answers)


def ask_server(
    spec: EvalModelSpec,
    prompts: Sequence[ChatPrompt],
    places: Sequence[str],
    max_new_tokens: int,
    cache: bool,
    progress: Progress,
) -> ServedAnswers:
    """A server's answer to each prompt, the likeliest token each time; `places` name the prompts in errors. Stop tokens
    are not sent: the server has to know them. A LorakitError where it fails, a UserError where it refuses."""
    assert spec.endpoint
    endpoint, decoding = spec.endpoint, {"temperature": 0, "max_tokens": max_new_tokens, "seed": 0}
    bodies = [{"model": endpoint.model, **prompt.to_openai(), **decoding} for prompt in prompts]
    keys = [digest(body) for body in bodies]
    file = open_cache("served", endpoint.identity(), cache)
    missing = list({key: at for at, key in reversed([*enumerate(keys)]) if key not in file.lines}.values())[::-1]
    reused = len({*keys} & file.lines.keys())
    if reused and file.path:
        when = datetime.fromtimestamp(file.path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        progress.say(
            f"{spec.name}: {reused:,} answers are those of a try that broke off ({when}); --no-cache asks anew"
        )
    with progress.bar(f"{spec.name}: answers", total=len(missing)) as bar:

        def save(at: int, reply: ServerReply) -> None:
            answer = read_answer(endpoint, reply, max_new_tokens, places[missing[at]])
            file.add({keys[missing[at]]: asdict(answer)})
            bar.advance()

        chosen = ([bodies[at] for at in missing], save, [places[at] for at in missing])
        try:
            asyncio.run(post_all(endpoint.address, _CHAT, *chosen))
        except LorakitError as error:
            stored = len({*keys} & file.lines.keys())
            more = (
                f" {stored:,} of {len({*keys}):,} answers are kept: the same command goes on."
                if file.path and stored
                else ""
            )
            raise type(error)(f"{error}{more}") from error
    if file.path:
        file.path.unlink(missing_ok=True)
    return ServedAnswers(endpoint, [ServedAnswer(**file.lines[key]) for key in keys])


def read_answer(endpoint: Endpoint, reply: ServerReply, max_new_tokens: int, place: str) -> ServedAnswer:
    """The answer in a reply; a LorakitError where there is none."""
    choice, usage = next(iter(_list(reply.body.get("choices"))), None), reply.body.get("usage")
    message = choice.get("message") if isinstance(choice, dict) else None
    text = message.get("content") if isinstance(message, dict) else 0
    if not isinstance(choice, dict) or not isinstance(message, dict) or not isinstance(text, str | None):
        what = f"{endpoint.url}: the server answers without a choice: {one_line(json.dumps(reply.body), 200)}"
        raise LorakitError(f"{what}. Look at its log. It was at {place}.")
    calls = [one.get("function", one) if isinstance(one, dict) else one for one in _list(message.get("tool_calls"))]
    counts = usage if isinstance(usage, dict) else {}
    reason, written = choice.get("finish_reason"), counts.get("completion_tokens")
    cut = reason == "length" or (reason is None and isinstance(written, int) and written >= max_new_tokens)
    count, fingerprint = counts.get("prompt_tokens"), reply.body.get("system_fingerprint")
    return ServedAnswer(
        "".join([text or "", *(json.dumps(call, ensure_ascii=False) for call in calls)]),
        not cut,
        count if isinstance(count, int) else None,
        fingerprint if isinstance(fingerprint, str) else None,
    )


def _list(value: Any) -> list[Any]:
    """A list that a server sent, or none."""
    return value if isinstance(value, list) else []
