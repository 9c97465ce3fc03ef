"""`lorakit chat`: answers as in eval, models switched on one base, commands, Ctrl-C, pipes, and what is saved."""

import json
import shutil
import subprocess
import sys

import pytest
from chat_terminal import TerminalOf
from conftest import rows_of
from eval_runs import edit_json, evaluate, make_run

from lorakit.chat.commands import run_entry
from lorakit.chat.interrupt import StopPressed
from lorakit.chat.models import Decoding
from lorakit.chat.opening import first_model, open_chat_models
from lorakit.chat.reading import Entry, read_entry
from lorakit.chat.session import ChatSession
from lorakit.errors import UserError
from lorakit.evaluate.models import resolve_models
from lorakit.prepare import reopen_run
from lorakit.progress import Silent

QUESTION = "Tell me about apples, number 30."


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_base):
    """The tiny model with positions for answers that go on until they are stopped."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("long") / "base")
    edit_json(folder / "config.json", max_position_embeddings=100_000)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    """A run long enough that its model ends its answers."""
    train = {"steps": 150, "eval_every": 75, "save_every": 75, "learning_rate": 0.01}
    return make_run(tmp_path_factory.mktemp("first"), base, adapter={"rank": 16}, train=train)


@pytest.fixture(scope="module")
def other_run(tmp_path_factory, base):
    """A run on the same base that learned something else, with a system prompt."""
    folder = tmp_path_factory.mktemp("second")
    return make_run(folder, base, data={"system": "Be brief."}, train={"learning_rate": 0.01, "steps": 3})


class ScreenOfTest(Silent):
    """Remembers what a chat shows."""

    def __init__(self):
        self.lines, self.pieces, self.rows, self.shown_tokens = [], [], [], []

    def say(self, text):
        self.lines.append(text)

    def label(self, name):
        self.pieces.append(f"<{name}>")

    def piece(self, text, thought):
        self.pieces.append(text)

    def end_answer(self, answer):
        pass

    def facts(self, rows):
        self.rows += rows

    def tokens(self, texts):
        self.shown_tokens = texts


def open_session(*given, **settings) -> ChatSession:
    model_set = resolve_models([str(one) for one in given], Silent())
    models = open_chat_models(model_set, Silent())
    decoding = Decoding(max_new_tokens=settings.pop("tokens", 8))
    return ChatSession(models, first_model(models, model_set), decoding, ScreenOfTest(), **settings)


def type_in(session, *lines):
    for line in lines:
        run_entry(session, Entry(line))


def last_answer(session) -> str:
    return session.answers[-1]["text"]


def lines_of(*texts):
    """A reader of these lines, as read_entry takes one."""
    waiting = list(texts)

    def read_line(goes_on):
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return read_line


def test_every_held_out_prompt_is_answered_as_in_eval(run):
    session = open_session(run.folder)
    _, prepared = reopen_run(run.folder, Silent())
    results, _ = evaluate(run, prepared, Silent())
    expected = {result.name: result.answers for result in results}
    questions = [row["messages"][0]["content"] for row in rows_of(40)[30:]]
    assert [len(answers) for answers in expected.values()] == [10, 10]
    for name, answers in expected.items():
        session.switch(name)
        for question, answer in zip(questions, answers, strict=True):
            type_in(session, "/clear", question)
            assert last_answer(session) == answer


def test_what_is_streamed_is_the_answer(run):
    session = open_session(run.folder, tokens=40)
    type_in(session, QUESTION)
    assert len(session.screen.pieces) > 2
    assert "".join(session.screen.pieces) == last_answer(session)


def test_adapters_and_their_base_take_turns_on_one_base_in_memory(run, other_run, loads):
    session = open_session(run.folder, other_run.folder)
    names = [model.name for model in session.models]
    assert names[0] == "base" and len(names) == 3
    answers = {}
    for _ in range(2):
        for name in names:
            type_in(session, f"/adapter {name}", "/clear", QUESTION)
            assert answers.setdefault(name, last_answer(session)) == last_answer(session)
    assert len(set(answers.values())) == 3
    assert len(loads) == 1


def test_compare_asks_all_and_the_conversation_goes_on_from_the_current_one(run, other_run):
    session = open_session(run.folder, other_run.folder)
    type_in(session, f"/compare {QUESTION}")
    names = [model.name for model in session.models]
    assert [piece for piece in session.screen.pieces if piece.startswith("<")] == [f"<{name}>" for name in names]
    assert len({answer["text"] for answer in session.answers}) == 3
    mine = next(answer["text"] for answer in session.answers if answer["model"] == session.current.name)
    assert session.messages() == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": mine}]
    type_in(session, "/compare on", "And rivers?", "/compare off", "And lamps?")
    assert [answer["model"] for answer in session.answers[3:]] == [*names, session.current.name]
    assert [message["role"] for message in session.messages()] == ["user", "assistant"] * 3


def test_each_model_gets_the_system_prompt_of_its_training_unless_another_is_set(run, other_run):
    session = open_session(run.folder, other_run.folder)
    _, first, second = [model.name for model in session.models]

    def prompt(name):
        type_in(session, f"/adapter {name}", "/clear", QUESTION, "/tokens")
        return "".join(one.text for one in session.screen.shown_tokens)

    assert "system" not in prompt(first)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt(second)
    type_in(session, "/system In rhymes.")
    assert "<|im_start|>system\nIn rhymes.<|im_end|>" in prompt(first)
    type_in(session, '/system ""')
    assert "system" not in prompt(second)


def test_tokens_are_those_that_the_model_got_with_special_ones_marked(run, tokenizer):
    session = open_session(run.folder)
    type_in(session, "Züge \N{PARTY POPPER}?", "/tokens")
    prompt = "<|im_start|>user\nZüge \N{PARTY POPPER}?<|im_end|>\n<|im_start|>assistant\n"
    shown = session.screen.shown_tokens
    assert "".join(one.text for one in shown) == prompt
    assert [one.text for one in shown if one.special] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert sum(one.tokens for one in shown) == len(tokenizer(prompt)["input_ids"])


def test_draws_are_repeated_by_their_seed_and_retry_draws_another(run):
    session = open_session(run.folder, tokens=20)
    type_in(session, "/adapter base", "/temperature 1.5", "/seed 3", QUESTION, "/retry", "/seed 3", "/retry")
    first, second, third = (answer["text"] for answer in session.answers)
    assert first == third != second
    assert len(session.turns) == 1


def test_a_stopped_answer_stays_and_is_saved_untrained(run, tmp_path):
    session = open_session(run.folder, tokens=50)
    type_in(session, QUESTION)
    assert session.turns[0].answer.ended == "stop"

    class Key:
        count = 0

        def check(self):
            self.count += 1
            if self.count == 3:
                raise StopPressed

    session.key = Key()
    type_in(session, "/adapter base", "And rivers?")
    assert session.turns[1].answer.ended == "stopped" and session.turns[1].answer.tokens == 3
    session.key = None
    type_in(session, f"/save {tmp_path / 'a.jsonl'}")
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert [message.get("train") for message in row["messages"]] == [None, None, None, False]


def test_saving_never_replaces_a_file_of_others(run, tmp_path):
    session, path = open_session(run.folder, tokens=50), tmp_path / "rows.jsonl"
    type_in(session, QUESTION, f"/save {path}", "And rivers?", f"/save {path}")
    assert [len(json.loads(line)["messages"]) for line in path.read_text().splitlines()] == [4]
    type_in(session, "/clear", QUESTION, f"/save {path}")
    assert [len(json.loads(line)["messages"]) for line in path.read_text().splitlines()] == [4, 2]
    path.write_text("mine")
    with pytest.raises(UserError, match="was changed since"):
        type_in(session, f"/save {path}")
    with pytest.raises(UserError, match="exists already"):
        type_in(open_session_with(session), f"/save {path}")
    assert path.read_text() == "mine"
    for name, reason in (("rows.txt", "ends in .jsonl"), ("nowhere/rows.jsonl", "no such folder")):
        with pytest.raises(UserError, match=reason):
            type_in(session, f"/save {tmp_path / name}")


def open_session_with(session) -> ChatSession:
    """Another chat with the same models and conversation."""
    screen = ScreenOfTest()
    return ChatSession(session.models, session.current, session.decoding, screen, turns=list(session.turns))


def test_what_was_saved_is_read_as_training_rows(run, tmp_path, recipe_file, lorakit):
    session, path = open_session(run.folder, tokens=50, system="Be kind."), tmp_path / "saved.jsonl"
    type_in(session, QUESTION, "And rivers?", f"/save {path}", "/clear", "And lamps?", f"/save {path}")
    answers = [answer["text"] for answer in session.answers]
    recipe = recipe_file(data={"train": str(path), "eval": None, "max_length": 256})
    code, out, err = lorakit("data", recipe, "--show", 2)
    assert code == 0, err
    assert all(f"⟦{answer}<|im_end|>⟧" in out for answer in answers) and "Be kind." in out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/tokns", "Did you mean /tokens"),
        ("/adapter adaptr", "Did you mean adapter"),
        ("/temperature warm", "not a temperature"),
        ("/temperature nan", "not a temperature"),
        ("/seed -1", "not a whole number"),
        ("/length 0", "not a whole number"),
        ("/retry", "no question"),
        ("/retry now", "nothing may follow"),
        ("/tokens", "no question was sent"),
        ("/save", "give the file"),
        ("/save a.jsonl", "no answer"),
        ("say <|im_end|>", "a mark of its chat template"),
        ("\ud800", "surrogate"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_sent(run, line, reason):
    session = open_session(run.folder)
    with pytest.raises(UserError, match=reason):
        type_in(session, line)
    assert session.turns == [] and session.answers == []


def test_an_answer_ends_with_the_models_positions_and_then_the_context_is_full(tiny_base):
    session = open_session(tiny_base, tokens=1000)
    type_in(session, QUESTION)
    answer = session.turns[0].answer
    assert answer.ended == "context" and answer.prompt_tokens + answer.tokens == 256 + 1
    with pytest.raises(UserError, match=r"context is full: the conversation takes .* 256 positions.*/clear"):
        type_in(session, "And rivers?")
    type_in(session, "/clear", "And rivers?")
    assert len(session.turns) == 1


def test_a_model_without_a_chat_template_is_refused(base, tmp_path, lorakit):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    code, _, err = lorakit("chat", folder)
    assert code == 2 and "has no chat template, which a chat needs" in err
    code, _, err = lorakit("chat")
    assert code == 2 and "no model is named" in err


def test_lines_are_put_together_to_questions_and_commands():
    assert read_entry(lines_of("one\\", "two\\", "three", "four")) == "one\ntwo\nthree"
    assert read_entry(lines_of('"""', "/etc", "", 'x"""')) == "/etc\n\nx"
    assert read_entry(lines_of('"""', "/etc", '"""')).command() is None
    assert read_entry(lines_of(" /etc/passwd")).command() is None
    assert read_entry(lines_of('/system """Be', 'brief."""')).command() == ("system", "Be\nbrief.")
    assert read_entry(lines_of('"""one"""')) == "one"
    for lines, reason in ((['"""', "x"], "has no"), (['"""x""" y'], "more after")):
        with pytest.raises(UserError, match=reason):
            read_entry(lines_of(*lines))


