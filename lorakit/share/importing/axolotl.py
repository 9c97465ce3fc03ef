"""Axolotl: its YAML config (axolotl/utils/schemas/, core/builders/base.py and utils/config of its repository)."""

from typing import Any

from lorakit.share.importing import training
from lorakit.share.importing.axolotl_data import import_datasets
from lorakit.share.importing.axolotl_keys import KEYS as KEYS
from lorakit.share.importing.base_model import (
    added_tokens,
    base_model,
    default_targets,
    lora_kind,
    quantization,
    remote_code,
)
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.source import as_flag, as_number
from lorakit.share.importing.special_tokens import special_tokens
from lorakit.share.importing.verdicts import shown

NAME = "Axolotl"
MARKS = """
    base_model micro_batch_size sequence_len num_epochs datasets adapter val_set_size lora_target_linear
    sample_packing dataset_prepared_path train_on_inputs lora_model_dir pad_to_sequence_len load_in_8bit
    saves_per_epoch evals_per_epoch pretraining_dataset strict"""
NEEDED = "base_model"

_PARTIAL = "Remove it, or import with --partial to train without it."
_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"}
_LINEAR |= {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2", "c_attn", "c_proj", "c_fc"}


_HARMLESS_PLUGINS = """
    axolotl.integrations.swanlab.SwanLabPlugin
    axolotl.integrations.liger.LigerPlugin axolotl.integrations.liger.plugin.LigerPlugin
    axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin axolotl.integrations.kernels.KernelsPlugin
    axolotl.integrations.lm_eval.LMEvalPlugin axolotl.integrations.liger axolotl.integrations.cut_cross_entropy"""
_TRACKERS = {
    "tensorboard": ("use_tensorboard", "", {}),
    "wandb": ("use_wandb", "wandb_project", {"project": "wandb_project", "entity": "wandb_entity"}),
    "mlflow": ("use_mlflow", "mlflow_experiment_name", {"experiment": "mlflow_experiment_name"}),
    "trackio": (
        "use_trackio",
        "trackio_project_name",
        {"project": "trackio_project_name", "space": "trackio_space_id"},
    ),
}
"""Tracker -> Axolotl's switch, the key that turns it on too, and our settings with Axolotl's names."""


def convert(c: Conversion) -> None:
    """Read every key that has a counterpart."""
    base_model(c, "base_model", "model_revision" if c.has("model_revision") else "revision_of_model")
    remote_code(c, "trust_remote_code")
    training.number_format(c, "bf16", "fp16", _default_format(c), _more_formats(c))
    _quantization(c)
    _attention(c)
    _adapter(c)
    _length(c)
    import_datasets(c)
    training.run_length(c, "num_epochs", 1.0)
    _batch(c)
    training.learning_rate(c, "learning_rate", None)
    training.schedule(c, "lr_scheduler", "cosine")
    ratio = "warmup_steps" if c.has("warmup_steps") else "warmup_ratio"  # steps of 0 decide there too
    training.warmup(c, "warmup_steps", ratio, 0.03)
    c.ignore("warmup_ratio" if c.has("warmup_steps") else (), "warmup_steps decides")
    training.optimizer(c, "optimizer", "adamw_torch_fused")
    c.map("train.weight_decay", float(c.number("weight_decay", 0.0)), "weight_decay")
    c.map("train.max_grad_norm", float(c.number("max_grad_norm", 1.0)), "max_grad_norm")
    training.adam(c)
    _least_rate(c)
    c.map("train.seed", c.whole("seed", 42), "seed")
    training.gradient_checkpointing(c, "gradient_checkpointing")
    training.sharding(c)
    _evaluation(c)
    training.best_model(c)
    if c.flag("dataset_exact_deduplication"):
        c.map("data.clean", {"duplicates": "fix"}, "dataset_exact_deduplication")
    c.map("output.dir", c.text("output_dir", "./model-out"), "output_dir")


def _least_rate(c: Conversion) -> None:
    key = "cosine_min_lr_ratio"
    share = c.number(key)
    if share is None:
        return
    if str(c.value("lr_scheduler", "cosine")) != "cosine":
        c.ignore(key, "it goes with cosine alone")
    elif 0 <= share < 1:
        c.map("train.min_rate", float(share), key)
    else:
        c.refuse(key, "the rate would not fall", "Write lr_scheduler: constant_with_warmup, or a share below 1.")


def _default_format(c: Conversion) -> str:
    """What Axolotl takes where no format is on: bf16 is auto, and off only where it is written."""
    if c.has("bf16") and as_flag(c.value("bf16")) is False:
        return "float16" if c.flag("load_in_8bit") else "float32"
    return "auto"


def _more_formats(c: Conversion) -> dict[str, str]:
    return {key: word for key, word in _FORMATS.items() if c.has(key)}


_FORMATS = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}


