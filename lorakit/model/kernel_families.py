"""The families of models that Liger-Kernel has kernels for, and how each computes what the kernels take the place of.

From Liger's own table (liger_kernel/transformers/monkey_patch.py, 0.8.5) and transformers' modeling files. Left out are
those whose parts are not what a kernel computes: gates with multipliers (Falcon H1), rotations of pairs side by side
(GLM-4, DeepSeek), rotation in complex numbers (Llama 4), experts whose gate is clamped (gpt-oss).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyKernels:
    """Which parts of a family kernels take the place of."""

    norm_offset: float = 0.0  # what is added to the scale of a normalization: Gemma's begins at 0
    norm_rounds_last: bool = False  # the scale is multiplied in float32; Llama rounds to the input's type before
    rotary: bool = True  # queries and keys are rotated by halves
    gate: str = "swiglu"  # how the feed-forward layers are gated: swiglu or geglu

    def kernels(self, on_gpu: bool) -> tuple[str, ...]:
        """The names of the kernels that a GPU, or a processor in float32 (cpu_kernels.py), has for it."""
        gates = (self.gate,) if on_gpu or self.gate == "swiglu" else ()
        return ("rms_norm", *gates, *(("rotary",) if self.rotary else ()))


_LLAMA = FamilyKernels()
_GEMMA = FamilyKernels(norm_offset=1.0, norm_rounds_last=True, gate="geglu")
_OLMO = FamilyKernels(norm_rounds_last=True)

# By the `model_type` of the text model.
KERNEL_FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen3_moe"), _LLAMA),
    **dict.fromkeys(("phi3", "granite", "smollm3", "exaone4", "hunyuan_v1_dense"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("olmo2", "olmo3"), _OLMO),
    "qwen3_next": FamilyKernels(norm_offset=1.0, norm_rounds_last=True),
    "qwen3_5_text": FamilyKernels(norm_offset=1.0, norm_rounds_last=True, rotary=False),
    "gemma4_text": FamilyKernels(norm_rounds_last=True, rotary=False, gate="geglu"),
    "glm4": FamilyKernels(rotary=False),
}


def kernel_family(model_type: str) -> FamilyKernels | None:
    """The family of a `model_type`, of the text model or of the one that holds it (gemma3: gemma3_text)."""
    return KERNEL_FAMILIES.get(model_type) or KERNEL_FAMILIES.get(f"{model_type}_text")
