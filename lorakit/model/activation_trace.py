"""What autograd keeps of a family that nobody has counted, found by running its own code on tensors without numbers.

torch's fake tensors (torch/_subclasses/fake_tensor.py) have only shapes and types: every operation gives those of its
results and saves what its backward needs, and nothing is computed or allocated. A model of any size takes seconds. Code
that asks for a number, such as how many tokens an expert got, cannot be followed so.
"""

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from lorakit.errors import LorakitError, first_line
from lorakit.model.fused_lora import fused_lora, replace_forward
from lorakit.model.loss import body_of, causal_of
from lorakit.model.peft_adapter import attach_adapter
from lorakit.model.spec import ModelSpec
from lorakit.model.targets import select_targets
from lorakit.recipe.adapter_kind import trains_all
from lorakit.recipe.schema import Adapter

_ROWS = 2
# Tokens of the longest pass; a quarter and a half of them are multiples of the chunks that linear attention works in.
_LONGEST = 1024
# And where the layers go through the tokens one by one: Mamba's, and those of these families.
_FEW = 64
_TOKEN_BY_TOKEN = ("rwkv", "recurrent_gemma", "xlstm")


def trace_activations(
    config: Any, spec: ModelSpec, settings: Adapter, half: bool
) -> tuple[str, dict[int, tuple[float, float]]]:
    """What autograd keeps of a model's blocks, with padded rows, as on a processor: the attention, and the number of
    the first block of each make -> bytes of a token, and of a pair of tokens of a row. A LorakitError that says why
    where its code cannot be followed.

    `settings` are of LoRA, DoRA or full fine-tuning; `half` is bfloat16 under autocast, with float32 trained weights.
    """
    most = min(getattr(config.get_text_config(), "max_position_embeddings", None) or _LONGEST, _LONGEST)
    longest = _FEW if spec.scan_states or spec.model_type in _TOKEN_BY_TOKEN else most
    lengths = (longest // 4, longest // 2, longest)  # for what is kept once, for a token, and for a pair of tokens
    log = logging.getLogger("torch._subclasses.fake_tensor")
    makes = defaultdict(list)
    for number, first in spec.prototypes.items():
        makes[first].append(number)
    few = {number for numbers in makes.values() for number in numbers[:2]}
    reason = ""
    for blocks in (few, set(spec.prototypes)):  # all, where later blocks need what earlier ones of their make hand on
        log.disabled = True  # it reports each operation that it cannot follow
        try:
            model, mode, attention = _fake_model(config, settings, half)
            sizes = [_bytes_by_block(model, mode, spec, half, length, blocks) for length in lengths]
        except Exception as error:  # the code of any family runs here, on tensors that it was not made for
            reason = f"{type(error).__name__}: {first_line(error)}"
            continue
        finally:
            log.disabled = False
        terms = [[1, _ROWS * length, _ROWS * length**2] for length in lengths]
        traced = {}
        for first, numbers in makes.items():
            # What two blocks share is counted with the first of them: the second is as all others are.
            _, token, pair = np.linalg.solve(terms, [by_block[numbers[:2][-1]] for by_block in sizes])
            traced[first] = float(token), float(pair)
        return attention, traced
    raise LorakitError(reason)


def _fake_model(config: Any, settings: Adapter, half: bool) -> tuple[Any, FakeTensorMode, str]:
    """The model with its adapter, of fake tensors as on a processor; with their mode, and its attention."""
    everything = trains_all(settings)
    dtype = torch.bfloat16 if half and not everything else torch.float32
    with torch.device("meta"):
        load = partial(AutoModelForCausalLM.from_config, config, dtype=dtype, trust_remote_code=False)
        try:
            base, attention = load(attn_implementation="sdpa"), "sdpa"
        except ValueError:  # the family has no such attention
            base, attention = load(attn_implementation="eager"), "eager"
        base.requires_grad_(everything)
        model = attach_adapter(base, settings, 0, select_targets(base, settings)).train()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device="cpu")
    return model, mode, attention


def _bytes_by_block(
    model: Any, mode: FakeTensorMode, spec: ModelSpec, half: bool, length: int, blocks: set[int]
) -> Counter[int]:
    """What autograd keeps of each block, for padded rows of so many tokens, where only `blocks` compute."""
    causal = causal_of(model)
    sizes = Counter[int]()
    seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    alive, running = [], [-1]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # so that no other storage gets its address
        if tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            sizes[running[0]] += tensor.untyped_storage().nbytes()
        return tensor

    has_adapter = hasattr(model, "peft_config")
    casting = disable_input_dtype_casting(model, active=half) if has_adapter else contextlib.nullcontext()
    computing, autocast = _computing_only(blocks, causal, spec, running), torch.autocast("cpu", torch.bfloat16, half)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with mode, computing, casting, fused_lora(model, _norms_of_shapes), autocast, hooks:
        ids = torch.zeros(_ROWS, length, dtype=torch.long)
        body_of(causal)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sizes


def _norms_of_shapes(weight: torch.Tensor, squares: torch.Tensor, *factors: Any) -> torch.Tensor:
    """What stands for `factored_norms` of DoRA, which asks whether numbers cancel."""
    return squares.sqrt()


@contextlib.contextmanager
def _computing_only(blocks: set[int], causal: Any, spec: ModelSpec, running: list[int]) -> Iterator[None]:
    """Within this all other blocks give their input back, `running` holds the number of the block that computes, and
    the first block's input asks for a gradient, as that of every other one does."""
    outputs: dict[int, Any] = {}
    numbers = {}
    for number, weights in spec.blocks.items():  # a block is where most of its weights are
        stacks = Counter(weight.path.partition(f".{number}.")[0] for weight in weights)
        numbers[causal.get_submodule(f"{stacks.most_common(1)[0][0]}.{number}")] = number

    def make(block: Any) -> Callable[..., Any]:
        number, first, forward = numbers[block], spec.prototypes[numbers[block]], block.forward

        def run(*args: Any, **named: Any) -> Any:
            if number in blocks:
                running[0] = number
                outputs[first] = forward(*args, **named)
                running[0] = -1
                return outputs[first]
            hidden = args[0] if args else named["hidden_states"]
            return (hidden, *outputs[first][1:]) if isinstance(outputs[first], tuple) else hidden

        return run

    embeddings = causal.get_input_embeddings()
    asking = embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_().clone())
    try:
        with replace_forward(list(numbers), make):
            yield
    finally:
        asking.remove()
