"""No two classes of lorakit share a name, and no identifier uses a participle that could mean anything.

python tools/check_names.py [PATH...]
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = {"asked", "begun", "brought", "found", "held", "kept", "looked", "said", "taken", "told"}
"""Each has stood for five things at once. `held_out` is a term of the field."""


def main() -> None:
    """Print every identifier that breaks a rule, and exit with 1 where there is one."""
    paths = [Path(given).resolve() for given in sys.argv[1:]] or [ROOT / "lorakit"]
    classes = defaultdict(list)
    problems = []
    for path in sorted(file for given in paths for file in ([given] if given.is_file() else given.rglob("*.py"))):
        where = path.relative_to(ROOT)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name.lstrip("_")].append(f"{where}:{node.lineno}")
        problems += [f"{where}:{line}: {name}" for name, line in sorted(set(_bound(tree))) if _is_vague(name)]
        problems += [f"{where}: {path.stem}"] if _is_vague(path.stem) else []
    problems += [
        f"{', '.join(places)}: {name} names {len(places)} classes" for name, places in classes.items() if places[1:]
    ]
    print(
        "\n".join(problems) or "names: every class has one of its own, no identifier uses " + ", ".join(sorted(WORDS))
    )
    raise SystemExit(bool(problems))


def _is_vague(name: str) -> bool:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", re.sub("held_?out", "", name, flags=re.IGNORECASE))
    return not WORDS.isdisjoint(word.lower() for word in words)


def _bound(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every name that the module gives to something, and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


if __name__ == "__main__":
    main()
