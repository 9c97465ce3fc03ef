"""`lorakit chat` with GGUF files, which llama.cpp runs."""

import pytest
from eval_runs import make_run
from gguf_models import spm_base
from test_chat import QUESTION, open_session, type_in

from lorakit.cli.export import open_source, parse_targets
from lorakit.export.run import export as write_exports
from lorakit.progress import Silent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    train = {"steps": 40, "learning_rate": 0.01, "eval_every": 40, "save_every": 40}
    return make_run(folder, spm_base(folder / "base"), train=train)


@pytest.fixture(scope="module")
def file(run):
    """The run's model as a GGUF file."""
    with open_source(str(run.folder), None, None, Silent()) as source:
        write_exports(source, parse_targets(["gguf:f32"]), run.exports, False, Silent())
    return run.exports / "gguf-f32" / "tiny-F32.gguf"


def test_a_gguf_file_beside_its_run_answers_as_the_run(run, file):
    session = open_session(run.folder, file, tokens=20)
    type_in(session, f"/compare {QUESTION}", "/tokens")
    base, adapter, gguf = session.answers
    assert [base["model"], adapter["model"]] == ["base", session.current.name]
    assert gguf["text"] == adapter["text"] != base["text"]
    assert gguf["prompt_tokens"] == adapter["prompt_tokens"]
    assert sum(one.tokens for one in session.screen.shown_tokens) == gguf["prompt_tokens"]


def test_a_gguf_file_alone_writes_its_prompts_itself_and_draws_by_seed(run, file):
    beside, session = open_session(run.folder, tokens=20), open_session(file, tokens=20)
    type_in(beside, QUESTION)
    type_in(session, QUESTION, "/temperature 3", "/seed 5", "/retry", "/seed 5", "/retry", "/retry")
    greedy, first, again, other = (answer["text"] for answer in session.answers)
    assert greedy == beside.answers[0]["text"]
    assert first == again and len({greedy, first, other}) == 3
