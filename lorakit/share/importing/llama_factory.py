"""LLaMA-Factory: its YAML config (src/llamafactory/hparams/ of its repository) with dataset_info.json."""

from typing import Any

from lorakit.share.importing import training
from lorakit.share.importing.base_model import added_tokens, base_model, lora_kind, remote_code
from lorakit.share.importing.chat_templates import chat_template
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.data_sources import write_training
from lorakit.share.importing.llama_factory_data import import_datasets
from lorakit.share.importing.source import as_flag
from lorakit.share.importing.trainer_keys import TRAINER_KEYS
from lorakit.share.importing.turn_templates import turn_template
from lorakit.share.importing.verdicts import ByFunction, Harmless, OffOnly, keys_with

NAME = "LLaMA-Factory"
MARKS = """
    stage finetuning_type template cutoff_len lora_target lora_rank dataset dataset_dir val_size
    preprocessing_num_workers overwrite_cache quantization_bit flash_attn plot_loss do_train adapter_name_or_path
    infer_backend export_dir additional_target"""
NEEDED = "model_name_or_path"

_PARTIAL = "Remove it, or import with --partial to train without it."


def convert(c: Conversion) -> None:
    """Read every key that has a counterpart."""
    base_model(c, "model_name_or_path", "model_revision")
    remote_code(c, "trust_remote_code")
    _stage(c)
    _precision(c)
    _adapter(c)
    _tokens(c)
    c.map("data.max_length", c.whole("cutoff_len", 2048), "cutoff_len")
    note = "lorakit keeps the turns that fit whole; LLaMA-Factory cuts prompt and answer in proportion"
    c.map("data.overlong", "truncate", note=note)
    sources = import_datasets(c)
    keys = [key for key in ("train_on_prompt", "mask_history") if c.has(key)]
    trains = "all" if c.flag("train_on_prompt") else "last" if c.flag("mask_history") else "assistant"
    for source in sources:
        source.trains = trains
    write_training(c, sources, keys)
    packs = "packing" if c.flag("packing") else "neat_packing" if c.flag("neat_packing") else ""
    training.transformers_arguments(c, 5e-5, packs)
    _packing(c, packs)
    _checkpointing(c)
    training.sharding(c, fsdp="fsdp fsdp_config")
    _evaluation(c)
    training.save(c)
    training.best_model(c)
    if c.has("output_dir"):
        c.map("output.dir", c.text("output_dir"), "output_dir")
    if c.has("default_system"):
        c.map("data.system", c.text("default_system"), "default_system")


def _stage(c: Conversion) -> None:
    stage = str(c.value("stage", "sft"))
    reasons = {
        "pt": "pretraining in LLaMA-Factory packs documents end to end without borders between them",
        "rm": "a reward model is trained on preferences",
        "ppo": "it is reinforcement learning",
        "dpo": "it is preference optimization",
        "kto": "it is preference optimization",
    }
    if stage == "sft":
        c.ignore("stage", "supervised fine-tuning is what lorakit does")
    else:
        reason = f"lorakit trains on answers and nothing else: {reasons.get(stage, f'{stage} is something else')}"
        c.refuse("stage", reason, "Import a config with stage: sft.")


