"""TRL: what `trl sft` reads from --config and its command line (trl/scripts/sft.py, SFTConfig, ModelConfig and
ScriptArguments of trl, TrainingArguments of transformers)."""

from typing import Any

from lorakit.share.importing import training
from lorakit.share.importing.base_model import (
    base_model,
    default_targets,
    lora_kind,
    quantization,
    remote_code,
)
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.paths import local_path, remote_reason
from lorakit.share.importing.special_tokens import special_token
from lorakit.share.importing.trainer_keys import TRAINER_KEYS
from lorakit.share.importing.trl_data import import_datasets
from lorakit.share.importing.verdicts import ByFunction, Harmless, OffOnly, keys_with

NAME = "TRL"
MARKS = """
    dataset_name dataset_config dataset_train_split dataset_test_split dataset_text_field use_peft
    lora_target_modules attn_implementation assistant_only_loss completion_only_loss max_length packing dtype
    torch_dtype lora_r load_in_4bit dataset_num_proc padding_free packing_strategy use_liger_kernel max_seq_length
    lora_task_type bnb_4bit_quant_type chat_template_path dataset_mixer dataset_mixture dataset_splits datasets
    max_grad_norm per_device_train_batch_size"""
NEEDED = "model_name_or_path"

_PARTIAL = "Remove it, or import with --partial to train without it."
_LORA = "lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save use_rslora use_dora"


def convert(c: Conversion) -> None:
    """Read every key that has a counterpart."""
    base_model(c, "model_name_or_path", "model_revision")
    remote_code(c, "trust_remote_code")
    _number_format(c)
    kind = str(c.value("bnb_4bit_quant_type", "nf4"))
    quantization(c, "load_in_4bit", "load_in_8bit", kind, (c.flag("use_bnb_nested_quant"), "use_bnb_nested_quant"))
    c.ignore("bnb_4bit_quant_type", "model.quantization says it")
    if c.has("attn_implementation"):
        training.attention(c, "attn_implementation")
    _adapter(c)
    _length(c)
    import_datasets(c)
    packs = c.flag("packing")
    training.transformers_arguments(c, 2e-5, "packing" if packs else "")
    _packing(c, packs)
    recompute = "activation_checkpointing" if c.has("activation_checkpointing") else "gradient_checkpointing"
    training.gradient_checkpointing(c, recompute)
    training.sharding(c)
    training.save(c)
    training.best_model(c)
    if c.has("output_dir"):
        c.map("output.dir", c.text("output_dir"), "output_dir")
    _template(c)


def _number_format(c: Conversion) -> None:
    words = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "auto": "auto"}
    key = "dtype" if c.has("dtype") else "torch_dtype"
    weights = words.get(str(c.value(key, "float32")).removeprefix("torch."))
    if weights is None:
        c.refuse(key, "it is no number format", "Write bfloat16, float16, float32 or auto.")
    off = c.has("bf16") and not c.flag("bf16")
    if off and not c.flag("fp16"):
        c.map("model.dtype", weights or "float32", f"{key} bf16 fp16")
        return
    training.number_format(c, "bf16", "fp16", "bfloat16")
    c.ignore(key, "bf16 or fp16 decides what is computed in; lorakit keeps the frozen weights in it too")


def _adapter(c: Conversion) -> None:
    if not c.flag("use_peft"):
        c.map("adapter.kind", "none", "use_peft", "without use_peft TRL trains all weights")
        c.ignore(_LORA, "use_peft is off: there is no adapter")
        return
    c.account("use_peft", "mapped", to="adapter.kind: lora")
    c.map("adapter.rank", c.whole("lora_r", 16), "lora_r")
    c.map("adapter.alpha", c.number("lora_alpha", 32), "lora_alpha")
    c.map("adapter.dropout", float(c.number("lora_dropout", 0.05)), "lora_dropout")
    written = c.value("lora_target_modules")
    names = [str(name) for name in written] if isinstance(written, list) else written
    if isinstance(names, list) and len(names) == 1:  # TRL takes one alone for a pattern, or all-linear
        names = names[0]
    if names:
        c.map(
            "adapter.targets",
            [names] if isinstance(names, str) and names.isidentifier() else names,
            "lora_target_modules",
        )
    elif targets := default_targets(c, "lora_target_modules"):
        c.map("adapter.targets", targets, "lora_target_modules", "PEFT's choice for this family")
    if c.has("lora_modules_to_save"):
        modules = c.value("lora_modules_to_save")
        c.map("adapter.train_modules", modules if isinstance(modules, list) else [modules], "lora_modules_to_save")
    lora_kind(c, {"dora": (c.flag("use_dora"), "use_dora"), "rslora": (c.flag("use_rslora"), "use_rslora")})


def _length(c: Conversion) -> None:
    key = next((key for key in ("max_length", "max_seq_length") if key in c.config.tree), "max_length")
    if key in c.config.tree and c.value(key) is None:
        c.refuse(key, "null cuts no row, and lorakit needs a longest row", "Write how many tokens the longest row has.")
        return
    c.map("data.max_length", c.whole(key, 1024), key)
    c.map("data.overlong", "truncate", note="lorakit keeps the turns that fit whole; TRL cuts at the token")
    if str(c.value("truncation_mode", "keep_start")) == "keep_start":
        c.ignore("truncation_mode", "the beginning is kept, as here")


