"""Every key of Axolotl 0.19 (axolotl/utils/schemas/ and integrations/*/args.py), and what it means here where no
function of axolotl.py reads it."""

from typing import Any

from lorakit.share.importing import training
from lorakit.share.importing.verdicts import ByFunction, Harmless, OffOnly, keys_with

_PARTIAL = "Remove it, or import with --partial to train without it."
_SFT = "lorakit trains on answers (supervised fine-tuning) and nothing else"
_HARMLESS = {
    "lorakit logs every step into log.jsonl; track in a recipe names the trackers that get it too": """
    logging_steps logging_strategy use_wandb wandb_name wandb_run_id wandb_mode wandb_project wandb_entity
    wandb_watch wandb_log_model use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name
    hf_mlflow_log_artifacts use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key
    comet_mode comet_online comet_experiment_config use_tensorboard use_swanlab swanlab_project
    swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace swanlab_api_key swanlab_log_model
    swanlab_web_host swanlab_api_host swanlab_lark_webhook_url swanlab_lark_secret swanlab_log_completions
    swanlab_completion_log_interval swanlab_completion_max_buffer use_trackio trackio_project_name trackio_run_name
    trackio_space_id use_otel_metrics otel_metrics_host otel_metrics_port include_tokens_per_second include_tkps
    profiler_steps profiler_steps_start generate_samples num_generation_samples generation_max_new_tokens
    generation_temperature generation_top_p generation_top_k generation_prompt_ratio generation_do_sample log_level""",
    "lorakit uploads nothing while it trains; lorakit push does it": """
    hub_model_id hub_strategy hub_revision push_dataset_to_hub hf_use_auth_token hub_private_repo push_to_hub""",
    "lorakit keeps prepared rows in its own cache, and reads them with the processes that the machine has": """
    dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataloader_pin_memory
    dataloader_num_workers dataloader_prefetch_factor preprocess_iterable is_preprocess
    remove_unused_columns num_dataset_shards_to_save streaming_multipack_buffer_size""",
    "which device and how many is an option of the command (lorakit train --devices N)": """
    device device_map world_size local_rank ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_find_unused_parameters accelerator_config max_memory gpu_memory_limit low_cpu_mem_usage use_ray ray_run_name
    ray_num_workers resources_per_worker lora_on_cpu experimental_skip_move_to_device""",
    "memory and speed, not the result: lorakit takes its own kernels and layouts": """
    tf32 sample_packing_group_size sample_packing_bin_size sample_packing_sequentially
    sample_packing_mp_start_method sample_packing_drop_attention_mask eval_sample_packing pad_to_sequence_len
    multipack_real_batches batch_flattening flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv
    flash_attn_fuse_mlp flash_optimum unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o
    unsloth_rms_norm unsloth_rope lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel use_kernels
    liger_rope liger_rms_norm liger_glu_activation liger_swiglu liger_layer_norm liger_cross_entropy
    liger_fused_linear_cross_entropy liger_rms_norm_gated cut_cross_entropy torch_compile
    torch_compile_backend torch_compile_mode gradient_checkpointing_kwargs activation_offloading layer_offloading
    qlora_sharded_model_loading chunked_cross_entropy chunked_cross_entropy_num_chunks
    selective_checkpointing pad_to_multiple_of gemma4_hybrid_attn_impl large_head_attention flash_attn_d512
    sdpa_varlen fused_attn_kernel experts_implementation ple_cpu_offload deepcompile torch_compile_options
    liger_kernel_impl use_scattermoe use_sonicmoe expert_backend moe_grouped_backend moe_dequant_chunk_size
    moe_bnb_fast tiled_mlp tiled_mlp_use_original_mlp tiled_mlp_num_shards gc_steps gc_collect_steps
    torch_empty_cache_steps flex_attn_compile_kwargs attention embeddings_skip_upcast peft_autocast_adapter_dtype
    fp32_norms_class dynamic_checkpoint""",
    "the checkpoint itself says how it is quantized, and lorakit reads it": """
    gptq gptq_disable_exllama gptq_groupsize gptq_model_v1 gptq_use_triton""",
    "train.micro_batch: auto finds what fits, and leaves the batch as it is": "auto_find_batch_size",
    "lorakit batches rows by length and shuffles them by train.seed": """
    group_by_length shuffle_merged_datasets shuffle_before_merging_datasets data_seed""",
    "Axolotl itself reads no key of this name, and it has no part in training": """
    wandb_run wandb_runid wandb_tags wandb_notes hub_repo hub_token hf_token push_to_hub_model_id report_to run_name
    eval_table_max_new_tokens early_stopping_threshold logging_dir seed_everything project_name experiment_name""",
    "lorakit evaluates as many rows at once as fit": "eval_batch_size eval_accumulation_steps eval_sequence_len",
    "it is an option of the command: lorakit train --resume, or --overwrite": """
    resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir""",
    "lorakit writes safetensors, the newest checkpoints and the best": """
    save_safetensors save_only_model save_first_step tokenizer_save_jinja_files""",
    "the base's config.json and tokenizer say it": """
    model_type type_of_model base_model_config cls_model_config tokenizer_type tokenizer_use_fast tokenizer_legacy
    is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model
    is_mistral_derived_model is_multimodal""",
    "lorakit checks recipe, rows and loss without being asked": """
    strict debug loss_watchdog_threshold loss_watchdog_patience sample_packing_eff_est total_num_tokens
    total_supervised_tokens axolotl_config_path verbose""",
    "lorakit eval measures a run, lorakit merge merges it, lorakit chat talks to it": """
    eval_table_size eval_max_new_tokens do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset
    bench_split bench_source_max_len gradio_title gradio_share gradio_server_name gradio_server_port
    gradio_max_new_tokens gradio_temperature lm_eval_tasks lm_eval_batch_size lm_eval_post_train lm_eval_model
    merge_lora merge_method lora_fan_in_fan_out base_model_ignore_patterns output""",
    "no embedding gets an adapter here": "loraplus_lr_embedding",
    "lorakit finds the token that ends a turn in the chat template, and always trains it": "eot_tokens",
}

