"""Extraction: two full checkpoints of one model -> the LoRA that leads from the one to the other, and what it keeps."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from lorakit.amounts import percent
from lorakit.errors import UserError
from lorakit.merge.low_rank import truncate_to_rank
from lorakit.merge.writer import describe_output
from lorakit.model import low_rank
from lorakit.model.base_files import has_tokenizer
from lorakit.model.companion_files import write_tokenizer
from lorakit.model.load import DTYPES, stored_dtype
from lorakit.model.low_rank import AdapterLayer, LowRankFactors, squared_norm
from lorakit.model.quantization_config import stored_quantization
from lorakit.model.resolve import Base
from lorakit.model.spec_from_meta import list_weights
from lorakit.model.state_dict import Weights, open_weights
from lorakit.model.targets import first_and_count, select_train_modules
from lorakit.model.tokenizer import load_tokenizer
from lorakit.output_dir import output_draft
from lorakit.progress import Progress
from lorakit.run_dir import now, versions

FACTS = "extract.json"  # by which a folder is known to hold an extracted adapter
_PIECE = 1 << 22
# What a configuration says of itself, of files and of generating, and not of what the model computes.
_IRRELEVANT = re.compile(
    r"_name_or_path|architectures|dtype|torch_dtype|transformers_version|use_cache|\w+_token_ids?|id2label|label2id"
)


@dataclass(frozen=True)
class CheckpointPair:
    """Two checkpoints of one architecture. By the `paths` of weights, tied ones once: `holders` are the layers of an
    adapter of all weights that a LoRA can hold; `reasons` say why it cannot hold another one of a matrix's shape."""

    tuned: Weights
    base: Weights
    paths: list[str]
    holders: dict[str, AdapterLayer]
    reasons: dict[str, str]


def extract(
    tuned: Base, base: Base, rank: int, output: Path, progress: Progress, *, keep_whole: bool = False
) -> dict[str, Any]:
    """Write the LoRA that turns `base` into `tuned`, as nearly as its rank allows, to `output`, which is replaced.

    One weight of each checkpoint is in memory at a time. A layer with fewer rows or columns than `rank` gets as many.
    Changed weights that a LoRA cannot hold (norms, biases, embeddings, the output head) are left out and named;
    `keep_whole` adds their modules whole where PEFT can (`modules_to_save`). Returns what `extract.json` says of the
    adapter (docs/merging.md).
    """
    pair = _open_pair(tuned, base, progress)
    tokenizer = _tuned_tokenizer(tuned, base, progress)
    norms, factors = _factorize(pair, rank, progress)
    if not factors:
        most = first_and_count(sorted(norms, key=lambda path: -norms[path])) if norms else ""
        changed = f"only {most}. Keep the tuned model whole" if most else "both have the same weights"
        raise UserError(f"{tuned.name}: nothing to extract: no linear layer differs from {base.name}, {changed}.")
    adapted = [layer.target.removesuffix(".weight") for layer in factors]
    whole, tied, reasons = _sort_out_others(pair, norms, adapted, keep_whole)
    summary = {"rank": rank, "whole": whole, "unchanged": len(pair.paths) - len(norms)}
    summary |= _summarize(norms, factors, reasons)

    def read_whole(path: str) -> torch.Tensor:
        return pair.tuned.read(path).to(DTYPES[stored_dtype(tuned)])

    with output_draft(output) as draft:
        summary["parameters"] = low_rank.write_adapter(
            draft, factors, base.folder, base.name, whole=whole, tied=tied, read_whole=read_whole
        )
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
            for folder, values in ((pair.tuned.folder, change), (pair.base.folder, original)):
                if values.is_floating_point() and not bool(values.isfinite().all()):
                    raise UserError(f"{folder}: {path} holds numbers that are not finite. Nothing was extracted.")
            change = change.float().sub_(original)
            norm = sum(float(piece.double().square().sum()) for piece in change.flatten().split(_PIECE))
            if norm:
                norms[path] = norm
            if norm and (layer := pair.holders.get(path)):
                matrices = change if change.ndim == 3 else change[None]  # one for each expert
                matrices = matrices.mT if layer.transposed else matrices
                low = [truncate_to_rank(matrix, rank) for matrix in matrices]
                a, b = torch.stack([one.a for one in low]), torch.stack([one.b for one in low])
                factors[layer] = low_rank.from_stacks(a, b)
            bar.advance()
    capped = [layer.path for layer, of_layer in factors.items() if of_layer.rank < rank]
    if capped:
        progress.say(
            f"layers with fewer than {rank} rows or columns get that number as their rank: {first_and_count(capped)}"
        )
    return norms, factors


