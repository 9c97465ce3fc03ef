"""Saving conversations as rows that `data.train` reads back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.atomic_io import sha256_of, write_atomic
from lorakit.chat.models import ChatAnswer
from lorakit.data.rows import Message
from lorakit.errors import UserError


@dataclass(frozen=True)
class Turn:
    """A question, and the answer that the conversation goes on from."""

    question: str
    answer: ChatAnswer

    def messages(self) -> list[Message]:
        thinking = {"thinking": self.answer.thinking} if self.answer.thinking else {}
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer.text, **thinking},
        ]


def row_of(turns: Sequence[Turn], system: str | None) -> dict[str, Any]:
    """A row of the format `messages`. Answers that the model did not end by itself are read and not trained."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        question, answer = turn.messages()
        messages += [question, answer if turn.answer.ended == "stop" else {**answer, "train": False}]
    return {"messages": messages}


@dataclass
class _WrittenFile:
    sha256: str
    rows: dict[int, dict[str, Any]]


@dataclass
class SavedFiles:
    """The files that this chat wrote, by path. No other file is ever replaced."""

    _files: dict[Path, _WrittenFile] = field(default_factory=dict)

    def save(self, path: Path, conversation: int, row: dict[str, Any]) -> int:
        """Write a row, in place of the one that this conversation has in the file already; how many there are then. A
        UserError where the file is not this chat's, or was changed since."""
        if path.suffix != ".jsonl":
            raise UserError(f"{path}: rows are saved as JSON lines: give a name that ends in .jsonl.")
        path = path.expanduser().absolute()
        written = self._files.get(path)
        if path.exists() or path.is_symlink():
            if written is None:
                raise UserError(f"{path}: exists already, and is not overwritten. Give another name.")
            if not path.is_file() or sha256_of(path) != written.sha256:
                raise UserError(f"{path}: was changed since it was saved, and is not overwritten. Give another name.")
        elif not path.parent.is_dir():
            raise UserError(f"{path.parent}: there is no such folder.")
        rows = {**(written.rows if written else {}), conversation: row}
        write_atomic(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows.values()))
        self._files[path] = _WrittenFile(sha256_of(path), rows)
        return len(rows)
