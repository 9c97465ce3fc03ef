"""`lorakit eval RUN http://host:port/v1`: what a server answers is scored on the same rows, and what it does otherwise
than the training is found."""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import CHATML, rows_of, write_rows
from doubles_of_servers import double, reply_with, served
from eval_runs import edit_json, labelled_rows, make_run, score
from gguf_models import spm_base
from runs_of_tests import run_recipe

from lorakit.cli.export import open_source
from lorakit.data.chat_prompts import ChatPrompt
from lorakit.evaluate.diagnosis.finding import describe_finding
from lorakit.export.run import export
from lorakit.model import endpoint_requests
from lorakit.progress import Silent
from lorakit.recipe.export_target import parse_target


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    base = spm_base(folder / "base")
    # transformers does not write it; without it llama.cpp puts a beginning of sequence before every prompt.
    edit_json(base / "tokenizer_config.json", add_bos_token=False)
    return make_run(folder, base, evaluate={"max_new_tokens": 24})


@pytest.fixture(scope="module")
def gguf(run, tmp_path_factory):
    return export_q8_0(run, tmp_path_factory.mktemp("export"))


def export_q8_0(run, folder):
    with open_source(str(run.folder), None, None, Silent()) as source:
        (result,) = export(source, [parse_target("gguf:q8_0")], folder, False, Silent())
    return next(result.folder.glob("*.gguf"))


@pytest.fixture(autouse=True)
def no_key_and_no_pause(monkeypatch):
    for name in ("LORAKIT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoint_requests, "_PAUSE", 0.0)


def findings_of(evaluation, name):
    return {finding.name: finding for finding in evaluation.findings[name]}


def test_a_served_file_stands_in_one_table_with_its_run_and_base(run, gguf, lorakit_eval, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with served(gguf) as url:
        code, out, err = lorakit_eval("base", run.folder, url)
        assert code == 0, err
        name = re.search(r"//(.*)/v1", url)[1]
        (header,) = [line for line in out.splitlines() if "base" in line and "run" in line and name in line]
        assert [part.strip() for part in header.split("┃")[2:5]] == ["base", "run", name]
        (losses,) = [line for line in out.splitlines() if line.startswith("│ loss ") and line.count("│") == 5][:1]
        assert losses.split("│")[4].strip() == "-" != losses.split("│")[3].strip()
        assert "exact-match" in out.split(f"{name} against base")[1] and "prompt tokens" in out
        assert "the server serves one model" in err

        code, out, err = lorakit_eval("base", run.folder, url, "--json", "--no-cache")
    assert code == 0, err
    document = json.loads(out)
    model = document["models"][name]
    assert model["kind"] == "endpoint" and model["given"] == url and "loss" not in model["scores"]
    assert model["identity"]["server"] == "llama.cpp" and model["identity"]["model"].endswith(".gguf")
    assert model["identity"]["system_fingerprints"]
    (compared,) = [one for one in document["comparisons"] if one["model"] == name]
    assert {"exact-match", "json-valid"} <= compared["scores"].keys() and "loss" not in compared["scores"]
    (prompts,) = [one for one in document["findings"][name] if one["name"] == "prompt tokens"]
    assert prompts["value"] == 0 and not prompts["flagged"]
    lines = [json.loads(line) for line in Path(document["file"]).with_suffix(".jsonl").read_text().splitlines()]
    assert all(line["answers"].keys() == {"base", "run", name} and name not in line["loss"] for line in lines)
    assert sum(line["answers"]["run"] == line["answers"][name] for line in lines) >= 0.8 * len(lines)


def test_a_wrong_chat_template_on_the_server_is_found_with_numbers_and_what_to_check(run, gguf, lorakit_eval, tmp_path):
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}### assistant: ")
    with served(gguf, template) as url:
        code, _, err = lorakit_eval(run.folder, url)
    assert code == 0, err
    assert re.search(r"prompt tokens: .*: 10 of 10 have another number of tokens, \d+ tokens more at the median", err)
    assert "--chat-template-file of llama-server, --chat-template of vLLM" in err


def test_one_more_beginning_of_sequence_is_named_as_such(run, gguf, tmp_path):
    template = tmp_path / "bos.jinja"
    template.write_text("<s>" + CHATML)
    with served(gguf, template) as url:
        found = findings_of(score(run.folder, url), re.search(r"//(.*)/v1", url)[1])["prompt tokens"]
    assert found.flagged and found.details["differences"] == {"1": 10}
    assert "as an added beginning of sequence (<s>) would make it. The tokenizer" in describe_finding(found)


def test_a_server_that_does_not_stop_and_writes_marks_is_found(run):
    with double(lambda body, number: (200, reply_with('{"topic": 1}<|im_end|>\nuser\n', finish="length"))) as server:
        evaluation = score(run.folder, f"{server.url}#tiny")
    (name,) = [model.name for model in evaluation.models if model.spec.endpoint]
    found = findings_of(evaluation, name)
    assert name.endswith("#tiny") and found["prompt tokens"].value is None
    assert found["marks in answers"].flagged and found["marks in answers"].details["marks"] == {"<|im_end|>": 10}
    assert found["unfinished answers"].flagged and "does not stop at what ends" in found["unfinished answers"].remedy
    assert "10 of 10 answers of the server have marks" in describe_finding(found["marks in answers"])


def test_messages_are_asked_as_the_training_read_and_cleaned_them(tmp_path, tiny_base):
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two &amp; <b>three</b>?"), ("assistant", "2")]
    rows = [{"conversations": [{"from": role, "value": f"{text} ({at})"} for role, text in turns]} for at in range(8)]
    write_rows(tmp_path / "rows.jsonl", rows)
    data = {"train": "rows.jsonl", "eval": 0.4, "system": "Be brief.", "clean": {"html": "fix"}, "max_length": 200}
    run = make_run(tmp_path, tiny_base, data=data)
    with double() as server:
        evaluation = score(run.folder, server.url, max_new_tokens=5)
    rendered = evaluation.models[1].rendered
    assert len(server.requests) == len(rendered.rows) > 1
    for body in server.requests:
        messages = body["messages"]
        assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
        assert messages[0]["content"] == "Be brief." and messages[3]["content"].startswith("Two & three? (")
        text = rendered.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered.tokenizer(text, add_special_tokens=False)["input_ids"] in rendered.prompts
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 5, 0) and "stop" not in body


