"""A model whose weights are read when they are needed and dropped right after: it runs in the memory of one block.

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

from lorakit.errors import UserError
from lorakit.hardware.memory import return_freed_memory
from lorakit.model.peft_adapter import adapter_config, load_adapter
from lorakit.model.spec_from_meta import empty_model, read_hf_config
from lorakit.recipe.init_adapter import PLAIN_INITS

# Path in the base model's state dict -> the float32 tensor of a parameter or persistent buffer; and the same some rows
# at a time, each with the number of its first row, valid until the next is taken.
Read = Callable[[str], torch.Tensor]
Pieces = Callable[[str], Iterator[tuple[int, torch.Tensor]]]


@dataclass(frozen=True)
class _Slot:
    """A place in a module for a tensor that is read, and the placeholder that is there until then."""

    holder: dict[str, Any]  # the module's own table of parameters or buffers
    name: str
    path: str
    placeholder: torch.Tensor

    @property
    def is_replaced(self) -> bool:
        """Whether an adapter has put its own tensor here, as one with trained biases does."""
        return self.holder[self.name] is not self.placeholder and not self.holder[self.name].is_meta


def layerwise_model(
    folder: Path, attention: str, read: Read, pieces: Pieces | None = None, adapter: Path | None = None
) -> Any:
    """The causal language model of a folder's config in evaluation mode, float32 on the CPU, its weights from `read`,
    which is given the paths of the base model. An adapter is applied by PEFT, and its tensors stay in memory.

    A block of the decoder is read whole when it is entered, any other module with weights (embeddings, norms, head) by
    itself. All are dropped when left, after errors too, and are NaN until then. Tied weights are read by their first
    name, the embedding's. The config's own quantization is ignored. With `pieces`, neither head nor embeddings are ever
    in memory as a whole. UserError where the config is no causal language model's, or the adapter another model's."""
    model, slots = _empty_model(folder, attention) if adapter is None else _adapted(folder, attention, adapter)
    own = {module: [slot for slot in of_module if not slot.is_replaced] for module, of_module in slots.items()}
    return_freed_memory()
    _read_on_call(model, own, read, pieces)
    return model.requires_grad_(False)  # a graph would keep what was read


def adapter_without_base(folder: Path, adapter: Path) -> tuple[Any, list[str]]:
    """PEFT's model of a folder's adapter on a base of which only the config is read, and the paths of the base's
    weights that the adapter replaces; UserError where the folder has no adapter, or one of another model."""
    model, slots = _adapted(folder, "eager", adapter)
    return model, sorted(slot.path for of_module in slots.values() for slot in of_module if slot.is_replaced)


def _adapted(folder: Path, attention: str, adapter: Path) -> tuple[Any, dict[int, list[_Slot]]]:
    config = adapter_config(adapter)
    if getattr(config, "layer_replication", None):
        reason = "was made with layer_replication, so that a merged model would need more layers than its base has"
        raise UserError(f"{adapter}: {reason}. Merge it with PEFT's merge_and_unload.")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start not in PLAIN_INITS:
        reason = f"was saved with init_lora_weights {start!r}, and belongs to a base changed by that"
        remedy = "Convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)."
        raise UserError(f"{adapter}: {reason}. {remedy}")
    model, slots = _empty_model(folder, attention)
    # PEFT moves an adapter to where the base is, and makes no first values that would need the base's weights.
    return load_adapter(model, adapter, low_cpu_mem_usage=True, torch_device="cpu"), slots


def _empty_model(folder: Path, attention: str) -> tuple[Any, dict[int, list[_Slot]]]:
    """The model of a config, and every place for a tensor of its state dict, by the id of the module. Parameters are
    NaN of the right shape on the CPU, with strides of 0, which takes no memory. Buffers are real: those that are not
    saved are computed here, and the others are small."""
    config = read_hf_config(folder)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with init_empty_weights(include_buffers=False):
        model = empty_model(config, dtype=torch.float32, attn_implementation=attention)
    model.tie_weights()  # which init_empty_weights has untied
    model.requires_grad_(False).eval()
    placeholders: dict[int, tuple[str, torch.nn.Parameter]] = {}
    slots: dict[int, list[_Slot]] = {}
    for prefix, module in model.named_modules():
        of_module = slots.setdefault(id(module), [])
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            path = f"{prefix}.{name}".lstrip(".")
            if isinstance(value, torch.nn.Parameter):
                nan = torch.nn.Parameter(torch.full((), torch.nan).expand(value.shape), requires_grad=False)
                path, nan = placeholders.setdefault(id(value), (path, nan))
                of_module.append(_Slot(module._parameters, name, path, nan))
            elif value is not None and name not in module._non_persistent_buffers_set:
                of_module.append(_Slot(module._buffers, name, path, value))
    for of_module in slots.values():
        _drop(of_module)  # only now: ids are those of living tensors
    return model, slots


def _read_on_call(model: Any, slots: dict[int, list[_Slot]], read: Read, pieces: Pieces | None) -> None:
    """Let every part of the model that is read at once read its slots when it is called, and drop them after."""
    for part, of_part in _parts(model, slots):
        _drop(of_part)
        is_embedding = part is model.get_input_embeddings()
        if pieces is not None and type(part) is torch.nn.Linear:
            (weight,) = (slot for slot in of_part if slot.name == "weight")
            part.forward = partial(_multiply_by_rows, part, weight.path, pieces)
            of_part = [slot for slot in of_part if slot is not weight]
        if pieces is not None and is_embedding and type(part).forward.__code__.co_argcount == 2:  # tokens only
            part.register_forward_pre_hook(partial(_fill_rows, of_part[0], pieces))
        else:
            part.register_forward_pre_hook(partial(_fill, of_part, read))
        part.register_forward_hook(lambda _, __, ___, of_part=of_part: _drop(of_part), always_call=True)


def _parts(model: Any, slots: dict[int, list[_Slot]]) -> list[tuple[Any, list[_Slot]]]:
    """The modules that are read at once, each with its slots: the members of the outermost lists of modules (the
    blocks), PEFT's layers outside of them, which may read the layer that they wrap, and any other module with tensors.
    """
    parts: dict[int, tuple[Any, dict[int, _Slot]]] = {}

    def visit(module: Any, part: Any, in_list: bool) -> None:
        if part is None and (in_list or isinstance(module, BaseTunerLayer)):
            part = module
        owner = module if part is None else part
        _, of_owner = parts.setdefault(id(owner), (owner, {}))
        of_owner.update({id(slot): slot for slot in slots.get(id(module), ())})
        for child in module.children():
            visit(child, part, isinstance(module, torch.nn.ModuleList))

    visit(model, None, in_list=False)
    return [(owner, list(of_owner.values())) for owner, of_owner in parts.values() if of_owner]


def _multiply_by_rows(layer: Any, path: str, pieces: Pieces, states: torch.Tensor) -> torch.Tensor:
    output = states.new_empty((*states.shape[:-1], layer.out_features))
    for row, piece in pieces(path):
        output[..., row : row + len(piece)] = states @ piece.T
    return output if layer.bias is None else output.add_(layer.bias)


def _fill(slots: list[_Slot], read: Read, module: Any, inputs: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}  # each path is read once, also where weights are tied within the part
    for slot in slots:
        if slot.path not in tensors:
            tensor = read(slot.path).to(slot.placeholder.dtype)
            is_parameter = isinstance(slot.placeholder, torch.nn.Parameter)
            tensors[slot.path] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        slot.holder[slot.name] = tensors[slot.path]


def _fill_rows(slot: _Slot, pieces: Pieces, module: Any, inputs: Any) -> None:
    """Read the rows of an embedding for the tokens of a batch. The others are never touched, so they take no memory."""
    weight, tokens = torch.empty(slot.placeholder.shape), inputs[0].unique()
    for row, piece in pieces(slot.path):
        here = tokens[(tokens >= row) & (tokens < row + len(piece))]
        weight[here] = piece[here - row]
    slot.holder[slot.name] = torch.nn.Parameter(weight, requires_grad=False)


def _drop(slots: list[_Slot]) -> None:
    for slot in slots:
        slot.holder[slot.name] = slot.placeholder