def _quantization(c: Conversion) -> None:
    kwargs = c.value("bnb_config_kwargs", {})
    kind = str(kwargs.get("bnb_4bit_quant_type", "nf4")) if isinstance(kwargs, dict) else "nf4"
    double = kwargs.get("bnb_4bit_use_double_quant", True) if isinstance(kwargs, dict) else True
    four, backend = "load_in_4bit", str(c.value("peft.backend", "bnb"))
    weights = str(c.value("peft.weight_dtype", ""))
    if weights and backend == "bnb" and not c.has("load_in_4bit") and not c.has("load_in_8bit"):
        c.map("model.quantization", {"nf4": "nf4", "int8": "q8"}.get(weights, "none"), "peft.weight_dtype")
        c.ignore("peft.backend", "bitsandbytes, as here")
        return
    if backend == "torchao":
        c.refuse("peft.backend peft.weight_dtype", "lorakit quantizes with bitsandbytes", "Write load_in_4bit: true.")
    c.ignore("peft.backend", "bitsandbytes, as here")
    quantization(c, four, "load_in_8bit", kind, (bool(double), "bnb_config_kwargs.bnb_4bit_use_double_quant"))
    c.ignore("bnb_config_kwargs.bnb_4bit_quant_type", "model.quantization says it")
    c.ignore("bnb_config_kwargs.llm_int8_has_fp16_weight", "lorakit keeps int8 weights alone")


def _attention(c: Conversion) -> None:
    switches = {
        "flash_attention": "flash_attention_2",
        "sdp_attention": "sdpa",
        "eager_attention": "eager",
        "flex_attention": "flex_attention",
        "xformers_attention": "auto",
    }
    on = [key for key in switches if c.has(key) and c.flag(key)]
    note = "the result is the same with each"
    if c.has("attn_implementation"):
        training.attention(c, "attn_implementation")
    elif on:
        c.map("model.attention", switches[on[0]], on[0], note)
    c.ignore([key for key in switches if key not in on[:1]], "attention does not change the result")


def _adapter(c: Conversion) -> None:
    kind = str(c.value("adapter", "")).lower()
    if kind not in ("lora", "qlora"):
        if kind in ("", "none", "null"):
            c.map("adapter.kind", "none", "adapter", "no adapter: the source trains all weights")
            lora = [key for key in c.config.tree if key.startswith(("lora_", "peft_"))]
            c.ignore([key for key in lora if key != "lora_model_dir"], "adapter is not set: there is no adapter")
        else:
            c.refuse("adapter", f"lorakit has no {kind}", "Write adapter: lora.")
        return
    is_quantized = c.flag("load_in_4bit") or c.has("gptq") or c.has("peft.weight_dtype")
    if kind == "qlora" and not is_quantized:
        c.refuse("adapter", "Axolotl's qlora needs load_in_4bit", "Write load_in_4bit: true, or adapter: lora.")
    if c.has("lora_model_dir"):
        c.refuse(
            "lora_model_dir",
            "lorakit goes on with an adapter by adapter.from, which brings its rank and modules with it",
            "Remove it here, and write adapter: {from: DIR} in the recipe instead of its other keys.",
        )
    for key, ours in (("lora_r", "adapter.rank"), ("lora_alpha", "adapter.alpha")):
        if c.has(key):
            c.map(ours, c.whole(key), key)
        else:
            c.refuse(key, "Axolotl needs it", f"Write {key}.")
    c.map("adapter.dropout", float(c.number("lora_dropout", 0.0)), "lora_dropout")
    _initialization(c)
    chosen = c.recipe.get("adapter.kind", "lora")
    c.account("adapter", "same" if chosen == "lora" else "mapped", to=f"adapter.kind: {shown('adapter.kind', chosen)}")
    _targets(c)
    if c.has("lora_modules_to_save"):
        c.map("adapter.train_modules", _list(c.value("lora_modules_to_save")), "lora_modules_to_save")
    if c.has("peft_layers_to_transform"):
        layers = c.value("peft_layers_to_transform")
        c.map("adapter.layers", layers if isinstance(layers, list) else [layers], "peft_layers_to_transform")
    for theirs, ours in (
        ("lora_rank_pattern", "adapter.rank_overrides"),
        ("lora_alpha_pattern", "adapter.alpha_overrides"),
    ):
        if isinstance(c.value(theirs), dict):
            c.map(ours, dict(c.value(theirs)), theirs)
    ratio = c.number("loraplus_lr_ratio")
    if ratio and ratio > 1:
        c.map("train.lora_plus", float(ratio), "loraplus_lr_ratio")
    else:
        c.ignore("loraplus_lr_ratio", "B learns as A does")


