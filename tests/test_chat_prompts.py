"""A server is asked for exactly the answer that a held-out row scores, whatever the template makes of the row."""

import pytest
from conftest import write_rows
from data_families import FAMILIES, TOOLS, answer, call, chat, result

from lorakit.data.answers import reference_of
from lorakit.data.chat_prompts import prompt_before, read_conversations
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.examples import examples_of
from lorakit.progress import Silent
from lorakit.recipe.schema import Data

PLAIN = [{"messages": chat("Hello", "Hello there!", "How are you?", "Hello there!")}]
THOUGHTS = [
    {"messages": [*chat("Two?"), answer("2", thinking="One and one."), *chat("Three?"), answer("3", thinking="More.")]}
]
CALLS = [
    {
        "messages": [
            *chat("How is the weather in Rome?"),
            answer(tool_calls=[call(city="Rome")]),
            result('{"t": 20}'),
            answer("It is 20 degrees."),
        ],
        "tools": TOOLS,
    }
]


THINK = ("qwen 3", "qwen 3.5", "harmony")
CASES = [(name, "plain", PLAIN) for name in FAMILIES] + [(name, "thoughts", THOUGHTS) for name in THINK]
CASES += [(name, "calls", CALLS) for name, family in FAMILIES.items() if family.tools]


@pytest.mark.parametrize(
    ("name", "rows"), [(one, rows) for one, _, rows in CASES], ids=[" ".join(one[:2]) for one in CASES]
)
def test_the_messages_before_the_answer_are_those_whose_prompt_was_trained(name, rows, tmp_path):
    tokenizer, stop_words = FAMILIES[name].tokenizer(), FAMILIES[name].stops
    data = Data(train=str(write_rows(tmp_path / "rows.jsonl", rows)), max_length=4096)
    template = ChatTemplate(tokenizer, stop_words=stop_words)
    examples, _ = examples_of(data, template, Silent())
    (row,) = read_conversations(data, template, {one["where"] for one in examples.rows}, Silent()).values()
    stops = tokenizer.convert_tokens_to_ids(sorted(template.stops))
    numbers = []
    for example in examples.rows:
        trained = example["input_ids"][: example["answer"]]
        prompt = prompt_before(row, trained, reference_of(example, tokenizer, stops))
        if prompt is None:
            assert row.messages[1].get("tool_calls") and len(examples.rows) == 2
            continue
        numbers.append(len(prompt.messages))
        messages = [template.adapt(message) for message in prompt.messages]
        text = template.write(messages, True, prompt.tools, variables=prompt.variables)
        written = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(written) == prompt.tokens
        # Qwen 3.5's prompt opens a thought, and an answer without one is trained after it is closed.
        assert written == trained or (name == "qwen 3.5" and rows is CALLS)
    assert numbers[-1] == len(row.messages) - 1 and numbers == sorted({*numbers})