def test_calls_their_results_and_thoughts_are_sent_as_the_interface_has_them():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    tool = {"name": "weather", "description": "", "parameters": {}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "thinking": "Ask.", "tool_calls": [call, call]},
        {"role": "tool", "content": "sun", "tool_call_id": "abc"},
        {"role": "tool", "content": "rain"},
    ]
    body = ChatPrompt(messages, [tool], {"enable_thinking": False}).to_openai()
    assert body["tools"] == [{"type": "function", "function": tool}]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    _, answer, *results = body["messages"]
    assert answer["reasoning_content"] == "Ask."
    assert answer["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Köln"}'}
    assert [one["id"] for one in answer["tool_calls"]] == [one["tool_call_id"] for one in results]
    assert results[0]["tool_call_id"] == "abc" and messages[2].keys() == {"role", "content", "tool_call_id"}


def test_rows_that_no_chat_request_asks_for_are_left_out_for_every_model(run, tmp_path):
    given = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It", "prefix": True}]
    row = {"messages": [*given, {"role": "assistant", "content": " is said"}]}
    file = write_rows(tmp_path / "rows.jsonl", [*rows_of(3), row])
    with double() as server:
        evaluation = score(run.folder, server.url, file=file)
    assert len(server.requests) == 3 == len(evaluation.baseline.rendered.rows)
    assert any("1 rows are left out for every model" in note for note in evaluation.notes)


@pytest.mark.slow
def test_labels_and_sources_are_scored_beside_a_server(run, tmp_path, lorakit_eval):
    file = write_rows(tmp_path / "rows.jsonl", labelled_rows(12))
    with double() as server:
        code, out, err = lorakit_eval(server.url, run.folder, "--data", file, "--json", "--diagnose", "base")
    assert code == 0, err
    models = json.loads(out)["models"]
    assert "label-accuracy" in models["run"]["scores"] and models["run"]["classification"]
    (served_model,) = [one for one in models.values() if one["kind"] == "endpoint"]
    assert served_model["scores"].keys() == {"exact-match", "json-valid"} and not served_model["classification"]


def test_a_server_is_judged_and_judged_against_by_its_answers(run, lorakit_eval):
    with double() as server:
        for words in ((run.folder, "--not-worse-than", server.url), (server.url, "--not-worse-than", run.folder)):
            code, out, err = lorakit_eval(*words, "--json")
            (gate,) = json.loads(out)["gates"]
            assert code in (0, 1) and list(gate["scores"]) == ["exact-match", "json-valid"], err
            assert gate["passed"] is (code == 0)


