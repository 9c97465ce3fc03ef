"""The rule for `model.template_date`, by what a chat template's source says; without transformers."""

from typing import Any

from lorakit.errors import UserError


def asks_for_date(templates: Any) -> bool:
    """Whether a chat template, or one of several by name, writes today's date."""
    return "strftime_now" in str(templates)


def refuse_day(given: str | None, writes: bool) -> None:
    """Refuse a day for a template that writes none, and none for one that writes it.

    Raises:
        UserError: it is one of these.
    """
    if writes and given is None:
        raise UserError("model.template_date: null: the chat template writes a date. Write auto, or a day.")
    if not writes and given not in ("auto", None):
        raise UserError(f"model.template_date: {given}: the chat template writes no date. Leave the key out.")
