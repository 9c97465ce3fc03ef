"""What others wrote may not go on for ever: each has a bound, a message, and exit code 2."""

import copy
import gzip
import json
import os
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHATML, rows_of, write_rows

import lorakit.data.chat_template.template
import lorakit.data.worker  # noqa: F401
from lorakit.bounds import TooLong, bounded
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.readers import read_blocks, text_stream
from lorakit.data.rows import RowError
from lorakit.errors import UserError
from lorakit.evaluate.metric import row_scores
from lorakit.model.targets import match_pattern
from lorakit.recipe import data_files as walks
from lorakit.recipe.data_files import TooManyFiles, data_files
from lorakit.recipe.schema import Evaluate

EVIL_PATTERN = "(a+)+$"
EVIL_TEXT = "a" * 64 + "b"


@pytest.fixture
def short(monkeypatch):
    """Bounds of a moment, which no test waits longer for."""
    for place in (
        "lorakit.data.chat_template.template",
        "lorakit.evaluate.metric",
        "lorakit.model.targets",
    ):
        monkeypatch.setattr(f"{place}._SECONDS", 0.3)
        if hasattr(sys.modules[place], "_MEMORY"):
            monkeypatch.setattr(f"{place}._MEMORY", 1 << 28)
    monkeypatch.setattr("lorakit.data.worker._SECONDS", 1)


def test_python_and_its_regular_expressions_are_interrupted_and_nothing_is_left_behind():
    import re

    for work in (lambda: [None for _ in iter(int, 1)], lambda: re.fullmatch(EVIL_PATTERN, EVIL_TEXT)):
        start = time.process_time()
        with pytest.raises(TooLong), bounded(0.2):
            work()
        assert 0.1 < time.process_time() - start < 2
    with bounded(0.2), bounded(0.1):
        pass
    until = time.process_time() + 0.4
    while time.process_time() < until:
        pass


def test_an_interruption_that_is_swallowed_comes_again():
    def swallow():
        while True:
            try:
                while True:
                    pass
            except BaseException as error:
                if len(swallowed) > 1:
                    raise
                swallowed.append(error)

    swallowed = []
    with pytest.raises(TooLong), bounded(0.1):
        swallow()
    assert len(swallowed) == 2


def test_memory_is_given_back_its_bound():
    with pytest.raises(MemoryError), bounded(5, 1 << 28):
        bytearray(1 << 30)
    assert len(bytearray(1 << 29)) == 1 << 29


ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a long range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "a recursion": "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
    "two recursions": "{% macro more(n) %}{% if n %}{{ more(n - 1) }}{{ more(n - 1) }}{% endif %}{% endmacro %}"
    "{{ more(80) }}",
    "a doubled text": "{% set ns = namespace(t='ab') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"
    "{{ ns.t }}",
    "a long text": "{{ 'x' * 99999999999 }}",
    "a wide text": "{{ 'x'.center(99999999999) }}",
    "a long list": "{% for a in [1] * 9999999999 %}{% endfor %}",
    "a power": "{{ (10 ** 10 ** 9) is odd }}",
    "squares": "{% set ns = namespace(n=10) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_that_never_ends_is_refused(case, short, recipe_file, tmp_path, lorakit):
    (tmp_path / "t.jinja").write_text(CHATML + ENDLESS[case])
    path = recipe_file(model={"chat_template": "t.jinja"})
    for command in ("data", "plan"):
        code, _, err = lorakit(command, path)
        assert "Traceback" not in err and "fault in lorakit" not in err
        if command == "data":
            assert code == 2 and "chat template" in err.replace("_", " "), err


def test_a_template_that_never_ends_for_some_rows_names_the_row(short, recipe_file, tmp_path, lorakit):
    never = "{% if 'number 7.' in m['content'] %}" + ENDLESS["loops in loops"] + "{% endif %}"
    text = CHATML.replace("message", "m").replace("for m in ms", "for m in messages")
    (tmp_path / "t.jinja").write_text(text.replace("{{ '<|im_start|>' + m", never + "{{ '<|im_start|>' + m", 1))
    code, _, err = lorakit("data", recipe_file(model={"chat_template": "t.jinja"}))
    assert code == 2 and "train.jsonl:8: preparing this row and those before it takes more than" in err


def test_a_template_that_writes_much_more_than_the_messages_say_is_refused(recipe_file, tmp_path, lorakit):
    path = recipe_file(model={"chat_template": "t.jinja"})
    (tmp_path / "t.jinja").write_text("{{ 'x' * 3000000 }}" + CHATML)
    code, _, err = lorakit("data", path)
    assert code == 2 and "model.chat_template: it writes 3,000," in err and "Fix the template" in err
    (tmp_path / "t.jinja").write_text(CHATML)
    answer = {"role": "assistant", "content": "Long."}
    write_rows(
        tmp_path / "train.jsonl", [{"messages": [{"role": "user", "content": "\n" * 1500000}, answer]}, *rows_of(22)]
    )
    code, out, _ = lorakit("data", path)
    assert code == 0 and "train: 22 of 23 rows" in out, "long messages are the rows' own"


def test_sums_and_products_that_templates_need_are_computed(recipe_file, tmp_path, lorakit):
    (tmp_path / "t.jinja").write_text(
        CHATML + "{% if 3 * 4 != 12 or 2 ** 10 != 1024 or '-' * 3 != '---' %}wrong{% endif %}"
    )
    code, out, err = lorakit("data", recipe_file(model={"chat_template": "t.jinja"}))
    assert code == 0 and "wrong" not in out, err


def metrics(*listed):
    return Evaluate.model_validate({"metrics": list(listed)}).metrics


