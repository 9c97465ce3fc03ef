"""What `auto` needs to know of a base model, from its config.json or a table, without loading or fetching anything."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.model.offline import CARRIERS
from lorakit.model.stored import Stored, quantization_in


@dataclass(frozen=True)
class ModelFacts:
    """The sizes of a model, in the field's names; None where its config does not say."""

    model_type: str
    hidden_size: int
    layers: int | None = None
    intermediate_size: int | None = None
    query_size: int | None = None
    key_value_size: int | None = None
    heads: int | None = None
    vocabulary_size: int | None = None
    tied: bool | None = None
    """Whether embeddings and output head are one; None leaves it to the family."""
    attention_bias: bool = False
    mlp_bias: bool = False
    stored: Stored | None = None
    """The quantization that the checkpoint has already."""

    @property
    def attention_at(self) -> float:
        """The length in tokens at which causal attention costs as much as a layer's matrix products; endless where the
        sizes are not known."""
        if not self.query_size or not self.intermediate_size:
            return math.inf
        products = 2 * self.query_size + 2 * (self.key_value_size or 0) + 3 * self.intermediate_size
        return self.hidden_size * products / self.query_size


def facts_of(base: str, revision: str) -> ModelFacts | None:
    """The facts of a recipe's base model, or None when it is not on this machine yet."""
    folder = Path(base) if Path(base).is_absolute() else _hub_snapshot(base, revision)
    if folder is not None and (folder / "config.json").is_file():
        return facts_in(folder)
    carrier = CARRIERS.get(base)
    if carrier is None:
        return None
    return ModelFacts(
        model_type=carrier.model_type,
        hidden_size=carrier.hidden_size,
        layers=carrier.layers,
        intermediate_size=carrier.intermediate_size,
        query_size=carrier.query_size,
        key_value_size=carrier.key_value_size,
        vocabulary_size=carrier.vocabulary_size,
        tied=carrier.tied,
    )


def facts_in(folder: Path) -> ModelFacts | None:
    """The facts in a model folder's config.json; None when the file names no hidden size."""
    try:
        whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    config = whole.get("text_config") or whole
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    if not isinstance(hidden, int):
        return None
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    head = config.get("head_dim") or hidden // heads
    return ModelFacts(
        model_type=str(config.get("model_type", "unknown")),
        hidden_size=hidden,
        layers=_whole(config.get("num_hidden_layers") or config.get("n_layer")),
        intermediate_size=_whole(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden),
        query_size=heads * head,
        key_value_size=(config.get("num_key_value_heads") or heads) * head,
        heads=_whole(heads),
        # A model with a text part has other parts too, of whose sizes nothing is known here.
        vocabulary_size=_whole(config.get("vocab_size")) if config is whole else None,
        tied=config.get("tie_word_embeddings"),
        attention_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
        stored=quantization_in(whole),
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _hub_snapshot(name: str, revision: str) -> Path | None:
    """The folder of a hub model in the hub's own cache (its layout: models--ORG--NAME/refs and /snapshots)."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repository = hub / ("models--" + name.replace("/", "--"))
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    folder = repository / "snapshots" / commit
    return folder if folder.is_dir() else None
