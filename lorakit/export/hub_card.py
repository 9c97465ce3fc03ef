"""The model card of an export for the hub: what it was made from and trained on, its scores, how it is loaded.

A card is read by strangers: it names no path of this machine, and of a local base only the folder's last name.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from lorakit.amounts import percent
from lorakit.atomic_io import read_json_object, sha256_of
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.rows import RowError
from lorakit.export.hub_scores import describe_scores
from lorakit.export.private_text import redact
from lorakit.export.source import Check, ExportSource
from lorakit.model.model_card import REPOSITORY, hub_id, quantization_argument
from lorakit.model.new_rows import grown_to
from lorakit.model.resolve import BUNDLED_MODELS
from lorakit.recipe.adapter_kind import adapter_spec, effective_model
from lorakit.recipe.load import load
from lorakit.recipe.paths import is_path
from lorakit.recipe.schema import Recipe, Source
from lorakit.run_dir import MERGED, Run, versions

_QUESTION = "Your question"


@dataclass(frozen=True)
class CardSubject:
    """What a card is about: a source, the weights of it that are exported, and the base that it was made from."""

    source: ExportSource
    weights: Literal["adapter", "merged"]
    sha256s: set[str] = field(default_factory=set)  # of the files of weights

    @cached_property
    def run(self) -> Run | None:
        """The run that it comes from: the source, or the one whose merged/ or model/ the source is."""
        own, outer = Run(self.source.folder), Run(self.source.folder.resolve().parent)
        if own.holds_results():
            return own
        return outer if outer.holds_results() and self.source.folder.resolve() in (outer.merged, outer.model) else None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """That of the run; empty without one."""
        return self.run.read_manifest() if self.run else {}

    @cached_property
    def recipe(self) -> Recipe | None:
        """That of the run; what its adapter began from may be gone."""
        return load(self.run.recipe, ["adapter.from=null"], ended=True).recipe if self.run else None

    @cached_property
    def base(self) -> tuple[str, str] | None:
        """Name and origin of the base model; None for a model of which nothing says what it was made from."""
        base = self.source.base
        if base.folder.resolve() != self.source.folder.resolve():
            return base.name, base.origin
        merge = read_json_object(base.folder / MERGED) or {}
        facts = self.manifest.get("base") or merge.get("base")
        return (str(facts["name"]), str(facts["origin"])) if facts else None

    @property
    def base_id(self) -> str | None:
        """The base's id on the hub."""
        return hub_id(self.base[0]) if self.base else None

    @property
    def shown_base(self) -> str:
        """The base as a reader may see it."""
        return self.base_id or Path(self.base[0]).name if self.base else "unknown"

    @property
    def is_whole(self) -> bool:
        """Whether the weights themselves were trained."""
        return self.weights == "merged" and self.source.adapter is None and "model_sha256" in self.manifest


def write_card(subject: CardSubject, adapter: dict[str, Any], checks: tuple[Check, ...]) -> str:
    """The card as text; `adapter`: what PEFT's configuration of an exported adapter says."""
    source = subject.source
    sections = {
        "": _introduction(subject, adapter),
        "Training": _training(subject, adapter),
        "Scores": _scores(subject),
        "Use": f"```python\n{loading_code(subject, adapter)}\n```",
        "Prompts": _prompts(subject),
        "What was checked": "\n".join(f"- {check.name}: {check.detail}" for check in checks if check.holds),
    }
    text = "\n\n".join(f"## {title}\n\n{body}" if title else body for title, body in sections.items() if body)
    front = card_data(subject, adapter).to_yaml()
    return redact(f"---\n{front}\n---\n\n# {source.name}\n\n{text}\n", source.folder, source.base.source, Path.cwd())


def card_data(subject: CardSubject, adapter: dict[str, Any]) -> ModelCardData:
    """The front matter, in the hub's words: a model with an adapter in its weights is a `finetune`; `merge` is one of
    several models (the hub's page on model cards, base_model_relation)."""
    is_adapter = subject.weights == "adapter"
    kinds = ["dora"] * bool(adapter.get("use_dora")) + ["rslora"] * bool(adapter.get("use_rslora"))
    tags = ["lora", *kinds, "lorakit"] if is_adapter else ["lorakit"]
    base, relation = subject.base_id, "adapter" if is_adapter else "finetune"
    return ModelCardData(
        base_model=base,
        datasets=_datasets(subject) or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **({"base_model_relation": relation} if base else {}),
        **_license(subject),
    )