def _packing(c: Conversion, packs: bool) -> None:
    if packs and str(c.value("packing_strategy", "bfd")) == "wrapped":
        reason = "wrapped packs see each other's rows, and lorakit's never do"
        c.refuse("packing_strategy", reason, "Write bfd, or import with --partial.")
    c.ignore("packing_strategy eval_packing padding_free", "rows never see each other, packed or not")
    c.map("data.packing", "on" if packs else "auto", "packing", "rows never see each other, packed or not")


def _template(c: Conversion) -> None:
    if isinstance(inline := c.value("chat_template"), str):  # of open-r1's and the alignment handbook's scripts
        c.write_template(inline, "chat_template")
    key, text = "chat_template_path", c.value("chat_template_path")
    if text and str(text).endswith((".jinja", ".j2")) and not remote_reason(str(text)):
        c.map("model.chat_template", local_path(c, str(text), is_file=True), key)
    elif text:
        c.refuse(key, "it is a tokenizer's folder or hub id, not a .jinja file", "Save its template as a .jinja file.")


def settle_rest(c: Conversion) -> None:
    """An end token that is the base's own."""
    if c.has("eos_token"):
        special_token(c, "eos_token", "eos_token", str(c.value("eos_token")))


KEYS: dict[str, Any] = {
    **TRAINER_KEYS,
    **keys_with(
        Harmless(
            "lorakit keeps prepared rows in its own cache, and reads them with the processes that the machine has"
        ),
        """dataset_num_proc preprocessing_num_workers dataset_batch_size dataset_streaming streaming
        dataset_kwargs.append_concat_token""",
    ),
    **keys_with(
        Harmless("memory and speed, not the result"),
        """pad_to_multiple_of activation_offloading bnb_4bit_quant_storage use_liger use_unsloth""",
    ),
    **keys_with(Harmless("padding is never trained on nor seen"), "pad_token"),
    **keys_with(OffOnly("lorakit trains causal language models", "Write CAUSAL_LM."), "lora_task_type=causal_lm"),
    **keys_with(Harmless("lorakit shuffles rows by train.seed"), "shuffle_dataset"),
    **keys_with(Harmless("buffers are not shared out"), "ignore_bias_buffers"),
    **keys_with(
        OffOnly(
            "remote code is never switched on by a recipe: lorakit runs no code of a model's folder",
            "Remove it, and use a base that transformers knows by itself.",
        ),
        "trust_remote_code",
    ),
    **keys_with(
        OffOnly("lorakit trains by the plain cross-entropy of the answers, with the base's tokenizer", _PARTIAL),
        """
        loss_type=nll|chunked_nll router_aux_loss_coef=0 eos_token lora_target_parameters model_init_kwargs
        truncation_mode=keep_start use_vllm""",
    ),
    **keys_with(
        ByFunction("it is off"),
        f"""
        model_name_or_path model_revision dtype torch_dtype attn_implementation use_peft {_LORA} load_in_8bit
        load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant dataset_name dataset_config dataset_train_split
        dataset_test_split datasets test_split_size max_length max_seq_length packing packing_strategy eval_packing
        padding_free completion_only_loss assistant_only_loss chat_template_path""",
    ),
    **keys_with(
        ByFunction("it was read"),
        """
        datasets[].path datasets[].name datasets[].data_files datasets[].split datasets[].columns
        datasets[].fraction dataset_mixture dataset_mixture.datasets dataset_mixture.datasets[].id
        dataset_mixture.datasets[].config dataset_mixture.datasets[].split dataset_mixture.datasets[].columns
        dataset_mixture.datasets[].weight dataset_mixture.seed dataset_mixture.test_split_size dataset_mixer
        dataset_splits dataset_kwargs""",
    ),
    **keys_with(OffOnly("lorakit has nothing for it", "Write data_files."), "datasets[].data_dir"),
    **keys_with(
        Harmless("the chat template writes the beginning of a sequence, once"), "dataset_kwargs.add_special_tokens"
    ),
    **keys_with(
        OffOnly("the rows have token ids already, which the recipe has to say", "Write format: tokens in it."),
        "dataset_kwargs.skip_prepare_dataset",
    ),
    **keys_with(ByFunction("it is off"), "chat_template warmup_ratio"),
    **keys_with(Harmless("the result is the same with each attention"), "use_flash_attention_2 use_flash_attn"),
    **keys_with(
        Harmless("lorakit logs every step into log.jsonl; track in a recipe names the trackers that get it too"),
        "wandb_entity wandb_project wandb_run_group wandb_log_unique_prompts log_completions overwrite_hub_revision",
    ),
    **keys_with(
        OffOnly("it is read by other scripts than `trl sft`", "Write it as TRL reads it, or import with --partial."),
        "dataset_configs system_prompt benchmarks callbacks",
    ),
    **keys_with(ByFunction("the rows have no texts of their own"), "dataset_text_field"),
}