_REFUSED = (
    (
        _SFT,
        "Import a config of supervised fine-tuning.",
        """
        rl trl vllm reward_model process_reward_model num_labels dpo_use_weighting dpo_use_logits_to_keep dpo_beta
        dpo_generate_during_eval dpo_norm_loss dpo_padding_free dpo_label_smoothing dpo_loss_type orpo_alpha
        rpo_alpha simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight rl_beta beta max_prompt_len=512
        pretraining_dataset pretraining_sample_concatenation pretrain_multipack_attn=true
        pretrain_multipack_buffer_size=10000 streaming grpo_beta diffusion kd_trainer kd_ce_alpha kd_alpha=1
        kd_temperature=1 kd_beta kd_normalize_topk kd_online_server_base_url kd_online_topk kd_online_server
        kd_online_timeout kd_temperature_min ebft center_rewards_coefficient precompute_ref_log_probs
        dpo_use_liger_kernel dpo_loss_weights hatchery nemo_gym_enabled nemo_gym_dir nemo_gym_auto_clone
        nemo_gym_config_paths nemo_gym_head_port nemo_gym_server_timeout nemo_gym_verify_timeout
        nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start nemo_gym_model_name nemo_gym_multi_turn
        nemo_gym_max_turns""",
    ),
    (
        "lorakit trains text alone",
        "Import a config without images.",
        "processor_type image_size image_resize_algorithm processor_config processor_kwargs freeze_mm_modules "
        "role_boundaries",
    ),
    (
        "remote code is never switched on by a recipe: lorakit runs no code of a model's folder",
        "Remove it, and use a base that transformers knows by itself.",
        "trust_remote_code",
    ),
    (
        "lorakit takes the base's tokenizer as it is, but for tokens that model.add_tokens adds",
        "Remove it where the base has these already, or import with --partial.",
        """
        tokens added_tokens_overrides special_tokens resize_token_embeddings_to_32x shrink_embeddings
        mean_resizing_embeddings tokenizer_config tokenizer_use_mistral_common tokenizer add_eos_token add_bos_token""",
    ),
    (
        "lorakit takes the base's config as it is",
        "Remove it, or change the base's config.json in a folder of your own.",
        """
        overrides_of_model_config model_config overrides_of_model_kwargs model_kwargs rope_scaling
        model_quantization_config model_quantization_config_kwargs quantize_moe_experts""",
    ),
    (
        "lorakit trains the adapter's matrices by the plain cross-entropy of the answers",
        _PARTIAL,
        """
        neftune_noise_alpha noisy_embedding_alpha label_smoothing_factor unfrozen_parameters relora relora_steps
        relora_warmup_steps relora_anneal_steps relora_prune_ratio relora_prune_method relora_cpu_offload
        jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps lisa_n_layers
        lisa_step_interval lisa_layers_attribute=model.layers lora_target_parameters peft_layer_replication
        peft_layers_pattern llama4_linearized_experts peft_trainable_token_indices peft_ensure_weight_tying
        embedding_lr embedding_lr_scale lr_groups optim_target_modules use_dft use_eaft eaft_alpha eaft_k loss_type
        liger_use_token_scaling router_aux_loss_coef s2_attention sage_attention fix_untrained_tokens use_pose
        pose_split_on_token_ids
        pose_max_context_len pose_num_chunks spectrum_top_fraction spectrum_model_name galore_rank torchdistx_path
        output_router_logits expert_parallel reinit_weights trainer_cls scaling_softmax scaling_softmax_factor
        scaling_softmax_bias fp32_norms fp32_norm_classes use_onebitllms mora dense_mixer grokfast_alpha
        grokfast_lamb nonexpert_quantization nvfp4_merge_aware nvfp4_merge_aware_start_step recipe save_compressed
        llmcompressor dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank
        qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits
        qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size use_dsv4_kernels
        use_glm_dsa_kernels dsv4_fp8_nonexpert_mode dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel dsv4_bf16_all
        dsv4_fp4_grouped_mode gemma4_fp8_nonexpert gemma4_nf4_nonexpert""",
    ),
    (
        "lorakit's schedules are cosine and linear, down to 0 or a share of the peak, and constant",
        _PARTIAL,
        "cosine_constant_lr_ratio=1 lr_quadratic_warmup lr_div_factor",
    ),
    (
        "lorakit has no such number format",
        "Write bf16: auto.",
        "fp8 fp8_config fp8_enable_fsdp_float8_all_gather qat quantization nvfp4_training",
    ),
    (
        "lorakit shares out rows over devices, but no parts of a row or of a product",
        _PARTIAL,
        """
        sequence_parallel_degree=1 context_parallel_size=1 tensor_parallel_size=1 dp_shard_size dp_replicate_size=1
        expert_parallel_size=1 expert_parallel_backend expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes
        expert_parallel_token_capacity expert_parallel_fallback_on_unsupported heads_k_stride=1 ring_attn_func""",
    ),
    (
        "lorakit has nothing for it, and it changes which rows are trained",
        _PARTIAL,
        """
        skip_prepare_dataset min_sample_len=2 curriculum_sampling dataset_shard_num dataset_shard_idx
        dataloader_drop_last max_packed_sequence_len mixed_dataset_weights""",
    ),
    (
        "Axolotl reads no key of this name, and quantizes to nf4, its constants too",
        "Write bnb_config_kwargs, which Axolotl reads, or remove it.",
        """
        bnb_4bit_quant_type=nf4 bnb_4bit_use_double_quant=true bnb_4bit_compute_dtype=bfloat16|float16|bf16|fp16|auto
        use_qlora=true use_lora=true""",
    ),
    (
        "a plugin runs code of its own, which lorakit does not",
        "Remove it, or import with --partial to train without it.",
        "plugins",
    ),
)
_ENTRY_READ = """shards shards_idx path data_files split name type ds_type revision field field_messages field_tools
    field_system message_field_role message_field_content message_property_mappings roles roles_to_train train_on_eos
    message_field_training chat_template chat_template_jinja conversation field_human field_model"""