def test_fail_under_a_loss_passes_over_the_server_but_never_checks_nothing(run, lorakit_eval):
    with double() as server:
        assert lorakit_eval("base", run.folder, server.url, "--fail-under", "loss=100")[0] == 0
        assert lorakit_eval("base", run.folder, server.url, "--fail-under", "loss=0")[0] == 1
        code, _, err = lorakit_eval(run.folder, server.url, "--fail-under", "loss=100")
    assert code == 2 and "'loss' is not measured here" in err


def test_the_key_comes_from_the_environment_and_stands_nowhere(run, lorakit_eval, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("LORAKIT_API_KEY", "sk-secret")
    with double(lambda body, number: (200, reply_with("sk-secret is your key"))) as server:
        code, out, err = lorakit_eval(run.folder, server.url, "--json")
        assert code == 0 and all(one["Authorization"] == "Bearer sk-secret" for one in server.headers)
        assert "sk-secret" not in out + err
        open_to_a_user = server.url.replace("//", "//me:p%40ss@")
        code, out, err = lorakit_eval(run.folder, open_to_a_user, "--json")
        assert code == 0 and server.headers[-1]["Authorization"].startswith("Basic ")
        assert "p%40ss" not in out + err and "p@ss" not in out + err
    with double(models=(401, {"error": {"message": "wrong key sk-secret"}})) as server:
        code, out, err = lorakit_eval(run.folder, server.url)
    assert code == 2 and "401: wrong key ***" in err and "set LORAKIT_API_KEY" in err


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (("a", "b"), "serves 2 models: a, b. Write which one is meant"),
        ((), "serves no model. Load one"),
        (
            (404, {"detail": "Not Found"}),
            "the server answers 404: Not Found. Check the address, which should end in /v1",
        ),
        ((200, "<html><body><h1>Welcome</h1></body></html>"), "answers with an HTML page: Welcome"),
        ((200, "gar bage"), "something that is not a JSON object: gar bage"),
        ((200, {"models": 3}), "its list of models cannot be read"),
        ((403, ""), "answers 403. It wants a key: set LORAKIT_API_KEY"),
        ((308, ""), "leads to nowhere. Give that address"),
    ],
)
def test_an_address_that_is_no_model_is_refused_at_once(run, lorakit_eval, models, says):
    with double(models=models) as server:
        code, _, err = lorakit_eval(run.folder, server.url)
    assert code == 2 and says in err and "Traceback" not in err


def test_a_wrong_name_is_refused_with_the_names_that_are_served(run, lorakit_eval):
    with double(models=("tiny", "tiny-sql")) as server:
        code, _, err = lorakit_eval(run.folder, f"{server.url}#tiny-sqk")
    assert code == 2 and "serves no model tiny-sqk; it serves tiny, tiny-sql. Did you mean tiny-sql?" in err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("http://127.0.0.1:1/v1", "no connection: Connection refused. Is the server running"),
        ("http://no.such.host.invalid/v1", "no connection"),
        ("http://u:secret@127.0.0.1:x/v1", "is not an address"),
        ("http://127.0.0.1:8000/v1?key=secret", "has a query"),
        ("http:///v1", "has no host"),
    ],
)
def test_an_address_without_a_server_is_refused_with_the_reason(run, lorakit_eval, given, says):
    code, _, err = lorakit_eval(run.folder, given)
    assert code == 2 and says in err and "secret" not in err


def test_https_to_a_server_without_it_is_told(run, lorakit_eval):
    with double() as server:
        code, _, err = lorakit_eval(run.folder, server.url.replace("http:", "https:"))
    assert code == 2 and "no secure connection" in err and "Write http://" in err


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        ((200, {"choices": []}), 1, "answers without a choice"),
        ((200, {"choices": [{"message": {"content": 3}}]}), 1, "answers without a choice"),
        ((200, {"choices": 3}), 1, "answers without a choice"),
        ((200, "<html>busy</html>"), 1, "answers with an HTML page"),
        ((500, {"error": {"message": "out of memory"}}), 1, "answers 500: out of memory. Wait until it is ready"),
        ((400, {"error": {"message": "exceeds the context"}}), 2, "400: exceeds the context. Start it with a longer"),
        ((404, {"message": "no model tiny"}), 2, "404: no model tiny"),
        ((0, None), 1, "the connection broke off"),
    ],
)
def test_a_server_that_fails_at_a_row_is_told_with_the_row(run, lorakit_eval, answer, code, says):
    with double(lambda body, number: answer) as server:
        found, _, err = lorakit_eval(run.folder, server.url)
    assert found == code and says in err and "It was at " in err and "eval.jsonl:" in err and "Traceback" not in err


