"""`prompt-completion`: what is given, and what the model is to say."""

import re
from collections.abc import Mapping
from typing import Any

from lorakit.data.conversations import Conversation
from lorakit.data.formats.columns import add_system_and_tools, question_and_answer, text
from lorakit.data.formats.message import messages_of, stored_as_text, with_given_beginnings
from lorakit.data.rows import RowError
from lorakit.registry import FORMATS

# The beginning of a list of messages that a table holds as text.
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


@FORMATS.register("prompt-completion", columns=("prompt", "completion"), optional=("system", "tools"))
def prompt_completion(record: Mapping[str, Any]) -> Conversation:
    """`prompt` and `completion`: two texts, or two lists of messages of which those of the completion are trained."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if all(isinstance(side, str) and _MESSAGES.match(side) for side in (prompt, completion)):
        prompt, completion = stored_as_text(str(prompt), "prompt"), stored_as_text(str(completion), "completion")
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return add_system_and_tools(record, question_and_answer(text(record, "prompt"), text(record, "completion")))
    given, answers = messages_of(prompt, "prompt"), messages_of(completion, "completion")
    if all(message["role"] != "assistant" for message in answers):
        raise RowError("the column 'completion' has no assistant message: there is nothing to train")
    given = [{**message, "train": False} if message["role"] == "assistant" else message for message in given]
    if given[-1]["role"] == answers[0]["role"] == "assistant":
        given[-1] = {"prefix": True, **given[-1]}
    return add_system_and_tools(record, Conversation(with_given_beginnings([*given, *answers])))
