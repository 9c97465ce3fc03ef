"""YAML is read by 1.2's core rules; everything odd is one problem with its place and a remedy."""

from pathlib import Path

import pytest

from lorakit.recipe.problem import Location
from lorakit.recipe.yaml_reader import MAX_BYTES, MAX_VALUES, find, plain, read_file, read_text

HERE = Location(Path("x.yaml"))


def value_of(text):
    node, problems = read_text(f"a: {text}", HERE)
    assert problems == []
    return plain(node)["a"]


def only_problem(text):
    _, problems = read_text(text, HERE)
    assert len(problems) == 1, problems
    return problems[0]


def position(problem):
    return problem.place.line, problem.place.column


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1.5E+3", -1500.0),
        ("0o17", 15),
        ("0x1F", 31),
        ("010", 10),
        ("+3", 3),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("Null", None),
    ],
)
def test_numbers_booleans_and_null_follow_the_core_rules(text, value):
    assert value_of(text) == value
    assert type(value_of(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    ["yes", "no", "on", "Off", "tRUE", "nULL", "1_000", "12:30", "2024-01-31", "1e", "0b1", "-0x1f", "e5", ".", "+"],
)
def test_everything_else_is_a_text(text):
    assert value_of(text) == text


def test_a_quoted_number_is_a_text():
    assert value_of("'3'") == "3"
    assert value_of('"true"') == "true"


def test_every_value_and_key_has_its_place():
    node, _ = read_text("a:\n  b: 1\n  c: [x, {d: y}]\n", HERE)
    places = {path: find(node, path).place for path in [("a", "b"), ("a", "c"), ("a", "c", 1, "d")]}
    assert [(place.line, place.column) for place in places.values()] == [(2, 6), (3, 6), (3, 14)]
    key = find(node, ("a", "c", 1, "d")).key
    assert (key.line, key.column) == (3, 11)


def test_a_duplicate_key_names_both_places_and_reading_goes_on():
    node, problems = read_text("a: 1\nb: 2\na: 3\nc: 4\nb: 5\n", HERE)
    assert plain(node) == {"a": 1, "b": 2, "c": 4}
    assert [str(problem) for problem in problems] == [
        "x.yaml:3:1: a: already written at line 1, column 1. Remove one of the two.",
        "x.yaml:5:1: b: already written at line 2, column 1. Remove one of the two.",
    ]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("1: x", (1, 1), "the key 1 is not a text"),
        ("a: {true: x}", (1, 5), "the key true is not a text"),
        ("? [a, b]\n: x", (1, 3), "the key a list is not a text"),
        ("a: &x {b: 1}\nc:\n  <<: *x", (3, 3), "merge key"),
        ("a: !!python/object/apply:os.system [ls]", (1, 4), "tags are not read"),
        ("a: !mine 1", (1, 4), "tags are not read"),
        ("a: 1\n---\nb: 2", (2, 1), "a second document"),
        ("a: &x [*x]", (1, 4), "nested deeper than"),
        ("a: *nowhere", (1, 4), "there is no anchor of this name above"),
        ("a: &x 1\nb: &x 2", (2, 4), "an anchor of this name is above already"),
        ("a: ! 1", (1, 4), "tags are not read"),
        ("a: .inf", (1, 4), "not a finite number"),
        ("a: -.INF", (1, 4), "not a finite number"),
        ("a: .nan", (1, 4), "not a finite number"),
        ("a: 1e999", (1, 4), "too large a number"),
        ("a: " + "9" * 5000, (1, 4), "too large a whole number"),
        ('a: "\\ud800"', (1, 4), "half a surrogate pair"),
        ('a: "\\UFFFFFFFF"', (1, 5), "this escape is not a character"),
    ],
)
def test_an_oddity_is_a_problem_at_its_place(text, place, words):
    problem = only_problem(text)
    assert words in problem.reason
    assert position(problem)[0] == place[0]
    if "escape is not" not in words:
        assert position(problem) == place


