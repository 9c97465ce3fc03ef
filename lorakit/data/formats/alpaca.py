"""`alpaca`: an instruction, what it is about, and the answer."""

from collections.abc import Mapping
from typing import Any

from lorakit.data.conversations import Conversation
from lorakit.data.formats.columns import add_system_and_tools, is_empty, question_and_answer, text
from lorakit.registry import FORMATS


@FORMATS.register("alpaca", columns=("instruction", "output"), optional=("input", "system"))
def alpaca(record: Mapping[str, Any]) -> Conversation:
    """`instruction`, optionally `input` (added below it after an empty line), and `output`."""
    prompt = text(record, "instruction")
    if not is_empty(record.get("input")):
        prompt = f"{prompt}\n\n{text(record, 'input')}"
    return add_system_and_tools(record, question_and_answer(prompt, text(record, "output")))
