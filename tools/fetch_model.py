"""Bring the small base model of the demo and the tests onto this machine, once."""

from lorakit.console import Terminal
from lorakit.model.resolve import resolve_base
from lorakit.model.tokenizer import quiet_libraries

quiet_libraries()
base = resolve_base("HuggingFaceTB/SmolLM2-135M-Instruct", "main", Terminal())
print(f"base model ready: {base.name} ({base.origin})")
