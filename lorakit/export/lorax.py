"""`lorax`: a folder that LoRAX serves, as an adapter on its base where LoRAX takes it."""

from pathlib import Path
from typing import Any

from lorakit.export.serving import Served, Server, export_for_server
from lorakit.export.source import Export, ExportSource
from lorakit.progress import Progress
from lorakit.registry import EXPORTERS


def _start_adapter(served: Served) -> str:
    return f"lorax-launcher --model-id {served.base} --port 8080"


def _start_merged(served: Served) -> str:
    return 'lorax-launcher --model-id "$PWD" --port 8080'


def _request(served: Served) -> dict[str, Any]:
    return {"model": "$PWD", "adapter_source": "local"}


LORAX = Server(
    name="LoRAX",
    port=8080,
    parts="server/lorax_server/adapters/lora.py",
    layers="server/lorax_server/adapters/lora.py drops a type that a layer lacks",
    # It pads other ranks itself, and then divides alpha by the padded rank from the second type of layers on.
    ranks=(16, 32, 64, 128),
    rank_source="server/lorax_server/utils/sgmv.py: kernels for 16, 32, 64 and 128",
    pads=True,
    modules=frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    module_source="docs/models/adapters: of models like Llama; others are left out without an error",
    start_adapter=_start_adapter,
    start_merged=_start_merged,
    request=_request,
    stop_words=True,
    note=(
        "LoRAX loads the adapter with the first request that names its folder, and takes the chat template from it. In "
        "a container the folder has to have the same path. The options are those of LoRAX's documentation; lorakit's "
        "tests do not run LoRAX."
    ),
)


@EXPORTERS.register("lorax", weights="either")
def export_lorax(source: ExportSource, argument: str, folder: Path, progress: Progress) -> Export:
    """A folder for LoRAX: the adapter at a scale of 1, or the merged model where LoRAX does not take the adapter."""
    return export_for_server(LORAX, source, folder, progress)
