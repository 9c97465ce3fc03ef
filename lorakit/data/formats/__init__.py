"""Formats: what one raw record holds. A plain function each, which takes the record as a dict, and the format's
settings where it has some, and returns a Conversation, a Text or Tokens, or raises a `RowError`. `FormatSpec`
(lorakit/registry.py) has what it is registered with."""

import importlib

from lorakit.data.formats.columns import columns_read, detect, parse_record, required_columns
from lorakit.data.rows import Conversation, RowError, Text, Tokens, kind

__all__ = ["Conversation", "RowError", "Text", "Tokens"]
__all__ += ["columns_read", "detect", "kind", "parse_record", "required_columns"]

# In the order in which docs and messages name them.
for _name in ("messages", "text_columns", "template", "tokens"):
    importlib.import_module(f"lorakit.data.formats.{_name}")
