"""Attaching: a frozen model and a recipe's adapter section -> what is trained; what is saved of it, one adapter that
plain PEFT puts on the untouched base; adapters back from folders, one after the other on one base in memory.
"""

import copy
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lorakit.errors import UserError, first_line
from lorakit.hardware.accelerator import restoring_random_states
from lorakit.model.adapters import InitContext
from lorakit.model.adapters.svd import svd_to_lora
from lorakit.model.adapters.weight_init import INITIAL, add_initial
from lorakit.model.base_files import read_header
from lorakit.model.targets import Targets, check_patterns, first_and_count, trains_every_weight
from lorakit.recipe.adapter_kind import adapter_spec, kind_settings
from lorakit.recipe.init_adapter import read_adapter_config, why_untrainable
from lorakit.recipe.schema import Adapter

# In a checkpoint: the folder of the adapter as it is trained, which may not be the form that it is saved in, and the
# file of the trained weights, each under its name in the model.
TRAINED_DIR = "trained"
TRAINED_WEIGHTS = f"{TRAINED_DIR}/weights.safetensors"

# What PEFT raises on files that are damaged, or hold values of another kind than it looks for.
_READING = (SafetensorError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError)

# What PEFT writes a second time where the embeddings were resized before the training (its `save_embedding_layers`):
# trained modules and rows under their names in the model, and the weights that trained modules replace.
_TWICE = re.compile(r"\.(token_adapter\.trainable_tokens_delta|modules_to_save\.weight|original_module\.weight)$")

_HASHED_AT_ONCE = 1 << 20  # numbers of 8 bytes

_MERGE_FIRST = "Merge it into its base, and give the merged model as model.base."

# What an adapter that is trained on may say of itself; anything else would be dropped or not be trained.
_UNDERSTOOD = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "ensure_weight_tying", "use_dora", "use_rslora", "fan_in_fan_out", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "exclude_modules", "eva_config", "loftq_config"),
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("peft_version", "runtime_config", "megatron_core", "megatron_config", "trainable_token_indices"),
}


def attach_adapter(
    model: Any, settings: Adapter, seed: int, targets: Targets, context: InitContext | None = None
) -> Any:
    """The model with a fresh adapter of the recipe's kind, initialized from `seed`; trained weights are float32.
    `context`: what the initialization of some kinds asks for. For `adapter.kind: none` it is the model itself, in which
    the weights to be trained are not frozen. UserError where PEFT cannot adapt the chosen modules."""
    torch.manual_seed(seed)
    kind = adapter_spec(settings)
    config = kind.function(settings, targets)
    if config is None:
        return _unfreeze(model, settings, targets)
    attached = _wrap(model, config)
    if kind.initialize:
        kind.initialize(attached, kind_settings(settings), context)
    return _in_float32(attached)


def continue_adapter(model: Any, folder: Path, dropout: float, new_rows: Sequence[int] = ()) -> Any:
    """The model with a folder's adapter, to be trained on; UserError where it has none, or one of another model, or of
    other `new_rows` of the embeddings."""
    config = adapter_config(folder)
    _refuse_other_rows(model, folder, config, new_rows)
    if refused := why_untrainable(folder):
        raise UserError(f"adapter.from: {refused[0]}. {refused[1]}")
    usual = LoraConfig()
    for name, value in vars(config).items():
        if name not in _UNDERSTOOD and value != getattr(usual, name, value):
            reason = f"{folder} was made with {name}: {value!r}, which lorakit does not train on"
            raise UserError(f"adapter.from: {reason}. {_MERGE_FIRST}")
    config.lora_dropout = dropout
    before = [(name, parameter, content_of(parameter)) for name, parameter in model.named_parameters()]
    loaded = _load(model, folder, "adapter.from: ", config, is_trainable=True)
    changed = next((name for name, parameter, content in before if content_of(parameter) != content), None)
    if changed:
        reason = f"{folder} has another {changed} than the base, which would not be saved again"
        raise UserError(f"adapter.from: {reason}. {_MERGE_FIRST}")
    if isinstance(loaded.get_output_embeddings(), BaseTunerLayer):
        raise UserError(f"adapter.from: {folder} adapts the output head, which lorakit trains whole or not at all.")
    broken = next((name for name, value in trained_weights(loaded).items() if not value.isfinite().all()), None)
    if broken:
        raise UserError(f"adapter.from: {folder} holds numbers that are not finite, the first in {broken}.")
    return _in_float32(loaded)


