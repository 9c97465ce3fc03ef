"""A model whose weights are read where they are needed and dropped right after: it runs in the memory of one block.

Every forward reads all weights once, so it pays to give it many tokens at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.errors import UserError
from lorakit.hardware.memory import return_freed_memory
from lorakit.model.peft_adapter import adapter_config, load_adapter

Read = Callable[[str], torch.Tensor]
"""Gives the float32 tensor of a parameter or persistent buffer by its path in the base model's state dict."""
Pieces = Callable[[str], Iterator[tuple[int, torch.Tensor]]]
"""Gives the same some rows at a time, each with the number of its first row, good until the next is asked for."""

# PEFT's ways to begin that leave the base's weights as they are, besides the usual one (a boolean).
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Slot:
    """A place in a module for a tensor that is read, and what lies there meanwhile."""

    holder: dict[str, Any]
    """The module's own table of parameters or buffers."""
    name: str
    path: str
    idle: torch.Tensor

    @property
    def is_taken(self) -> bool:
        """Whether an adapter has put a tensor of its own here, as one that trained biases does."""
        return self.holder[self.name] is not self.idle and not self.holder[self.name].is_meta


def layerwise_model(folder: Path, attention: str, read: Read, pieces: Pieces | None = None) -> Any:
    """The causal language model of a folder's config in evaluation mode, float32 on the CPU, its weights from `read`.

    A block of the decoder is read whole when it is entered, since not every layer's weight is read by calling the
    layer; any other module with weights (embeddings, norms, head) is read by itself. All are dropped when left, errors
    included. Tied weights are asked for by their first name, the embedding's. What is read outside of its block is
    NaN. The config's own quantization is ignored. With `pieces`, neither head nor embeddings
    are ever in memory as a whole.

    Raises:
        UserError: the config is of no causal language model.
    """
    model = _without_weights(folder, attention)
    return_freed_memory()
    _stream(model, _emptied(model), read, pieces)
    return model


def layerwise_adapter_model(
    folder: Path, attention: str, read: Read, adapter: Path, pieces: Pieces | None = None
) -> Any:
    """`layerwise_model` with the adapter of a folder, put on it by PEFT, whose forward it is; its tensors are held.

    `read` is asked for the paths of the base model, without what PEFT adds to them.

    Raises:
        UserError: the folder holds no adapter, or one that does not belong to this model or to these weights of it.
    """
    loaded, slots = _put_on_nothing(folder, attention, adapter)
    own = {module: [slot for slot in found if not slot.is_taken] for module, found in slots.items()}
    return_freed_memory()
    _stream(loaded, own, read, pieces)
    return loaded.requires_grad_(False)  # a graph would hold what was read


def adapter_without_base(folder: Path, adapter: Path) -> tuple[Any, list[str]]:
    """PEFT's model of the adapter of a folder on a base of which the config alone is read, and the paths of the base's
    own weights that the adapter brings with it.

    Raises:
        UserError: the folder holds no adapter, or one that does not belong to this model.
    """
    loaded, slots = _put_on_nothing(folder, "eager", adapter)
    return loaded, sorted(slot.path for found in slots.values() for slot in found if slot.is_taken)


def _put_on_nothing(folder: Path, attention: str, adapter: Path) -> tuple[Any, dict[int, list[_Slot]]]:
    _refuse_changed_base(adapter)
    model = _without_weights(folder, attention)
    slots = _emptied(model)
    # PEFT moves an adapter to where the base lies, and makes no first values that would need the base's weights.
    return load_adapter(model, adapter, low_cpu_mem_usage=True, torch_device="cpu"), slots


def _refuse_changed_base(adapter: Path) -> None:
    config = adapter_config(adapter)
    if getattr(config, "layer_replication", None):
        raise UserError(
            f"{adapter}: was made with layer_replication, which repeats layers of the base, each time with other "
            "adapters. A merged model would need more layers than its base has. Merge it with PEFT's merge_and_unload."
        )
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start not in _PLAIN_STARTS:
        raise UserError(
            f"{adapter}: was saved with init_lora_weights {start!r}, and belongs to a base changed by that. Convert it "
            "to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)."
        )


