"""`vllm`: a folder that vLLM serves, as an adapter on its base where vLLM takes it."""

from pathlib import Path

from lorakit.export.serving import Served, Server, command_line, export_for_server
from lorakit.export.source import Export, ExportSource
from lorakit.progress import Progress
from lorakit.registry import EXPORTERS


def _start_adapter(served: Served) -> str:
    return command_line(
        f"vllm serve {served.base}",
        f"--enable-lora --max-lora-rank {served.rank}",
        f'--lora-modules {served.name}="$PWD"',
        f"--chat-template {served.template}" if served.template else "",
    )


def _start_merged(served: Served) -> str:
    template = f"--chat-template {served.template}" if served.template else ""
    return command_line(f'vllm serve "$PWD" --served-model-name {served.name}', template)


VLLM = Server(
    name="vLLM",
    port=8000,
    parts="vllm/lora/peft_helper.py",
    layers="vllm/lora/model_manager.py takes layers that an adapter lacks, too",
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    rank_source="vllm/config/lora.py: one of 1, 8, 16, 32, 64, 128, 256, 320, 512; older releases have no 1 and 320",
    start_adapter=_start_adapter,
    start_merged=_start_merged,
)


@EXPORTERS.register("vllm", weights="either")
def export_vllm(source: ExportSource, argument: str, folder: Path, progress: Progress) -> Export:
    """A folder for vLLM: the adapter at a scale of 1, or the merged model where vLLM does not take the adapter."""
    return export_for_server(VLLM, source, folder, progress)