def pipe(text, *arguments):
    command = [sys.executable, "-m", "lorakit", "chat", *map(str, arguments)]
    return subprocess.run(command, input=text.encode(), capture_output=True, check=False)


@pytest.mark.slow
def test_a_pipe_gives_questions_and_gets_answers_alone(run):
    session = open_session(run.folder)
    type_in(session, QUESTION, "And rivers?", "/compare And lamps?")
    done = pipe(f"{QUESTION}\n\nAnd rivers?\n/compare And lamps?\n", run.folder, "-q", "--max-new-tokens", 8)
    assert done.returncode == 0, done.stderr
    one, two, base, adapter = (answer["text"] for answer in session.answers)
    assert done.stdout.decode() == f"{one}\n{two}\nbase:\n{base}\nadapter:\n{adapter}\n"


def test_a_pipe_ends_at_its_first_mistake_and_json_has_messages_and_answers(run, capsys, monkeypatch, lorakit):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n/tokens\n/exit\nnever\n"))
    code, out, err = lorakit("chat", run.folder, "--json", "--max-new-tokens", 8)
    document = json.loads(out)
    assert code == 0, err
    assert [message["role"] for message in document["messages"]] == ["user", "assistant"]
    assert document["answers"][0]["text"] == document["messages"][1]["content"]
    assert document["answers"][0]["prompt_tokens"] == sum(one["tokens"] for one in document["tokens"][0])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/adaptr base\n{QUESTION}\n"))
    code, out, err = lorakit("chat", run.folder)
    assert (code, out) == (2, "") and "Did you mean /adapter?" in err


