"""Extraction: two full checkpoints of one model -> the LoRA that leads from the one to the other, and what it keeps."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from lorakit.amounts import percent
from lorakit.atomic_io import atomic_dir
from lorakit.errors import UserError, first_line
from lorakit.merge import peft_layout
from lorakit.merge.card import write_card, write_facts
from lorakit.merge.low_rank import LowRankFactors, from_stacks, truncate_to_rank
from lorakit.merge.peft_layout import AdapterLayer, adapter_layout, name_factors, plain_lora_config, write_adapter
from lorakit.merge.writer import explain_full_disk
from lorakit.model.companion_files import write_tokenizer
from lorakit.model.load import DTYPES, stored_dtype
from lorakit.model.quantization_config import stored_quantization
from lorakit.model.resolve import Base
from lorakit.model.spec_from_meta import list_weights
from lorakit.model.state_dict import Weights, open_weights
from lorakit.model.targets import select_train_modules
from lorakit.progress import Progress
from lorakit.run_dir import now, versions

FACTS = "extract.json"
"""The file by which a folder is known to hold an extracted adapter."""
_PIECE = 1 << 22
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# What a configuration says of itself, of files and of generating, and not of what the model computes.
_IRRELEVANT = re.compile(
    r"_name_or_path|architectures|dtype|torch_dtype|transformers_version|use_cache|\w+_token_ids?|id2label|label2id"
)


@dataclass(frozen=True)
class CheckpointPair:
    """Two checkpoints of one architecture."""

    tuned: Weights
    base: Weights
    paths: list[str]
    """Every weight, tied ones once."""
    holders: dict[str, AdapterLayer]
    """Path of a weight that a LoRA can hold -> its layer in an adapter of all of them."""
    reasons: dict[str, str]
    """Path of another weight of a matrix's shape -> why a LoRA cannot hold it."""


def extract(
    tuned: Base, base: Base, rank: int, output: Path, progress: Progress, *, keep_whole: bool = False
) -> dict[str, Any]:
    """Write the LoRA that turns `base` into `tuned`, as nearly as its rank allows, to `output`, which is replaced.

    One weight of each checkpoint is in memory at a time. Changed weights that a LoRA cannot hold (norms, biases,
    embeddings, the output head) are left out and named.

    Args:
        rank: of every layer; a layer with fewer rows or columns gets as many as it has.
        keep_whole: add the modules of such weights whole where PEFT can (`modules_to_save`). Programs that serve
        adapters beside a model, such as vLLM, mostly refuse these.

    Returns:
        What `extract.json` says of the adapter (docs/merging.md).
    """
    if rank < 1:
        raise UserError(f"--rank: {rank} is not a rank. Write 1 or more, such as 32.")
    pair = _open_pair(tuned, base, progress)
    tokenizer = _tuned_tokenizer(tuned, base, progress)
    norms, factors = _factorize(pair, rank, progress)
    if not norms:
        raise UserError(f"{tuned.name} and {base.name} have the same weights: there is nothing to extract.")
    if not factors:
        most = _first_of(sorted(norms, key=lambda path: -norms[path]))
        raise UserError(
            f"{tuned.name}: no linear layer differs from {base.name}, only {most}: no LoRA can hold that. Keep the "
            "tuned model whole."
        )
    adapted = [layer.target.removesuffix(".weight") for layer in factors]
    whole, tied, reasons = _sort_out_others(pair, norms, adapted, keep_whole)
    config = plain_lora_config(factors, whole, tied)
    config.base_model_name_or_path = base.name
    layers, shapes = adapter_layout(base.folder, config)
    by_path = {layer.path: of_layer for layer, of_layer in factors.items()}
    tensors = name_factors({layer: by_path[layer.path] for layer in layers})
    for name in shapes.keys() - tensors.keys():
        tensors[name] = pair.tuned.read(name.removeprefix(peft_layout.PREFIX)).to(DTYPES[stored_dtype(tuned)])
    size, unchanged = sum(tensor.numel() for tensor in tensors.values()), len(pair.paths) - len(norms)
    summary = {"rank": rank, "whole": whole, "unchanged": unchanged, "parameters": size}
    summary |= _summarize(norms, factors, reasons)
    with explain_full_disk(output), atomic_dir(output) as draft:
        write_adapter(draft, config, tensors)
        if tokenizer is not None:
            write_tokenizer(tokenizer[1], tokenizer[0], draft)
        _describe(draft, output.name, summary, tuned, base)
    return summary


