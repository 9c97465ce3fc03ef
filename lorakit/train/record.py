"""The files of a run: recipe.yaml and manifest.json while it trains, and the adapter's or the model's folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorakit.atomic_io import atomic_dir, files_in, sha256_of, write_atomic
from lorakit.data.dataset import Examples
from lorakit.data.examples import file_sha256s, tokenizer_sha256
from lorakit.data.sources import hub_commits
from lorakit.data.survey import decode_by_trained, histogram, sample
from lorakit.distributed.processes import is_first, world_size
from lorakit.errors import Interrupted, first_line
from lorakit.hardware.allocator import allocator_settings
from lorakit.model.companion_files import write_tokenizer, write_trained_model
from lorakit.model.load import DTYPES, stored_dtype
from lorakit.model.model_card import quantization_argument
from lorakit.model.new_rows import grown_to
from lorakit.model.peft_adapter import save_adapter
from lorakit.model.resolve import Base
from lorakit.model.tokenizer import stop_token_ids
from lorakit.prepare import Prepared
from lorakit.recipe.adapter_kind import adapter_folder, adapter_spec, effective_model, initial_adapter, trains_all
from lorakit.recipe.chat_templates import is_named, template_file
from lorakit.recipe.init_adapter import read_adapter_settings
from lorakit.recipe.load import to_yaml
from lorakit.recipe.paths import input_paths
from lorakit.recipe.schema import Recipe
from lorakit.recipe.to_yaml import plain_recipe
from lorakit.run_dir import BASE, FAILED, INTERRUPTED, RUNNING, Run, now, versions
from lorakit.train.samples import sampled_rows
from lorakit.train.setup import TrainingState

_SAMPLES = 3
_CARD = """\
---
base_model: {model.base}
library_name: {library}
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

{what} `{model.base}`, trained with lorakit {version}.

| | |
|---|---|
| base model | `{model.base}`, revision `{model.revision}` ({base[origin]}) |
| quantization while training | {base[quantization]} |
| trained | {trained}, {parameters[trainable]:,} of {parameters[total]:,} parameters |
| training rows | {rows[kept]:,} ({rows[trained_tokens]:,} trained tokens an epoch) |
| steps | {result[steps]} of {train.batch_size} rows, learning rate {train.learning_rate:g}, {train.schedule} |
| held-out loss | {eval_loss} |
| answers end with | {stops} |
| prompts | {prompts} |

## Use

```python
{use}
```

The run's folder also has the recipe that repeats this run, and the manifest with every version and checksum.
"""
_ADAPTER_USE = """\
from peft import PeftModel
from transformers import {imports}

base = AutoModelForCausalLM.from_pretrained("{base}"{load}){grow}
model = PeftModel.from_pretrained(base, "adapter")
tokenizer = AutoTokenizer.from_pretrained("adapter")"""
_MODEL_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")"""


class RunRecord:
    """The recipe and the manifest of a run, kept true while it trains."""

    def __init__(self, run: Run, recipe: Recipe, manifest: dict[str, Any]) -> None:
        self.run, self.recipe, self.has_written = run, recipe, False
        self.manifest = {key: value for key, value in manifest.items() if key != "failure"} | {"status": RUNNING}

    def write(self) -> None:
        self.has_written = True
        self.manifest["recipe"] = plain_recipe(self.recipe, self.run.folder)
        self.run.write_manifest(self.manifest)
        write_atomic(self.run.recipe, to_yaml(self.recipe, self.run.folder))

    @contextmanager
    def noting_early_end(self) -> Iterator[None]:
        """Within this a run that ends before its result is complete says so in its manifest: that it was interrupted,
        or that it failed and why. One that is killed cannot; its manifest goes on saying that it runs."""
        try:
            yield
        except BaseException as error:
            if self.has_written and is_first() and not self.run.is_complete():
                stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
                early = {"status": INTERRUPTED} if stopped else {"status": FAILED, "failure": first_line(error)}
                with suppress(OSError):  # a full disk may be why it ended
                    self.run.write_manifest(self.manifest | early)
            raise

    def add_out_of_memory(self, change: dict[str, Any]) -> None:
        """Record what the run goes on with after memory ran out, so that repeating or resuming it begins with that."""
        values = {"micro_batch": change["now"], "gradient_checkpointing": change["gradient_checkpointing"]}
        self.recipe = self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update=values)})
        self.manifest["out_of_memory"] = [*self.manifest.get("out_of_memory", []), change]
        self.write()
        facts = {key: value for key, value in change.items() if key != "step"}
        self.run.log_line({"step": change["step"], "out_of_memory": facts})


