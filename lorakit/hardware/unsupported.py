"""What a recipe may ask of some GPUs only: torch or bitsandbytes cannot do it on the others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unsupported:
    """Why a value of a key does not work on a type of device, and which value does."""

    reason: str
    instead: str


_FLASH = Unsupported("the package flash-attn is for CUDA and ROCm", "sdpa")
_VARLEN = Unsupported("torch has variable-length attention for CUDA and for processors", "sdpa")
_PAGED = Unsupported("bitsandbytes has no memory for Metal that moves between a GPU and the processor", "adamw")
# torch's nn/attention/flex_attention.py and amp/grad_scaler.py; bitsandbytes' README and backends, 0.50.
UNSUPPORTED = {
    ("mps", "model.attention", "varlen"): _VARLEN,
    ("mps", "model.attention", "flash_attention_2"): _FLASH,
    ("mps", "model.attention", "flash_attention_3"): _FLASH,
    ("mps", "model.attention", "flex_attention"): Unsupported("torch has no backward pass of it for Metal", "sdpa"),
    ("mps", "train.optimizer", "adamw-8bit"): Unsupported("bitsandbytes has no 8-bit optimizers for Metal", "adamw"),
    ("mps", "train.optimizer", "paged-adamw"): _PAGED,
    ("mps", "train.optimizer", "paged-adamw-8bit"): _PAGED,
    ("xpu", "model.attention", "varlen"): _VARLEN,
    ("xpu", "model.attention", "flash_attention_2"): _FLASH,
    ("xpu", "model.attention", "flash_attention_3"): _FLASH,
    ("xpu", "model.dtype", "float16"): Unsupported(
        "torch scales its loss in float64, which some of Intel's GPUs lack", "bfloat16"
    ),
}