_ENTRY_HARMLESS = (
    "preprocess_shards field_thinking template_thinking_key chat_template_kwargs.tokenize load_in_parallel"
)
_ENTRY_OFF = """input_transform input_format message_field_training_detail split_thinking
    drop_system_message logprobs_field temperature trust_remote_code chat_template_kwargs eot_tokens train_on_eot
    overlap_len=0 step_separator max_completion_length train_on_last_step_only field_chosen field_rejected skip=0
    field_prompt field_completion field_label text_column weight=1 merge_weight"""

DATASET_KEYS: dict[str, Any] = {
    "datasets": ByFunction("it is read as a list of sources"),
    "test_datasets": ByFunction("it is read as a list of sources"),
    "chat_template": ByFunction("no row goes through a chat template"),
    "chat_template_jinja": ByFunction("no row goes through a chat template"),
    "default_system_message": ByFunction("no row has a system prompt"),
    "train_on_inputs": ByFunction("the rows say what is trained"),
    **{
        f"{name}[].{key}": record
        for name in ("datasets", "test_datasets")
        for key, record in {
            **keys_with(ByFunction("rows of this type do not have it"), _ENTRY_READ),
            **keys_with(Harmless("it does not change the rows"), _ENTRY_HARMLESS),
            **keys_with(
                OffOnly(
                    "lorakit has nothing for it, and it changes what is trained",
                    "Change the rows, or import with --partial to train without it.",
                ),
                _ENTRY_OFF,
            ),
        }.items()
    },
}

