"""The keys of transformers' TrainingArguments, earlier versions' too, which LLaMA-Factory and TRL share."""

from typing import Any

from lorakit.share.importing.training import OPTIMIZER_KEYS
from lorakit.share.importing.verdicts import ByFunction, Harmless, OffOnly, keys_with

_PARTIAL = "Remove it, or import with --partial to train without it."
_HARMLESS = {
    "lorakit logs every step into log.jsonl; track in a recipe names the trackers that get it too": """
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter logging_dir
    include_num_input_tokens_seen include_tokens_per_second log_level log_level_replica disable_tqdm report_to
    run_name project trackio_space_id trackio_bucket_id trackio_static_space_id prediction_loss_only
    skip_memory_metrics debug metric_for_best_model greater_is_better include_for_metrics include_inputs_for_metrics
    batch_eval_metrics""",
    "lorakit uploads nothing while it trains; lorakit push does it": """
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    push_to_hub_model_id push_to_hub_organization push_to_hub_token""",
    "memory and speed, not the result": """
    tf32 activation_checkpointing_kwargs gradient_checkpointing_kwargs torch_compile torch_compile_backend
    torch_compile_mode use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps
    average_tokens_across_devices bf16_full_eval fp16_full_eval half_precision_backend fp16_opt_level fp16_backend
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order use_cpu no_cuda use_mps_device use_ipex jit_mode_eval
    full_determinism remove_unused_columns length_column_name group_by_length train_sampling_strategy torchdynamo
    mp_parameters auto_find_batch_size_divisor accelerator_config split_batches past_index""",
    "which devices and how many is an option of the command (lorakit train --devices N)": """
    local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout tpu_num_cores tpu_metrics_debug fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap""",
    "on several devices train.sharding shares the base out; how is lorakit's": "fsdp fsdp_config deepspeed",
    "lorakit evaluates as many rows at once as fit": """
    per_device_eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps eval_do_concat_batches
    eval_use_gather_object eval_on_start eval_delay""",
    "lorakit writes safetensors, the newest checkpoints and the best": """
    save_only_model save_on_each_node save_safetensors enable_jit_checkpoint restore_callback_states_from_checkpoint""",
    "it is an option of the command: lorakit train --resume, or --overwrite": """
    resume_from_checkpoint overwrite_output_dir ignore_data_skip""",
    "training is what the command does; lorakit eval measures": "do_train do_eval do_predict",
    "train.seed draws the rows too": "data_seed",
    "train.micro_batch: auto finds what fits, and leaves the batch as it is": "auto_find_batch_size",
}
_REFUSED = (
    (
        "lorakit trains the adapter's matrices by the plain cross-entropy of the answers",
        _PARTIAL,
        "label_smoothing_factor=0 neftune_noise_alpha optim_target_modules label_names",
    ),
    (
        "lorakit has nothing for it",
        _PARTIAL,
        "dataloader_drop_last sharded_ddp use_legacy_prediction_loop",
    ),
    (
        "lorakit shares out rows over devices, but no parts of a row or of a product",
        _PARTIAL,
        "parallelism_config",
    ),
)
TRAINER_KEYS: dict[str, Any] = {
    **{key: value for reason, keys in _HARMLESS.items() for key, value in keys_with(Harmless(reason), keys).items()},
    **{
        key: value
        for reason, remedy, keys in _REFUSED
        for key, value in keys_with(OffOnly(reason, remedy), keys).items()
    },
    **OPTIMIZER_KEYS,
    **keys_with(
        ByFunction("it is off"),
        """
        output_dir per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate
        lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim weight_decay max_grad_norm bf16 fp16
        gradient_checkpointing activation_checkpointing eval_strategy evaluation_strategy eval_steps save_strategy
        save_steps save_total_limit load_best_model_at_end metric_for_best_model greater_is_better seed""",
    ),
}
