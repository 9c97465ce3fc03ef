"""How rows become conversations, texts and tokens: one promise a format and what each refuses."""

import copy
import json
import pickle

import pyarrow as pa
import pytest

from lorakit.data.formats import RowError, parse_record
from lorakit.data.formats.messages import Sharegpt
from lorakit.data.formats.template import Template
from lorakit.data.formats.text_columns import Classification
from lorakit.data.rows import Conversation, Text, Tokens
from lorakit.registry import FORMATS

SYSTEM, USER, ASSISTANT = (
    {"role": role, "content": text} for role, text in (("system", "s"), ("user", "a"), ("assistant", "b"))
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4 degrees"}
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"type": "string"}, "day": {"type": ["string", "null"]}},
        "required": ["city"],
    },
}
TOOL = {"type": "function", "function": WEATHER}


def messages(name, record, settings=None):
    found = parse_record(name, settings, record)
    assert isinstance(found, Conversation)
    return found.messages


def complaint(name, record, settings=None):
    with pytest.raises(RowError) as caught:
        parse_record(name, settings, record)
    return caught.value.reason, caught.value.case


@pytest.mark.parametrize(
    ("name", "row", "conversation"),
    [
        ("messages", {"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        ("messages", {"messages": [{**USER, "name": None, "tool_calls": []}, ASSISTANT]}, [USER, ASSISTANT]),
        ("messages", {"messages": [USER], "system": "s"}, [SYSTEM, USER]),
        ("messages", {"messages": [{"role": "developer", "content": "s"}, USER]}, [SYSTEM, USER]),
        ("alpaca", {"instruction": "a", "output": "b"}, [USER, ASSISTANT]),
        ("alpaca", {"instruction": "a", "output": "b", "input": None, "system": ""}, [USER, ASSISTANT]),
        ("alpaca", {"instruction": "a", "output": "b", "input": "c"},
         [{"role": "user", "content": "a\n\nc"}, ASSISTANT]),
        ("prompt-completion", {"prompt": "a", "completion": "b"}, [USER, ASSISTANT]),
        ("prompt-completion", {"prompt": "", "completion": ""},
         [{**USER, "content": ""}, {**ASSISTANT, "content": ""}]),
        ("prompt-completion", {"prompt": [USER], "completion": [ASSISTANT], "system": "s"}, [SYSTEM, USER, ASSISTANT]),
        ("question-answer", {"question": "a", "answer": "b"}, [USER, ASSISTANT]),
        ("question-answer", {"question": "a", "answer": "b", "context": "c", "system": "s"},
         [SYSTEM, {"role": "user", "content": "c\n\na"}, ASSISTANT]),
        ("question-answer", {"question": "a", "answers": {"text": ["b", "c"], "answer_start": [1, 2]}},
         [USER, ASSISTANT]),
        ("question-answer", {"question": "a", "answer": ["b", "c"], "answers": None}, [USER, ASSISTANT]),
        ("classification", {"text": "a", "label": "b"}, [USER, ASSISTANT]),
    ],
)  # fmt: skip
def test_a_row_becomes_a_conversation(name, row, conversation):
    assert messages(name, row) == conversation


@pytest.mark.parametrize(
    ("name", "row", "reason", "case"),
    [
        ("messages", {}, "the column 'messages' is missing or null", ""),
        ("messages", {"messages": []}, "the column 'messages' is an empty list", ""),
        ("messages", {"messages": "hello"}, "the column 'messages' is not a list of messages", "it is a text"),
        ("messages", {"messages": "[]"}, "the column 'messages' is an empty list", ""),
        ("messages", {"messages": [USER, "b"]},
         "a message is not an object with role and content", "message 2 is a text"),
        ("messages", {"messages": [{"role": "user"}]},
         "a message has no text in 'content'", "message 1 (user) has null"),
        ("messages", {"messages": [{"role": "gpt", "content": "a"}]},
         "a message has none of the roles system, user, assistant, tool", "message 1 has 'gpt'"),
        ("messages", {"messages": [{"content": "a"}]},
         "a message has none of the roles system, user, assistant, tool", "message 1 has None"),
        ("messages", {"messages": [{"role": ["user"], "content": "a"}]},
         "a message has none of the roles system, user, assistant, tool", "message 1 has ['user']"),
        ("messages", {"messages": [USER, {**ASSISTANT, "audio": {"id": "x"}, "score": 0}]},
         "a message has parts that would not be trained on", "message 2 (assistant) has 'audio', 'score'"),
        ("messages", {"messages": [SYSTEM, USER], "system": "t"},
         "the row has a system prompt twice, in the column 'system' and as its first message", ""),
        ("alpaca", {"instruction": "a", "output": "b", "input": 3},
         "the column 'input' is not a text", "it is a number"),
        ("alpaca", {"instruction": "a", "output": None}, "the column 'output' is missing or null", ""),
        ("prompt-completion", {"prompt": "a", "completion": [USER]},
         "the column 'completion' is not a text", "it is a list"),
        ("prompt-completion", {"prompt": [3], "completion": [USER]}, "a message is not an object with role and content",
         "message 1 is a number"),
        ("prompt-completion", {"prompt": [USER], "completion": [USER]},
         "the column 'completion' has no assistant message: there is nothing to train", ""),
        ("question-answer", {"question": "a", "answers": {"text": []}},
         "the row has no answer", "the list in the column 'answers' is empty"),
        ("question-answer", {"question": "a", "answer": 3}, "the column 'answer' is not a text", "it is a number"),
        ("question-answer", {"question": "a", "answer": "b", "answers": ["c"]},
         "the row has both 'answer' and 'answers': one of them would not be trained on", ""),
        ("text", {"text": None}, "the column 'text' is missing or null", ""),
        ("text", {"text": ["a"]}, "the column 'text' is not a text", "it is a list"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_conversation_says_why(name, row, reason, case):
    assert complaint(name, row) == (reason, case)


def test_a_text_is_trained_as_it_is():
    assert parse_record("text", None, {"text": " a\n"}) == Text(" a\n")


# Parts of messages


@pytest.mark.parametrize("key", ["thinking", "reasoning_content", "reasoning"])
def test_an_assistants_reasoning_is_kept_under_one_name(key):
    row = {"messages": [USER, {**ASSISTANT, key: "hm"}]}
    assert messages("messages", row)[1] == {**ASSISTANT, "thinking": "hm"}
    assert complaint("messages", {"messages": [{**USER, key: "hm"}]}) == (
        "a message has parts that would not be trained on", f"message 1 (user) has {key!r}",
    )  # fmt: skip


def test_reasoning_that_is_said_twice_must_be_the_same():
    same = {**ASSISTANT, "thinking": "hm", "reasoning": "hm"}
    assert messages("messages", {"messages": [USER, same]})[1]["thinking"] == "hm"
    assert "two different" in complaint("messages", {"messages": [USER, {**same, "reasoning": "oh"}]})[0]


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        ({"train": False}, False),
        ({"weight": 0}, False),
        ({"weight": 0.0, "train": None}, False),
        ({"train": False, "weight": 0}, False),
        ({"train": True}, True),
        ({"weight": 1}, True),
        ({"weight": None}, True),
    ],
)
def test_a_message_says_whether_it_is_trained(parts, trained):
    found = messages("messages", {"messages": [USER, {**ASSISTANT, **parts}]})[1]
    assert found == (ASSISTANT if trained else {**ASSISTANT, "train": False})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({**ASSISTANT, "train": 0}, "'train' is not true or false"),
        ({**ASSISTANT, "weight": 0.5}, "'weight' is not 0 or 1"),
        ({**ASSISTANT, "weight": True}, "'weight' is not 0 or 1"),
        ({**ASSISTANT, "train": True, "weight": 0}, "'train' and 'weight' contradict each other"),
        ({**USER, "train": False}, "only an assistant's message may have 'train'"),
        ({**USER, "weight": 1}, "only an assistant's message may have 'weight'"),
        ({**USER, "name": "b"}, "a message has parts that would not be trained on"),
        ({**RESULT, "name": 3}, "a message's 'name' is not a text"),
        ({**USER, "tool_calls": [CALL]}, "a message has parts that would not be trained on"),
        ({**ASSISTANT, "content": None}, "a message has no text in 'content'"),
        ({**ASSISTANT, "content": None, "thinking": "hm"}, "a message has no text in 'content'"),
        ({**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
         "a message has a part that is not plain text"),
        ({**USER, "content": [{"type": "text", "text": "a", "cache": {"x": 1}}]},
         "a message has a part that is not plain text"),
        ({**USER, "content": ["a"]}, "a message has a part that is not plain text"),
    ],
)  # fmt: skip
def test_what_a_message_cannot_have_is_refused(message, reason):
    assert complaint("messages", {"messages": [USER, message]})[0] == reason


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": " b"}]
    assert messages("messages", {"messages": [{**USER, "content": parts}]}) == [{**USER, "content": "a b"}]


# Tools


@pytest.mark.parametrize(
    "parts",
    [
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [{"name": "weather", "arguments": {"city": "Bonn"}}]},
        {"content": "", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}]},
        {"content": None, "function_call": {"name": "weather", "arguments": '{"city": "Bonn"}'}},
    ],
)
def test_calls_of_tools_get_one_shape(parts):
    row = {"messages": [USER, {"role": "assistant", **parts}, {"role": "function", "name": "weather", "content": "x"}]}
    assert messages("messages", row)[1:] == [CALLS, {"role": "tool", "content": "x", "name": "weather"}]


