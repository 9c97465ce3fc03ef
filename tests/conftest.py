"""Shared by all tests: a cache of their own, tiny models from config classes, real tokenizers, small recipes."""

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

# Every processor computes in float32 here, those with bfloat16 tiles (AMX) too; oneDNN reads it when torch is imported.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOPICS = ["apples", "rivers", "lamps", "clouds", "bridges", "letters", "horses", "stones"]
TINY_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


# Files of few tests that take long, such as those that start processes: they begin first, so that at the end none waits
# for the last of them.
_FIRST = [
    "test_gallery",
    "test_data_parallel",
    "test_fsdp",
    "test_zero",
    "test_eval_devices",
    "test_training",
    "test_doctor",
    "test_export_safety",
    "test_tracking",
    "test_samples",
    "test_export_gguf",
    "test_export_lora",
    "test_eval_gguf",
    "test_eval_endpoint",
    "test_chat_gguf",
    "test_push",
    "test_watch",
    "test_sweep",
    "test_bounds",
    "test_retrain",
    "test_diagnosis",
    "test_system_errors",
    "test_merge_command",
    "test_packing",
]


def pytest_collection_modifyitems(items):
    """The long files first, all others as they are."""
    items.sort(key=lambda item: _FIRST.index(item.path.stem) if item.path.stem in _FIRST else len(_FIRST))


def some_of(cases, every: int) -> list:
    """Cases of which `make test` tries one of so many, from all along the list, and `make test-all` every one."""
    slow = (pytest.mark.slow,)
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if number % every == 0 else slow)
        for number, case in enumerate(cases)
    ]


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_not_garbage():
    """Modules, and what their import made: each training collects garbage, and would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's cache, except those that ask for the real model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def rows_of(count: int) -> list[dict]:
    """Question-answer rows of several lengths, as `messages`."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Tell me about {TOPICS[i % 8]}{' and more' * (i % 5)}, number {i}."},
                {"role": "assistant", "content": json.dumps({"topic": TOPICS[i % 8], "number": i % 3})},
            ]
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with ChatML's tokens, trained on the rows of the tests."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [message["content"] for row in rows_of(200) for message in row["messages"]]
    raw.train_from_iterator([*texts, "system user assistant"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, tokenizer) -> Path:
    """A random Llama of two layers as a local folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("tiny-llama")
    stop = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=stop, bos_token_id=None, pad_token_id=0, **TINY_LLAMA)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def users_cache(monkeypatch):
    """The real model lies in the user's cache, where `make model` put it."""
    monkeypatch.delenv("LORAKIT_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit" / "converted"
    if not home.is_dir():
        pytest.skip("the model is not on this machine: make model")


@pytest.fixture
def recipe_file(tmp_path, tiny_base, monkeypatch) -> Callable[..., Path]:
    """Write a small recipe on the tiny model; sections given are merged over it, `...` takes a key out.

    The test runs in its folder.
    """
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", rows_of(22))
    write_rows(tmp_path / "eval.jsonl", rows_of(40)[30:])

    def write(**sections: dict) -> Path:
        recipe: dict = {
            "name": "tiny",
            "model": {"base": str(tiny_base)},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 128},
            "train": {"epochs": 2, "batch_size": 4, "learning_rate": 0.05, "eval_every": 4, "save_every": 2},
            "evaluate": {"metrics": ["exact-match", "json-valid", "json-fields"], "max_new_tokens": 8},
        }
        for name, values in sections.items():
            merged = {**recipe.get(name, {}), **values}
            recipe[name] = {key: value for key, value in merged.items() if value is not ...}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def loads(monkeypatch):
    """The quantizations of the bases that an evaluation loads."""
    from lorakit.evaluate import inference

    found, load_model = [], inference.load_model

    def noted(base, settings, device):
        found.append(settings.quantization)
        return load_model(base, settings, device)

    monkeypatch.setattr(inference, "load_model", noted)
    return found


_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# It reaches for its maker's servers at the start otherwise; root has no sandbox.
_FLAGS = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture(scope="module")
def browser():
    """A Chromium; skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium); CHROMIUM names one elsewhere")
    flags = [*_FLAGS, "--no-sandbox"] if os.geteuid() == 0 else _FLAGS
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


def open_page(context, file: Path):
    """A page in a new tab, whose `faults` are its errors, and its requests but that for itself."""
    page = context.new_page()
    page.set_default_timeout(5000)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.faults.append(request.url) if request.url != file.as_uri() else None)
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(file.as_uri())
    return page


@pytest.fixture
def lorakit(capsys, monkeypatch):
    """Run a command in process: exit code, standard output, the words of standard error."""
    from lorakit.cli import main

    def call(command, *arguments):
        monkeypatch.setattr(sys, "argv", ["lorakit", command, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, " ".join(err.split())

    return call


@pytest.fixture
def lorakit_eval(lorakit):
    """`lorakit eval` in process."""
    return partial(lorakit, "eval")


@pytest.fixture
def lorakit_benchmark(lorakit):
    """`lorakit benchmark` in process."""
    return partial(lorakit, "benchmark")


@pytest.fixture
def lorakit_plan(lorakit):
    """`lorakit plan` in process."""
    return partial(lorakit, "plan")


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command in process: exit code, standard output, standard error, on lines of any length."""
    from lorakit.cli import main

    monkeypatch.setenv("COLUMNS", "1000")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call