def _precision(c: Conversion) -> None:
    training.number_format(c, "bf16", "fp16", "auto", {"pure_bf16": "bfloat16"} if c.has("pure_bf16") else {})
    bits = c.whole("quantization_bit")
    method = str(c.value("quantization_method", "bnb")).lower()
    if bits is not None and method not in ("bnb", "bitsandbytes"):
        c.refuse("quantization_method", f"lorakit quantizes with bitsandbytes, not {method}", "Write bnb.")
    c.ignore("quantization_method", "bitsandbytes, as here")
    if bits not in (None, 4, 8):
        c.refuse("quantization_bit", "lorakit quantizes to 4 or 8 bits", "Write 4 or 8.")
    elif bits == 8:
        c.map("model.quantization", "q8", "quantization_bit")
    elif bits == 4:
        kind = "q4" if str(c.value("quantization_type", "nf4")) == "fp4" else "nf4"
        c.map("model.quantization", kind, "quantization_bit quantization_type")
        c.map("model.double_quant", c.flag("double_quantization", True), "double_quantization")
    else:
        c.ignore("quantization_type double_quantization", "the base is not quantized")
    words = {
        "fa2": "flash_attention_2",
        "fa3": "flash_attention_3",
        "sdpa": "sdpa",
        "disabled": "eager",
        "auto": "auto",
    }
    if c.has("flash_attn"):
        switch = as_flag(c.value("flash_attn"))
        word = str(c.value("flash_attn")).lower()
        word = {True: "fa2", False: "disabled"}[switch] if switch is not None else word
        c.map("model.attention", words.get(word, "auto"), "flash_attn", "the result is the same with each")


def _adapter(c: Conversion) -> None:
    kind = str(c.value("finetuning_type", "lora")).lower()
    lora = """
    lora_rank lora_alpha lora_dropout lora_target additional_target loraplus_lr_ratio use_rslora use_dora pissa_init
    pissa_iter pissa_convert"""
    if kind == "full":
        c.map("adapter.kind", "none", "finetuning_type")
        c.ignore(lora, "finetuning_type is full: there is no adapter")
        return
    if kind != "lora":
        c.refuse("finetuning_type", f"lorakit has no {kind}", "Write lora or full.")
        return
    c.ignore("finetuning_type", "lora, as here")
    if c.has("adapter_name_or_path"):
        c.refuse(
            "adapter_name_or_path",
            "lorakit goes on with an adapter by adapter.from, which brings its rank and modules with it",
            "Remove it here, and write adapter: {from: DIR} in the recipe instead of its other keys.",
        )
    rank = c.whole("lora_rank", 8)
    c.map("adapter.rank", rank, "lora_rank")
    alpha = c.whole("lora_alpha") or 2 * (rank or 8)
    c.map("adapter.alpha", alpha, "lora_alpha", "" if c.has("lora_alpha") else "twice the rank")
    c.map("adapter.dropout", float(c.number("lora_dropout", 0.0)), "lora_dropout")
    names = _names(c.value("lora_target", "all"))
    c.map("adapter.targets", "all-linear" if names in (["all"], []) else names, "lora_target")
    if modules := _names(c.value("additional_target", "")):
        c.map("adapter.train_modules", modules, "additional_target")
    iterations = c.whole("pissa_iter", 16)
    pissa = {"pissa": {"iterations": iterations if iterations and iterations > 0 else None}}
    if c.flag("pissa_init"):
        c.map("adapter.kind", pissa, "pissa_init pissa_iter")
        c.ignore("pissa_convert", "lorakit always saves a plain LoRA")
    else:
        c.ignore("pissa_init pissa_iter pissa_convert", "PiSSA is off")
    lora_kind(c, {"dora": (c.flag("use_dora"), "use_dora"), "rslora": (c.flag("use_rslora"), "use_rslora")})
    ratio = c.number("loraplus_lr_ratio")
    if ratio and ratio > 1:
        c.map("train.lora_plus", float(ratio), "loraplus_lr_ratio")
    else:
        c.ignore("loraplus_lr_ratio", "B learns as A does")


def _tokens(c: Conversion) -> None:
    keys = ("add_tokens", "add_special_tokens", "new_special_tokens")
    added_tokens(c, {key: _names(c.value(key)) for key in keys if c.has(key)})
    c.ignore("resize_vocab", "the embeddings grow by what model.add_tokens needs")


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value).split(",")
    return [str(name).strip() for name in names if str(name).strip()]


