"""Export targets as a recipe and the command line write them: `gguf:q4_k_m`, `ollama`."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest
from lorakit.registry import EXPORTERS, ExporterSpec


@dataclass(frozen=True)
class ExportTarget:
    """An entry of the table of exporters, and the word after the colon; empty where the entry takes none."""

    spec: ExporterSpec
    argument: str

    @property
    def is_merged(self) -> bool:
        """Whether it is made from merged weights, whatever the run trained."""
        return self.spec.weights == "merged" or (self.spec.weights == "either" and self.argument == "merged")

    @property
    def is_adapter(self) -> bool:
        """Whether it is made from an adapter alone."""
        return self.spec.weights == "adapter" or (self.spec.weights == "either" and self.argument == "adapter")

    @property
    def folder_name(self) -> str:
        """The name of the folder that the export is written to."""
        return f"{self.spec.name}-{self.argument}" if self.argument else self.spec.name

    def __str__(self) -> str:
        return f"{self.spec.name}:{self.argument}" if self.argument else self.spec.name


def parse_target(text: str) -> ExportTarget:
    """The target that a word means; a ValueError with reason and remedy where it means none."""
    name, colon, argument = text.strip().lower().partition(":")
    if name not in EXPORTERS:
        near = nearest(name, EXPORTERS.names())
        remedy = f"Did you mean {near}?" if near else f"There are {', '.join(EXPORTERS.names())}."
        raise ValueError(f"{text!r} is not an export target. {remedy}")
    spec = EXPORTERS[name]
    if not spec.arguments:
        if colon:
            raise ValueError(f"{text!r}: {name} takes nothing after a colon. Write {name}.")
        return ExportTarget(spec, "")
    if not argument and spec.default is not None:
        return ExportTarget(spec, spec.default)
    if argument not in spec.arguments:
        near = nearest(argument, spec.arguments, parts=True) if argument else None
        remedy = f"Did you mean {name}:{near}?" if near else f"Write {name}: and one of {', '.join(spec.arguments)}."
        reason = f"{argument!r} is not a type that {name} takes" if argument else f"{name} needs a type"
        raise ValueError(f"{text!r}: {reason}. {remedy}")
    return ExportTarget(spec, argument)


def refuse_missing_modules(targets: Iterable[ExportTarget], where: str) -> None:
    """Refuse targets that need packages which are not installed, without importing any. `where` they are written."""
    for target in targets:
        if missing := [name for name in target.spec.modules if find_spec(name) is None]:
            raise UserError(
                f"{where}: {target} needs packages that are not installed ({', '.join(missing)}). Install them "
                "with pip install 'lorakit[export]', or leave the target out."
            )