def pinned_facts(recipe: Recipe, base: Base, tokenizer: Any) -> dict[str, Any]:
    """What a run depends on besides its recipe's keys and its machine: the packages' versions, and the identity of all
    that it reads. A manifest has it, and a lock. `inputs`: what is neither rows nor a model, such as templates."""
    adapter_from, inputs = None, input_paths(recipe)
    if source := initial_adapter(recipe.adapter):
        folder = adapter_folder(Path(source))
        files = ("adapter_config.json", "adapter_model.safetensors")
        adapter_from = {"folder": str(folder), "sha256": {name: sha256_of(folder / name) for name in files}}
    data = file_sha256s(recipe.data)
    named = recipe.model.chat_template if is_named(recipe.model.chat_template) else None
    shipped = {f"chat template {named}": sha256_of(template_file(named))} if named else {}
    others = sorted(path for path in inputs if path.is_file() and str(path) not in data and path != Path(base.name))
    return {
        "versions": versions(),
        "base": {
            "name": base.name,
            "revision": recipe.model.revision,
            "origin": base.origin,
            "commit": base.commit,
            "sha256": base.sha256(),
            "stop_token_ids": stop_token_ids(base, tokenizer),
        },
        "adapter_from": adapter_from,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "inputs": {str(path): sha256_of(path) for path in others} | shipped,
        "data": {"files": data, "commits": hub_commits(recipe.data)},
    }


def initial_manifest(prepared: Prepared, state: TrainingState) -> dict[str, Any]:
    """The facts that are known before the first step."""
    recipe, machine = prepared.recipe, prepared.machine
    pinned = pinned_facts(recipe, prepared.base, prepared.tokenizer)
    return pinned | {
        "format": 1,
        "started": now(),
        "machine": {
            "device": machine.device,
            "name": machine.name,
            "threads": torch.get_num_threads(),
            "devices": world_size(),
            "allocator": allocator_settings() if machine.device == "cuda" else None,
        },
        "seed": recipe.train.seed,
        "base": pinned["base"] | {"quantization": state.quantization["effective"], "held_as": state.quantization},
        "template_variables": recipe.model.template_variables,
        "template_date": recipe.model.template_date,
        "data": pinned["data"]
        | {
            "tokens_sha256": prepared.tokens_sha256,
            "train": prepared.train.report.to_dict(),
            "eval": prepared.held_out.report.to_dict() if prepared.held_out else None,
            "lengths": {side: histogram(examples.lengths()) for side, examples in _sides(prepared).items()},
        },
        "auto": [asdict(choice) for choice in prepared.choices],
        "parameters": {"trainable": state.trainable, "total": state.total},
        "predicted_memory": prepared.expected.to_dict() if prepared.expected else None,
        "stop_token_ids": prepared.stop_ids,
        "steps": prepared.steps,
        "result": None,
    }


def _sides(prepared: Prepared) -> dict[str, Examples]:
    return {"train": prepared.train} | ({"eval": prepared.held_out} if prepared.held_out else {})


def sample_lines(prepared: Prepared) -> str:
    """A few training rows as lines of JSON, each in stretches of text that are trained or not; then the held-out rows
    that are answered as the model learns, each with its prompt and its reference."""
    lines = []
    for row in sample(prepared.train, _SAMPLES):
        stretches = decode_by_trained(prepared.tokenizer, row["input_ids"], row["labels"])
        lines.append(json.dumps({"where": row["where"], "stretches": stretches}, ensure_ascii=False) + "\n")
    lines += [json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in sampled_rows(prepared)]
    return "".join(lines)


def whole_model(state: TrainingState, prepared: Prepared) -> dict[str, torch.Tensor]:
    """Of a model that was trained itself all weights, in the type that its base has on disk, on the first process. All
    processes call it, when the training has ended."""
    if not trains_all(prepared.recipe.adapter):
        return {}
    dtype = DTYPES[stored_dtype(prepared.base)]
    if state.sharding.share_optimizer is None:
        state.model.to(dtype)  # DeepSpeed's parts keep their type: what is made of them is changed after it
    weights = state.sharding.whole_on_first(state.model.state_dict(keep_vars=True))
    places = {name: weight.data_ptr() for name, weight in weights.items()}  # tied ones stay one
    typed = {
        places[name]: weight.to(dtype if weight.is_floating_point() else weight.dtype)
        for name, weight in weights.items()
    }
    return {name: typed[place] for name, place in places.items()}