def _datasets(subject: CardSubject) -> list[str]:
    """Those of the training rows that come from the hub."""
    given = subject.recipe.data.train if subject.recipe else []
    sources = given if isinstance(given, list) else [given]
    paths = [one.path if isinstance(one, Source) else one for one in sources]
    return list(dict.fromkeys(path for path in paths if not is_path(path) and hub_id(path)))


def _license(subject: CardSubject) -> dict[str, str]:
    """The base's licence, by its own card or by the package that it came from; nothing is guessed."""
    if subject.base and (bundle := BUNDLED_MODELS.get(subject.base[0])):
        return {"license": bundle.license.lower()}
    folder = subject.source.base.source
    for card in (folder / "README.md",) if folder.resolve() != subject.source.folder.resolve() else ():
        try:
            data = ModelCard.load(card).data.to_dict() if card.is_file() else {}
        except (ValueError, OSError, YAMLError):  # another program's, or damaged
            return {}
        keys = ("license", "license_name", "license_link")
        return {key: data[key] for key in keys if isinstance(data.get(key), str)}
    return {}


def _introduction(subject: CardSubject, adapter: dict[str, Any]) -> str:
    base, version = f"`{subject.shown_base}`", subject.manifest.get("versions", versions()).get("lorakit", "")
    made = f"trained with lorakit {version}" if subject.run else f"exported with lorakit {version}"
    if subject.weights == "adapter":
        kind = "DoRA" if adapter.get("use_dora") else "LoRA"
        return f"A {kind} adapter for {base}, {made}."
    if subject.is_whole:
        return f"{base} with its weights fine-tuned, {made}."
    return f"{base} with a LoRA adapter merged into its weights, {made}." if subject.base else f"A model, {made}."


def _training(subject: CardSubject, adapter: dict[str, Any]) -> str | None:
    """The run in numbers; of an adapter alone what its configuration says."""
    rows = {"base model": f"`{subject.shown_base}` ({subject.base[1]})"} if subject.base else {}
    if adapter:
        rows["adapter"] = _describe_adapter(adapter)
    if subject.recipe:
        recipe, manifest, train = subject.recipe, subject.manifest, subject.recipe.train
        read, result, count = manifest["data"]["train"], manifest["result"], manifest["parameters"]
        kind, held_out = adapter_spec(recipe.adapter).name, manifest["data"].get("eval")
        quantization = manifest["base"]["quantization"]
        own = "the weights themselves" if kind == "none" else ""
        if manifest.get("adapter_from"):
            own = "the adapter that it began with"
        rows |= {
            "trained": f"{own or kind}, {count['trainable']:,} of {count['total']:,} parameters",
            "base while training": "not quantized" if quantization == "none" else f"quantized to {quantization}",
            "training rows": f"{read['kept']:,} ({read['trained_tokens']:,} trained tokens an epoch)",
            "held-out rows": f"{held_out['kept']:,}" if held_out else "none",
            "steps": f"{result['steps']:,} of {train.batch_size:,} rows",
            "learning rate": f"{train.learning_rate:g}, {train.schedule}",
        }
        if result["eval_loss"] is not None:
            rows["held-out loss"] = f"{result['eval_loss']:.4f} (step {result['best_step']:,})"
    named = subject.manifest.get("versions", versions())
    rows["versions"] = ", ".join(f"{name} {named[name]}" for name in ("lorakit", "torch", "transformers", "peft"))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _scores(subject: CardSubject) -> str | None:
    """Those of the exported weights, or of the adapter that was merged into them."""
    if subject.run is None:
        return None
    if table := describe_scores(subject.run, subject.sha256s):
        return table
    adapter = subject.run.adapter / "adapter_model.safetensors"
    if subject.weights == "adapter" or not adapter.is_file():
        return None
    table = describe_scores(subject.run, {sha256_of(adapter)})
    return f"Scores of the adapter that was merged, on its base. {table}" if table else None


