"""Kernels in the place of what a model computes between its matrix products: RMSNorm, rotation, gated activations.

A kernel is a function; whose it is does not matter here. `liger_kernels` are those of Liger-Kernel (Hsu et al., arXiv
2410.10989), which need a GPU: one kernel where the model's own code starts up to a dozen, and less kept for the
backward pass. What a family's parts compute is in kernel_families.py. Nothing of a model is left changed.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from lorakit.model.kernel_families import FamilyKernels, kernel_family
from lorakit.model.loss import body_of, causal_of

# What modeling files call the rotation of queries and keys.
_ROTATION = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class Kernels:
    """Functions that compute what a model's own code would. None: its own code does."""

    rms_norm: Callable[[Tensor, Tensor, float, float, bool], Tensor] | None = None
    """x (..., width), scale (width), epsilon, what is added to the scale, whether x is rounded last -> as x."""
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """Queries and keys (rows, heads, tokens, size), cosines and sines (rows or 1, tokens, size rotated) -> as they."""
    swiglu: Callable[[Tensor, Tensor], Tensor] | None = None
    """Gate and up (..., width) -> silu(gate) * up."""
    geglu: Callable[[Tensor, Tensor], Tensor] | None = None
    """Gate and up (..., width) -> gelu(gate) * up, GELU in its tanh form."""

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))


NO_KERNELS = Kernels()


def liger_kernels() -> Kernels:
    """Those of Liger-Kernel. ImportError where it, or Triton, is not installed."""
    from liger_kernel.ops import LigerGELUMulFunction, LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    def rms_norm(x: Tensor, scale: Tensor, epsilon: float, offset: float, rounds_last: bool) -> Tensor:
        # Not in place: a gradient that goes to a residual too must stay as it is.
        casting = "gemma" if rounds_last else "llama"
        result: Tensor = LigerRMSNormFunction.apply(x, scale, epsilon, offset, casting, False)
        return result

    return Kernels(rms_norm, LigerRopeFunction.apply, LigerSiLUMulFunction.apply, LigerGELUMulFunction.apply)


@contextmanager
def use_kernels(model: Any, kernels: Kernels) -> Iterator[Counter[str]]:
    """Within this, kernels compute what they can of a causal language model, with an adapter or without; afterwards it
    is as it was. Gives how many modules each has taken over, by the names of `Kernels`; none in a family that
    kernel_families.py does not have. Other models of its family in this process rotate by the same kernel."""
    body = body_of(causal_of(model))
    family = kernel_family(body.config.get_text_config().model_type)
    counts: Counter[str] = Counter()
    with replaced(list(_replacements(body, family, kernels, counts)) if family else []):
        yield counts


def _replacements(
    body: nn.Module, family: FamilyKernels, kernels: Kernels, counts: Counter[str]
) -> Iterator[tuple[Any, str, Any]]:
    for module in body.modules():
        if (name := _kind(module)) and (kernel := getattr(kernels, name)):
            counts[name] += 1
            yield module, "forward", MethodType(_forward(module, name, kernel, family), module)
    if family.rotary and kernels.rotary:
        for file, attentions in _rotating_files(body).items():
            counts["rotary"] += attentions
            yield file, _ROTATION, _rotation(kernels.rotary, getattr(file, _ROTATION))


def _kind(module: nn.Module) -> str:
    """The name of the kernel that computes what this module does, or none."""
    if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor):
        return "rms_norm"
    children = {name for name, _ in module.named_children()}
    gates = ({"gate_proj", "up_proj", "down_proj", "act_fn"}, {"gate_up_proj", "down_proj", "activation_fn"})
    return _activation(module) if children in gates else ""


def _activation(module: Any) -> str:
    activation = module.act_fn if hasattr(module, "act_fn") else module.activation_fn
    if isinstance(activation, (nn.SiLU, SiLUActivation)):
        return "swiglu"
    return "geglu" if isinstance(activation, GELUTanh) else ""


def _forward(module: nn.Module, name: str, kernel: Callable[..., Any], family: FamilyKernels) -> Callable[..., Tensor]:
    """The forward of a module by a kernel, as a method."""
    if name == "rms_norm":
        epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps

        def normalize(self: Any, hidden_states: Tensor) -> Tensor:
            result: Tensor = kernel(hidden_states, self.weight, epsilon, family.norm_offset, family.norm_rounds_last)
            return result

        return normalize

    def feed_forward(self: Any, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(kernel(self.gate_proj(x), self.up_proj(x)))
        return result

    def feed_forward_of_one(self: Any, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(kernel(*self.gate_up_proj(x).chunk(2, dim=-1)))
        return result

    return feed_forward if hasattr(module, "gate_proj") else feed_forward_of_one


def _rotating_files(body: nn.Module) -> Counter[Any]:
    """The modeling files whose attentions rotate queries and keys, and how many there are in `body`."""
    files = (sys.modules[type(module).__module__] for module in body.modules() if _is_attention(module))
    return Counter(file for file in files if hasattr(file, _ROTATION))


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and hasattr(
        module, "q_proj" if hasattr(module, "q_proj") else "qkv_proj"
    )


def _rotation(kernel: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        return kernel(q, k, cos, sin) if unsqueeze_dim == 1 else own(q, k, cos, sin, unsqueeze_dim)

    return rotate


@contextmanager
def replaced(values: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within this, each owner (a module of a model, a modeling file) has another value under a name; afterwards what it
    had, or none of its own."""
    with ExitStack() as stack:
        for owner, name, value in values:
            if name in vars(owner):
                stack.callback(setattr, owner, name, vars(owner)[name])
            else:
                stack.callback(delattr, owner, name)
            setattr(owner, name, value)
        yield
