"""`sglang`: a folder that SGLang serves, as an adapter on its base where SGLang takes it."""

from pathlib import Path
from typing import Any

from lorakit.export.serving import Served, Server, command_line, export_for_server
from lorakit.export.source import Export, ExportSource
from lorakit.progress import Progress
from lorakit.registry import EXPORTERS


def _start_adapter(served: Served) -> str:
    return command_line(
        f"python -m sglang.launch_server --model-path {served.base}",
        f'--served-model-name base --enable-lora --lora-paths {served.name}="$PWD"',
        f"--max-lora-rank {served.rank} --lora-target-modules {' '.join(served.modules)}",
        f"--chat-template {served.template}" if served.template else "",
        "--port 30000",
    )


def _start_merged(served: Served) -> str:
    return command_line(
        f'python -m sglang.launch_server --model-path "$PWD" --served-model-name {served.name}',
        f"--chat-template {served.template}" if served.template else "",
        "--port 30000",
    )


def _request(served: Served) -> dict[str, Any]:
    return {"model": f"base:{served.name}"}  # docs/advanced_features/lora: base model, colon, adapter


SGLANG = Server(
    name="SGLang",
    port=30000,
    parts="python/sglang/srt/lora/lora.py, lora_config.py",
    layers="python/sglang/srt/lora/lora.py stacks q, k and v, and gate and up, of each layer",
    ranks=(),
    rank_source="docs/advanced_features/lora: any; adapters that are loaded later may not have a larger one",
    modules=frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    module_source="python/sglang/srt/utils/common.py, SUPPORTED_LORA_TARGET_MODULES",
    start_adapter=_start_adapter,
    start_merged=_start_merged,
    request=_request,
    note="The options are those of SGLang's documentation; lorakit's tests do not run SGLang.",
)


@EXPORTERS.register("sglang", weights="either")
def export_sglang(source: ExportSource, argument: str, folder: Path, progress: Progress) -> Export:
    """A folder for SGLang: the adapter at a scale of 1, or the merged model where SGLang does not take the adapter."""
    return export_for_server(SGLANG, source, folder, progress)