def _refuse_other_rows(model: Any, folder: Path, config: Any, new_rows: Sequence[int]) -> None:
    indices = config.trainable_token_indices or []
    trained = {row for some in indices.values() for row in some} if isinstance(indices, dict) else {*indices}
    own = model.get_input_embeddings().weight.shape[0]
    remedy = "Write model.add_tokens as the recipe of that training has it."
    if trained and max(trained) >= own:
        reason = f"{folder} trains rows of the embeddings up to {max(trained)}, and the base has {own:,}"
        raise UserError(f"adapter.from: {reason}. {remedy}")
    other = sorted({*new_rows} - trained)
    if other and not _trains_ends_whole(model, config.modules_to_save or []):
        reason = f"{folder} does not train row {other[0]} of the embeddings, which model.add_tokens adds"
        merge = "To add others, merge that adapter into its base, and give the merged model as model.base."
        raise UserError(f"adapter.from: {reason}. {remedy} {merge}")


def _trains_ends_whole(model: Any, names: Sequence[str]) -> bool:
    """Whether the embeddings and the output head are among the modules of these names, all their rows with them."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [inputs] if head is None or head.weight is inputs.weight else [inputs, head]
    paths = [path for path, module in model.named_modules() if any(module is end for end in ends)]
    return all(any(f".{path}".endswith(f".{name}") for name in names) for path in paths)


def rebuild_adapter(model: Any, settings: Adapter, targets: Targets | None, checkpoint: Path) -> Any:
    """The model with the adapter of a checkpoint, shaped as it was and without its weights: `load_trained` brings them.
    `targets`: for `adapter.kind: none`, whose checkpoints name no modules."""
    if targets is not None and adapter_spec(settings).function(settings, targets) is None:
        return _unfreeze(model, settings, targets)
    config = PeftConfig.from_pretrained(str(checkpoint / TRAINED_DIR))
    config.init_lora_weights, config.inference_mode = False, False
    attached = _wrap(model, config)
    with safe_open(checkpoint / TRAINED_WEIGHTS, "pt") as file:
        if any(f".{INITIAL}." in name for name in file.keys()):  # noqa: SIM118
            add_initial(attached)
    return _in_float32(attached)


def trained_parameters(model: Any) -> dict[str, Any]:
    """All that training changes or that an adapter began with, by name in the model."""
    named = model.named_parameters()
    return {name: part for name, part in named if part.requires_grad or f".{INITIAL}." in name}


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """The `trained_parameters` as tensors."""
    return {name: part.detach() for name, part in trained_parameters(model).items()}


def load_trained(model: Any, checkpoint: Path, put: Callable[[Any, torch.Tensor], Any]) -> None:
    """Put the `trained_weights` of a checkpoint into the model, whose shapes are theirs. `put` gives a parameter
    the numbers of a whole tensor."""
    own = dict(model.named_parameters())
    for name, tensor in load_file(checkpoint / TRAINED_WEIGHTS).items():
        put(own[name], tensor)


def load_adapter(model: Any, folder: Path, **options: Any) -> Any:
    """The model with a folder's trained adapter, in evaluation mode; UserError where it has none, or one of another
    model. `options` are those of PEFT's own loading."""
    with restoring_random_states():
        torch.manual_seed(0)  # PEFT draws at random for some initializations, which it does again while it loads
        loaded = _load(model, folder, "", adapter_config(folder), **options).eval()
    for module in loaded.modules():
        if isinstance(module, ModulesToSaveWrapper):  # evaluation runs without autocast: its input has the model's type
            module.modules_to_save.to(loaded.dtype)
    return loaded


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable and all parameters, as PEFT counts them."""
    if not isinstance(model, PeftModel):
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
    trainable, total = model.get_nb_trainable_parameters()
    frozen = sum(parameter.numel() for name, parameter in model.named_parameters() if f".{INITIAL}." in name)
    return int(trainable), int(total) - frozen


def _wrap(model: Any, config: Any) -> Any:
    try:
        return peft.get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        reason = f"PEFT cannot adapt these modules: {first_line(error)}"
        raise UserError(f"adapter.targets: {reason}. Leave them out with adapter.exclude.") from error


def _unfreeze(model: Any, settings: Adapter, targets: Targets) -> Any:
    chosen = {*(f"{name}.weight" for name in targets.modules), *targets.experts}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains_every_weight(settings) or name in chosen)
    return model


def _in_float32(model: Any) -> Any:
    """Weights that are trained are held in float32: half precision loses small steps. The rank that AdaLoRA's layers
    divide by is none of them, though PEFT lets it be trained where the base is in half precision."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def adapter_config(folder: Path) -> Any:
    """PEFT's configuration of the adapter in a folder; UserError where it has none, or a damaged one."""
    read_adapter_config(folder)
    read_header(folder / "adapter_model.safetensors")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except _READING as error:
        raise UserError(f"{folder}: its adapter_config.json cannot be read: {first_line(error)}") from error


