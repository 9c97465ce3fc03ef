"""Export targets: a run's model written as other programs read it, with what was checked of it.

An exporter is a plain function of an `ExportSource` (lorakit/export/source.py), the word after the colon of the target,
an empty folder and a `Progress`. It fills the folder and returns an `Export` (lorakit/export/source.py).
`ExporterSpec` in lorakit/registry.py has what it is registered with.

The recipe reads this table: torch, numpy and the libraries are imported when a function is called.
"""

import importlib

# The order is that of the table: documents and messages name them so.
for _name in ("gguf", "gguf_lora", "ollama", "vllm", "sglang", "lorax", "huggingface"):
    importlib.import_module(f"lorakit.export.{_name}")