def _initialization(c: Conversion) -> None:
    start = c.value("peft_init_lora_weights", True)
    word = str(start).lower()
    kinds: dict[str, Any] = {"pissa": {"pissa": {"iterations": None}}, "olora": "olora", "eva": "eva"}
    iterations = as_number(word.removeprefix("pissa_niter_"))
    if word.startswith("pissa_niter_") and isinstance(iterations, int):
        kinds[word] = {"pissa": {"iterations": iterations}}
    if c.has("peft.loftq_config"):
        c.map("adapter.kind", "loftq", "peft.loftq_config.loftq_bits")
        if as_number(c.value("peft.loftq_config.loftq_bits", 4)) != 4:
            c.refuse("peft.loftq_config.loftq_bits", "lorakit's LoftQ has 4 bits", "Write 4.")
    elif word in kinds:
        c.map("adapter.kind", kinds[word], "peft_init_lora_weights")
    elif start is not True and word != "true":
        c.refuse("peft_init_lora_weights", "lorakit begins with A random and B zero, pissa, olora or eva", _PARTIAL)
    else:
        c.ignore("peft_init_lora_weights", "A random and B zero, as here")
    lora_kind(
        c,
        {
            "dora": (c.flag("peft_use_dora"), "peft_use_dora"),
            "rslora": (c.flag("peft_use_rslora"), "peft_use_rslora"),
        },
    )


def _targets(c: Conversion) -> None:
    written = c.value("lora_target_modules")
    names = written if isinstance(written, list) else None
    if c.flag("lora_target_linear"):
        extra = sorted({str(name) for name in names or []} - _LINEAR)
        if extra or isinstance(written, str):
            what = "all linear modules and others besides cannot be named together"
            c.refuse("lora_target_modules", what, "Name all modules there, without lora_target_linear.")
        c.map("adapter.targets", "all-linear", "lora_target_linear lora_target_modules")
    elif written:
        c.map("adapter.targets", [str(name) for name in names] if names else written, "lora_target_modules")
        c.ignore("lora_target_linear", "it is off")
    else:
        c.ignore("lora_target_linear", "it is off")
        if targets := default_targets(c, "lora_target_modules"):
            c.map("adapter.targets", targets, "lora_target_modules", "PEFT's choice for this family")


def _length(c: Conversion) -> None:
    c.map("data.max_length", c.whole("sequence_len", 512), "sequence_len")
    strategy = str(c.value("excess_length_strategy", "drop"))
    words = {"drop": "drop", "truncate": "truncate", "raise": "error"}
    if strategy not in words:
        c.refuse("excess_length_strategy", "it is none of drop, truncate and raise", "Write one of them.")
    note = "lorakit keeps the turns that fit whole, Axolotl cuts at the token" if strategy == "truncate" else ""
    c.map("data.overlong", words.get(strategy, "drop"), "excess_length_strategy", note)