KEYS: dict[str, Any] = {
    **{key: value for reason, keys in _HARMLESS.items() for key, value in keys_with(Harmless(reason), keys).items()},
    **{
        key: value
        for reason, remedy, keys in _REFUSED
        for key, value in keys_with(OffOnly(reason, remedy), keys).items()
    },
    **training.OPTIMIZER_KEYS,
    **DATASET_KEYS,
    **keys_with(
        Harmless(
            "on several devices train.sharding: fsdp shares the base out; how its blocks are wrapped is lorakit's"
        ),
        "fsdp fsdp_config fsdp_final_state_dict_type fsdp_version deepspeed",
    ),
    **keys_with(
        ByFunction("there is no adapter, or it is off"),
        """
        base_model model_revision revision_of_model adapter lora_r lora_alpha lora_dropout lora_target_modules
        lora_target_linear lora_modules_to_save lora_model_dir peft_layers_to_transform peft_use_dora
        peft_use_rslora peft_init_lora_weights peft peft.loftq_config peft.loftq_config.loftq_bits peft.backend
        peft.weight_dtype loraplus_lr_ratio load_in_4bit load_in_8bit bnb_config_kwargs flash_attention
        sdp_attention eager_attention flex_attention xformers_attention attn_implementation bf16 fp16 bfloat16
        float16 float32 sequence_len excess_length_strategy num_epochs max_steps micro_batch_size
        gradient_accumulation_steps batch_size sample_packing learning_rate lr_scheduler lr_scheduler_kwargs
        warmup_steps warmup_ratio optimizer weight_decay max_grad_norm seed gradient_checkpointing val_set_size
        eval_steps evals_per_epoch eval_strategy evaluation_strategy save_steps saves_per_epoch save_strategy
        save_total_limit early_stopping_patience load_best_model_at_end metric_for_best_model greater_is_better
        cosine_min_lr_ratio output_dir dataset_exact_deduplication lora_rank_pattern lora_alpha_pattern
        chat_template_kwargs""",
    ),
}