def _load(model: Any, folder: Path, key: str, config: Any, is_trainable: bool = False, **options: Any) -> Any:
    """What `PeftModel.from_pretrained` makes; that keeps to itself what PEFT missed and what it had no place for."""
    config.inference_mode = not is_trainable
    kind = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    try:
        check_patterns(config, [name for name, _ in model.named_modules()], f"{key}{folder}: its adapter_config.json")
        loaded = kind(model, config, low_cpu_mem_usage=options.get("low_cpu_mem_usage", False))
        report = loaded.load_adapter(str(folder), "default", is_trainable=is_trainable, key_mapping=mapping, **options)
    except KeyError as error:  # of modules that were trained whole
        raise UserError(f"{key}{folder}: this adapter lacks {error.args[0]}, which PEFT expects in it.") from error
    except _READING as error:
        gaps = _expert_gaps(folder)
        reason = f"its file lacks {first_and_count(gaps)}" if gaps else first_line(error)
        raise UserError(f"{key}{folder}: this adapter cannot be put on the base model: {reason}") from error
    misplaced = "holds {}, for which the base model has no place"
    unexpected = [name for name in report.unexpected_keys if not _TWICE.search(name)]
    for sentence, names in (("lacks {}", report.missing_keys), (misplaced, unexpected)):
        if names:
            shown = sentence.format(first_and_count(sorted(name.replace(".default", "") for name in names)))
            raise UserError(f"{key}{folder}: this adapter {shown}. It is damaged, or of another model.")
    return loaded


def _expert_gaps(folder: Path) -> list[str]:
    """Tensors that some experts lack in an adapter's file: PEFT stacks those of all, and fails without a name."""
    names = read_header(folder / "adapter_model.safetensors")[0]
    matches = [match for name in names if (match := re.fullmatch(r"(.*\.experts\.\d+\.)(.*)", name))]
    experts, parts = {match[1] for match in matches}, {match[2] for match in matches}
    return sorted(expert + part for expert in experts for part in parts if expert + part not in names)


@dataclass
class SharedBase:
    """A base that `load` reads from disk. PEFT's `unload` does not always restore it (modules trained whole stay, tied
    weights come apart), so its fingerprint is compared, and it is loaded again if needed."""

    load: Callable[[], Any]
    _model: Any = field(default=None, repr=False)
    _adapter: Path | None = None
    _fingerprint: str = ""

    def model_with(self, adapter: Path | None) -> Any:
        """The base with the adapter of a folder, or alone; the model returned before must not be used any more."""
        if self._model is not None and self._adapter == adapter:
            return self._model
        base, self._model = self._model, None  # until the adapter is on it as a whole
        if base is not None and self._adapter is not None:
            base = base.unload() if hasattr(base, "unload") else None  # PEFT cannot take off every kind of adapter
        if base is None or fingerprint_of(base) != self._fingerprint:
            del base  # frees its memory before the next one is loaded
            base = self.load()
            self._fingerprint = fingerprint_of(base)
        self._model, self._adapter = base if adapter is None else load_adapter(base, adapter), adapter
        return self._model

    def copied(self) -> Any:
        """The base, frozen, in modules of its own around the weights, which those that were returned before share.
        Nothing has to be undone: where one of them was changed, the base is loaded again."""
        if self._model is None or self._adapter is not None or fingerprint_of(self._model) != self._fingerprint:
            self._model = self._adapter = None  # frees its memory before the next one is loaded
            self._model = self.load()
            self._fingerprint = fingerprint_of(self._model)
        weights = (*self._model.parameters(), *self._model.buffers())
        return copy.deepcopy(self._model, {id(tensor): tensor for tensor in weights}).requires_grad_(False)


