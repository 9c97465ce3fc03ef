"""Cleaning a row finds what is wrong with its texts, leaves alone what is not, and is done after one time."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data.cleaning.clean import CHECKS, clean
from lorakit.data.rows import Conversation, Text, Tokens

FIX = dict.fromkeys((*CHECKS, "trivial"), "fix")


def row(answer: str, prompt: str = "Tell me more.", **more) -> Conversation:
    asked = {"role": "user", "content": prompt}
    return Conversation([asked, {"role": "assistant", "content": answer, **more}])


def cleaned(check: str, answer: str, prompt: str = "Tell me more.", action: str = "fix"):
    said, findings = clean(row(answer, prompt), {check: action})
    return (said.messages[1]["content"] if said else None), findings


FIXED = [
    ("encoding", "cafÃ© au lait", "café au lait"),
    ("encoding", "â€œquotedâ€\x9d and donâ€™t", "“quoted” and don’t"),
    ("encoding", "voilÃ le travail", "voilà le travail"),
    ("encoding", "\x93said\x94", "“said”"),
    ("encoding", "РїСЂРёРІРµС‚, РјРёСЂ", "привет, мир"),
    ("encoding", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет"),
    ("encoding", "good line\nbad lÃ¯ne\nnaïve line", "good line\nbad lïne\nnaïve line"),
    ("encoding", "pair \ud83d\ude00", "pair 😀"),
    ("encoding", "half \ud800 pair", "half \ufffd pair"),
    ("html", "<p>Hello <b>World</b>.</p><p>Next.</p>", "Hello World.\n\nNext."),
    ("html", "one<br/>two<BR>three", "one\ntwo\nthree"),
    ("html", "see <a href='https://x.org/a?b=1'>this page</a>", "see this page"),
    ("html", '<div class="a b">text</div>', "text"),
    ("html", "<td>a</td><td>b</td>", " a  b "),
    ("html", "salt &amp; pepper&nbsp;here &#39;now&#39; caf&eacute; &#x2014;", "salt & pepper here 'now' café —"),
    ("html", "kept<!-- gone\nall -->", "kept"),
    ("html", "<script type='x'>if (a < b) run()</script>after<style>p {color: red}</style>", "after"),
    ("html", "<b>bold</b> and `<b>code</b> &amp;`", "bold and `<b>code</b> &amp;`"),
    ("html", "a &lt; b &amp;&amp; c", "a < b && c"),
    ("noise", "a\x00b\x07c\x7f", "abc"),
    ("noise", "\x1b[1;31mred\x1b[0m \x1b]0;title\x07text", "red text"),
    ("noise", "one\rtwo\x0cthree", "one\ntwo\nthree"),
    ("noise", "\ufeffzero\u200bwidth\u2060 a\u200db", "zerowidth ab"),
    ("noise", "hidden\U000e0041\U000e0042 tags", "hidden tags"),
    ("noise", "\u202eturned", "turned"),
]


@pytest.mark.parametrize(("check", "text", "right"), FIXED)
def test_what_is_wrong_is_put_right(check, text, right):
    fixed, findings = cleaned(check, text)
    assert fixed == right
    assert findings
    assert {(one.check, one.field) for one in findings} == {(check, "message 2 (assistant)")}
    assert findings[0].fixed


@pytest.mark.parametrize(("check", "text", "right"), FIXED)
@pytest.mark.parametrize("action", ["report", "error"])
def test_only_fix_changes_a_row(check, text, right, action):
    said = row(text)
    before = copy.deepcopy(said)
    after, findings = clean(said, {check: action})
    assert after is said
    assert said == before
    assert findings
    assert not any(one.fixed for one in findings)


@pytest.mark.parametrize(("check", "text", "right"), FIXED)
def test_a_fix_leaves_the_row_it_was_given(check, text, right):
    said = row(text)
    before = copy.deepcopy(said)
    clean(said, FIX)
    assert said == before


def test_a_check_that_is_off_finds_nothing():
    assert clean(row("<p>cafÃ©\x00</p>"), {}) == (row("<p>cafÃ©\x00</p>"), [])
    assert clean(row(""), dict.fromkeys(FIX, "off")) == (row(""), [])


UNTOUCHED = [
    "“Curly” quotes — déjà vu, ﬁne ligatures, Ｗｉｄｅ letters, e\u0301 decomposed, ½ µm, 10³",
    "Été, où êtes-vous ? « À la carte » — l’été à Âge",
    "Ça s'est passé à São Paulo, MANHÃ, AÇÃO, ÎLE, Århus, Łódź, Čeština, Ñandú",
    "В начале её пьесы — «ёлка», №5, 20°",
    "Ελληνικά: ΆΈΉ «και» ά",
    "日本語のテスト。中文，测试！한국어 ไทย हिन्दी العربية עברית Tiếng Việt được",
    "می\u200cخواهم क\u094d\u200dष 👩\u200d👩\u200d👧 ❤\ufe0f\u200d🔥",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e007f",
    "ไทย\u200bไทย \u200fעברית\u200e",
    "a < b and c > d; x <- 3; 1<2>0",
    "List<int> Map<String, Object> Vec<a> Shared<p> std::vector<std::string> Option<T>",
    "<think>\nstep\n</think>\n<tool_call>{}</tool_call><|im_end|> <s>[INST]",
    "<summary>short</summary> <title>My life</title> <answer>4</answer> <style>formal</style> <body>text</body>",
    "Write to <a@b.c> or <https://example.org/?a=1&copy=2&lt=3>.",
    "```html\n<p>Hi &amp; bye</p>\n```",
    "Use `<p>` and `&nbsp;` here, or ``<br/>``",
    "```\n<div>never closed",
    "int *p = &copy; f(&reg;, &times;);",
    "R&D; AT&T; Q&A; a&b;c &unknown; & &;",
    "<!DOCTYPE html>\n<html><body><p>Hi &amp; bye</p></body></html>",
    "<ul><li>1</li><li>2</li><li>3</li><li>4</li></ul>",
    "The HTML tag <p> opens a paragraph.",
    "Line one\r\nline two\ttabbed\n\n\n\nend",
    "It happened at 10:30:00 and INFO desks know it. WARNING: do not eat.",
    "ERROR: 42 is not a list",
    "def f(x):\n    return x if x else None  # see http://x.org/%7Euser?q=a%20b",
]


@pytest.mark.parametrize("text", UNTOUCHED)
@pytest.mark.parametrize("said", [row, Text], ids=["answer", "document"])
def test_what_is_right_stays_and_is_not_reported(text, said):
    assert clean(said(text), FIX) == (said(text), [])


@pytest.mark.parametrize(
    ("check", "text"),
    [
        ("encoding", "lost \ufffd\ufffd letters"),
        ("html", "write &lt;b&gt;bold&lt;/b&gt;"),
        ("html", "&lt;|im_end|&gt;"),
        ("html", "&amp;lt;"),
        ("noise", "2024-01-02 10:00:00,123 INFO module: started"),
        ("noise", "[10:00:00] ERROR something failed"),
        ("noise", 'Traceback (most recent call last):\n  File "a.py", line 3, in f'),
        ("noise", "Failed:\n\tat org.example.Main.run(Main.java:12)"),
        ("noise", "12%|███       | 3/24 [00:01<00:09]"),
    ],
)
def test_what_cannot_be_put_right_is_found_and_stays(check, text):
    fixed, findings = cleaned(check, text)
    assert fixed == text
    assert [(one.check, one.fixed) for one in findings] == [(check, False)]
    assert "no fix" in findings[0].what or "stays" in findings[0].what


@pytest.mark.parametrize("prompt", ["Show me a log line.", "Explain this traceback", "What does the error mean?"])
def test_log_lines_are_expected_where_the_prompt_speaks_of_them(prompt):
    assert cleaned("noise", "2024-01-02 10:00:00,123 INFO module: started", prompt)[1] == []


def test_markup_is_expected_where_the_row_speaks_of_html():
    assert cleaned("html", "<div><p>Hi</p></div>", "Write me some HTML.") == ("<div><p>Hi</p></div>", [])
    assert cleaned("html", "<div><p>Hi</p></div>", "See index.html there.")[0] == "Hi"


TRIVIAL = {
    "the answer is empty": ["", " \n\t"],
    "the answer is only punctuation": ["...", "…", "?", "---", "??!", "。"],
    "the answer is a placeholder": ["N/A", "n/a.", "TODO", "tbd", "<answer>", "Lorem ipsum dolor"],
    "the answer is a bare refusal": ["I don't know.", "I’m sorry, but I can’t assist with that."],
    "the answer is the prompt again": ["Tell me more.", "tell  me\nmore."],
}  # fmt: skip


@pytest.mark.parametrize(("what", "answer"), [(what, answer) for what, some in TRIVIAL.items() for answer in some])
def test_an_answer_that_says_nothing_is_left_out(what, answer):
    said, findings = clean(row(answer), {"trivial": "fix"})
    assert said is None
    assert [(one.what, one.fixed, one.field) for one in findings] == [(what, True, "message 2 (assistant)")]
    kept, findings = clean(row(answer), {"trivial": "report"})
    assert kept == row(answer)
    assert [(one.what, one.fixed) for one in findings] == [(what, False)]


@pytest.mark.parametrize(
    "answer",
    ["Paris", "42", "yes", "No.", "{}", "[]", "-", "+", "👍", "None", "null", "A", "output", "x = ?", "北京", ":)", "0",
     "Sorry, I can't refund that after a month, but I can offer you a credit.",
     "I don't know him well, yet he seems honest."],
)  # fmt: skip
def test_a_short_answer_is_not_a_trivial_one(answer):
    assert clean(row(answer), {"trivial": "fix"}) == (row(answer), [])


def test_an_answer_that_calls_a_tool_may_be_empty():
    said = row("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    assert clean(said, FIX) == (said, [])


def test_thinking_is_cleaned_and_tools_are_not():
    call = [{"type": "function", "function": {"name": "f", "arguments": {"q": "<p>cafÃ©</p>"}}}]
    tools = [{"type": "function", "function": {"name": "f", "description": "<p>x</p>"}}]
    messages = [
        {"role": "user", "content": "Go <b>on</b>"},
        {"role": "assistant", "content": "", "thinking": "cafÃ©", "tool_calls": call, "train": False},
        {"role": "tool", "content": "<p>page</p>\x00", "name": "f"},
        {"role": "assistant", "content": "Done"},
    ]
    said, findings = clean(Conversation(messages, tools), FIX)
    assert said.tools == tools
    assert said.messages[0]["content"] == "Go on"
    assert said.messages[1] == {**messages[1], "thinking": "café"}
    assert said.messages[2] == {"role": "tool", "content": "<p>page</p>", "name": "f"}
    assert [one.field for one in findings] == [
        "message 1 (user)",
        "message 2 (assistant), thinking",
        "message 3 (tool)",
    ]


def test_token_ids_are_never_touched():
    said = Tokens([1, 2], [-100, 2])
    assert clean(said, FIX) == (said, [])


def test_what_does_not_settle_is_left_as_it_came():
    said = row("<" * 40 + "b></b>" + "<b>x</b>" * 2 + "b>" * 40)
    after, _ = clean(said, {"html": "fix"})
    again, more = clean(after, {"html": "fix"})
    assert again == after
    assert not any(one.fixed for one in more)


MARKUP = "< > </ <p> </p> <b> </b> <br/> <a href='x' & &amp; &lt; &gt; &#39; &#60; amp; lt; ; nbsp; #8203; <!-- -->"
SIGNS = "\x00 \x1a \x1b [0m ] \x9b \x85 \u200b \u200d \u200c \ufeff \u202e \ufffd \ud83d \ude00 Ã © â € ™ Â Ð ¿ é я 中"
MORE = [
    "👩",
    "\U000e0041",
    "\n",
    " ",
    "\r",
    "\xa0",
    "`",
    "```",
    "<script>",
    "</script>",
    "html",
    "x",
    "12:00:00 INFO",
    "TODO",
    "...",
]
PIECES = st.sampled_from([*MARKUP.split(" "), *SIGNS.split(" "), *MORE])


@settings(max_examples=400, deadline=None)
@given(
    st.lists(PIECES | st.text(max_size=3), max_size=14).map("".join),
    st.sampled_from(["Tell me.", "html?", "<b>Go</b>"]),
)
def test_cleaning_the_cleaned_finds_nothing_to_fix(answer, prompt):
    for said in (row(answer, prompt), Text(answer)):
        once, _ = clean(said, FIX)
        if once is not None:
            twice, findings = clean(once, FIX)
            assert twice == once
            assert not any(one.fixed for one in findings)


PARTS = [
    "<",
    "<!--",
    "<p ",
    "<b",
    "&amp",
    "&amp;",
    "```",
    "`",
    "<script>",
    "\u200d",
    "Ã",
    "é",
    "\n",
    " ",
    "\x1b]",
    "=",
    "█",
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", [*PARTS, "1:00:00 ", "\n    at ", '\n  File "'])
def test_no_text_takes_more_than_a_time_that_grows_with_its_length(piece):
    clean(Text(piece * (300_000 // len(piece))), FIX)
