"""lorakit: fine-tune language models with LoRA from one YAML recipe."""

__version__ = "0.1.0"
