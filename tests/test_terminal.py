"""What other people's rows, files, templates and models say never commands the terminal, nor hides from the reader."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
from conftest import rows_of, write_rows

from lorakit import console

# A window title, a cleared screen, a C1 introducer, a line written over, a reversed reading, invisible signs, half a
# character, and what rich would take for its own.
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\rgone\b\x7f\u202etxt\u2066\u200b\ufeff\U000e0041[red]:smile:[/nothing]"
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\ufeff\U000e0000-\U000e007f]")
# What a terminal gets from rich: colours, a cursor that is hidden, shown and moved up, a line that is cleared.
OURS = re.compile("\x1b\\[[0-9;]*m|\x1b\\[\\?25[lh]|\x1b\\[\\d*A|\x1b\\[2K|\r(?=\x1b\\[2K)|\r\n")


def clean(text: str) -> bool:
    return not UNSEEN.search(text)


def test_texts_are_printed_as_they_are_but_for_what_is_not_to_be_seen():
    assert console.visible("Zürich\tکتاب\u200cها 👩\u200d💻 [red]\n") == "Zürich\tکتاب\u200cها 👩\u200d💻 [red]\n"
    assert console.visible(EVIL).startswith(r"\x1b]0;owned\x07\x1b[2J\x9b31m\rgone\x08\x7f\u202etxt\u2066\u200b\ufeff")
    assert console.visible("\ud800") == r"\ud800"


@pytest.mark.parametrize("tty", [False, True])
def test_every_way_to_print_makes_texts_visible(tty, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty)
    console.result(EVIL)
    console.result_wrapped(f"{EVIL} {EVIL}", under=" ")
    console.result_table(EVIL, [EVIL, "b"], [[EVIL, EVIL]])
    console.result_facts([(EVIL, EVIL)])
    console.result_bars(EVIL, [(EVIL, 3)])
    console.result_masked(EVIL, [(EVIL, True), (EVIL, False)])
    console.result_tokens([(EVIL, True), (EVIL, False)])
    console.result_piece(EVIL)
    console.result_piece(EVIL, dim=True)
    console.result_label(EVIL)
    console.aside(EVIL)
    console.error(EVIL)
    terminal = console.Terminal()
    terminal.say(EVIL)
    terminal.warn(EVIL)
    with terminal.bar(EVIL, 2, unit=EVIL) as bar:
        bar.advance(1, note=EVIL)
        terminal.say(EVIL)
    out, err = (OURS.sub("", text) for text in capsys.readouterr())
    assert clean(out) and clean(err)
    joined = "".join(out.split()) + "".join(err.split())
    assert joined.count("[red]") >= 12 and joined.count(":smile:") >= 12  # nothing is taken for markup
    assert r"\x1b]0;owned\x07" in out and r"\x1b]0;owned\x07" in err


def test_json_holds_the_texts_exactly_and_shows_none_of_them_raw(capsys):
    console.result_json({EVIL: [EVIL, "\ud800", "é"]})
    out = capsys.readouterr().out
    assert clean(out) and "é" in out
    assert json.loads(out) == {EVIL: [EVIL, "\ud800", "é"]}


def test_what_libraries_log_and_warn_of_is_visible_too():
    code = (
        "import logging, warnings\nfrom lorakit import console\nconsole.keep_libraries_visible()\n"
        f"logging.getLogger('a.library').warning('no %s', {EVIL!r})\nwarnings.warn({EVIL!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    said = done.stderr.decode()
    assert said.count(r"\x1b]0;owned") == 2 and clean(said)


@pytest.fixture
def hostile(recipe_file, tmp_path, tiny_base):
    """A recipe whose rows, columns, file names and template say evil things."""
    rows = rows_of(24)
    for row in rows:
        row["messages"][0]["content"] += EVIL
        row["messages"][1]["content"] += EVIL
        row[EVIL] = EVIL
    rows[5] = {"messages": [{"role": EVIL, "content": EVIL}]}
    name = EVIL.replace("/", "|")
    write_rows(tmp_path / f"{name}.jsonl", rows)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    clean = {"noise": "report", "encoding": "report", "html": "report", "leakage": "report"}
    return recipe_file(
        model={"base": str(base)},
        data={"train": f"{name}.jsonl", "broken": "drop", "clean": clean, "max_length": 250},
    )


def run_on_a_terminal(*arguments) -> str:
    """All that a command writes on a terminal of its own."""
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    parts = []
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # the last writer has gone
            break
        if not part:
            break
        parts.append(part)
    os.close(master)
    process.wait()
    return b"".join(parts).decode()


def test_evil_rows_columns_and_names_are_visible_in_data_and_dry_run(hostile, lorakit):
    for arguments in (["data", hostile], ["data", hostile, "--json"], ["train", hostile, "--dry-run"]):
        code, out, err = lorakit(*arguments)
        assert code == 0, err
        assert clean(out) and clean(err) and "owned" in out


@pytest.mark.slow
def test_evil_rows_are_visible_on_a_terminal(hostile):
    said = run_on_a_terminal("data", hostile)
    assert "trained" in said and "owned" in said
    assert clean(OURS.sub("", said))


EVIL_VALUES = {
    "a key": {EVIL: 1},
    "a path": {"data": {"train": f"{EVIL}.jsonl", "max_length": 9}},
    "a name": {"model": {"base": f"./{EVIL}"}},
    "a hub id": {"model": {"base": f"a/b{EVIL}"}},
    "a choice": {"adapter": {"kind": EVIL}},
    "a text": {"adapter": {"targets": [EVIL]}},
    "a column": {"data": {"columns": {"prompt": EVIL}, "train": "train.jsonl", "max_length": 9}},
    "a good value": {"output": {"dir": EVIL}},
}


@pytest.mark.parametrize("case", EVIL_VALUES)
def test_evil_values_of_a_recipe_are_visible(case, recipe_file, lorakit):
    path = recipe_file(**EVIL_VALUES[case]) if case != "a key" else recipe_file(train=EVIL_VALUES[case])
    for command in ("check", "plan", "data"):
        code, out, err = lorakit(command, path)
        assert code in (0, 2) and clean(out) and clean(err), (command, out, err)


def test_evil_arguments_are_visible(tmp_path, lorakit):
    for arguments in ([EVIL], ["check", EVIL], ["check", "x.yaml", f"--{EVIL}"], ["check", "x.yaml", "--set", EVIL]):
        code, out, err = lorakit(*arguments)
        assert code == 2 and clean(out) and clean(err)


def test_evil_templates_and_configs_are_visible_in_errors(hostile, tmp_path, lorakit):
    config = tmp_path / "base" / "config.json"
    whole = json.loads(config.read_text())
    for values in ({"model_type": EVIL}, {"hidden_size": EVIL}, {"auto_map": {EVIL: EVIL}}):
        config.write_text(json.dumps({**whole, **values}))
        for command in ("data", "check", "plan"):
            code, out, err = lorakit(command, hostile)
            assert code in (0, 1, 2) and clean(out) and clean(err)
    config.write_text(json.dumps(whole))
    template = tmp_path / "t.jinja"
    for text in (f"{{{{ raise_exception({EVIL!r}) }}}}", f"{{% {EVIL} %}}"):
        template.write_text(text)
        code, out, err = lorakit("data", hostile, "--set", f"model.chat_template={template}")
        assert code == 2 and clean(out) and clean(err)
