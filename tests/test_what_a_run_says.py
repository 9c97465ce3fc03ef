"""What training, evaluating and merging tell besides their results: what is missing, what can be done next, retries."""

import http.server
import json
import shlex
import threading

import pytest
from conftest import rows_of, write_rows
from eval_runs import Remembers
from safetensors.torch import load_file, save_file

from lorakit.progress import report_hub_retries


def next_lines(out: str) -> list[str]:
    """The commands that a command names as the next ones."""
    line = next(line for line in out.splitlines() if line.startswith("next: "))
    return line.removeprefix("next: ").split("   or   ")


SHORT = {"steps": 1, "epochs": ..., "batch_size": 2}


def test_the_next_commands_work_as_they_stand(recipe_file, command):
    """Without held-out rows, in a folder whose name a shell would cut, each command that is named runs."""
    path = recipe_file(data={"eval": None}, train=SHORT, output={"dir": "runs/my run; it's"})
    code, out, err = command("train", path)
    assert code == 0
    assert "no held-out rows (data.eval): no held-out loss is measured" in err and "data.eval: 0.1" in err
    evaluation, merge = next_lines(out)
    assert evaluation.endswith(" --data FILE")
    for line in (merge, evaluation.replace("FILE", "eval.jsonl")):
        code, out, err = command(*shlex.split(line)[1:])
        assert code == 0, err
    code, out, _ = command(*shlex.split(merge)[1:], "--overwrite")
    (after,) = next_lines(out)
    code, out, err = command(*shlex.split(after.replace("FILE", "eval.jsonl"))[1:])
    assert code == 0 and "merged" in out, err


def test_with_held_out_rows_nothing_is_missing(recipe_file, command):
    code, out, err = command("train", recipe_file(train=SHORT))
    assert code == 0 and "no held-out rows" not in err
    assert next_lines(out) == ["lorakit eval runs/tiny", "lorakit merge runs/tiny"]


def test_a_full_fine_tuning_is_not_told_to_merge(recipe_file, command):
    adapter = {"kind": "none", "rank": ..., "alpha": ...}
    code, out, err = command("train", recipe_file(adapter=adapter, train=SHORT))
    assert code == 0, err
    assert next_lines(out) == ["lorakit eval runs/tiny"]


def test_an_adapter_that_changes_nothing_is_told(recipe_file, command, tmp_path):
    assert command("train", recipe_file(train=SHORT))[0] == 0
    file = tmp_path / "runs/tiny/adapter/adapter_model.safetensors"
    zero = {name: value * 0 if "lora_B" in name else value for name, value in load_file(file).items()}
    save_file(zero, file, metadata={"format": "pt"})
    manifest = tmp_path / "runs/tiny/manifest.json"
    from lorakit.atomic_io import sha256_of

    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"adapter_sha256": sha256_of(file)}))
    for name in ("eval", "merge"):
        code, _, err = command(name, "runs/tiny")
        assert code == 0 and "changes nothing: one half of each of its changes is zero" in err, name


def test_an_adapter_that_changes_something_is_not(recipe_file, command):
    assert command("train", recipe_file(train=SHORT))[0] == 0
    assert "changes nothing" not in command("eval", "runs/tiny")[2]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_would_stop_a_run_is_told_with_its_rows(recipe_file, command, tmp_path, options):
    write_rows(tmp_path / "train.jsonl", [*rows_of(5), rows_of(31)[30]])
    code, _, err = command("data", recipe_file(), *options)
    assert code == 2
    assert "a run would stop at these rows: 1 x leakage (first: " in err and "train.jsonl:6" in err
    assert "above" not in err


@pytest.fixture
def failing_hub():
    """A server on this machine that answers 503 to everything; its address and the number of its answers."""
    answered = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answered.append(self.path)
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *given):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", answered
    server.shutdown()
    server.server_close()


def test_retries_of_the_hub_are_told_in_one_line(failing_hub, monkeypatch, capsys):
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import http_backoff

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    address, answered = failing_hub
    heard = Remembers()
    with report_hub_retries(heard), pytest.raises(HfHubHTTPError):
        http_backoff("GET", address, max_retries=3, base_wait_time=0, max_wait_time=0)
    assert len(answered) == 4
    assert heard.warned == ["a request to the hub failed (HTTP Error 503); trying again"]
    assert capsys.readouterr() == ("", "")
