"""Unsloth: the YAML or JSON config of its command line (unsloth_cli/config.py of its repository)."""

from typing import Any

from lorakit.share.importing import training
from lorakit.share.importing.base_model import base_model, lora_kind
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.data_sources import ImportedSource, write_sources, write_training
from lorakit.share.importing.paths import local_path, remote_reason
from lorakit.share.importing.prompts import UNSLOTH_ALPACA, template_format, write_plain_template
from lorakit.share.importing.row_format import peek_format
from lorakit.share.importing.verdicts import ByFunction, Harmless, OffOnly, keys_with

NAME = "Unsloth"
MARKS = "model data training lora logging"
NEEDED = "model"

_LORA = "lora.lora_r lora.lora_alpha lora.lora_dropout lora.target_modules lora.use_rslora lora.use_loftq lora.use_dora"
_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
_FORMATS = {
    "auto": None,
    "chatml": "messages",
    "conversational": "messages",
    "sharegpt": "sharegpt",
    "raw": "text",
    "alpaca": "alpaca",
}


def convert(c: Conversion) -> None:
    """Read every key that has a counterpart."""
    base_model(c, "model")
    c.map("model.dtype", "auto")
    is_full = str(c.value("training.training_type", "lora")).lower() == "full"
    _adapter(c, is_full)
    _quantization(c, is_full)
    c.map("data.max_length", c.whole("training.max_seq_length", 2048), "training.max_seq_length")
    c.map("data.overlong", "truncate", note="lorakit keeps the turns that fit whole; Unsloth cuts at the token")
    _data(c)
    training.run_length(c, "training.num_epochs", 3, "training.max_steps")
    packs = c.flag("training.packing")
    rows = ("training.batch_size", "training.gradient_accumulation_steps", 2, 4)
    training.batch_size(c, *rows, "training.packing" if packs else "")
    note = "rows never see each other, packed or not"
    c.map("data.packing", "on" if packs else "auto", "training.packing", note)
    training.learning_rate(c, "training.learning_rate", 2e-4)
    training.schedule(c, "training.lr_scheduler_type", "linear")
    training.warmup(c, "training.warmup_steps", "training.warmup_ratio", 5)
    training.optimizer(c, "training.optim", "adamw_8bit")
    c.map("train.weight_decay", float(c.number("training.weight_decay", 0.01)), "training.weight_decay")
    c.map("train.seed", c.whole("training.random_seed", 3407), "training.random_seed")
    training.gradient_checkpointing(c, "training.gradient_checkpointing")
    steps = c.whole("training.save_steps", 0)
    if steps and steps > 0:
        c.map("train.save_every", steps, "training.save_steps")
    else:
        c.ignore("training.save_steps", "0 leaves it to the trainer; it does not change the result")
    if c.has("training.output_dir"):
        c.map("output.dir", c.text("training.output_dir"), "training.output_dir")


def _adapter(c: Conversion, is_full: bool) -> None:
    if is_full:
        c.map("adapter.kind", "none", "training.training_type")
        c.ignore(_LORA, "training_type is full: there is no adapter")
        return
    c.ignore("training.training_type", "lora, as here")
    c.map("adapter.rank", c.whole("lora.lora_r", 64), "lora.lora_r")
    c.map("adapter.alpha", c.number("lora.lora_alpha", 16), "lora.lora_alpha")
    c.map("adapter.dropout", float(c.number("lora.lora_dropout", 0.0)), "lora.lora_dropout")
    modules = c.value("lora.target_modules", _TARGETS)
    names = modules if isinstance(modules, list) else str(modules).split(",")
    names = [str(name).strip() for name in names if str(name).strip()]
    c.map("adapter.targets", "all-linear" if names in ([], ["all-linear"]) else names, "lora.target_modules")
    on = {kind: (c.flag(f"lora.use_{kind}"), f"lora.use_{kind}") for kind in ("rslora", "loftq", "dora")}
    lora_kind(c, on)


def _quantization(c: Conversion, is_full: bool) -> None:
    key = "training.load_in_4bit"
    if is_full:
        c.ignore(key, "training_type is full: the base is not quantized")
    elif c.recipe.get("adapter.kind") == "loftq":
        c.account(key, "mapped", to="adapter.kind: loftq", reason="loftq quantizes the base to nf4 itself")
    else:
        c.map("model.quantization", "nf4" if c.flag(key, True) else "none", key)


