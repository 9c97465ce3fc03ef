"""Write the docs that are generated from the code; with --check, only say which of them are not current."""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from lorakit.recipe import docs as reference

GENERATED: dict[str, Callable[[], str]] = {
    "docs/recipe.md": reference.markdown,
    "docs/recipe.schema.json": lambda: json.dumps(reference.json_schema(), indent=2, ensure_ascii=False) + "\n",
}


def stale(root: Path, generated: Mapping[str, Callable[[], str]]) -> dict[str, str]:
    """The files under `root` that are not current, with the text that they should have."""
    texts = {name: text() for name, text in generated.items()}
    return {name: text for name, text in texts.items() if not _says(root / name, text)}


def _says(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def main(arguments: list[str] | None = None, root: Path = Path(__file__).parent.parent) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 and name the files that are not current"
    )
    options = parser.parse_args(arguments)
    found = stale(root, GENERATED)
    for name, text in found.items():
        if options.check:
            print(f"{name} is not current: run python tools/generate_docs.py")
            continue
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {name}")
    return 1 if options.check and found else 0


if __name__ == "__main__":
    raise SystemExit(main())
