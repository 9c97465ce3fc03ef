"""The recipe's reference, read from the schema: a JSON schema for editors, a Markdown page for people."""

import json
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lorakit.recipe.rules import RULES
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import alternatives_of, default_at, describe, fields, section_of
from lorakit.registry import ADAPTERS, EXPORTERS, FORMATS, METRICS, QUANTIZERS, TRACKERS, AnyTable

EXTENDS = "Files that this one builds on: a path, or a list of paths of which later ones win, relative to this file."

_TABLES: dict[str, AnyTable] = {
    "data.format": FORMATS,
    "adapter.kind": ADAPTERS,
    "model.quantization": QUANTIZERS,
    "evaluate.metrics": METRICS,
    "track": TRACKERS,
    "output.export": EXPORTERS,
}

_INTRO = """# The recipe

This page is generated from `lorakit/recipe/schema.py` by `python tools/generate_docs.py`.

A recipe is one YAML file. Only `model.base` and `data.train` must be written:

```yaml
# yaml-language-server: $schema=recipe.schema.json
model:
  base: HuggingFaceTB/SmolLM2-135M-Instruct
data:
  train: data/train.jsonl
  eval: 0.1
```

Nothing in it is ignored: an unknown key, a value that a key does not take, a combination that cannot work are errors.
All of them come at once, each with its file, line and column, the reason, and what to write instead.
[recipe.schema.json](recipe.schema.json) lets an editor check and complete the keys while you write.

## How YAML is read

By the core rules of YAML 1.2, strictly:

- `1e-4`, `.5`, `1.`, `0x1f` and `0o17` are numbers; `010` is ten; `1_000` and `12:30` are texts.
- Only `true` and `false` are booleans; `yes`, `no`, `on` and `off` are texts. `null`, `~` and nothing are null.
- A number or a boolean in quotes is a text, and an error where a number is wanted.
- Errors: a key written twice, a key that is not a text, `<<`, tags (`!name`), `.inf` and `.nan`, a second document, a
  tab used for indentation, a file that is not UTF-8 or larger than 1 MB.
- Anchors and aliases (`&a`, `*a`) work within one file.

## Several files: `extends`

```yaml
extends: hardware/8gb    # a shipped part, a path, or a list: [model.yaml, hardware/8gb]
```

A path is relative to the file in which it is written; `hardware/8gb` and its like are parts that come with lorakit, one
for each size of card ([configs/README.md](../configs/README.md)). Mappings merge key by key; lists and single values
replace. Later files of the list win over earlier ones, and the extending file wins over all of them. `null` sets null;
where a key takes no null, it removes what the extended file says, and the default applies again. An error in an
extended file names that file.

## One setting from the command line: `--set`

`--set train.learning_rate=1e-4` overrides what all files say. The value is read by the same YAML rules,
so that `--set 'evaluate.metrics=[exact-match, json-valid]'` is a list, and its errors have the same form. A list is set
as a whole.

## Paths

A path is relative to the file in which it is written; with `--set`, to the working directory. `~` is your home folder;
a variable of the environment, such as `${DATA}`, is refused: on the command line the shell fills it in.
Where a key takes *a path or a hub id*, a text is a path when it begins with `/`, `./`, `../` or `~`, when it ends like
a file of its kind (`.jsonl`, `.json`, `.csv`, `.parquet`; `.gguf` for models), or when it exists; else it is a hub id.
A path that does not exist is an error. `output.dir` alone is relative to the working directory.

## Keys
"""


_MOST_NAMES = 4  # of keys that hold the same section, in its heading
_HEAD = ["| key | accepts | default | meaning |", "|---|---|---|---|"]


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file. No section or key of it is required: a parent may hold them."""
    schema = Recipe.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        section.pop("title", None)
        for key in section["properties"].values():
            key.pop("title", None)
    for section in (schema, schema["$defs"]["Model"], schema["$defs"]["Data"]):
        section.pop("required")
    path = {"type": "string", "minLength": 1}
    extends = {"description": EXTENDS, "anyOf": [path, {"type": "array", "items": path}]}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lorakit recipe", **schema}


def markdown() -> str:
    """The text of docs/recipe.md."""
    sections = {name: section for name, annotation in fields(Recipe).items() if (section := section_of(annotation))}
    top = [f"| `extends` | a path, or a list of paths | none | {EXTENDS} |"]
    top += [_row(Recipe, name) for name in fields(Recipe) if name not in sections]
    lines = [_INTRO, "### At the top", "", *_HEAD, *top, ""]
    for name, annotation in fields(Recipe).items():
        if name not in sections and (inner := _section_in(annotation)):
            lines += [*_section(f"`{name}` as a mapping", inner), *_sections_inside(name, inner)]
    for name, section in sections.items():
        lines += [*_section(f"`{name}`", section), *_sections_inside(name, section)]
    lines += ["## Combinations", "", *(f"- {rule.__doc__}" for rule, _ in RULES), "", "## Words", ""]
    for name, table in _TABLES.items():
        lines += [f"### `{name}`: each {table.noun}", ""]
        lines += ["| word | meaning |", "|---|---|"]
        lines += [f"| `{entry.name}` | {entry.summary} |" for entry in table]
        lines.append("")
    return "\n".join(lines)


def _sections_inside(name: str, section: type[BaseModel]) -> list[str]:
    lines = []
    for nested, names in _inside(name, section).items():
        shown = names if len(names) <= _MOST_NAMES else [names[0], "the like"]
        lines += _section(f"{' and '.join(shown)} as a mapping", nested)
    return lines


def _inside(name: str, section: type[BaseModel]) -> dict[type[BaseModel], list[str]]:
    """Every section inside this one, and the names under which it stands: outer ones first, each once.

    What is inside a section that stands under several names is named under the first of them.
    """
    sections: dict[type[BaseModel], list[str]] = {}
    waiting = [(name, section)]
    for prefix, outer in waiting:  # which grows
        for key, annotation in fields(outer).items():
            if inner := _section_in(annotation):
                waiting += [] if inner in sections else [(f"{prefix}.{key}", inner)]
                sections.setdefault(inner, []).append(f"`{prefix}.{key}`")
    return sections


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, or that the items of its list are."""
    items = [branch.of for branch in alternatives_of(annotation) if branch.kind is list]
    return next((section for part in (annotation, *items) if (section := section_of(part))), None)


def _section(title: str, section: type[BaseModel]) -> list[str]:
    purpose = (section.__doc__ or "").strip()
    return [f"### {title}", "", purpose, "", *_HEAD, *(_row(section, key) for key in fields(section)), ""]


def _row(section: type[BaseModel], name: str) -> str:
    annotation, default = fields(section)[name], default_at(section, name)
    accepted, inner = describe(annotation), _section_in(annotation)
    if inner:  # which has its own table
        accepted = accepted.replace(f"the keys {', '.join(fields(inner))}", "the keys below")
    written = "those below" if isinstance(default, BaseModel) else default
    if default is not PydanticUndefined and not isinstance(written, str):
        written = json.dumps(written).replace('"', "")
    written = "required" if default is PydanticUndefined else f"`{written}`"
    meaning = section.model_fields[name].description or ""
    cells = [cell.replace("|", "\\|") for cell in (accepted, written, meaning)]
    return f"| `{name}` | {' | '.join(cells)} |"