def test_calls_keep_their_ids():
    calls = {**CALLS, "tool_calls": [{**CALL, "id": "c1"}]}
    row = {"messages": [USER, calls, {**RESULT, "tool_call_id": "c1"}]}
    assert messages("messages", row) == row["messages"]


@pytest.mark.parametrize("arguments", ["", "{}", None, {}])
def test_a_call_may_have_no_arguments(arguments):
    calls = [{"name": "now", "arguments": arguments}]
    row = {"messages": [USER, {"role": "assistant", "tool_calls": calls}]}
    assert messages("messages", row)[1]["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ("[]", "'tool_calls' is not a list of calls"),
        (["x"], "a tool call is not an object"),
        ([{"name": "", "arguments": {}}], "a tool call names no function"),
        ([{"function": "x"}], "a tool call names no function"),
        ([{"name": "x", "arguments": "{"}], "the arguments of a tool call is not valid JSON"),
        ([{"name": "x", "arguments": '{"a": NaN}'}], "the arguments of a tool call is not valid JSON"),
        ([{"name": "x", "arguments": '{"a": 1, "a": 2}'}], "the arguments of a tool call is not valid JSON"),
        ([{"name": "x", "arguments": "[1]"}], "the arguments of a tool call are not an object"),
        ([{"name": "x", "arguments": {}, "result": 3}], "a tool call has parts that would not be trained on"),
        ([{"type": "custom", "name": "x"}], "a tool call has parts that would not be trained on"),
        ([{**CALL, "id": 3}], "the id of a tool call is not a text"),
    ],
)
def test_a_call_that_cannot_be_read_is_refused(calls, reason):
    assert complaint("messages", {"messages": [USER, {"role": "assistant", "tool_calls": calls}]})[0] == reason


