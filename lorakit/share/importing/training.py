"""What the tools share, since all of them stand on transformers' Trainer: batches, length, schedule, optimizer,
evaluation and saving, and the number formats. The words are those of transformers' TrainingArguments."""

import json
import re
from collections.abc import Mapping
from typing import Any

from lorakit.amounts import counted
from lorakit.registry import TRACKERS
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.paths import find_local, remote_reason
from lorakit.share.importing.source import as_flag, as_number
from lorakit.share.importing.verdicts import ByFunction, OffOnly, keys_with

SCHEDULES = {
    "cosine": ("cosine", ""),
    "cosine_with_restarts": ("cosine", "with one cycle it is plain cosine"),
    "linear": ("linear", ""),
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""),
}
"""transformers' SchedulerType -> ours, with a note."""
_NO_SCHEDULE = "lorakit's schedules are cosine and linear, down to 0 or a share of the peak, and constant"

OPTIMIZERS = {
    "adamw": "adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused adamw_torch_xla adamw_torch_npu_fused adamw "
    "adamw_anyprecision",
    "adamw-8bit": "adamw_bnb_8bit adamw_8bit",
    "paged-adamw": "paged_adamw paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}
_OPTIMIZERS = {theirs: ours for ours, words in OPTIMIZERS.items() for theirs in words.split()}
_TORCHAO = {"adamw_torch_8bit": "adamw-8bit", "ao_adamw_8bit": "adamw-8bit"}

ATTENTIONS = {
    "eager": "eager",
    "sdpa": "sdpa",
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
    "flex_attention": "flex_attention",
    "auto": "auto",
}
_ROUNDED_ATTENTION = ("sage", "fp8")  # they compute in fewer bits
_WARMUP_NOTE = "lorakit's warm-up begins above zero, transformers' at zero: a step's difference"
_SPLIT_NOTE = "which rows are held out differs: lorakit splits by a hash of each row's content"
BEST_NOTE = (
    "With held-out rows lorakit's adapter is the checkpoint of the lowest held-out loss; tools without "
    "load_best_model_at_end keep the last step's."
)

TRAINER_OFF = OffOnly("lorakit has nothing for it", "Remove it, or import with --partial to train without it.")
OPTIMIZER_KEYS: dict[str, Any] = {
    **keys_with(ByFunction("AdamW's own"), "adam_beta1 adam_beta2 adam_epsilon"),
    **keys_with(
        OffOnly("lorakit's AdamW has betas, epsilon and weight decay", "Remove it, or import with --partial."),
        "adam_beta3 adam_epsilon2 optim_args",
    ),
}


def batch_size(c: Conversion, rows_key: str, steps_key: str, rows: int, steps: int, packing: str = "") -> None:
    """Rows of a device x accumulation steps x devices -> `train.batch_size`; `packing` is the key by which rows are
    packs, of which a batch then counts each as one row."""
    per_device, accumulated = c.whole(rows_key, rows), c.whole(steps_key, steps)
    if not (isinstance(per_device, int) and isinstance(accumulated, int) and per_device > 0 and accumulated > 0):
        for key, number in ((rows_key, per_device), (steps_key, accumulated)):
            if not isinstance(number, int) or number < 1:
                c.refuse(key, "it is not a whole number above 0", "Write how many rows, or how many steps.")
        return
    devices = counted(c.devices, "device")
    note = f"{per_device} a device x {accumulated} accumulated x {devices} (--devices)"
    rows_a_step = per_device * accumulated * c.devices
    if packing and not c.rows_per_pack:
        _tokens_of_packs(c, rows_a_step, [rows_key, steps_key], note)
        return
    if packing:
        rows_a_step *= c.rows_per_pack or 1
        note += f" x {c.rows_per_pack} rows a pack (--rows-per-pack)"
    c.map("train.batch_size", rows_a_step, [rows_key, steps_key], note)


def _tokens_of_packs(c: Conversion, packs: int, keys: list[str], note: str) -> None:
    """A step of packs by the tokens that they hold: packs are nearly full, and rows are not counted there."""
    length = c.settled.get("data.max_length")
    if length is None:
        c.refuse(keys, "a step is so many packs, and how long they are is not known", "Write the maximal length.")
        return
    c.map("train.batch_tokens", packs * length, keys, f"{note} x {length} tokens a pack, taken as full")
    c.settled["train.batch_size"] = None


def run_length(c: Conversion, epochs_key: str, epochs: float, steps_key: str = "max_steps") -> None:
    """Epochs, or steps where they are above 0, which then count alone."""
    steps = c.whole(steps_key, 0)
    if isinstance(steps, int) and steps > 0:
        c.map("train.steps", steps, steps_key)
        c.ignore(epochs_key, f"{steps_key} decides how long the run is")
        return
    c.ignore(steps_key, f"{steps} switches it off")
    number = c.number(epochs_key, epochs)
    if not number or number <= 0:
        c.refuse(epochs_key, "it is not above 0, so that nothing would be trained", "Write how many epochs.")
        return
    c.map("train.epochs", int(number) if number == int(number) else number, epochs_key)


def schedule(c: Conversion, key: str, default: str, kwargs: str = "lr_scheduler_kwargs") -> None:
    """How the learning rate falls."""
    word = str(c.text(key, default)).lower().removeprefix("schedulertype.")
    settings = _kwargs(c, kwargs)
    ours, note = SCHEDULES.get(word, ("", ""))
    least = _least_share(c, word, settings)
    if word == "cosine_with_min_lr" and least is not None:
        ours = "cosine"
        names = [f"{kwargs}.{name}" for name in ("min_lr_rate", "min_lr") if name in settings]
        c.map("train.min_rate", least, names if isinstance(c.value(kwargs), dict) else [kwargs])
    if word == "polynomial" and as_number(settings.get("power", 1)) == 1:
        ours, note = "linear", "with the power 1 it is linear, down to 1e-7 instead of 0"
    if not ours:
        c.refuse(key, f"{_NO_SCHEDULE}; {word} is another", "Write one of these, or import with --partial.")
        if settings:
            c.refuse(kwargs, f"it goes with {word}", "Remove it, or import with --partial.")
        return
    c.map("train.schedule", ours, key, note)
    harmless: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": 1},
        "cosine": {"num_cycles": 0.5},
        "cosine_with_min_lr": {"num_cycles": 0.5, "min_lr": None, "min_lr_rate": None},
        "polynomial": {"power": 1},
    }
    for name, value in settings.items():
        inner = f"{kwargs}.{name}" if isinstance(c.value(kwargs), dict) else kwargs
        number = as_number(value)
        if word == "cosine_with_min_lr" and name in ("min_lr", "min_lr_rate") and number is not None:
            continue
        if name in harmless.get(word, {}) and number == harmless[word][name]:
            c.ignore(inner, "it is what the schedule does anyway")
        else:
            c.refuse(inner, f"{_NO_SCHEDULE}, without settings", "Remove it, or import with --partial.")