def _packing(c: Conversion, packs: str) -> None:
    if not packs:
        c.ignore(
            "packing neat_packing", "rows are not packed there; lorakit's rows never see each other, packed or not"
        )
        return
    if packs == "packing" and not c.flag("neat_packing"):
        reason = "rows of a pack see each other in LLaMA-Factory's plain packing, and never in lorakit"
        c.refuse("packing", reason, "Write neat_packing: true, or import with --partial.")
    c.map("data.packing", "on", "packing neat_packing")


def _checkpointing(c: Conversion) -> None:
    if c.has("disable_gradient_checkpointing"):
        off = c.flag("disable_gradient_checkpointing")
        c.map("train.gradient_checkpointing", not off, "disable_gradient_checkpointing")
        c.ignore("gradient_checkpointing", "disable_gradient_checkpointing decides")
    else:
        training.gradient_checkpointing(c, "gradient_checkpointing")


def _evaluation(c: Conversion) -> None:
    if c.has("eval_dataset"):
        c.ignore("val_size", "eval_dataset has the held-out rows")
        c.note(training.BEST_NOTE)
        has_rows = True
    else:
        has_rows = training.held_out_share(c, "val_size")
    keys = ["eval_strategy", "evaluation_strategy", "eval_steps"]
    if not has_rows:
        c.ignore(keys, "there are no held-out rows")
        return
    strategy = str(c.value("eval_strategy", c.value("evaluation_strategy", "steps" if c.has("eval_steps") else "no")))
    written = [key for key in keys if c.has(key)]
    training.interval(c, "train.eval_every", strategy.lower(), c.number("eval_steps"), written, None)
    patience = c.whole("early_stopping_steps")
    if patience:
        c.map("train.early_stopping", {"patience": patience}, "early_stopping_steps")


def settle_rest(c: Conversion) -> None:
    """The template by name: without one the tokenizer's own is taken."""
    if c.has("template"):
        name = str(c.value("template"))
        chat_template(c, "template", name, thinks=c.flag("enable_thinking", True))
        turns = turn_template(c.tool, name)
        if c.has("enable_thinking"):
            if turns and turns.thought:
                c.account("enable_thinking", "mapped", to="model.chat_template")
            else:
                c.ignore("enable_thinking", f"{name} writes no thoughts")


