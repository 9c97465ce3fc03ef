"""`text`: documents, for continued pretraining."""

from collections.abc import Mapping
from typing import Any

from lorakit.data.conversations import Text
from lorakit.data.formats import columns
from lorakit.registry import FORMATS


@FORMATS.register("text", columns=("text",), conversations=False)
def text(record: Mapping[str, Any]) -> Text:
    """`text`: a document. Every token of it is trained (continued pretraining)."""
    return Text(columns.text(record, "text"))