def _least_share(c: Conversion, word: str, settings: Mapping[str, Any]) -> float | None:
    """The share of the peak rate to which cosine_with_min_lr falls; None where it is none that a recipe can say."""
    if word != "cosine_with_min_lr":
        return None
    rate, share = as_number(settings.get("min_lr")), as_number(settings.get("min_lr_rate"))
    peak = c.settled.get("train.learning_rate")
    if share is None and rate is not None and peak:
        share = rate / peak
    return round(float(share), 9) if share is not None and 0 <= share < 1 else None


def _kwargs(c: Conversion, key: str) -> dict[str, Any]:
    value = c.value(key, {})
    if isinstance(value, dict):
        return value
    pairs = re.findall(r"[\"']?(\w+)[\"']?\s*[:=]\s*([-\w.+]+)", str(value))
    return dict(pairs)


def warmup(c: Conversion, steps_key: str, ratio_key: str, default: float | int) -> None:
    """Warm-up steps, else a ratio of the run."""
    keys = [steps_key, ratio_key]
    if c.settled.get("train.schedule") == "constant" and not _is_constant_with_warmup(c):
        c.ignore(keys, "transformers' schedule `constant` has no warm-up")
        c.map("train.warmup", 0, note="the schedule `constant` has none")
        return
    steps, ratio = c.number(steps_key, 0), c.number(ratio_key, 0)
    total = c.settled.get("train.steps")
    if steps and total and steps >= total:
        c.refuse(steps_key, f"the rate would rise through all {total} steps", "Write fewer steps of warm-up.")
        return
    if steps and 0 < steps < 1 and not ratio:  # as transformers 5 has it
        c.map("train.warmup", float(steps), [steps_key], _WARMUP_NOTE)
        c.ignore(ratio_key, "0 is none")
    elif steps and steps > 0:
        c.map("train.warmup", int(steps), [steps_key], _WARMUP_NOTE)
        c.ignore(ratio_key, f"{steps_key} decides")
    elif ratio and not 0 < ratio < 1:
        c.refuse(ratio_key, "it is no share of the run", "Write a number from 0 to below 1.")
    elif ratio:
        c.map("train.warmup", float(ratio), [ratio_key], _WARMUP_NOTE)
        c.ignore(steps_key, "0 is none")
    elif any(c.has(key) for key in keys):
        c.map("train.warmup", 0, keys)
    else:
        c.map("train.warmup", default)


