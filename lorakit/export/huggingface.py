"""`huggingface`: the adapter or the merged model with a model card, as `lorakit push` sends it to the hub."""

from pathlib import Path

from lorakit.export.source import Export, ExportSource
from lorakit.progress import Progress
from lorakit.registry import EXPORTERS


@EXPORTERS.register("huggingface", weights="either", arguments=("adapter", "merged"), default="")
def export_huggingface(source: ExportSource, argument: str, folder: Path, progress: Progress) -> Export:
    """The adapter, or with `:merged` the whole model, and its model card, as the hub wants them."""
    from lorakit.atomic_io import files_in, sha256_of
    from lorakit.errors import UserError
    from lorakit.export import hub_folder
    from lorakit.export.hub_card import CardSubject, merge_check, write_card
    from lorakit.model.config_values import read_json

    if argument == "adapter" and source.adapter is None:
        raise UserError(f"{source.folder}: has no adapter. Write huggingface:merged for the model.")
    is_adapter = source.adapter is not None and argument != "merged"
    if is_adapter:
        hub_folder.copy_adapter(source, folder)
    else:
        hub_folder.copy_model(source.merged_model, folder)
    weights = {sha256_of(folder / name) for name in files_in(folder) if name.endswith(".safetensors")}
    subject = CardSubject(source, "adapter" if is_adapter else "merged", weights)
    adapter = read_json(folder / hub_folder.ADAPTER_CONFIG) if is_adapter else {}
    hub_folder.remove_local_names(subject, folder, adapter)
    checks = [
        *([] if is_adapter else filter(None, [merge_check(subject)])),
        hub_folder.check_weights(subject, folder),
        hub_folder.check_tokenizer(source, folder),
        hub_folder.check_base(subject),
        hub_folder.check_private(subject, folder),
    ]
    card = write_card(subject, adapter, tuple(checks))
    return Export({"weights": subject.weights, "base_model": subject.base_id}, tuple(checks), card, is_card=True)