@pytest.mark.parametrize("tools", [[TOOL], [WEATHER], json.dumps([TOOL]), [json.dumps(WEATHER)]])
def test_tools_get_one_shape(tools):
    assert parse_record("messages", None, {"messages": [USER, ASSISTANT], "tools": tools}).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "[]", ""])
def test_no_tools_are_none(tools):
    assert parse_record("messages", None, {"messages": [USER, ASSISTANT], "tools": tools}).tools is None


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("{", "the column 'tools' is not valid JSON"),
        ({"name": "x"}, "the column 'tools' is not a list of functions"),
        ([3], "a tool is not an object"),
        ([{"description": "x"}], "a tool has no name"),
        ([{"type": "code_interpreter"}], "a tool is of another type than function"),
    ],
)
def test_tools_that_cannot_be_read_are_refused(tools, reason):
    assert complaint("messages", {"messages": [USER, ASSISTANT], "tools": tools})[0] == reason


def through_arrow(*rows):
    return pa.Table.from_pylist(list(rows)).to_pylist()


def test_rows_mean_the_same_after_arrow_has_filled_their_structs():
    """Arrow gives every struct the members of all, null where it has none."""
    other = {
        "name": "clock",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string", "description": "a zone"}}},
    }
    # A column has one schema: a type cannot be a text here and a list there.
    tool = copy.deepcopy(TOOL)
    del tool["function"]["parameters"]["properties"]["day"]
    clock = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}, "id": "c2"}
    rows = [
        {"messages": [USER, CALLS, {**RESULT, "tool_call_id": "c1"}, ASSISTANT], "tools": [tool], "system": None},
        {"messages": [{**USER}, {**CALLS, "tool_calls": [clock]}, RESULT, {**ASSISTANT, "train": False}],
         "tools": [{"type": "function", "function": other}]},
        {"messages": [USER, {**ASSISTANT, "thinking": "hm"}], "system": "s"},
    ]  # fmt: skip
    filled = through_arrow(*rows)
    assert filled[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Bonn", "zone": None}
    assert [parse_record("messages", None, row) for row in filled] == [
        parse_record("messages", None, row) for row in rows
    ]


def test_a_null_argument_is_dropped_only_where_the_tools_say_it_is_none():
    def arguments(given, tools):
        calls = [{"name": "weather", "arguments": given}]
        row = {"messages": [USER, {"role": "assistant", "tool_calls": calls}], "tools": tools}
        return messages("messages", row)[1]["tool_calls"][0]["function"]["arguments"]

    parameters = {
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string"},
            "day": {"type": ["string", "null"]},
            "where": {"type": "object", "properties": {"x": {"type": "number"}}},
        },
        "required": ["city"],
    }
    tools = [{"name": "weather", "parameters": parameters}]
    given = {"city": None, "unit": None, "day": None, "zone": None, "where": {"x": 1, "y": None}}
    assert arguments(given, tools) == {"city": None, "day": None, "where": {"x": 1}}
    assert arguments(given, None) == given