_HARMLESS = {
    "lorakit logs every step into log.jsonl; track in a recipe names the trackers that get it too": """
    plot_loss use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key
    swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret include_effective_tokens_per_second compute_accuracy
    use_trackio trackio_project print_param_status include_num_input_tokens_seen""",
    "lorakit keeps prepared rows in its own cache, and reads them with the processes that the machine has": """
    cache_dir overwrite_cache preprocessing_batch_size preprocessing_num_workers tokenized_path low_cpu_mem_usage
    offload_folder media_dir data_shared_file_system quantization_device_map""",
    "memory and speed, not the result: lorakit takes its own kernels": """
    use_unsloth use_unsloth_gc enable_liger_kernel use_v1_kernels use_reentrant_gc use_hyper_parallel
    upcast_lmhead_output enable_thinking_budget""",
    "the base's config.json and tokenizer say it": "use_fast_tokenizer",
    "it is about answering, exporting or serving, not about training": """
    infer_backend infer_dtype use_kv_cache export_dir export_size export_device export_quantization_bit
    export_quantization_dataset export_quantization_nsamples export_quantization_maxlen export_legacy_format
    export_hub_model_id vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen
    sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend do_sample temperature top_p top_k num_beams
    max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens eval_num_beams
    predict_with_generate generation_max_length generation_num_beams generation_config sortish_sampler ray_run_name
    ray_storage_path ray_storage_filesystem ray_num_workers resources_per_worker placement_strategy ray_init_kwargs
    master_addr master_port task task_dir batch_size lang n_shot save_dir download_mode enable_torch_profiler
    profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat
    profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules device_map""",
    "no image, video or sound is read": """
    image_max_pixels image_min_pixels image_do_pan_and_scan image_resolution crop_to_patches video_max_pixels
    video_min_pixels video_resolution video_fps video_maxlen use_audio_in_video audio_sampling_rate
    freeze_vision_tower freeze_multi_modal_projector freeze_language_model""",
    "padding is never trained on": "ignore_pad_token_for_loss",
    "no embedding gets an adapter here": "loraplus_lr_embedding",
    "lorakit begins a new adapter": "create_new_adapter",
    "tokens are not copied: lorakit takes them from the environment alone": "hf_hub_token ms_hub_token om_hub_token",
}
_REFUSED = (
    (
        "lorakit trains on answers (supervised fine-tuning) and nothing else",
        "Import a config of supervised fine-tuning.",
        """
        pref_beta=0.1 pref_ftx=0 pref_bco_weight=0 pref_loss=sigmoid dpo_label_smoothing=0 kto_chosen_weight=1
        kto_rejected_weight=1 simpo_gamma=0.5 ppo_buffer_size=1 ppo_epochs=4 ppo_score_norm ppo_target=6
        ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model
        reward_model_adapters reward_model_quantization_bit reward_model_type=lora ld_alpha""",
    ),
    (
        "remote code is never switched on by a recipe: lorakit runs no code of a model's folder",
        "Remove it, and use a base that transformers knows by itself.",
        "trust_remote_code",
    ),
    (
        "lorakit takes the base's tokenizer and config as they are",
        _PARTIAL,
        """
        split_special_tokens new_special_tokens_config
        init_special_tokens=noise_init rope_scaling shift_attn mixture_of_depths train_from_scratch adapter_folder""",
    ),
    (
        "lorakit has nothing for it",
        _PARTIAL,
        """
        use_galore galore_target=all galore_rank=16 galore_update_interval=200 galore_scale=2 galore_proj_type=std
        galore_layerwise use_apollo apollo_target=all apollo_rank=16 apollo_update_interval=200 apollo_scale=32
        apollo_proj=random apollo_proj_type=std apollo_scale_type=channel apollo_layerwise apollo_scale_front
        use_badam badam_mode=layer badam_start_block badam_switch_mode=ascending badam_switch_interval=50
        badam_update_ratio=0.05 badam_mask_mode=adjacent badam_verbose=0 use_adam_mini use_muon use_mca use_dft_loss
        use_asft_loss use_eaft_loss asft_alpha=0.1 eaft_alpha=1 use_llama_pro freeze_trainable_layers=2
        freeze_trainable_modules=all freeze_extra_modules module_dropout=0 oft_rank=0 oft_block_size=32
        oft_target=all moe_aux_loss_coef upcast_layernorm disable_shuffling mix_strategy=concat interleave_probs
        streaming buffer_size=16384 eval_on_each_dataset fp8 fp8_backend=auto fp8_enable_fsdp_float8_all_gather
        tool_format enable_thinking=true preserve_thinking reasoning_effort mask_history_cot use_kt kt_weight_path
        kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size
        hyper_parallel_args block_diag_attn compute_dtype model_max_length""",
    ),
)
KEYS: dict[str, Any] = {
    **TRAINER_KEYS,
    **{key: value for reason, keys in _HARMLESS.items() for key, value in keys_with(Harmless(reason), keys).items()},
    **{
        key: value
        for reason, remedy, keys in _REFUSED
        for key, value in keys_with(OffOnly(reason, remedy), keys).items()
    },
    **keys_with(
        ByFunction("it is off"),
        """
        model_name_or_path model_revision adapter_name_or_path stage finetuning_type lora_rank lora_alpha
        lora_dropout lora_target additional_target loraplus_lr_ratio use_rslora use_dora pissa_init pissa_iter
        pissa_convert quantization_bit quantization_method quantization_type double_quantization flash_attn
        add_tokens add_special_tokens new_special_tokens resize_vocab
        pure_bf16 template dataset eval_dataset dataset_dir cutoff_len train_on_prompt mask_history max_samples
        val_size packing neat_packing default_system disable_gradient_checkpointing early_stopping_steps
        warmup_ratio evaluation_strategy""",
    ),
}