def _summarize(
    norms: dict[str, float], factors: dict[AdapterLayer, LowRankFactors], reasons: dict[str, str]
) -> dict[str, Any]:
    """Shares of squared norms, by their keys in `extract.json`."""
    shares = {path: norm / sum(norms.values()) for path, norm in norms.items()}
    layers: list[dict[str, Any]] = []
    for layer, of_layer in factors.items():
        share = min(1.0, squared_norm([(of_layer, 1.0)]) / norms[layer.path])
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
    paragraphs = [
        f"The difference of `{tuned.name}` from `{base.name}`, as a LoRA of rank {summary['rank']} extracted by "
        f"lorakit {versions().get('lorakit', '')}: the largest singular directions of each linear layer's change. It "
        f"keeps {percent(summary['kept'], 1)} of the whole change (squared Frobenius norm), and "
        f"{percent(summary['kept_of_layers'], 1)} of the change of its {len(summary['taken'])} layers.",
        *(f"Held whole: `{module}`." for module in summary["whole"]),
    ]
    if left := summary["left"]:
        share, first = percent(sum(one["change"] for one in left), 1), left[0]["path"]
        paragraphs.append(f"It does not hold the change of {len(left)} weights, {share}, such as `{first}`.")
    describe_output(draft, FACTS, facts | summary, name, base.name, "extracted", *paragraphs)


def _open_pair(tuned: Base, base: Base, progress: Progress) -> CheckpointPair:
    """Two unquantized checkpoints whose configurations and shapes are those of one architecture."""
    for one in (tuned, base):
        if stored := stored_quantization(one.folder):
            raise UserError(
                f"{one.name}: its weights are {stored.quantization}, so that rounding would be taken for training. "
                "Give the unquantized checkpoint."
            )
    opened, original = open_weights(tuned.folder), open_weights(base.folder)
    _check_shapes(tuned, opened, base, original)
    ours, others = (one.model.config.get_text_config().to_dict() for one in (opened, original))
    names = [name for name in sorted({*ours, *others}) if not _IRRELEVANT.fullmatch(name)]
    pairs = {name: (ours.get(name), others.get(name)) for name in names}
    if settings := [f"{name}: {one} and {other}" for name, (one, other) in pairs.items() if one != other]:
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
    holders = {layer.path: layer for layer in low_rank.adapter_layout(base.folder, config)[0]}
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
        else:
            reasons[path] = pair.reasons.get(path, "it is not the weight of a linear layer")
    if not modules:
        return [], False, reasons
    return *select_train_modules(model, list(dict.fromkeys(modules)), adapted), reasons


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and saved buffer of a model; of tied ones by the first of their names."""
    model: Any = weights.model
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in named if name in saved}


def _check_shapes(tuned: Base, opened: Weights, base: Base, original: Weights) -> None:
    ours, others = ({"model_type": one.model.config.model_type, **_shapes(one)} for one in (opened, original))
    differing = [name for name in {**others, **ours} if ours.get(name) != others.get(name)]
    if differing:
        one, other = ours.get(differing[0], "not"), others.get(differing[0], "not")
        raise UserError(
            f"{tuned.name} and {base.name} are not checkpoints of one model: {first_and_count(differing)} is {one} in "
            f"the one and {other} in the other. Give the base that the tuned model was trained from. Where the "
            "vocabulary was resized, resize the base's in the same way, or keep the tuned model whole."
        )


def _tuned_tokenizer(tuned: Base, base: Base, progress: Progress) -> tuple[Any, Path] | None:
    """The tokenizer that the adapter gets, with its folder: the tuned checkpoint's, or the base's where it has none."""
    own, original = (load_tokenizer(one, None) if has_tokenizer(one.folder) else None for one in (tuned, base))
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
    more = [f"{len(ids.keys() - expected.keys())} tokens that {base.name} lacks"] if ids != expected else []
    more += ["another chat template"] if own.chat_template != original.chat_template else []
    if more:
        progress.warn(f"the adapter gets the tokenizer of {tuned.name}, which has {' and '.join(more)}")
    return own, tuned.folder
