"""What the builders of the gallery read, small and made up: the files, and the arguments that name them."""

import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

AREAS = ("admin", "database", "games", "graphics", "mail", "science", "sound", "web")
LANGUAGES, INTERFACES = ("c", "c++", "perl", "python"), ("x11", "commandline", "daemon", "web", "text-mode")
TEAMS = ("Debian Games Team <a@b.org>", "Debian QA Group <c@d.org>", "Someone Real <e@f.org>")
_SYLLABLES = ("ba", "ro", "mi", "tel", "kun", "sa", "por", "ne", "vig", "lo", "das", "hem")


def _word(draw: str) -> str:
    digest = hashlib.sha256(draw.encode()).digest()
    return "".join(_SYLLABLES[byte % len(_SYLLABLES)] for byte in digest[:3])


def _record(number: int, with_descriptions: bool) -> str:
    """A program's paragraph, in the index or in the file of descriptions. Half of them share a source with another."""
    words = [_word(f"{number} {position}") for position in range(14)]
    name, synopsis = f"tool{number}", " ".join(words[:4])
    source = f"Source: suite{number % 8}-{number // 32} (1.0)\n" if number % 32 < 16 else ""
    if with_descriptions:
        sentence = f" {name.title()} {' '.join(words)}.\n .\n  * a list"
        return f"Package: {name}\nDescription-md5: {number}\nDescription-en: {synopsis}\n{sentence}\n"
    return (
        f"Package: {name}\n{source}Version: 1:{number}.2-3\nInstalled-Size: {number * 7}\n"
        f"Maintainer: {TEAMS[number % 3]}\nRecommends: helper{number}, other\nDescription: {synopsis}\n"
        f"Homepage: https://{words[0]}.org/\nDescription-md5: {number}\nSection: {AREAS[number % 8]}\n"
        f"Tag: implemented-in::{LANGUAGES[number % 4]}, interface::{INTERFACES[number % 5]},\n role::program\n"
    )


def debian_index(folder: Path) -> list[str]:
    """An index of programs."""
    index = folder / "index.txt"
    index.write_text("\n".join(_record(number, False) for number in range(400)), encoding="utf-8")
    return ["--index", str(index)]


def debian_index_with_descriptions(folder: Path) -> list[str]:
    """An index of programs, and their long descriptions."""
    texts = folder / "Translation-en"
    texts.write_text("\n".join(_record(number, True) for number in range(400)), encoding="utf-8")
    return [*debian_index(folder), "--descriptions", str(texts)]


def novels(folder: Path) -> list[str]:
    """Novels as R has them: character vectors, serialized one after the other, each with its length before it."""
    file, data = folder / "made-up.rdb", b""
    for title in ("Persuasion", "Another", "A third"):
        words = [[_word(f"{title} {line} {position}") for position in range(7)] for line in range(99)]
        lines = [title, "", *(f"{' '.join(line).capitalize()} of the {' '.join(line[:3])}." for line in words)]
        vector = struct.pack(">2s4i5s", b"X\n", 3, 0x40201, 0x30500, 5, b"UTF-8") + struct.pack(">2i", 16, len(lines))
        vector += b"".join(struct.pack(">2i", 9 | 1 << 18, len(line)) + line.encode() for line in lines)
        data += struct.pack(">i", len(vector)) + zlib.compress(vector)
    file.write_bytes(data)
    return ["--novels", str(file)]


def html_pages(folder: Path) -> list[str]:
    """The files of a package of HTML pages."""
    file = folder / "package.tar"
    with tarfile.open(file, "w") as tar:
        for page in ("about", "arch", "faq", "limits", "psow", "testing", "vdbe", "vfs", "wal", "whyc"):
            words = " ".join(_word(f"{page} {number}") for number in range(60))
            html = f"<head><title>T</title></head><h1>1. {page}</h1><p>{words}.<pre>code</pre><p>More.".encode()
            info = tarfile.TarInfo(f"./usr/share/doc/sqlite3/{page}.html")
            info.size = len(html)
            tar.addfile(info, io.BytesIO(html))
    return ["--package", str(file)]


SOURCES: dict[str, Callable[[Path], list[str]]] = {
    "austen-voice": novels,
    "debian-json": debian_index,
    "debian-tools": debian_index,
    "grounded-answers": debian_index,
    "small-gpu": debian_index_with_descriptions,
    "sqlite-docs": html_pages,
    "topic-labels": debian_index_with_descriptions,
}
"""Task -> what writes the files that its build.py reads, and gives the arguments that name them."""
