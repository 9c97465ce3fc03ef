"""Valid input made into bad input: bytes, texts, and values of JSON or YAML."""

import copy
import random
from typing import Any

TEXTS = [
    *("", " ", "\n", "\t", "\r", "\r\n", "\0", "\x1b[31m", "\x1b]0;x\x07", "\x9b2J", "\u202e", "\u2028", "\ufeff"),
    *("\ud800", "é", "e\u0301", "𝔘", "😀", "ﷺ" * 30, "a" * 5000, "null", "~", "no", "on", "auto", "nan", ".inf", "-0"),
    *("1e-4", "1_000", "0x1F", "0o17", "1e999", "9" * 400, "../../etc/passwd", "/dev/zero", "/", ".", "-", "--help"),
    *("~/x", "$HOME", "${HOME}", "%s%n", "{}", "{{ 7*7 }}", "[1, 2", "*", "**/*", "(a+)+$", "<<", "!!python/object:x"),
    *("<|im_end|>", "<|im_start|>", "</s>", "<think>", "__class__", "O'Brien", '"', "'", "\\", ":", "#", "&a", "*a"),
]
NUMBERS = [0, -1, 1, 2, 3, 0.5, -0.5, 1e-9, 1e9, 1e308, 2**31, 2**63, 2**64, 10**30, True, False, None]
BYTES = [
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\r",
    b"\n",
    b"\r\n",
    b'"',
    b"\\",
    b",",
]


def mutate_bytes(chance: random.Random, data: bytes, most: int = 3) -> bytes:
    """Some bytes flipped, taken out, put in, repeated, moved, or the rest cut off."""
    found = bytearray(data)
    for _ in range(chance.randint(1, most)):
        start = chance.randrange(len(found) + 1)
        size = min(len(found) - start, chance.choice([1, 1, 2, 4, 8, 64, 1000]))
        way = chance.randrange(7)
        if way == 0 and found:
            found[start % len(found)] ^= 1 << chance.randrange(8)
        elif way == 1:
            del found[start : start + size]
        elif way == 2:
            found[start:start] = chance.choice(BYTES)
        elif way == 3:
            found[start:start] = found[start : start + size]
        elif way == 4:
            found[start : start + size] = chance.randbytes(size)
        elif way == 5:
            other = chance.randrange(len(found) + 1)
            found[start:start] = found[other : other + size]
        elif chance.random() < 0.3:
            del found[start:]
    return bytes(found)


def mutate_text(chance: random.Random, text: str, pieces: list[str], most: int = 3) -> str:
    """Pieces, and texts that are hard to read, put in; stretches taken out, repeated, or moved."""
    for _ in range(chance.randint(1, most)):
        start = chance.randrange(len(text) + 1)
        stop = min(len(text), start + chance.choice([1, 1, 2, 5, 20, 100]))
        way = chance.randrange(5)
        if way == 0:
            text = text[:start] + text[stop:]
        elif way == 1:
            text = text[:start] + chance.choice(TEXTS) + text[start:]
        elif way == 2:
            text = text[:start] + chance.choice(pieces) + text[start:]
        elif way == 3:
            text = text[:start] + text[start:stop] * chance.choice([2, 2, 3, 50]) + text[stop:]
        else:
            other = chance.randrange(len(text) + 1)
            text = text[:other] + text[start:stop] + text[other:]
    return text


def bad_value(chance: random.Random, depth: int = 0) -> Any:
    """Any value."""
    way = chance.randrange(10)
    if way < 4 or depth > 3:
        return chance.choice(TEXTS)
    if way < 7:
        return chance.choice(NUMBERS)
    if way == 7:
        return [bad_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    if way == 8:
        return {str(chance.choice(TEXTS)): bad_value(chance, depth + 1) for _ in range(chance.randrange(3))}
    return nested(chance.choice([2, 10, 45, 90]), chance.random() < 0.5)


def nested(depth: int, lists: bool) -> Any:
    """A value inside that many others."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if lists else {"a": value}
    return value


def mutate_value(chance: random.Random, value: Any, most: int = 2) -> Any:
    """A value with some of its parts replaced, removed, repeated, renamed, or put into another."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, most)):
        places = list(_places(value))
        if not places:
            return bad_value(chance)
        holder, key = chance.choice(places)
        way = chance.randrange(8)
        if way < 3:
            holder[key] = bad_value(chance)
        elif way == 3:
            del holder[key]
        elif way == 4 and isinstance(holder, dict):
            holder[_other_name(chance, key)] = holder.pop(key) if chance.random() < 0.7 else holder[key]
        elif way == 5:
            holder[key] = [holder[key]] if chance.random() < 0.5 else {str(key): holder[key]}
        elif way == 6:
            other, name = chance.choice(places)
            if name in other if isinstance(other, dict) else isinstance(name, int) and name < len(other):
                holder[key] = copy.deepcopy(other[name])
        elif isinstance(holder[key], str):
            holder[key] = mutate_text(chance, holder[key], TEXTS, 1)
        elif isinstance(holder[key], int | float):
            holder[key] = chance.choice([str(holder[key]), -holder[key], holder[key] * 1000, holder[key] / 3])
    return value


def _other_name(chance: random.Random, name: object) -> str:
    text = str(name)
    if chance.random() < 0.5 and len(text) > 1:  # a slip of the finger
        at = chance.randrange(len(text) - 1)
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return chance.choice(TEXTS)


def _places(value: Any, most: int = 400) -> list[tuple[Any, Any]]:
    """Every part of a value as what holds it and the key or index there."""
    found: list[tuple[Any, Any]] = []
    open_: list[Any] = [value]
    while open_ and len(found) < most:
        holder = open_.pop(0)
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            found.append((holder, key))
            open_.append(holder[key])
    return found