def test_a_schemas_default_null_is_kept_where_null_is_allowed():
    properties = {
        "a": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "b": {"type": "string", "default": None, "enum": None},
        "c": None,
    }
    tools = [{"name": "f", "parameters": {"type": "object", "properties": properties}}]
    found = parse_record("messages", None, {"messages": [USER, ASSISTANT], "tools": tools}).tools
    assert found[0]["function"]["parameters"]["properties"] == {"a": properties["a"], "b": {"type": "string"}}


# sharegpt


@pytest.mark.parametrize(
    ("word", "role"),
    [
        *((word, "user") for word in ("human", "user", "prompter", "Human", "HUMAN", "humam", " user ")),
        *((word, "assistant") for word in ("gpt", "GPT", "assistant", "chatgpt", "bard", "bing", "model", "ai", "bot")),
        *((word, "assistant") for word in ("gtp", "assistent")),
        *((word, "system") for word in ("system", "System", "sytem")),
        *((word, "tool") for word in ("tool", "observation", "function_response", "function-response")),
    ],
)
def test_the_roles_of_sharegpt_are_known_by_their_many_names(word, role):
    turns = [{"from": "system", "value": "s"}, {"from": word, "value": "a"}]
    assert messages("sharegpt", {"conversations": turns})[1] == {"role": role, "content": "a"}


def test_a_role_that_is_not_known_comes_with_the_nearest():
    reason, case = complaint("sharegpt", {"conversations": [{"from": "humann", "value": "a"}]})
    assert reason.startswith("a turn has an unknown role")
    assert case == "turn 1 has 'humann'. Did you mean human?"


def test_roles_of_ones_own_come_first():
    row = {"conversations": [{"from": "Customer", "value": "a"}, {"from": "human", "value": "b"}]}
    settings = Sharegpt(roles={"customer": "user", "human": "assistant"})
    assert messages("sharegpt", row, settings) == [USER, ASSISTANT]


def test_sharegpt_rows_have_tools_and_calls():
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
        {"from": "observation", "value": "4 degrees"},
        {"from": "gpt", "value": "b"},
    ]
    row = {"conversations": turns, "tools": json.dumps([WEATHER]), "system": "s"}
    assert parse_record("sharegpt", None, row) == Conversation([SYSTEM, USER, CALLS, RESULT, ASSISTANT], [TOOL])


