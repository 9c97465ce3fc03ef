"""What a model is made of, in plain numbers: enough to count parameters, memory and operations. No torch here."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from lorakit.errors import UserError

# The layers that close one half of a block: attention's output, and the way back from the feed-forward width.
_CLOSING = re.compile(r"(o|out|c|down)_proj|dense(_4h_to_h)?|wo|w2|fc2|fc_out|out_lin|lin2|output_linear")

# How many tensors of the feed-forward width an activation keeps where transformers writes it out in several operations
# (its activations.py), and where a family's own code does so, whatever the config names (counted with hooks).
ACTIVATIONS = {"gelu_new": 4, "gelu_accurate": 4, "gelu_fast": 5, "quick_gelu": 2, "xielu": 3}
WRITTEN_OUT = {"gpt_oss": 9}

TIED_HEAD = "it is one weight with the embeddings, which adapter.train_modules can train"
UNTIED_HEAD = "it is the output head, which adapter.train_modules can train"
OUTSIDE = "not part of the language model"


@dataclass(frozen=True)
class WeightSpec:
    """A weight that an adapter could be put on: of a linear layer, or a fused one with a matrix for each expert."""

    path: str  # the path of the layer, or of the fused parameter
    sublayer: str  # `attention`, `mlp`, or nothing where it is neither, as in a state space model
    fused: bool = False  # whether it is a parameter (experts, rows, columns), which PEFT adapts by `target_parameters`
    is_head: bool = False
    skip_reason: str = ""  # why the words `all-linear`, `attention` and `mlp` do not mean it
    unadaptable: str = ""  # why an adapter on it would do nothing, or something wrong
    peft_renames: bool = False
    """Whether PEFT takes the layer's name for that of fused experts, as in checkpoints of transformers 4."""
    quantized: bool = False
    outer: int = 0
    """Rows: the features that come out; of a fused weight the rows of one expert's matrix, as it lies in memory."""
    inner: int = 0  # columns: the features that go in
    experts: int = 1  # how many matrices a fused weight holds

    @property
    def layer(self) -> int | None:
        """The number of its block: the first number in its path."""
        return next((int(part) for part in self.path.split(".") if part.isdecimal()), None)

    @property
    def parameter(self) -> str | None:
        """The full path of the parameter that PEFT has to be given, where it cannot be given a layer."""
        if self.fused:
            return self.path
        return f"{self.path}.weight" if self.peft_renames else None

    @property
    def size(self) -> int:
        """The numbers in it."""
        return self.experts * self.outer * self.inner


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of one causal language model."""

    model_type: str
    hidden: int
    vocabulary: int
    layers: int
    heads: int
    key_value: int  # the width of keys, and of values
    weights: tuple[WeightSpec, ...]  # every weight of a linear layer and of fused experts, the output head included
    modules: dict[str, int]  # every module that holds parameters itself -> how many
    embeddings: str  # the path of the input embeddings
    norms: int = 2  # normalizations over the hidden width in one block
    head_norms: bool = False  # whether queries and keys are normalized too
    layer_norm: bool = False  # LayerNorm instead of RMSNorm
    experts_used: int = 1  # the experts that one token goes through
    activation: int = 1  # how many tensors of the feed-forward width the activation keeps for its backward
    soft_capped: bool = False  # whether attention's scores go through a tanh, as Gemma 2's do
    logits_capped: bool = False  # whether the logits do
    scan_states: int = 0
    """Numbers of one token's states in a state space layer's scan: inner width x states; 0 where there is none."""
    built: bool = False  # whether it was read off a model on torch's meta device instead of counted from the config
    extra_bytes: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    """What a traced model keeps beyond what is derived: first block of each make, and bytes of a number -> bytes of a
    token, and on a processor of a pair of tokens."""
    shared: dict[str, int] = field(default_factory=dict)
    """Modules whose weights are those of another one, such as a tied output head, and are counted there."""

    @cached_property
    def parameters(self) -> int:
        """All numbers of the model; tied embeddings once."""
        return sum(size for path, size in self.modules.items() if path not in self.shared)

    @cached_property
    def blocks(self) -> dict[int, list[WeightSpec]]:
        """Layer number -> its weights, of the language model's own layers."""
        blocks = defaultdict(list)
        for weight in self.weights:
            if weight.layer is not None and weight.skip_reason != OUTSIDE:
                blocks[weight.layer].append(weight)
        return dict(blocks)

    @cached_property
    def prototypes(self) -> dict[int, int]:
        """Layer number -> the first layer that is made alike: most models repeat one block."""
        prototypes: dict[int, int] = {}
        first: dict[tuple[object, ...], int] = {}
        for number, block in self.blocks.items():
            make = tuple(
                (w.path.partition(f".{number}.")[2], w.sublayer, w.skip_reason, w.fused, w.experts, w.outer, w.inner)
                for w in block
            )
            prototypes[number] = first.setdefault(make, number)
        return prototypes

    @cached_property
    def quantizable(self) -> list[WeightSpec]:
        """What bitsandbytes quantizes: linear layers, the head excepted; fused experts stay as they are."""
        return [weight for weight in self.weights if not weight.fused and not weight.is_head]

    @cached_property
    def largest(self) -> int:
        """The numbers of the largest single weight that is dequantized for a product."""
        return max((weight.size for weight in self.quantizable), default=0)

    @cached_property
    def active_numbers(self) -> int:
        """The numbers in the blocks that one token is multiplied with."""
        own = (weight for block in self.blocks.values() for weight in block)
        return sum(self.used(weight) * weight.outer * weight.inner for weight in own)

    def used(self, weight: WeightSpec) -> int:
        """How many matrices of a weight one token goes through."""
        return min(self.experts_used, weight.experts) if weight.fused else 1

    def whole(self, names: list[str]) -> dict[str, int]:
        """The modules that `adapter.train_modules` means -> their numbers; of tied embeddings one end."""
        named: dict[str, int] = {}
        for name in names:
            hit = {path: size for path, size in self.modules.items() if f".{name}." in f".{path}."}
            if not hit:
                own = ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in self.modules))
                raise UserError(f"adapter.train_modules: {name!r} is not a module of this model, which has {own}.")
            named |= hit
        if any(path in named for path in self.shared):
            named = {path: size for path, size in named.items() if path not in self.shared}
            named[self.embeddings] = self.modules[self.embeddings]
        return named


def part(weight: WeightSpec) -> Literal["opens", "closes"]:
    """Whether a weight of a half of a block takes the hidden states in, or gives its result back to them."""
    return "closes" if _CLOSING.fullmatch(weight.path.rsplit(".", 1)[-1]) else "opens"