def _is_constant_with_warmup(c: Conversion) -> bool:
    keys = ("lr_scheduler", "lr_scheduler_type", "training.lr_scheduler_type")
    return any(str(c.value(key, "")).lower().endswith("with_warmup") for key in keys)


def optimizer(c: Conversion, key: str, default: str) -> None:
    """The optimizer by table; any other than AdamW is refused."""
    word = str(c.text(key, default)).lower().removeprefix("optimizernames.")
    ours = _OPTIMIZERS.get(word)
    note = ""
    if word in _TORCHAO:
        ours, note = _TORCHAO[word], "its 8-bit states are bitsandbytes' instead of torchao's"
    if ours is None:
        reason = f"lorakit trains with AdamW, and {word} is another optimizer or keeps its states otherwise"
        c.refuse(key, reason, "Write adamw_torch, or import with --partial to train with AdamW.")
        return
    c.map("train.optimizer", ours, key, note)


def adam(c: Conversion) -> None:
    """AdamW's betas and epsilon."""
    betas = [float(c.number("adam_beta1", 0.9)), float(c.number("adam_beta2", 0.999))]
    if all(0 <= beta < 1 for beta in betas):
        c.map("train.betas", betas, "adam_beta1 adam_beta2")
    else:
        c.refuse("adam_beta1 adam_beta2", "a beta is from 0 to below 1", "Write for example 0.9 and 0.999.")
    epsilon = float(c.number("adam_epsilon", 1e-8))
    if epsilon > 0:
        c.map("train.epsilon", epsilon, "adam_epsilon")
    else:
        c.refuse("adam_epsilon", "it is not above 0", "Write for example 1e-8.")


def learning_rate(c: Conversion, key: str, default: float | None) -> None:
    """The peak learning rate, which is always written: ours is found from the model."""
    rate = c.number(key, default)
    if rate is None or rate <= 0:
        c.refuse(key, "it is not a number above 0" if c.has(key) else f"{c.tool} needs it", "Write the learning rate.")
    else:
        c.map("train.learning_rate", float(rate), key)


def interval(c: Conversion, ours: str, strategy: str, steps: Any, keys: list[str], default: Any) -> None:
    """When something is done: `strategy` is no, steps or epoch, `steps` a number of them or a share of the run."""
    epochs = c.settled.get("train.epochs")
    every = as_number(steps) if steps is not None else default
    if strategy == "epoch":
        share = 1 / epochs if epochs and epochs > 1 else None
        if share:
            c.map(ours, round(share, 6), keys, "once an epoch")
        else:
            c.ignore(keys, "once at the end, which lorakit does anyway")
    elif strategy in ("no", "none", "false") or not every or every <= 0:
        c.ignore(keys, "it does not change the result, and lorakit does it at the end of a run anyway")
    elif every >= 1:
        c.map(ours, int(every), keys)
    else:
        c.map(ours, float(every), keys)