def _without_weights(folder: Path, attention: str) -> Any:
    """The model with parameters on the meta device. Its buffers are real: what is not saved is computed here."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UserError(f"{folder}: no model can be made of its config: {str(error).splitlines()[0]}") from error
    model.tie_weights()  # becoming empty has torn them apart
    return model.requires_grad_(False).eval()


def _emptied(model: Any) -> dict[int, list[_Slot]]:
    """Every place for a tensor of the state dict, by the id of its module.

    In the places of parameters NaN of the right shape is put, which takes no memory and lies on the CPU as the model's
    and PEFT's code expect. Buffers stay: they are small.
    """
    empty: dict[int, torch.nn.Parameter] = {}
    paths: dict[int, str] = {}
    slots: dict[int, list[_Slot]] = {}
    for prefix, module in model.named_modules():
        found = slots.setdefault(id(module), [])
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            path = paths.setdefault(id(parameter), f"{prefix}.{name}".lstrip("."))
            nothing = torch.full((), torch.nan).expand(parameter.shape)
            idle = empty.setdefault(id(parameter), torch.nn.Parameter(nothing, requires_grad=False))
            found.append(_Slot(module._parameters, name, path, idle))
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.append(_Slot(module._buffers, name, f"{prefix}.{name}".lstrip("."), buffer))
    for slot in (slot for found in slots.values() for slot in found):  # only now: ids are those of living tensors
        slot.holder[slot.name] = slot.idle
    return slots


def is_empty(tensor: torch.Tensor) -> bool:
    """Whether nothing lies in the place of a weight until it is read: the model, or its adapter, brings none."""
    return all(step == 0 for step in tensor.stride())


def _stream(model: Any, slots: dict[int, list[_Slot]], read: Read, pieces: Pieces | None) -> None:
    """Let every part of the model that is read at once read its slots when it is called, and drop them after."""
    for part, chosen in _parts(model, slots):
        _drop(chosen)
        if pieces is not None and type(part) is torch.nn.Linear:
            (weight,) = (slot for slot in chosen if slot.name == "weight")
            part.forward = partial(_product, part, weight.path, pieces)
            chosen = [slot for slot in chosen if slot is not weight]
        elif (
            pieces is not None and part is model.get_input_embeddings() and type(part).forward.__code__.co_argcount == 2
        ):
            part.register_forward_pre_hook(lambda _, given, chosen=chosen: _fill_rows(chosen[0], given[0], pieces))
            part.register_forward_hook(lambda _, __, ___, chosen=chosen: _drop(chosen), always_call=True)
            continue
        part.register_forward_pre_hook(lambda _, __, chosen=chosen: _fill(chosen, read))
        part.register_forward_hook(lambda _, __, ___, chosen=chosen: _drop(chosen), always_call=True)


def _product(layer: Any, path: str, pieces: Pieces, states: torch.Tensor) -> torch.Tensor:
    """A linear layer's output, computed from some rows of its weight at a time."""
    output = states.new_empty((*states.shape[:-1], layer.out_features))
    for row, piece in pieces(path):
        output[..., row : row + len(piece)] = states @ piece.T
    return output if layer.bias is None else output.add_(layer.bias)


def _parts(model: Any, slots: dict[int, list[_Slot]]) -> list[tuple[Any, list[_Slot]]]:
    """The modules that are read at once, each with its slots.

    These are the members of the outermost lists of modules (the blocks), PEFT's layers outside of them, some of which
    read the weight of the layer that they wrap, and else every module with tensors of its own.
    """
    parts: dict[int, tuple[Any, dict[int, _Slot]]] = {}

    def visit(module: Any, part: Any, in_list: bool) -> None:
        if part is None and (in_list or isinstance(module, BaseTunerLayer)):
            part = module
        owner = module if part is None else part
        _, chosen = parts.setdefault(id(owner), (owner, {}))
        chosen.update({id(slot): slot for slot in slots.get(id(module), ())})
        for child in module.children():
            visit(child, part, isinstance(module, torch.nn.ModuleList))

    visit(model, None, in_list=False)
    return [(owner, list(chosen.values())) for owner, chosen in parts.values() if chosen]


def _fill(slots: list[_Slot], read: Read) -> None:
    tensors: dict[str, torch.Tensor] = {}  # each path is read once, also where weights are tied within the part
    for slot in slots:
        if slot.path not in tensors:
            tensor = read(slot.path).to(slot.idle.dtype)
            is_parameter = isinstance(slot.idle, torch.nn.Parameter)
            tensors[slot.path] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        slot.holder[slot.name] = tensors[slot.path]


def _fill_rows(slot: _Slot, tokens: torch.Tensor, pieces: Pieces) -> None:
    """Read the rows of an embedding that tokens ask for. The others are never touched, so they take no memory."""
    weight, asked = torch.empty(slot.idle.shape), tokens.unique()
    for row, piece in pieces(slot.path):
        here = asked[(asked >= row) & (asked < row + len(piece))]
        weight[here] = piece[here - row]
    slot.holder[slot.name] = torch.nn.Parameter(weight, requires_grad=False)


def _drop(slots: list[_Slot]) -> None:
    for slot in slots:
        slot.holder[slot.name] = slot.idle
