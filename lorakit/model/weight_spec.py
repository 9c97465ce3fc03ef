"""One weight of a model that an adapter could be put on, as a plain fact: no torch here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightSpec:
    """One weight of a model: of a linear layer, or a fused one that holds a matrix for each of several experts."""

    path: str
    """The path of the layer, or of the fused parameter."""
    sublayer: str
    """`attention`, `mlp`, or nothing where it is neither, as in a state space model."""
    fused: bool = False
    """Whether it is a parameter (experts, rows, columns), which PEFT adapts by `target_parameters`."""
    is_head: bool = False
    skip_reason: str = ""
    """Why the words `all-linear`, `attention` and `mlp` do not mean it."""
    unadaptable: str = ""
    """Why an adapter on it would do nothing, or something wrong."""
    peft_renames: bool = False
    """Whether PEFT takes the layer's name for that of fused experts, as in checkpoints of transformers 4."""
    quantized: bool = False
    outer: int = 0
    """Rows: the features that come out; of a fused weight the rows of one expert's matrix, as it lies in memory."""
    inner: int = 0
    """Columns: the features that go in."""
    experts: int = 1
    """How many matrices a fused weight holds."""

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
