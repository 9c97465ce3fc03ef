"""What must not leave this machine in a text that others read: access tokens, keys, and paths of this machine."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

# Tokens by the prefixes that their makers give them, long enough that no word of a vocabulary is one.
_SECRETS = {
    "a token of the hub": rb"\bhf_[A-Za-z0-9]{20,}",
    "a key of an API": rb"\bsk-[A-Za-z0-9_-]{24,}",
    "a token of GitHub": rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a key of AWS": rb"\bAKIA[0-9A-Z]{16}\b",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_WEIGHTS = ".safetensors"
_PIECE, _OVERLAP = 1 << 22, 1 << 10


def redact(text: str, *folders: Path) -> str:
    """A text without secrets, and without the paths of these folders and of the home folder."""
    for pattern in _SECRETS.values():
        text = re.sub(pattern.decode(), "(redacted)", text)
    for path in _paths(folders):
        text = text.replace(path, "(path)")
    return text


def find_secrets(folder: Path, names: Sequence[str]) -> list[str]:
    """The files of a folder that hold an access token or a key: name, and what it looks like, never the secret."""
    return [f"{name}: {what}" for name in names for what in sorted(set(_secrets_in(folder / name)))]


def find_paths(folder: Path, names: Sequence[str], *folders: Path) -> list[str]:
    """The files of a folder that hold the path of one of these folders, or of the home folder."""
    paths = [path.encode() for path in _paths(folders)]
    return [name for name in names if any(path in piece for piece in _pieces(folder / name) for path in paths)]


def _secrets_in(file: Path) -> Iterator[str]:
    for piece in _pieces(file):
        yield from (what for what, pattern in _SECRETS.items() if re.search(pattern, piece))


def _pieces(file: Path) -> Iterator[bytes]:
    """The file's bytes; of weights those of the header alone, which says how long it is in the first eight."""
    with file.open("rb") as opened:
        length = file.stat().st_size
        if file.suffix == _WEIGHTS:
            length = 8 + int.from_bytes(opened.read(8), "little")
            opened.seek(0)
        before, left = b"", length
        while left > 0 and (piece := opened.read(min(_PIECE, left))):
            yield before + piece
            before, left = piece[-_OVERLAP:], left - len(piece)


def _paths(folders: Sequence[Path]) -> list[str]:
    """The longest first, so that none is left half replaced; a folder at the top is no telling path."""
    given = {str(form) for folder in (*folders, Path.home()) for form in (folder.absolute(), folder.resolve())}
    return sorted((path for path in given if path.count("/") > 1), key=len, reverse=True)