def _describe_adapter(adapter: dict[str, Any]) -> str:
    parts = [f"rank {adapter.get('r')}, alpha {adapter.get('lora_alpha'):g}"]
    parts += ["scaled by alpha over the root of the rank (rsLoRA)"] if adapter.get("use_rslora") else []
    parts += ["with magnitudes (DoRA)"] if adapter.get("use_dora") else []
    for key, word in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        parts += [f"another {word} for {len(adapter[key])} patterns of modules"] if adapter.get(key) else []
    targets = adapter.get("target_modules") or []
    parts += [f"modules {', '.join(sorted(targets))}"] if isinstance(targets, list) and 0 < len(targets) <= 12 else []
    whole = adapter.get("modules_to_save") or []
    return "; ".join([*parts, *([f"trained whole: {', '.join(whole)}"] if whole else [])])


def loading_code(subject: CardSubject, adapter: dict[str, Any]) -> str:
    """Python code that loads the export and answers one question."""
    recipe, source = subject.recipe, subject.source
    model = effective_model(recipe) if recipe else None
    imports, lines = ["AutoModelForCausalLM", "AutoTokenizer"], [f'repository = "{REPOSITORY}"']
    if subject.weights == "adapter":
        arguments = [f'"{subject.base_id or "BASE"}"']
        if subject.base_id and model and model.revision != "main":
            arguments.append(f'revision="{model.revision}"')
        if quantization := quantization_argument(model) if model else "":
            imports.append("BitsAndBytesConfig")
            arguments.append(quantization)
        hint = "" if subject.base_id else "  # the base model: its id or folder"
        lines += [f"base = AutoModelForCausalLM.from_pretrained({', '.join(arguments)}){hint}"]
        if rows := grown_to(source.base):
            lines += [f"base.resize_token_embeddings({rows})"]
        lines += ["model = PeftModel.from_pretrained(base, repository)"]
    else:
        lines += ["model = AutoModelForCausalLM.from_pretrained(repository)"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(repository)", ""]
    if source.tokenizer.chat_template:
        variables = "".join(f", {key}={value!r}" for key, value in (model.template_variables if model else {}).items())
        system = f'{{"role": "system", "content": {json.dumps(source.system)}}}, ' if source.system else ""
        lines += [
            f'messages = [{system}{{"role": "user", "content": "{_QUESTION}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            f'    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{variables}',
            ")",
        ]
    else:
        lines += [f'inputs = tokenizer("{_QUESTION}", return_tensors="pt")']
    stops = list(source.stop_ids)
    lines += [
        f"output = model.generate(**inputs, max_new_tokens=256, do_sample=False, eos_token_id={stops or None})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    heading = ["from peft import PeftModel"] if subject.weights == "adapter" else []
    return "\n".join([*heading, f"from transformers import {', '.join(sorted(imports))}", "", *lines])


def _prompts(subject: CardSubject) -> str | None:
    """The text that the model is asked with, as the training's chat template writes it."""
    source, recipe = subject.source, subject.recipe
    if not source.tokenizer.chat_template:
        return None
    variables, day = (recipe.model.template_variables, recipe.model.template_date) if recipe else ({}, None)
    template = ChatTemplate(source.tokenizer, variables=variables, date=day)
    messages = [{"role": "system", "content": source.system}] if source.system else []
    try:
        text = template.write([*messages, {"role": "user", "content": _QUESTION}], ask=True)
    except RowError:  # a template that takes no question alone
        return None
    stops = ", ".join(f"`{token}`" for token in source.tokenizer.convert_ids_to_tokens(list(source.stop_ids)))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    parts = ["The tokenizer's chat template writes", f"{fence}text\n{text}\n{fence}", f"Answers end with {stops}."]
    if day:
        parts.append(f"The template writes the day; it was {day} in training.")
    return "\n\n".join(parts)


def merge_check(subject: CardSubject) -> Check | None:
    """How the merge was proved, in words; None for a model that was not merged."""
    proof = (read_json_object(subject.source.merged_model / MERGED) or {}).get("proof")
    if not proof:
        return None
    detail = (
        f"it predicts what base and adapter predict, on {proof['positions']:,} positions of {proof['rows']:,} rows: "
    )
    detail += f"top-1 agreement {percent(proof['top1_agreement'], 2)}, mean KL {proof['mean_kl']:.2e} nats"
    return Check("merge", True, detail)