def fingerprint_of(model: Any) -> str:
    """A hash that is equal only where a model computes the same, bit for bit: of every weight and buffer, taken on its
    device, which weights are tied, the modules with their hooks, and the configurations."""
    facts: list[Any] = [config.to_dict() for config in (model.config, model.generation_config) if config is not None]
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        facts.append([name, type(module).__qualname__, module.training, *hooks, "forward" in vars(module)])
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    state = model.state_dict().items()  # has what quantized layers keep besides
    tensors += [(f"state.{name}", value) for name, value in state if isinstance(value, torch.Tensor)]
    first: dict[Any, str] = {}
    for name, tensor in tensors:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        shared = first.setdefault(place, name) if tensor.numel() else name
        content = [shared] if shared != name else content_of(tensor)
        facts.append([name, str(tensor.dtype), str(tensor.device), tensor.shape, content])
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def content_of(tensor: torch.Tensor) -> list[int]:
    """For each block of a tensor the sum of its bits times odd numbers, modulo 2^64: a change of one number always
    changes it, and a change of several almost always."""
    if not tensor.numel() or tensor.is_meta:
        return []
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 8 else flat
    whole, factors = flat.numel() // 8 * 8, _factors(flat.device)
    pieces = flat[:whole].view(torch.int64).split(_HASHED_AT_ONCE) if whole else ()
    sums = [(piece * factors[: len(piece)]).sum() for piece in pieces]
    return [*(torch.stack(sums).tolist() if sums else []), *flat[whole:].tolist()]


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    random = torch.randint(-(2**62), 2**62, (_HASHED_AT_ONCE,), generator=torch.Generator().manual_seed(0))
    return random.to(device) * 2 + 1


def save_adapter(model: Any, folder: Path) -> None:
    """Write a PEFT model's adapter as `adapter_config.json` and `adapter_model.safetensors`. LoRA, rsLoRA and DoRA as
    they are; every other kind as the plain LoRA that computes the same."""
    config, tensors = to_plain_lora(model)
    trained = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = trained.base_model_name_or_path, trained.revision
    config.inference_mode = True
    save_config(config, folder)
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_config(config: Any, folder: Path) -> None:
    """Write `adapter_config.json`, the same for the same adapter (PEFT writes sets in the order of hashes)."""
    ordered = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(ordered, name, sorted(value))
    ordered.save_pretrained(str(folder))


def full_config(model: Any) -> Any:
    """PEFT's configuration of the adapter that is trained, with all ends of tied modules that are trained whole. PEFT
    strikes all but the first from it, and on loading ties only those again whose names it knows."""
    config = copy.deepcopy(model.peft_config["default"])
    named = model.base_model.model.named_modules()
    config.modules_to_save = [name for name, part in named if isinstance(part, ModulesToSaveWrapper)] or None
    return config


def to_plain_lora(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A LoRA or DoRA configuration and its tensors by name, as PEFT saves them."""
    if model.peft_config["default"].peft_type == "ADALORA":
        config, tensors = svd_to_lora(model)
        config.modules_to_save = full_config(model).modules_to_save
        return config, tensors
    config = full_config(model)
    config.init_lora_weights = True
    tensors = peft.get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    if INITIAL in model.peft_config:
        # s (B A - B0 A0) as one product of twice the rank: [B, -B0] [A; A0], at the same scale.
        for name, tensor in _initial_tensors(model).items():
            tensors[name] = torch.cat([tensors[name], tensor], dim=0 if ".lora_A." in name else 1)
        config.r *= 2
        config.lora_alpha *= 2
        config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    return config, tensors


def _initial_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The low-rank tensors that an adapter began with, as PEFT saves them. It looks for single rows of embeddings under
    every adapter's name."""
    state = model.state_dict()
    state |= {f"{name}.{INITIAL}": value for name, value in _rows_by_name(state).items()}
    tensors = peft.get_peft_model_state_dict(model, state, adapter_name=INITIAL, save_embedding_layers=False)
    return {name: tensor for name, tensor in tensors.items() if ".lora_" in name}


def _rows_by_name(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    end = ".trainable_tokens_delta.default"
    return {name.removesuffix(".default"): value for name, value in state.items() if name.endswith(end)}


def is_no_op(folder: Path) -> bool:
    """Whether every change in an adapter's file is zero; one with other weights besides, or DoRA, is not judged."""
    zero: dict[str, bool] = {}  # of each module: of the parts of a change, one that is all zero makes it zero
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                module, _, part = name.partition(".lora_")
                if name.endswith(".ranknum"):
                    continue
                if part.split(".")[0] not in ("A", "B", "E", "embedding_A", "embedding_B") or "bias" in part.split("."):
                    return False
                zero[module] = zero.get(module, False) or not bool(file.get_tensor(name).any())
    except (OSError, SafetensorError):
        return False  # loading it will say what is wrong
    return bool(zero) and all(zero.values())
