"""What a training leaves: the folder of the adapter, or of the whole model where there is none."""

from typing import Any

from lorakit.atomic_io import atomic_dir, files_in, sha256_of
from lorakit.model.adapters.plain_lora import save_adapter
from lorakit.model.companion_files import write_tokenizer, write_trained_model
from lorakit.model.load import DTYPES, stored_dtype
from lorakit.prepare import Prepared
from lorakit.recipe.adapter_kind import trains_all
from lorakit.run_dir import Run
from lorakit.train.card import adapter_card, model_card
from lorakit.train.setup import TrainingState


def save_result(begun: TrainingState, prepared: Prepared, run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the adapter with the tokenizer it was trained with and a card, or the model. The sha256 of its weights.

    A whole model is rounded to the type in which its base lies on disk.
    """
    recipe, model = prepared.recipe, begun.model
    if trains_all(recipe.adapter):
        with atomic_dir(run.model) as draft:
            model.to(DTYPES[stored_dtype(prepared.base)])
            model.config = begun.config
            write_trained_model(model, prepared.base.folder, prepared.tokenizer, prepared.stop_ids, draft)
            (draft / "README.md").write_text(model_card(recipe, manifest), encoding="utf-8")
        files = [*run.model.glob("*.safetensors"), run.model / "config.json"]
        return {
            "model_sha256": {path.name: sha256_of(path) for path in sorted(files)},
            "files": files_in(run.model),
        }
    with atomic_dir(run.adapter) as draft:
        save_adapter(model, draft)
        write_tokenizer(prepared.base.folder, prepared.tokenizer, draft)
        (draft / "README.md").write_text(adapter_card(recipe, manifest), encoding="utf-8")
    return {
        "files": files_in(run.adapter),
        "adapter_sha256": sha256_of(run.adapter / "adapter_model.safetensors"),
        "adapter_config_sha256": sha256_of(run.adapter / "adapter_config.json"),
    }