@pytest.mark.parametrize(
    ("text", "place", "reason", "remedy"),
    [
        ("a:\n\tb: 1", (2, 1), "a tab is used", "Replace the tab by spaces."),
        ("a: [1, 2\nb: 3", (1, 4), "this list lacks", "missing"),
        ("a: {b: 1\nc: 3", (1, 4), "this mapping lacks", "missing"),
        ('a: "x\nb: 3', (1, 4), "this quote is never closed", "closing quote"),
        ("a: b: c", (1, 5), "a second `: `", "Put quotes"),
        ("a: 1\nb\nc: 2", (2, 1), "not `key: value`", "colon"),
        ("a:\n    b: 1\n  c: 2", (3, 3), "does not fit the indentation", "indentation"),
        ("a: @x", (1, 4), "no value can begin", "Put quotes"),
        ('a: "C:\\data"', (1, 8), "a backslash", "single quotes"),
        ("a: - b", (1, 4), "a list cannot begin", "its own line"),
    ],
)
def test_a_syntax_error_is_explained_where_it_is(text, place, reason, remedy):
    problem = only_problem(text)
    assert position(problem) == place
    assert reason in problem.reason
    assert remedy in problem.remedy


def test_aliases_are_read():
    node, problems = read_text("a: &x {b: 1}\nc: *x", HERE)
    assert problems == []
    assert plain(node) == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_billion_laughs_are_refused():
    lines = ["a0: &a0 [" + "lol, " * 10 + "]"]
    lines += [f"a{n}: &a{n} [" + f"*a{n - 1}, " * 10 + "]" for n in range(1, 10)]
    assert f"more than {MAX_VALUES} values" in only_problem("\n".join(lines)).reason


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "{a: " * 5000, "- " * 3000 + "x"])
def test_deep_nesting_is_refused(text):
    assert "nested deeper than" in only_problem(text).reason


def test_nesting_through_aliases_is_refused():
    lines = ["a0: &a0 x"] + [f"a{n}: &a{n} " + "[" * 30 + f"*a{n - 1}" + "]" * 30 for n in range(1, 100)]
    assert "nested deeper than" in only_problem("\n".join(lines)).reason


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "the file has no settings"),
        (b"# only a comment\n", "the file has no settings"),
        (b"---\n", "the file has no settings"),
        (b"- a\n- b\n", "the file is a list"),
        (b"model:base\n", "the file is the single value 'model:base'"),
        (b"a: 1\nb: \xff\n", "byte 0xff is not UTF-8"),
        ("a: 1".encode("utf-16"), "is not UTF-8"),
        (b"a: 1\nb: \x00\n", "the character U+0000"),
        (b"a: \x1b[31m\n", "the character U+001B"),
        (b"a: " + b"x" * MAX_BYTES, "larger than 1 MB"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path, raw, words):
    path = tmp_path / "x.yaml"
    path.write_bytes(raw)
    node, problems = read_file(path, Location(path))
    assert node is None
    assert len(problems) == 1
    assert words in problems[0].reason


def test_bytes_that_are_not_utf8_have_a_position(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes("a: é\nb: ü".encode() + b"\xff")
    _, problems = read_file(path, Location(path))
    assert position(problems[0]) == (2, 5)


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb:\r\n  c: x\r\n")
    node, problems = read_file(path, Location(path))
    assert problems == []
    assert plain(node) == {"a": 1, "b": {"c": "x"}}
    assert (find(node, ("b", "c")).place.line, find(node, ("b", "c")).place.column) == (3, 6)
    assert find(node, ("a",)).key.column == 1


def test_a_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: 1")
    _, problems = read_file(tmp_path / "recpie.yaml", Location(tmp_path / "recpie.yaml"))
    assert "there is no file" in problems[0].reason
    assert problems[0].remedy.endswith("recipe.yaml?")


def test_a_folder_names_the_recipe_in_it(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: 1")
    _, problems = read_file(tmp_path, Location(tmp_path))
    assert "is a folder" in problems[0].reason
    assert problems[0].remedy.endswith("recipe.yaml?")


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0.yaml"])
def test_a_name_that_no_file_can_have_is_a_problem(tmp_path, name):
    node, problems = read_file(tmp_path / name, Location(tmp_path / name))
    assert node is None
    assert "there is no file" in problems[0].reason
    assert "\0" not in str(problems[0])