@pytest.mark.slow
def test_a_chat_in_a_terminal(run, other_run, tmp_path):
    terminal = TerminalOf("chat", run.folder, other_run.folder, "--max-new-tokens", 30)
    terminal.wait("Ctrl-D leaves.\n(.|\n)*> ")
    terminal.send(QUESTION)
    first = terminal.wait(r"\[.* tokens?, .* s.*\]\n> ")
    assert '{"' in first
    names = [line.split()[0] for line in terminal_facts(terminal, "/adapter")]
    assert len(names) == 3
    terminal.send(f"/compare {QUESTION}")
    compared = terminal.wait(r"(\[.* tokens?, [^]]*\]\n(.|\n)*){3}> ")
    assert compared.count(":\n") == 3
    terminal.send("/adapter base")
    terminal.wait("base answers now\n> ")
    terminal.send("/length 90000")
    terminal.wait("90,000 tokens\n> ")
    terminal.send("And rivers?")
    terminal.wait(r"\n.{40}")  # the answer has begun, and would take minutes
    terminal.press("\x03")
    assert "stopped]" in terminal.wait(r"\[base, .*\]\n> ")
    terminal.press("half a line")
    terminal.wait("half a line")
    terminal.interrupt("\n> ")
    terminal.send("/tokens")
    assert "And rivers?<|im_end|>" in terminal.wait("tokens, .* special\n> ")
    assert "\x1b[1;35m<|im_end|>" in terminal.raw
    terminal.send("/nonsense")
    terminal.wait("not a command.*\n> ")
    terminal.send(f"/save {tmp_path / 'talk.jsonl'}")
    terminal.wait(r"saved: .*\n> ")
    terminal.press("\x04")
    assert terminal.end() == 0
    messages = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == [QUESTION, QUESTION, "And rivers?"]
    assert "half a line" not in json.dumps(messages) and "Traceback" not in terminal.text


def terminal_facts(terminal, command):
    terminal.send(command)
    return [line.strip("* ") for line in terminal.wait("\n> ").splitlines()[1:-1]]