def test_sharegpt_turns_may_be_messages_and_say_whether_they_are_trained():
    row = {"conversation": [{**USER, "from": None}, ASSISTANT], "conversations": None}
    assert messages("sharegpt", row) == [USER, ASSISTANT]
    turns = [{"from": "human", "value": "a", "weight": 0}, {"from": "gpt", "value": "b", "weight": 0.0}]
    assert messages("sharegpt", {"conversations": turns}) == [USER, {**ASSISTANT, "train": False}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "the column 'conversations' is missing or null"),
        ({"conversations": []}, "the column 'conversations' is an empty list"),
        ({"conversation": "a"}, "the column 'conversation' is not a list of turns"),
        ({"conversations": [1], "conversation": [2]},
         "the row has both 'conversations' and 'conversation': one of them would not be trained on"),
        ({"conversations": ["a"]}, "a turn is not an object with from and value"),
        ({"conversations": [{"value": "a"}]}, "a turn does not say who speaks, in 'from'"),
        ({"conversations": [{"from": "human", "value": "a", "content": "b"}]}, "a turn has both 'value' and 'content'"),
        ({"conversations": [{"from": "human", "value": None}]}, "a message has no text in 'content'"),
        ({"conversations": [{"from": "gpt", "value": "a", "image": "x.png"}]},
         "a message has parts that would not be trained on"),
        ({"conversations": [{"from": "function_call", "value": "weather"}]},
         "the value of a function_call turn is not valid JSON"),
        ({"conversations": [{"from": "function_call", "value": "3"}]},
         "the value of a function_call turn is not a call"),
    ],
)  # fmt: skip
def test_a_sharegpt_row_that_cannot_be_read_says_why(record, reason):
    assert complaint("sharegpt", record)[0] == reason


# prompt-completion


def test_only_the_completion_is_trained():
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert messages("prompt-completion", row) == [USER, {**ASSISTANT, "train": False}, USER, ASSISTANT]


# classification


def test_labels_are_asked_for_and_looked_up():
    settings = Classification(labels=["ham", "spam"])
    asked = messages("classification", {"text": "{labels}", "label": 1}, settings)
    assert "ham, spam" in asked[0]["content"]
    assert "{labels}" in asked[0]["content"]
    assert asked[1]["content"] == "spam"
    assert messages("classification", {"text": "a", "label": "ham"}, settings)[1]["content"] == "ham"
    assert messages("classification", {"text": "a", "label": "0"}, settings)[1]["content"] == "ham"


def test_a_prompt_of_ones_own_is_filled_in():
    settings = Classification(labels=["x", "y"], prompt='{{"t": "{text}"}} {labels} {text}')
    row = {"text": "a {text}", "label": 0, "system": "s"}
    assert messages("classification", row, settings)[:2] == [
        SYSTEM,
        {"role": "user", "content": '{"t": "a {text}"} x, y a {text}'},
    ]


def test_a_label_of_digits_is_a_name_where_names_are_digits():
    settings = Classification(labels=["1", "0"])
    assert messages("classification", {"text": "a", "label": "1"}, settings)[1]["content"] == "1"
    assert messages("classification", {"text": "a", "label": 1}, settings)[1]["content"] == "0"
    assert complaint("classification", {"text": "a", "label": "2"}, settings)[1] == "'2'"


@pytest.mark.parametrize(
    ("label", "labels", "reason", "case"),
    [
        (None, None, "the column 'label' is missing or null", ""),
        (True, ["a"], "the column 'label' is neither a text nor a whole number", "it is true or false"),
        (1.0, ["a"], "the column 'label' is neither a text nor a whole number", "it is a number"),
        ("spma", ["ham", "spam"], "a label is not in the list of labels", "'spma'. Did you mean spam?"),
        (2, ["ham", "spam"], "a label is not in the list of labels", "2, of 0 to 1"),
        (-1, ["ham", "spam"], "a label is not in the list of labels", "-1, of 0 to 1"),
    ],
)
def test_a_label_that_is_none_is_refused(label, labels, reason, case):
    assert complaint("classification", {"text": "a", "label": label}, Classification(labels=labels)) == (reason, case)


def test_a_number_without_a_list_of_names_is_refused():
    assert "labels: [...]" in complaint("classification", {"text": "a", "label": 1})[0]


# oasst


def node(role, text, *replies, **facts):
    return {"message_id": text, "role": role, "text": text, "replies": list(replies), **facts}