def _factorize(
    pair: CheckpointPair, rank: int, progress: Progress
) -> tuple[dict[str, float], dict[AdapterLayer, LowRankFactors]]:
    """The squared norm of each change by path, and the factors of those that a LoRA can hold."""
    norms, factors = {}, {}
    with torch.no_grad(), progress.bar("differences", total=len(pair.paths)) as bar:
        for path in pair.paths:
            change, original = pair.tuned.read(path), pair.base.read(path)
            for weights, values in ((pair.tuned, change), (pair.base, original)):
                if values.is_floating_point() and not bool(values.isfinite().all()):
                    raise UserError(
                        f"{weights.folder}: {path} holds numbers that are not finite. Nothing was extracted."
                    )
            change = change.float().sub_(original)
            norm = sum(float(piece.double().square().sum()) for piece in change.flatten().split(_PIECE))
            if norm:
                norms[path] = norm
            if norm and (layer := pair.holders.get(path)):
                matrices = change if change.ndim == 3 else change[None]  # one for each expert
                low = [truncate_to_rank(matrix.mT if layer.transposed else matrix, rank) for matrix in matrices]
                a, b = torch.stack([one.a for one in low]), torch.stack([one.b for one in low])
                factors[layer] = from_stacks(a, b)
            bar.advance()
    capped = [layer.path for layer, of_layer in factors.items() if of_layer.rank < rank]
    if capped:
        progress.say(f"{_first_of(capped)} has fewer than {rank} rows or columns, and a rank of as many")
    return norms, factors


def _summarize(
    norms: dict[str, float], factors: dict[AdapterLayer, LowRankFactors], reasons: dict[str, str]
) -> dict[str, Any]:
    """Shares of squared norms, by their keys in `extract.json`."""
    shares = {path: norm / sum(norms.values()) for path, norm in norms.items()}
    layers: list[dict[str, Any]] = []
    for layer, of_layer in factors.items():
        share = min(1.0, of_layer.squared_norm() / norms[layer.path])
        layers.append({"path": layer.path, "rank": of_layer.rank, "change": shares[layer.path], "kept": share})
    left = [{"path": path, "change": shares[path], "reason": reason} for path, reason in reasons.items()]
    of_layers = sum(layer["change"] * layer["kept"] for layer in layers)
    in_whole = shares.keys() - {layer["path"] for layer in layers} - reasons.keys()
    return {
        "taken": layers,
        "left": sorted(left, key=lambda one: -shares[str(one["path"])]),
        "kept": of_layers + sum(shares[path] for path in in_whole),
        "kept_of_layers": of_layers / sum(layer["change"] for layer in layers),
    }


def _describe(draft: Path, name: str, summary: dict[str, Any], tuned: Base, base: Base) -> None:
    facts: dict[str, Any] = {"format": 1, "made": now(), "versions": versions()}
    for role, model in (("tuned", tuned), ("base", base)):
        facts[role] = {"name": model.name, "origin": model.origin, "sha256": model.sha256()}
    write_facts(draft / FACTS, facts | summary)
    paragraphs = [
        f"The difference of `{tuned.name}` from `{base.name}`, as a LoRA of rank {summary['rank']} extracted by "
        f"lorakit {versions().get('lorakit', '')}: the largest singular directions of each linear layer's change. It "
        f"keeps {percent(summary['kept'], 1)} of the whole change (squared Frobenius norm), and "
        f"{percent(summary['kept_of_layers'], 1)} of the change of its {len(summary['taken'])} layers.",
        *(f"Held whole: `{module}`." for module in summary["whole"]),
    ]
    if left := summary["left"]:
        share = percent(sum(one["change"] for one in left), 1)
        paragraphs.append(
            f"It does not hold the change of {len(left)} other weights, {share} of the whole, such as "
            f"`{left[0]['path']}`."
        )
    write_card(draft, name, base.name, "extracted", *paragraphs)


def _open_pair(tuned: Base, base: Base, progress: Progress) -> CheckpointPair:
    """Two unquantized checkpoints whose configurations and shapes are those of one architecture."""
    for one in (tuned, base):
        stored = stored_quantization(one.folder)
        if stored:
            raise UserError(
                f"{one.name}: its weights are {stored.quantization}, so that rounding would be taken for training. "
                "Give the unquantized checkpoint."
            )
    opened, original = open_weights(tuned.folder), open_weights(base.folder)
    _check_shapes(tuned, opened, base, original)
    settings = _differing_settings(opened.model.config.to_dict(), original.model.config.to_dict())
    if settings:
        progress.warn(
            f"{tuned.name} and {base.name} differ in their config.json as well ({', '.join(settings)}), which no "
            "adapter holds: the base with the adapter will not answer as the tuned model does"
        )
    if stored_dtype(tuned) != stored_dtype(base):
        progress.warn(
            f"{tuned.name} is stored in {stored_dtype(tuned)}, {base.name} in {stored_dtype(base)}: what rounding "
            "changed is counted as change"
        )
    reasons, modules, parameters = {}, [], []
    for weight in list_weights(original.model):
        if weight.unadaptable:
            path = weight.path if weight.fused else f"{weight.path}.weight"
            reasons[path] = weight.unadaptable.partition(",")[0]
        elif weight.parameter:
            parameters.append(weight.parameter)
        else:
            modules.append(weight.path)
    config = LoraConfig(r=1, target_modules=modules, target_parameters=parameters or None)
    holders = {layer.path: layer for layer in adapter_layout(base.folder, config)[0]}
    return CheckpointPair(opened, original, list(_shapes(original)), holders, reasons)


