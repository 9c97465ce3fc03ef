"""A key whose value is the word of a table's entry, or a mapping of that word to the entry's settings.

The mapping's keys are read from the table, so that errors, documents and the JSON schema know every entry's settings.
"""

from typing import Any

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, create_model, model_serializer

from lorakit.recipe.fields import word_of
from lorakit.registry import ADAPTERS, FORMATS, METRICS, AnyTable, Section


class _OneEntry(Section):
    # The keys are made from the table: there is no source text with docstrings under them.
    model_config = ConfigDict(use_attribute_docstrings=False, json_schema_extra={"minProperties": 1})

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The entries that are not chosen are left out."""
        return {name: value for name, value in handler(self).items() if value is not None}


def _settings_by_name(table: AnyTable, name: str) -> Any:
    keys: dict[str, Any] = {
        entry.name: (entry.settings | None, Field(default=None, description=f"Settings of {entry.name}."))
        for entry in table
        if entry.settings
    }
    purpose = f"One {table.noun}, with its settings."
    return create_model(name, __base__=_OneEntry, __module__=__name__, __doc__=purpose, **keys)


FormatSettings: Any = _settings_by_name(FORMATS, "FormatSettings")
KindSettings: Any = _settings_by_name(ADAPTERS, "KindSettings")
MetricSettings: Any = _settings_by_name(METRICS, "MetricSettings")
_FORMAT = word_of(FORMATS, "auto")
_KIND = word_of(ADAPTERS)
_METRIC = word_of(METRICS)
Format: Any = _FORMAT | FormatSettings
AdapterKind: Any = _KIND | KindSettings
Metric: Any = _METRIC | MetricSettings