def path(*replies, **facts):
    record = {
        "message_tree_id": "q",
        "tree_state": "ready_for_export",
        "prompt": node("prompter", "q", *replies, **facts),
    }
    return [message["content"] for message in messages("oasst", record)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rank": 1}, {"rank": 0}),
        ({}, {"rank": 7}),
        ({"rank": None, "score": 9}, {"rank": 1, "score": 0}),
        ({"score": 0.1}, {"score": 0.2}),
        ({}, {"score": -3}),
        ({"labels": {"quality": {"value": 0.2}}}, {"labels": {"quality": {"value": 0.9}}}),
        ({"deleted": True, "rank": 0}, {"rank": 1}),
        ({"review_result": False, "rank": 0}, {"rank": 1}),
        ({"review_result": False}, {"review_result": None, "deleted": None}),
    ],
)
def test_the_best_reply_is_taken(one, other):
    assert path(node("assistant", "worse", **one), node("assistant", "better", **other)) == ["q", "better"]


def test_the_first_of_equal_replies_is_taken():
    assert path(node("assistant", "first"), node("assistant", "second")) == ["q", "first"]


def test_the_path_ends_with_an_answer():
    deep = node("assistant", "a", node("prompter", "b", node("assistant", "c", node("prompter", "d"))))
    assert path(deep) == ["q", "a", "b", "c"]
    roles = [message["role"] for message in messages("oasst", {"prompt": node("prompter", "q", deep), "system": "s"})]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_a_very_deep_tree_is_read():
    tree = node("assistant", "end")
    for level in range(2000):
        tree = node("prompter" if level % 2 == 0 else "assistant", str(level), tree)
    assert len(messages("oasst", {"prompt": node("prompter", "q", tree)})) == 2002


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a", "the column 'prompt' is not a tree of messages"),
        (None, "the column 'prompt' is not a tree of messages"),
        (node("prompter", "q"), "the tree has no answer"),
        (node("prompter", "q", node("assistant", "a", deleted=True)), "the tree has no answer"),
        (node("prompter", "q", node("assistant", "a"), review_result=False),
         "the prompt of the tree is deleted, or failed its review"),
        (node("prompter", None, node("assistant", "a")), "a message of the tree has no text in 'text'"),
        (node("teacher", "q", node("assistant", "a")),
         "a message of the tree has none of the roles prompter, user, human, assistant"),
        ({**node("prompter", "q"), "replies": "a"}, "the replies in a tree are not a list of messages"),
        (node("prompter", "q", "a"), "the replies in a tree are not a list of messages"),
    ],
)  # fmt: skip
def test_a_tree_that_cannot_be_read_says_why(prompt, reason):
    assert complaint("oasst", {"prompt": prompt})[0] == reason


# tokens


@pytest.mark.parametrize(
    ("row", "ids", "labels"),
    [
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, [1, 2, 3], [-100, 2, 3]),
        ({"input_ids": [1, 2, 3]}, [1, 2, 3], [1, 2, 3]),
        ({"input_ids": [1, 2, 3], "labels": None, "attention_mask": [1, 1, 1]}, [1, 2, 3], [1, 2, 3]),
        ({"input_ids": [1, 2, 0, 0], "attention_mask": [1, 1, 0, 0]}, [1, 2], [1, 2]),
        ({"input_ids": [0, 1, 2], "labels": [-100, -100, 2], "attention_mask": [0, 1, 1]}, [1, 2], [-100, 2]),
        ({"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}, [1, 2, 3], [-100, -100, 3]),
        ({"input_ids": [1, 2, 3], "assistant_masks": [0, 1, 0]}, [1, 2, 3], [-100, 2, -100]),
    ],
)
def test_tokens_are_trained_as_they_are(row, ids, labels):
    assert parse_record("tokens", None, row) == Tokens(ids, labels)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": None}, "the column 'input_ids' is missing or null"),
        ({"input_ids": "1 2"}, "the column 'input_ids' is not a list of whole numbers"),
        ({"input_ids": [1, True]}, "the column 'input_ids' is not a list of whole numbers"),
        ({"input_ids": [1, 2.0]}, "the column 'input_ids' is not a list of whole numbers"),
        ({"input_ids": [[1, 2]]}, "the column 'input_ids' is not a list of whole numbers"),
        ({"input_ids": [1, -1]}, "a token id is below 0"),
        ({"input_ids": []}, "no token after the first is trained"),
        ({"input_ids": [1]}, "no token after the first is trained"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "no token after the first is trained"),
        ({"input_ids": [1, 2], "labels": [1]}, "the column 'labels' does not have as many numbers as 'input_ids'"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
         "a label is neither -100 nor the token at its place: something else would be trained"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "the column 'attention_mask' has other numbers than 0 and 1"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]},
         "the column 'attention_mask' hides tokens in the middle"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "the column 'attention_mask' hides every token"),
        ({"input_ids": [1, 2, 0], "labels": [1, 2, 0], "attention_mask": [1, 1, 0]},
         "the column 'attention_mask' hides tokens that are trained"),
        ({"input_ids": [1, 2], "labels": [1, 2], "completion_mask": [0, 1]},
         "the row says in two columns what is trained, 'labels' and 'completion_mask'"),
    ],
)  # fmt: skip
def test_tokens_that_would_train_something_else_are_refused(row, reason):
    assert complaint("tokens", row)[0] == reason