def save(c: Conversion, default: str = "steps", keys: str = "save_strategy save_steps save_total_limit") -> None:
    """Checkpoints, which do not change the result: written where the config says something."""
    strategy_key, steps_key, limit_key = keys.split()
    steps = c.number(steps_key)
    strategy = str(c.value(strategy_key, "steps" if steps else default)).lower()
    if c.has(strategy_key) or c.has(steps_key):
        interval(c, "train.save_every", strategy, steps, [strategy_key, steps_key], 500)
    limit = c.whole(limit_key)
    if limit and limit > 0:
        c.map("train.keep", limit, limit_key)
    else:
        c.ignore(limit_key, "all checkpoints: it does not change the result. lorakit keeps the newest and the best")


def held_out_share(c: Conversion, key: str, default: float = 0.0) -> bool:
    """A share, or a number, of the training rows that is held out -> `data.eval`; whether there is one."""
    size = c.number(key, default)
    if not size or size <= 0:
        c.ignore(key, "no rows are held out")
        return False
    if size >= 1 and size != int(size):
        c.refuse(key, "it is neither a share nor a number of rows", "Write a share, such as 0.05, or a whole number.")
        return False
    c.map("data.eval", float(size) if size < 1 else int(size), key, _SPLIT_NOTE)
    c.note(BEST_NOTE)
    return True


def transformers_arguments(c: Conversion, rate: float, packing: str = "") -> None:
    """Length, batch, rate and optimizer by the names of transformers' TrainingArguments, and its defaults."""
    run_length(c, "num_train_epochs", 3.0)
    batch_size(c, "per_device_train_batch_size", "gradient_accumulation_steps", 8, 1, packing)
    learning_rate(c, "learning_rate", rate)
    schedule(c, "lr_scheduler_type", "linear")
    warmup(c, "warmup_steps", "warmup_ratio", 0)
    optimizer(c, "optim", "adamw_torch_fused")
    c.map("train.weight_decay", float(c.number("weight_decay", 0.0)), "weight_decay")
    c.map("train.max_grad_norm", float(c.number("max_grad_norm", 1.0)), "max_grad_norm")
    adam(c)
    c.map("train.seed", c.whole("seed", 42), "seed")
    given = c.value("report_to")
    words = [word for word in (given if isinstance(given, list) else [given]) if isinstance(word, str)]
    if names := [word for word in dict.fromkeys(words) if word in TRACKERS]:
        others = ", ".join(word for word in words if word not in TRACKERS)
        c.map("track", names, "report_to", f"lorakit knows no {others}" if others else "")


def best_model(c: Conversion) -> None:
    """Which checkpoint is the result: lorakit's is that of the lowest held-out loss."""
    has_rows = "data.eval" in c.recipe
    metric = str(c.value("metric_for_best_model", "loss")).removeprefix("eval_")
    if c.flag("load_best_model_at_end") and metric != "loss":
        c.refuse(
            "metric_for_best_model", "lorakit takes the checkpoint of the lowest held-out loss", "Write eval_loss."
        )
    best = "the checkpoint of the lowest held-out loss is the result" if has_rows else "there are no held-out rows"
    c.ignore("load_best_model_at_end metric_for_best_model greater_is_better", best)


def number_format(c: Conversion, bf16: str, fp16: str, default: str, more: Mapping[str, str] = {}) -> None:
    """bf16 and fp16 -> `model.dtype`; `more` maps further switches to a word of ours, `default` where none is on."""
    switches = {bf16: "bfloat16", fp16: "float16", **more}
    on = {key: ours for key, ours in switches.items() if c.has(key) and _is_on(c, key)}
    keys = [key for key in switches if c.has(key)]
    words = [*dict.fromkeys(on.values())]
    note = "the base's weights are rounded to it too" if words and words[0] != "float32" else ""
    c.map("model.dtype", words[0] if words else default, keys, note)


