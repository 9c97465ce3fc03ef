"""Formats: what one raw record says. One plain function each, one format a file.

A format function takes the record as a dict, and the format's settings where it has some, and returns a Conversation,
a Text or Tokens (lorakit/data/conversations.py), or raises `RowError` with what is wrong. `FormatSpec` in
lorakit/registry.py has what it is registered with.
"""

import importlib

from lorakit.data.conversations import Conversation as Conversation
from lorakit.data.conversations import Text as Text
from lorakit.data.conversations import Tokens as Tokens
from lorakit.data.formats.choice import can_be_read as can_be_read
from lorakit.data.formats.choice import columns_read as columns_read
from lorakit.data.formats.choice import detect as detect
from lorakit.data.formats.choice import needed as needed
from lorakit.data.formats.choice import said as said
from lorakit.data.formats.judged import flags_of as flags_of
from lorakit.data.formats.judged import pairs_of as pairs_of
from lorakit.data.formats.judged import refuse_flagged as refuse_flagged
from lorakit.data.formats.judged import refuse_judged as refuse_judged
from lorakit.data.rows import RowError as RowError
from lorakit.data.rows import kind as kind

# The order is that of the table: documents and messages name them so.
for _name in (
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "text",
    "classification",
    "oasst",
    "tokens",
):
    importlib.import_module(f"lorakit.data.formats.{_name}")