def test_calls_that_a_server_answers_with_are_its_answer(run):
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}, "strange"]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    with double(lambda body, number: (200, {"choices": [{"message": message}], "usage": 7})) as server:
        evaluation = score(run.folder, server.url)
    assert {*evaluation.models[1].answers} == {'{"name": "f", "arguments": "{}"}"strange"'}


def test_a_busy_server_is_asked_again(run):
    asked_before = set()

    def answer(body, number):
        prompt = str(body["messages"])
        busy = prompt not in asked_before
        asked_before.add(prompt)
        return (503, "") if busy else (200, reply_with("yes"))

    with double(answer) as server:
        evaluation = score(run.folder, server.url)
    assert evaluation.models[1].answers == ["yes"] * 10


def test_a_server_that_is_too_slow_is_told(run, lorakit_eval, monkeypatch):
    from threading import Event

    monkeypatch.setattr(endpoint_requests, "ANSWER_SECONDS", 0.2)
    never = Event()
    with double(lambda body, number: (200, never.wait(2))) as server:
        code, _, err = lorakit_eval(run.folder, server.url)
        never.set()
    assert code == 1 and "no answer within 0.2 s" in err and "--max-new-tokens" in err


def test_after_a_server_died_midway_the_same_command_goes_on_and_a_finished_one_asks_anew(run, lorakit_eval):
    tries = ["first"]

    def answer(body, number):
        return (0, None) if tries == ["first"] and number > 3 else (200, reply_with(tries[-1]))

    def answers(out):
        lines = Path(json.loads(out)["file"]).with_suffix(".jsonl").read_text().splitlines()
        return [text for line in lines for name, text in json.loads(line)["answers"].items() if name != "run"]

    with double(answer) as server:
        code, _, err = lorakit_eval(run.folder, server.url)
        kept = int(re.search(r"(\d+) of 10 answers are kept: the same command goes on", err)[1])
        assert code == 1 and 0 < kept <= 3
        tries.append("second")
        code, out, err = lorakit_eval(run.folder, server.url, "--json")
        assert code == 0 and f"{kept} answers are those of a try that broke off" in err
        assert sorted(answers(out)) == ["first"] * kept + ["second"] * (10 - kept)
        tries.append("third")
        code, out, err = lorakit_eval(run.folder, server.url, "--json")
        assert code == 0 and answers(out) == ["third"] * 10 and "broke off" not in err


def test_commands_for_which_a_server_makes_no_sense_say_so(run, lorakit, lorakit_benchmark, lorakit_eval):
    with double() as server:
        code, _, err = lorakit_benchmark(run.folder, server.url, "--tasks", "gsm8k")
        assert code == 2 and "need likelihoods" in err
        code, _, err = lorakit_eval(server.url)
        assert code == 2 and "a server alone brings neither rows nor the tokenizer" in err
        code, _, err = lorakit("export", server.url, "--to", "gguf:q8_0")
        assert code == 2 and "is not a run" in err
        assert not server.requests


def test_raters_get_a_servers_answers_too(run, lorakit, tmp_path):
    (tmp_path / "questions.txt").write_text("What is it?\nWho are you?\n")
    with double() as server:
        given = ("--questions", tmp_path / "questions.txt", "--output", tmp_path / "sheet")
        code, _, err = lorakit("rate", "sheet", run.folder, server.url, *given)
    assert code == 0, err
    asked = sorted(body["messages"][-1]["content"] for body in server.requests)  # two at once, in any order
    assert asked == ["What is it?", "Who are you?"]


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2_served_as_q8_0_answers_as_its_run(tmp_path, monkeypatch):
    monkeypatch.delenv("LORAKIT_CACHE")
    if not (Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit" / "converted").is_dir():
        pytest.skip("the model is not on this machine: make model")
    recipe = Path(__file__).parent.parent / "recipes" / "debian-json" / "recipe.yaml"
    short = ("train.steps=16", "train.eval_every=16", "train.save_every=16")
    run, _ = run_recipe(recipe, tmp_path / "run", *short)
    with served(export_q8_0(run, tmp_path / "export")) as url:
        evaluation = score(run.folder, "base", url, rows=20, max_new_tokens=48)
    _, served_model = (model for model in evaluation.models if model is not evaluation.baseline)
    found = findings_of(evaluation, served_model.name)
    assert found["prompt tokens"].value == 0 == found["marks in answers"].value
    assert not found["unfinished answers"].flagged and not found["format"].flagged
    assert (
        sum(one == other for one, other in zip(evaluation.models[0].answers, served_model.answers, strict=True)) >= 14
    )