def _sort_out_others(
    pair: CheckpointPair, changed: Iterable[str], adapted: list[str], keep_whole: bool
) -> tuple[list[str], bool, dict[str, str]]:
    """Of the changed weights that no layer of an adapter holds: the modules to hold whole, whether they are tied
    embeddings, and why the others are left out, by path. `adapted` are the layers with an adapter."""
    model: Any = pair.base.model
    modules, reasons = [], {}
    for path in (path for path in changed if path not in pair.holders):
        module = path.rpartition(".")[0]
        if any(f"{layer}.".startswith(f"{module}.") for layer in adapted):
            reasons[path] = "it belongs to a module that gets an adapter"
        elif keep_whole:
            try:
                select_train_modules(model, [module], adapted)
                modules.append(module)
            except UserError as error:
                reasons[path] = str(error).removeprefix("adapter.train_modules: ").removesuffix(" Remove it.")
        elif path in pair.reasons:
            reasons[path] = pair.reasons[path]
        elif model.get_submodule(module) is model.get_input_embeddings():
            reasons[path] = "it is the embeddings"
        else:
            is_vector = model.state_dict()[path].ndim < 2
            reasons[path] = "it is a vector" if is_vector else "it is not a linear layer's weight"
    if not modules:
        return [], False, reasons
    return *select_train_modules(model, list(dict.fromkeys(modules)), adapted), reasons


def _differing_settings(tuned: dict[str, Any], base: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, with both values."""
    differing = []
    for name in sorted({*tuned, *base}):
        one, other = tuned.get(name), base.get(name)
        if one == other or _IRRELEVANT.fullmatch(name):
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            differing += _differing_settings(one, other, f"{prefix}{name}.")
        else:
            differing.append(f"{prefix}{name}: {one} and {other}")
    return differing


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and saved buffer of a model; of tied ones by the first of their names."""
    model: Any = weights.model
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in named if name in saved}


def _check_shapes(tuned: Base, opened: Weights, base: Base, original: Weights) -> None:
    kinds = opened.model.config.model_type, original.model.config.model_type
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{tuned.name} is a {kinds[0]} model, {base.name} a {kinds[1]}. Give two checkpoints of one model."
        )
    shapes, expected = _shapes(opened), _shapes(original)
    differing = [name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)]
    if not differing:
        return
    one, other = shapes.get(differing[0]), expected.get(differing[0])
    embeddings = original.model.get_input_embeddings().weight
    if one and other and one[1:] == other[1:] and other == tuple(embeddings.shape):
        raise UserError(
            f"{tuned.name} has embeddings of {one[0]:,} tokens, {base.name} of {other[0]:,}: the vocabulary was "
            "resized, which no LoRA can hold. Resize the base in the same way, or keep the tuned model whole."
        )
    raise UserError(
        f"{tuned.name} and {base.name} are not checkpoints of one model: {_first_of(differing)} is {one or 'not'} "
        f"in the one and {other or 'not'} in the other. Give the base that the tuned model was trained from."
    )


def _first_of(paths: list[str]) -> str:
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _tuned_tokenizer(tuned: Base, base: Base, progress: Progress) -> tuple[Any, Path] | None:
    """The tokenizer that the adapter gets, with its folder: the tuned checkpoint's, or the base's where it has none."""
    own, original = _load_tokenizer(tuned.folder), _load_tokenizer(base.folder)
    if own is None or original is None:
        lacking = tuned.name if own is None else base.name
        progress.warn(f"{lacking} has no tokenizer, so that it was not compared with the other's")
        return (own, tuned.folder) if own else (original, base.folder) if original else None
    ids, expected = own.get_vocab(), original.get_vocab()
    token = min((token for token in ids.keys() & expected.keys() if ids[token] != expected[token]), default=None)
    if token is not None:
        raise UserError(
            f"{tuned.name} and {base.name} have different tokenizers: {token!r} is {ids[token]:,} in the one and "
            f"{expected[token]:,} in the other. Give the base that the tuned model was trained from."
        )
    if ids != expected:
        progress.warn(
            f"the tokenizer of {tuned.name} has {len(ids.keys() - expected.keys())} tokens that {base.name} lacks; the "
            "adapter gets it"
        )
    elif own.chat_template != original.chat_template:
        progress.say(f"the adapter gets the chat template of {tuned.name}, which is not that of {base.name}")
    return own, tuned.folder


def _load_tokenizer(folder: Path) -> Any | None:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise bare Exceptions on a damaged tokenizer.json
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {first_line(error)}") from error