def save_result(
    state: TrainingState, weights: dict[str, torch.Tensor], prepared: Prepared, run: Run, manifest: dict[str, Any]
) -> dict[str, Any]:
    """Write the adapter, or the `whole_model`, with the tokenizer that it was trained with and a card. Returns the
    sha256 of its weights."""
    recipe, model = prepared.recipe, state.model
    if trains_all(recipe.adapter):
        with atomic_dir(run.model) as draft:
            model.config = state.config
            write_trained_model(model, weights, prepared.base.folder, prepared.tokenizer, prepared.stop_ids, draft)
            _write_card(draft, recipe, manifest, prepared.base)
        files = [*run.model.glob("*.safetensors"), run.model / "config.json"]
        return {"model_sha256": {path.name: sha256_of(path) for path in sorted(files)}, "files": files_in(run.model)}
    with atomic_dir(run.adapter) as draft:
        save_adapter(model, draft)
        write_tokenizer(prepared.base.folder, prepared.tokenizer, draft)
        _write_card(draft, recipe, manifest, prepared.base)
        _write_base(draft, manifest)
    return {
        "files": files_in(run.adapter),
        "adapter_sha256": sha256_of(run.adapter / "adapter_model.safetensors"),
        "adapter_config_sha256": sha256_of(run.adapter / "adapter_config.json"),
    }


def _write_base(folder: Path, manifest: dict[str, Any]) -> None:
    """What the adapter was trained on, by content, for when its folder leaves the run."""
    base = {key: manifest["base"][key] for key in ("revision", "quantization", "sha256")}
    facts = {"format": 1, "versions": manifest["versions"], "base": base}
    (folder / BASE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _write_card(folder: Path, recipe: Recipe, manifest: dict[str, Any], base: Base) -> None:
    """The README.md of an adapter, or of a model trained whole."""
    adapter, model, counts = recipe.adapter, effective_model(recipe), manifest["parameters"]
    examples, loss = manifest["data"]["train"], manifest["result"]["eval_loss"]
    kind, source = adapter_spec(adapter).name, initial_adapter(adapter)
    if trains_all(adapter):
        what, use = "All weights of" if counts["trainable"] == counts["total"] else "Weights of", _MODEL_USE
        trained = "the weights themselves"
    else:
        saved = ", saved as LoRA of twice the rank" if kind in ("pissa", "olora") else ""
        trained = f"{kind}, rank {adapter.rank}, alpha {adapter.alpha:g}{saved}"
        if source:
            kind = read_adapter_settings(Path(source)).get("kind", "lora")
            trained = f"the adapter that began as {Path(source).name}"
        what = f"A{'n' if str(kind)[0] in 'aeiou' else ''} {kind} adapter for"
        revision = "" if model.revision == "main" else f', revision="{model.revision}"'
        quantization = quantization_argument(model)
        imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantization else "")
        load = revision + (f", {quantization}" if quantization else "")
        rows = grown_to(base)
        grow = f"\nbase.resize_token_embeddings({rows})  # with {', '.join(model.add_tokens)}" if rows else ""
        use = _ADAPTER_USE.format(base=model.base, load=load, imports=imports, grow=grow)
    variables = f", with the variables `{json.dumps(model.template_variables)}`" if model.template_variables else ""
    day = [f"with the date {model.template_date}"] if model.template_date else []
    text = _CARD.format(
        **{name: manifest[name] for name in ("base", "parameters", "result")},
        model=model,
        name=recipe.name,
        train=recipe.train,
        rows=examples,
        version=manifest["versions"].get("lorakit", ""),
        library="transformers" if trains_all(adapter) else "peft",
        tags="lorakit" if trains_all(adapter) else "lora, lorakit",
        what=what,
        trained=trained,
        use=use,
        eval_loss="no held-out rows" if loss is None else f"{loss:.4f} (step {manifest['result']['best_step']})",
        stops=", ".join(f"`{token}`" for token in examples["stop_tokens"]),
        prompts="; ".join([f"the chat template's{variables}", *day, *examples.get("notes", {})]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