# What holds for all


STRANGE = [None, True, 0, -1, 10**400, float("nan"), "", "x", "{", [], [None], [[]], {}, {"a": None}, ["x"], [{}], [3]]
TURNS = [
    {"from": "human", "value": "a"},
    {"from": "function_call", "value": '{"name": "f"}'},
    {"from": "gpt", "value": ""},
]
BEST = node("assistant", "a", rank=1, score=1, deleted=False, review_result=True, labels={"quality": {"value": 1}})
FULL_MESSAGES = [
    {**USER, "content": [{"type": "text", "text": "a"}]},
    {**ASSISTANT, "thinking": "b", "reasoning": "b", "train": True, "weight": 1, "function_call": None,
     "tool_calls": [{"function": {"name": "weather", "arguments": {"city": None, "x": [None]}}, "id": "c"}]},
    {**RESULT, "name": "weather", "tool_call_id": "c"},
]  # fmt: skip
FULL_TOOL = {
    "name": "weather",
    "parameters": {
        "required": ["day"],
        "properties": {"city": {"type": ["a"], "anyOf": [{"type": "null"}], "oneOf": None, "enum": [1], "items": {}}},
    },
}
GOOD = {
    "messages": {"messages": FULL_MESSAGES, "system": "s", "tools": [FULL_TOOL]},
    "sharegpt": {"conversations": TURNS, "system": "s", "tools": json.dumps([WEATHER])},
    "alpaca": {"instruction": "a", "input": "b", "output": "c", "system": "s"},
    "prompt-completion": {"prompt": [USER], "completion": [ASSISTANT], "system": "s", "tools": [WEATHER]},
    "question-answer": {"question": "a", "answers": {"text": ["b"]}, "context": "c", "system": "s"},
    "text": {"text": "a"},
    "classification": {"text": "a", "label": "b", "system": "s"},
    "oasst": {"prompt": node("prompter", "q", BEST, node("assistant", "b")), "system": "s"},
    "template": {"q": "a", "a": ["b"], "list": {"x": 1}, "system": "s", "tools": [WEATHER]},
    "tokens": {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 1]},
}


TEMPLATE = Template(user="{q} {list.x}", assistant="{a}", missing={"list.x": "-"})


def changed(value):
    """Every value that differs from this one in one part."""
    yield from STRANGE
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {other: kept for other, kept in value.items() if other != key}
            yield from ({**value, key: part} for part in changed(inner))
        yield {**value, "unknown": {"a": 1}}
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from ([*value[:index], part, *value[index + 1 :]] for part in changed(inner))


@pytest.mark.parametrize("name", FORMATS.names())
def test_no_value_makes_a_format_fail_but_with_a_row_error(name):
    settings = TEMPLATE if name == "template" else None
    assert parse_record(name, settings, GOOD[name])
    for record in changed(GOOD[name]):
        if not isinstance(record, dict):
            continue
        try:
            found = parse_record(name, settings, record)
        except RowError as error:
            assert error.reason
            assert pickle.loads(pickle.dumps(error)).case == error.case  # noqa: S301
        else:
            assert isinstance(found, (Conversation, Text, Tokens))


def test_a_row_that_is_nested_too_deeply_is_refused():
    deep = {}
    for _ in range(5000):
        deep = {"items": deep}
    row = {"messages": [USER, ASSISTANT], "tools": [{"name": "f", "parameters": deep}]}
    assert complaint("messages", row)[0] == "the row is nested too deeply"