def _batch(c: Conversion) -> None:
    packs = c.flag("sample_packing")
    if c.has("batch_size") and not c.has("gradient_accumulation_steps"):
        total, rows = c.whole("batch_size"), c.whole("micro_batch_size", 1)
        if isinstance(total, int) and isinstance(rows, int) and rows > 0 and total >= rows:
            c.config.tree["gradient_accumulation_steps"] = total // rows
            training.batch_size(c, *_BATCH, "sample_packing" if packs else "")
            del c.config.tree["gradient_accumulation_steps"]
            c.accounts.pop("gradient_accumulation_steps", None)
            c.account("batch_size", "mapped", to="train.batch_size")
            return
    training.batch_size(c, *_BATCH, "sample_packing" if packs else "")
    c.map("data.packing", "on" if packs else "auto", "sample_packing", "rows never see each other, packed or not")


_BATCH = ("micro_batch_size", "gradient_accumulation_steps", 1, 1)


def _evaluation(c: Conversion) -> None:
    if not (c.has("test_datasets") or training.held_out_share(c, "val_set_size")):
        c.ignore("eval_steps evals_per_epoch eval_strategy evaluation_strategy", "there are no held-out rows")
    elif c.has("test_datasets"):
        c.ignore("val_set_size", "test_datasets are the held-out rows")
        c.note(training.BEST_NOTE)
    _trackers(c)
    _every(c, "train.eval_every", "evals_per_epoch", "eval_steps", "eval_strategy evaluation_strategy", "no")
    _every(c, "train.save_every", "saves_per_epoch", "save_steps", "save_strategy", "epoch")
    if limit := c.whole("save_total_limit"):
        c.map("train.keep", limit, "save_total_limit")
    if (rows := c.whole("eval_table_size")) and "data.eval" in c.recipe:
        c.map("evaluate.samples", min(rows, 100), "eval_table_size")
    patience = c.whole("early_stopping_patience")
    if patience and ("data.eval" in c.recipe):
        c.map("train.early_stopping", {"patience": patience}, "early_stopping_patience")
    else:
        c.ignore("early_stopping_patience", "there are no held-out rows to measure")


def _trackers(c: Conversion) -> None:
    """Trackers, which Axolotl turns on by a switch or by naming a project; a server comes from the environment here."""
    entries: list[Any] = []
    keys: list[str] = []
    for name, (switch, project, others) in _TRACKERS.items():
        if not c.flag(switch, bool(project and c.text(project))):
            continue
        named = {ours: theirs for ours, theirs in others.items() if c.text(theirs)}
        settings = {ours: c.text(theirs) for ours, theirs in named.items()}
        entries.append({name: settings} if settings else name)
        keys += [switch, *named.values()]
    if entries:
        c.map("track", entries, keys)


def _every(c: Conversion, ours: str, per_epoch: str, steps_key: str, strategies: str, default: str) -> None:
    keys = [key for key in strategies.split() if c.has(key)]
    times, epochs = c.number(per_epoch), c.settled.get("train.epochs")
    if ours == "train.eval_every" and "data.eval" not in c.recipe:
        return
    if times and times > 0:
        share = 1 / (times * epochs) if epochs else 0
        if 0 < share < 1:
            c.map(ours, round(share, 6), per_epoch, f"{times:g} times an epoch")
        else:
            c.ignore(per_epoch, "once at the end, which lorakit does anyway")
        c.ignore([steps_key, *keys], f"{per_epoch} decides")
        return
    c.ignore(per_epoch, "it is off")
    steps = c.number(steps_key)
    strategy = "steps" if steps else str(c.value(keys[0])).lower() if keys else default
    if steps or keys:
        training.interval(c, ours, strategy, steps, [steps_key, *keys], None)


def _list(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def settle_rest(c: Conversion) -> None:
    """Keys whose value decides: plugins for speed alone, and special tokens."""
    plugins = c.value("plugins")
    if plugins and all(str(plugin) in _HARMLESS_PLUGINS.split() for plugin in _list(plugins)):
        c.ignore("plugins", "kernels for speed, trackers, or scores after training: the result is the same")
    base = str(c.value("base_model", ""))
    if str(c.value("tokenizer_config", base)) == base:
        c.ignore("tokenizer_config", "it is the base's own tokenizer")
    if isinstance(c.value("tokens"), list):
        added_tokens(c, {"tokens": _list(c.value("tokens"))})
    for key in ("special_tokens", "tokens"):  # `tokens` was a mapping in earlier versions
        special_tokens(c, key)