def _is_on(c: Conversion, key: str) -> bool:
    """Whether a number format is on; Axolotl's `full` is, without automatic mixed precision."""
    word = c.value(key)
    return word == "full" or (word != "auto" and c.flag(key))


def attention(c: Conversion, key: str) -> None:
    """The attention implementation by transformers' words, and by those of the hub's kernels."""
    word = str(c.value(key)).lower().partition("@")[0].partition(":")[0].removeprefix("paged|")
    if any(part in word for part in _ROUNDED_ATTENTION):
        c.refuse(key, f"{word} computes attention in fewer bits", "Write flash_attention_2 or sdpa.")
        return
    word = {"flash": "flash_attention_2", "flex": "flex_attention", "sdp": "sdpa"}.get(word, word)
    word = {"flash-attn2": "flash_attention_2", "flash-attn3": "flash_attention_3"}.get(word.rpartition("/")[2], word)
    c.map("model.attention", ATTENTIONS.get(word, "auto"), key, "the result is the same with each")


def gradient_checkpointing(c: Conversion, key: str) -> None:
    """It does not change the result: only what is written is mapped."""
    if c.has(key):
        value = c.value(key)
        off = as_flag(value) is False or str(value).lower() in ("none", "")
        note = "" if isinstance(value, bool) else f"{value}: activations are recomputed"
        c.map("train.gradient_checkpointing", not off, key, note)


def sharding(c: Conversion, deepspeed: str = "deepspeed", fsdp: str = "fsdp fsdp_config") -> None:
    """DeepSpeed and FSDP -> `train.sharding` on several devices: memory and speed, never the result."""
    keys = [key for key in (deepspeed, *fsdp.split()) if c.value(key) not in (None, "", [], {}, False)]
    if not keys:
        return
    if keys[0] == deepspeed and not _deepspeed_only_shares(c, deepspeed):
        return
    if c.devices == 1:
        c.ignore(keys, "on one device nothing is shared out; it never changes the result")
        return
    word = "fsdp"
    if keys[0] == deepspeed:
        text = str(c.value(deepspeed)).lower()
        stage = re.search(r"(?:zero|z|stage)[\s_\-'\":]*(?:stage[\s_\-'\":]*)?([0-3])", text)
        word = {"2": "zero-2", "3": "zero-3"}.get(stage[1] if stage else "", "none" if stage else "zero-2")
    if word.startswith("zero") and "8bit" in str(c.settled.get("train.optimizer", "")):
        c.ignore(
            keys, "lorakit's DeepSpeed takes no 8-bit optimizer: train.sharding stays auto. The result is the same"
        )
        return
    c.map("train.sharding", word, keys, "memory and speed, not the result")


def _deepspeed_only_shares(c: Conversion, key: str) -> bool:
    """Whether DeepSpeed's settings bring no optimizer or schedule of their own, which are then refused."""
    value = c.value(key)
    path = find_local(c, value) if isinstance(value, str) and not remote_reason(value) else None
    if path is not None and path.is_file():
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, OSError, RecursionError):
            value = None
    if not isinstance(value, dict):
        if not re.search(r"(?:zero|ds_z|z)_?[0-3]", str(value).lower()):
            c.note(f"{value} is not here: an optimizer or a schedule in it would go before those of the config.")
        return True
    for name, known in (("optimizer", ("adam", "adamw")), ("scheduler", ())):
        own = value.get(name)
        kind = str(own.get("type", "")) if isinstance(own, dict) else ""
        if own and kind.lower() not in known:
            reason = f"its {name} {kind or 'of its own'} goes before that of the config"
            c.refuse(key, reason, f"Take {name} out of it, or import with --partial.")
            return False
    return True