def _data(c: Conversion) -> None:
    local, hub = c.value("data.local_dataset"), c.value("data.dataset")
    key = "data.local_dataset" if local else "data.dataset"
    names = (
        [str(one) for one in (local if isinstance(local, list) else [local])] if local else [str(hub)] if hub else []
    )
    if not names:
        c.refuse("data.dataset", "Unsloth needs it", "Write the rows to train on.")
        return
    if local and hub:
        c.ignore("data.dataset", "data.local_dataset decides")
    if reason := next((reason for name in names if (reason := remote_reason(name))), ""):
        c.refuse(key, reason, "Download its files, and write their path.")
        return
    sources = [ImportedSource(local_path(c, name, bool(local))) for name in names]
    word = str(c.value("data.format_type", "auto")).lower()
    if word not in _FORMATS:
        c.refuse("data.format_type", f"{word} is none of Unsloth's formats", f"Write one of {', '.join(_FORMATS)}.")
    form = c.row_format or _FORMATS.get(word)
    for source in sources:
        source.format = form or peek_format(source.path)
        source.is_text = source.format == "text"
        source.trains = "assistant" if c.flag("training.train_on_completions") else "all"
    if word in _FORMATS:
        c.account("data.format_type", "mapped", to=f"format: {form or 'auto'}")
    if all(source.format == "alpaca" for source in sources):
        write_plain_template(c, "data.format_type" if c.has("data.format_type") else key)
        for source in sources:
            source.format = template_format(UNSLOTH_ALPACA)
    elif any(source.format == "alpaca" for source in sources):
        reason = "Unsloth writes Alpaca rows as plain text, others through the chat template, and a recipe has one"
        c.refuse("data.format_type", reason, "Import them one at a time.")
    elif any(source.format is None for source in sources):
        reason = "Unsloth looks at the rows, writes conversations through the chat template and others as plain text"
        c.refuse(
            key, f"{reason}; which these are is not known here", "Give --format messages, sharegpt, alpaca or text."
        )
    c.account(key, "mapped", to="data.train")
    write_sources(c, "data.train", sources, [key], key)
    write_training(c, sources, ["training.train_on_completions"])


def settle_rest(c: Conversion) -> None:
    """Nothing is left to decide by values."""


KEYS: dict[str, Any] = {
    **keys_with(
        Harmless("lorakit logs every step into log.jsonl; track in a recipe names the trackers that get it too"),
        """
        logging.enable_wandb logging.wandb_project logging.enable_tensorboard logging.tensorboard_dir
        logging.log_frequency training.eval_steps training.vision_image_size""",
    ),
    **keys_with(
        Harmless("tokens are not copied: lorakit takes them from the environment alone"),
        "logging.wandb_token logging.hf_token",
    ),
    **keys_with(
        OffOnly("lorakit trains text alone", "Import a config for a text model."),
        "lora.vision_all_linear audio_type audio_input is_embedding",
    ),
    **keys_with(
        Harmless("it is about models that see: a text model's modules are lora.target_modules"),
        """
        lora.finetune_vision_layers lora.finetune_language_layers lora.finetune_attention_modules
        lora.finetune_mlp_modules""",
    ),
    **keys_with(
        OffOnly("lorakit trains on answers (supervised fine-tuning) and nothing else", "Import a config without it."),
        "rl",
    ),
    **keys_with(
        OffOnly("lorakit has one learning rate", "Remove it, or import with --partial."),
        "training.embedding_learning_rate",
    ),
    **keys_with(
        ByFunction("it is off"),
        f"""
        model data training lora logging data.dataset data.local_dataset data.format_type training.training_type
        training.max_seq_length training.load_in_4bit training.output_dir training.num_epochs training.learning_rate
        training.batch_size training.gradient_accumulation_steps training.warmup_steps training.max_steps
        training.save_steps training.weight_decay training.random_seed training.packing
        training.train_on_completions training.gradient_checkpointing training.optim training.lr_scheduler_type
        training.warmup_ratio {_LORA}""",
    ),
}