def test_a_pattern_that_searches_for_ever_is_refused_wherever_one_may_be_written(short, recipe_file, tmp_path, lorakit):
    with pytest.raises(UserError, match=r"regex computes for more than 0\.3 s on answer 2 of 2"):
        row_scores(metrics({"regex": {"pattern": EVIL_PATTERN}}), ["a", EVIL_TEXT], ["a", "a"])
    schema = {"json-schema": {"schema": {"type": "string", "pattern": EVIL_PATTERN}}}
    with pytest.raises(UserError, match=r"json-schema computes for more than 0\.3 s on answer 1 of 1"):
        row_scores(metrics(schema), [json.dumps(EVIL_TEXT)], ["a"])
    with pytest.raises(UserError, match=r"adapter\.targets: the pattern '\(a\+\)\+\$' searches"):
        match_pattern(EVIL_PATTERN, [EVIL_TEXT], "adapter.targets")
    evil = r"(\w+\.?)+!"
    for section in ({"targets": evil}, {"exclude": [evil]}, {"rank_overrides": {evil: 2}}):
        for command in ("check", "plan"):
            code, _, err = lorakit(command, recipe_file(adapter=section))
            assert code == 2 and "searches the modules' names for more than 0.3 s" in err, (section, err)


def test_the_patterns_of_a_foreign_adapter_are_bounded_before_peft_tries_them(short, tiny_base):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from lorakit.model.targets import check_patterns

    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(tiny_base).named_modules()]
    check_patterns(
        LoraConfig(target_modules=r".*\.(q|v)_proj", rank_pattern={"q_proj": 2, "layers.0.*": 3}), names, "x"
    )
    for config in (LoraConfig(target_modules=r"(\w+\.?)+!"), LoraConfig(rank_pattern={r"(\w+\.?)+!": 2})):
        with pytest.raises(UserError, match="x: the pattern"):
            check_patterns(config, names, "x")


def test_a_packed_line_of_gigabytes_is_refused_before_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(text_stream, "_LONGEST_LINE", 1 << 24)
    monkeypatch.setattr("lorakit.data.readers.json_rows._LONGEST_VALUE", 1 << 24)
    for name, begin in (
        ("a.jsonl.gz", b'{"text": "'),
        ("a.txt.gz", b""),
        ("a.csv.gz", b"text\n"),
        ("a.json.gz", b'["'),
    ):
        with gzip.open(tmp_path / name, "wb") as file:
            file.write(begin)
            for _ in range(40):
                file.write(b"x" * (1 << 20))
        with pytest.raises(UserError, match=r"a (line|value) of more than 16 MiB"):
            for block in read_blocks(tmp_path / name):
                list(block.rows())


def test_folders_and_patterns_that_mean_the_whole_disk_are_refused(recipe_file, tmp_path, monkeypatch, lorakit):
    monkeypatch.setattr(walks, "_MOST", 200)
    many = tmp_path / "many"
    for number in range(300):
        (many / f"{number % 17}").mkdir(parents=True, exist_ok=True)
        (many / f"{number % 17}" / f"{number}.jsonl").touch()
    for path in ("many", "many/**/*.jsonl", "many/*/*.nothing", "many/**/**/**/*.csv"):
        for command in ("check", "plan", "data"):
            code, _, err = lorakit(command, recipe_file(data={"train": path}))
            assert code == 2 and "more than 200 files and folders lie there" in err, (path, command, err)
    with pytest.raises(TooManyFiles):
        list(data_files(tmp_path / "/".join(["*"] * 900)))


def test_the_root_of_the_disk_is_answered_in_little_time(recipe_file, lorakit):
    start = time.process_time()
    code, _, err = lorakit("check", recipe_file(data={"train": "/"}))
    assert code == 2 and ("files and folders lie there" in err or "without data files" in err), err
    assert time.process_time() - start < 30


def test_devices_and_pipes_are_no_files_of_a_recipe(recipe_file, tmp_path, lorakit):
    os.mkfifo(tmp_path / "pipe")
    for section in (
        {"model": {"chat_template": "/dev/zero"}},
        {"model": {"chat_template": "./pipe"}},
        {"evaluate": {"metrics": [{"json-schema": {"schema": "/dev/zero"}}]}},
    ):
        code, _, err = lorakit("check", recipe_file(**section))
        assert code == 2 and "is not a regular file" in err, err


def test_a_row_of_very_many_messages_has_its_end(short, recipe_file, tmp_path, lorakit):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 10_000
    write_rows(tmp_path / "train.jsonl", [*rows_of(3), {"messages": turns}])
    start = time.process_time()
    code, _, err = lorakit("data", recipe_file(data={"eval": None}, train={"eval_every": ...}))
    assert code == 2 and "train.jsonl:4: preparing this row and those before it takes more than" in err
    assert time.process_time() - start < 30


def test_a_row_error_is_still_a_row_error_within_a_bound():
    with pytest.raises(RowError), bounded(5, 1 << 30):
        raise RowError("no")


@pytest.mark.slow
def test_a_small_file_of_values_that_many_rows_share_comes_in_small_blocks(tmp_path):
    long = "word " * 200_000  # a MB, which Parquet stores once
    pq.write_table(pa.table({"text": [long] * 3000}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    blocks = read_blocks(tmp_path / "a.parquet")
    assert all(len(next(blocks).payload) < 1 << 22 for _ in range(3))


def test_a_power_of_constants_is_refused_before_jinja_computes_it(tokenizer):
    written = copy.deepcopy(tokenizer)
    written.chat_template = "{% if messages %}{{ 2 ** 99999999 }}{% endif %}"
    with pytest.raises(Exception, match="thousands of digits"):
        ChatTemplate(written, "assistant", None, ["<|im_end|>"]).write([{"role": "user", "content": "a"}])
