"""What the files of a packed run say of the machine that packed it: paths become relative to the run's folder, as its
recipe has them; what is left of the home and the working folder, tokens and keys are taken out."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakit.export.private_text import redact
from lorakit.recipe.paths import is_path, relative_path

_TEXTS = (".json", ".jsonl", ".md", ".yaml", ".txt")
_LARGEST = 64 << 20  # vocabularies are smaller
_HOMES = (Path("/home"), Path("/Users"))


class LocalNames:
    """Rewrites texts. `paths`: those that lead out of the run's folder, `moved`: the names that files get in it."""

    def __init__(self, folder: Path, paths: Iterable[str], moved: Mapping[str, str]) -> None:
        names, self._in_recipe = dict[str, str](), dict[str, str]()
        for path in (one for one in paths if is_path(one) and one.count("/") > 1):
            relative = relative_path(path, folder.absolute())
            names |= {path: _without_home(path, folder) or relative}
            if names[path] != relative:
                names[relative] = self._in_recipe[relative] = names[path]  # as recipe and manifest have it
        names |= dict.fromkeys((str(folder.absolute()), str(folder.resolve())), ".")
        self._names = {**names, **moved}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._escaped = [json.dumps(name)[1:-1] for name in longest_first if not name.isascii()]  # as JSON may have it
        self._pattern = re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?![\\w-]|\\.\\w)")

    def text(self, text: str) -> str:
        """A text without the names of this machine."""
        return redact(self._pattern.sub(lambda match: self._names[match[0]], text), Path.cwd())

    def recipe_text(self, text: str) -> str:
        """A text of the recipe, whose paths are relative to its folder already: one that begins as a path is none."""
        return redact(self._in_recipe.get(text, text), Path.cwd())

    def value(self, value: Any, rewrite: Callable[[str], str] | None = None) -> Any:
        """A JSON value, in all of its texts and keys, each by `rewrite`, else as `text` does."""
        rewrite = rewrite or self.text
        if isinstance(value, str):
            return rewrite(value)
        if isinstance(value, list):
            return [self.value(one, rewrite) for one in value]
        if isinstance(value, dict):
            texts = {key: rewrite(key) if isinstance(key, str) else key for key in value}
            return {texts[key]: self.value(one, rewrite) for key, one in value.items()}
        return value

    def file(self, path: Path) -> bytes | Path:
        """The content of a file without these names; the file itself where it has none of them."""
        if path.suffix not in _TEXTS or path.stat().st_size > _LARGEST:
            return path
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            return path
        if self.text(text) == text and not any(name in text for name in self._escaped):
            return path
        try:
            changed = self._rewrite(text, path.suffix)
        except (ValueError, RecursionError):
            changed = self.text(text)
        return path if changed == text else changed.encode()

    def _rewrite(self, text: str, suffix: str) -> str:
        if suffix == ".json":
            value = json.loads(text)
            same = self.value(value) == value
            return text if same else json.dumps(self.value(value), indent=2, ensure_ascii=False) + "\n"
        if suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines()]
            return "".join(f"{json.dumps(self.value(line), ensure_ascii=False)}\n" for line in lines)
        return self.text(text)


def _without_home(path: str, folder: Path) -> str | None:
    """A path in a home folder as that of a run elsewhere has it: relative to the run, it would lead through the home,
    whose name is a person's. None where it does not."""
    home = _home_around(Path(path))
    if home is None or folder.absolute().is_relative_to(home):
        return None
    return f"../{Path(path).relative_to(home)}"


def _home_around(path: Path) -> Path | None:
    """The home folder that a path lies in: the user's own, or another one beside it or where homes are."""
    own = Path.home().absolute()
    if len(own.parts) > 1 and path.is_relative_to(own):
        return own
    places = {*_HOMES, *([own.parent] if len(own.parts) > 2 else [])}
    return next((above for above in path.parents if above.parent in places), None)
