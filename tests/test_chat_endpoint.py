"""`lorakit chat` with OpenAI-compatible servers."""

import json

import pytest
from doubles_of_servers import double, reply_with, served
from eval_runs import edit_json, make_run
from gguf_models import spm_base
from test_chat import QUESTION, ScreenOfTest, type_in

from lorakit.chat.interrupt import StopPressed
from lorakit.chat.models import Decoding
from lorakit.chat.opening import first_model, open_chat_models
from lorakit.chat.session import ChatSession
from lorakit.cli.export import open_source, parse_targets
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.models import resolve_models
from lorakit.export.run import export as write_exports
from lorakit.progress import Silent

STREAM = {"Content_Type": "text/event-stream; charset=utf-8"}


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("LORAKIT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def open_session(*given, tokens=20) -> ChatSession:
    model_set = resolve_models([str(one) for one in given], Silent(), servers_alone=True)
    models = open_chat_models(model_set, Silent())
    return ChatSession(models, first_model(models, model_set), Decoding(max_new_tokens=tokens), ScreenOfTest())


def events(*deltas, finish="stop", usage=None, last="data: [DONE]\n\n"):
    """The body of a streamed answer."""
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish})
    bodies = [{"choices": [choice]} for choice in choices] + ([{"choices": [], "usage": usage}] if usage else [])
    return ": a comment\n\n" + "".join(f"data: {json.dumps(body)}\n\n" for body in bodies) + last


@pytest.mark.slow
def test_a_served_file_answers_as_its_run_with_the_runs_system_prompt(tmp_path):
    base = spm_base(tmp_path / "base")
    edit_json(base / "tokenizer_config.json", add_bos_token=False)
    train = {"steps": 40, "learning_rate": 0.01, "eval_every": 40, "save_every": 40}
    run = make_run(tmp_path, base, data={"system": "Be brief."}, train=train)
    with open_source(str(run.folder), None, None, Silent()) as source:
        write_exports(source, parse_targets(["gguf:f32"]), run.exports, False, Silent())
    with served(run.exports / "gguf-f32" / "tiny-F32.gguf") as url:
        session = open_session(run.folder, url)
        type_in(session, f"/compare {QUESTION}")
    of_base, adapter, server = session.answers
    assert server["text"] == adapter["text"] != of_base["text"]
    assert server["prompt_tokens"] == adapter["prompt_tokens"]
    assert session.screen.pieces[-1] != server["text"], "it came in pieces"


def test_pieces_thoughts_and_counts_are_those_of_the_stream():
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    body = events(
        {"role": "assistant"}, {"reasoning_content": "Hm."}, {"content": "Gr"}, {"content": "ün"}, usage=usage
    )
    with double(lambda request, number: (200, body), **STREAM) as server:
        session = open_session(f"{server.url}#tiny")
        type_in(session, "/system Be kind.", "/temperature 0.5", "/seed 4", "Which?", "And?")
    answer = session.answers[0]
    assert (answer["text"], answer["thinking"], answer["ended"]) == ("Grün", "Hm.", "stop")
    assert (answer["prompt_tokens"], answer["tokens"]) == (7, 3)
    assert session.screen.pieces == ["Hm.", "Gr", "ün"] * 2
    first, second = server.requests
    assert first["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Which?"}]
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert (first["temperature"], first["seed"], first["max_tokens"], first["stream"]) == (0.5, 4, 20, True)
    with pytest.raises(UserError, match="7 tokens by its own count"):
        type_in(session, "/tokens")


def test_a_server_that_does_not_stream_is_understood():
    with double(lambda request, number: (200, reply_with("yes", 5, finish="length"))) as server:
        session = open_session(server.url)
        type_in(session, "Well?")
    assert (session.answers[0]["text"], session.answers[0]["ended"]) == ("yes", "length")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (events({"content": "a"}, finish=None, last=""), "ends in the middle"),
        ('data: {"error": {"message": "no memory"}}\n\n', "no memory"),
        ("data: {nonsense\n\n", "breaks the answer off"),
        ("data: [DONE]\n\n", "without a choice"),
        (None, "broke off"),
    ],
)
def test_what_a_server_does_wrong_is_said_and_the_chat_goes_on(body, reason):
    with double(lambda request, number: (200, body if number == 1 else events({"content": "b"})), **STREAM) as server:
        session = open_session(server.url)
        with pytest.raises(LorakitError, match=reason):
            type_in(session, "Well?")
        type_in(session, "Now?")
    assert [turn.question for turn in session.turns] == ["Now?"]


def test_a_stopped_answer_of_a_server_ends_its_request():
    with double(lambda request, number: (200, events({"content": "a"}, {"content": "b"})), **STREAM) as server:
        session = open_session(server.url)

        class Key:
            count = 0

            def check(self):
                self.count += 1
                if self.count == 2:
                    raise StopPressed

        session.key = Key()
        type_in(session, "Well?")
    assert (session.answers[0]["text"], session.answers[0]["ended"]) == ("a", "stopped")
