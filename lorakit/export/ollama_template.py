"""The TEMPLATE of a Modelfile: a chat template's shape, in the language of Ollama, which is Go's text/template."""

from collections.abc import Iterator

from lorakit.export.chat_shape import NO_TRIM, SYSTEM, ChatShape, MessageSlot, Trim
from lorakit.export.go_expression import go_text

# What Python's str.strip() takes away, by the number of bytes in UTF-8: Go's `slice` counts bytes.
_SPACES = [chr(number) for number in range(0x3001) if chr(number).isspace()]
_REFUSED = {
    "prompt": "no system message",
    "later": "no system message after the first message",
    "role": "no message of this role here",
}
_END = "{{ end }}"


def write_go_template(shape: ChatShape) -> str:
    """The template of Ollama that writes what the shape writes. Messages that the chat template refuses are errors of
    Ollama's too. But an answer before the first question is left out where the chat template takes none: Ollama drops
    the beginning of a conversation that has become too long. An answer at the end is continued."""
    takes_system = "system prompt" in shape.takes
    opening = ["{{ $system = .Content }}", "{{ $has_system = true }}"] if takes_system else [_refuse("prompt")]
    middle = ['{{ if and (eq $at 0) (eq .Role "system") }}', *opening]
    for role in ("user", "assistant", "system"):
        middle += [f'{{{{ else if eq .Role "{role}" }}}}', *_role(shape, role)]
    middle += ["{{ else }}", _refuse("role"), "{{ end }}"]
    lines = [*_definitions(shape), '{{ $before := "" }}']
    lines += ['{{ $system := "" }}', "{{ $has_system := false }}"] if takes_system else []
    lines += ["{{ range $at, $message := .Messages }}"]
    if any("$last" in line for line in middle):
        lines += ["{{ $last := eq (len (slice $.Messages $at)) 1 }}"]
    lines += [*middle, "{{ end }}", *_end(shape)]
    return "\n".join("{{-" + line.removeprefix("{{") for line in lines)


def _role(shape: ChatShape, role: str) -> Iterator[str]:
    """What is written for a message, by the role of the one before it."""
    cases: dict[tuple[str, ...], list[str]] = {}
    for previous in dict.fromkeys(place.previous for place in shape.slots if place.role == role):
        cases.setdefault(tuple(_choose(shape, role, previous)), []).append(previous)
    if not cases:
        yield _refuse("later")
        return
    skips = role == "assistant" and "assistant" not in shape.takes
    known = {previous for alike in cases.values() for previous in alike} | ({""} if skips else set())
    word = "if"
    for lines, alike in cases.items():
        yield f"{{{{ {word} eq $before {' '.join(map(go_text, alike))} }}}}"
        yield from (*lines, f'{{{{ $before = "{role}" }}}}')
        word = "else if"
    if known < {"", "user", "assistant", "system"} - {role}:
        yield f'{{{{ {word} ne $before "" }}}}' if skips else "{{ else }}"
        yield _refuse("role")
    yield "{{ end }}"


def _end(shape: ChatShape) -> Iterator[str]:
    """Where the next answer begins: after a question, or a system message."""
    cases: dict[tuple[str, ...], list[str]] = {}
    for previous in dict.fromkeys(place.previous for place in shape.slots if not place.role):
        cases.setdefault(tuple(_choose(shape, "", previous)), []).append(previous)
    for lines, alike in cases.items():
        yield f"{{{{ if eq $before {' '.join(map(go_text, alike))} }}}}"
        yield from (*lines, "{{ end }}")


def _choose(shape: ChatShape, role: str, previous: str) -> list[str]:
    """The slot of a message, by the system prompt and by whether the message is the last."""
    slots: dict[str, dict[bool, MessageSlot]] = {}
    for place, slot in shape.slots.items():
        if (place.role, place.previous) == (role, previous):
            slots.setdefault(place.system, {})[place.last] = slot
    cases = {}
    for system, by_last in slots.items():
        lines = {last: list(_slot(shape, slot, bool(role))) for last, slot in by_last.items()}
        cases[system] = _branch("$last", lines.get(True), lines.get(False))
    given, without = cases.get("given"), cases["none"]
    if given is None:
        return without
    emptied = {last: slot._replace(before=slot.before.replace(SYSTEM, "")) for last, slot in slots["given"].items()}
    if slots["empty"] != emptied:  # an empty system prompt is not written as others are
        if cases["empty"] == without:
            return _branch("$system", given, without)
        given = _branch("$system", given, cases["empty"])
    return _branch("$has_system", given, without)


def _branch(variable: str, lines: list[str] | None, other: list[str] | None) -> list[str]:
    """The lines of either case, after a condition where they differ. What they end with alike follows it."""
    if lines is None or other is None or lines == other:
        return lines if lines is not None else other or []
    alike = 0
    while alike < min(len(lines), len(other)) and lines[-1 - alike] == other[-1 - alike] and lines[-1 - alike] != _END:
        alike += 1
    one, two, end = lines[: len(lines) - alike], other[: len(other) - alike], lines[len(lines) - alike :]
    if not one:
        return [f"{{{{ if not {variable} }}}}", *two, _END, *end]
    return [f"{{{{ if {variable} }}}}", *one, *(["{{ else }}", *two] if two else []), _END, *end]


def _slot(shape: ChatShape, slot: MessageSlot, has_content: bool) -> Iterator[str]:
    parts = [slot.before] if SYSTEM not in slot.before else slot.before.split(SYSTEM)
    for at, text in enumerate(parts):
        if at:
            yield _trimmed("$system", shape.system_trim)
        if text:
            yield f"{{{{ {go_text(text)} }}}}"
    if has_content:
        yield _trimmed(".Content", slot.trim)


def _trimmed(value: str, trim: Trim) -> str:
    return f"{{{{ {value} }}}}" if trim == NO_TRIM else f'{{{{ template "{_name(trim)}" {value} }}}}'


def _name(trim: Trim) -> str:
    side = "" if trim.left and trim.right else "_left" if trim.left else "_right"
    return f"trim{'_newlines' if trim.characters else ''}{side}"


def _definitions(shape: ChatShape) -> Iterator[str]:
    """Templates that take white space away, letter by letter: Ollama has no function for it."""
    used = {shape.system_trim, *(slot.trim for slot in shape.slots.values())} - {NO_TRIM}
    used |= {trim._replace(left=False) for trim in used if trim.left and trim.right}
    for trim in sorted(used, key=_name):
        then = _trimmed(".", trim._replace(left=False)) if trim.left and trim.right else "{{ . }}"
        yield f'{{{{ define "{_name(trim)}" }}}}'
        word = "if"
        letters = list(trim.characters or _SPACES)
        for size in sorted({len(letter.encode()) for letter in letters}):
            texts = " ".join(go_text(letter) for letter in letters if len(letter.encode()) == size)
            end = f"(len (slice . {size}))"
            part, rest = (f"0 {size}", str(size)) if trim.left else (end, f"0 {end}")
            yield f"{{{{ {word} and (ge (len .) {size}) (eq (slice . {part}) {texts}) }}}}"
            yield f'{{{{ template "{_name(trim)}" (slice . {rest}) }}}}'
            word = "else if"
        yield from ("{{ else }}", then, "{{ end }}", "{{ end }}")


def _refuse(kind: str) -> str:
    """An action that fails with these words in Ollama's message: a list has no such index."""
    return f"{{{{ index $.Messages {go_text('the chat template of this model takes ' + _REFUSED[kind])} }}}}"
