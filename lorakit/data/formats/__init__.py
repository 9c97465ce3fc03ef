"""Formats: what one raw record holds. A plain function each, which takes the record as a dict, and the format's
settings where it has some, and returns a Conversation, a Text or Tokens, or raises a `RowError`. `FormatSpec`
(lorakit/registry.py) has what it is registered with."""

import importlib

from lorakit.data.conversations import Conversation as Conversation
from lorakit.data.conversations import Text as Text
from lorakit.data.conversations import Tokens as Tokens
from lorakit.data.formats.columns import columns_read as columns_read
from lorakit.data.formats.columns import detect as detect
from lorakit.data.formats.columns import parse_record as parse_record
from lorakit.data.formats.columns import required_columns as required_columns
from lorakit.data.rows import RowError as RowError
from lorakit.data.rows import kind as kind

# In the order in which docs and messages name them.
for _name in ("messages", "text_columns", "oasst", "tokens"):
    importlib.import_module(f"lorakit.data.formats.{_name}")
