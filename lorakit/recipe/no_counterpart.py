"""Settings of other fine-tuning tools that lorakit has nothing for, and what it does instead."""

_GROUPS = {
    "it writes every logged step into log.jsonl in the run's folder": """
        logging_steps log_every_n_steps logging_strategy logging_first_step logging_dir log_level steps_per_report
        metric_logger plot_loss logging_nan_inf_filter log_peak_memory_stats profiler include_tokens_per_second""",
    "it reports to no tracker; log.jsonl in the run's folder has every logged step": """
        report_to wandb_project wandb_entity wandb_name wandb_watch wandb_log_model wandb_run_id wandb_mode use_wandb
        use_mlflow mlflow_tracking_uri mlflow_experiment_name use_comet comet_project_name use_tensorboard use_swanlab
        swanlab_project trackio_project_name wandb""",
    "it uploads nothing, and takes tokens from the environment alone (HF_TOKEN)": """
        hub_model_id hub_strategy push_to_hub hub_token hub_private_repo hf_token token hf_use_auth_token
        push_dataset_to_hub push_to_hub_model_id save_to_hub""",
    "it takes the processes and the memory that the machine has": """
        dataset_num_proc preprocessing_num_workers dataloader_num_workers dataloader_pin_memory num_workers num_proc
        dataset_processes dataloader_prefetch_factor dataloader_drop_last low_cpu_mem_usage streaming buffer_size
        preprocessing_batch_size torch_empty_cache_steps""",
    "it trains on one device, the GPU where there is one": """
        fsdp fsdp_config fsdp_version deepspeed ddp ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb num_gpus
        gpus n_gpu device device_map max_memory distributed distributed_strategy local_rank world_size gpu_memory_limit
        context_parallel_size tensor_parallel_size sequence_parallel_degree no_cuda use_cpu""",
    "it keeps prepared rows in its own cache (LORAKIT_CACHE), by content": """
        dataset_prepared_path overwrite_cache cache_dir tokenized_path skip_prepare_dataset dataset_keep_in_memory""",
    "it is an option of the command: lorakit train --resume": """
        resume_from_checkpoint auto_resume_from_checkpoints resume resume_training""",
    "it is an option of the command: lorakit train --overwrite": "overwrite_output_dir",
    "it takes its own kernels where they fit": """
        torch_compile torch_compile_backend torch_compile_mode compile liger_kernel use_liger_kernel liger_rope
        liger_rms_norm liger_swiglu liger_glu_activation liger_fused_linear_cross_entropy enable_liger_kernel plugins
        lora_mlp_kernel lora_qkv_kernel lora_o_kernel use_unsloth unsloth_lora_mlp unsloth_lora_qkv use_kernels tf32
        use_tf32 cut_cross_entropy chunked_cross_entropy full_finetuning_kernel""",
    "it keeps activations on the device": "enable_activation_offloading activation_offloading",
    "it trains on answers (supervised fine-tuning) and nothing else": """
        stage rl do_train do_eval do_predict pref_beta pref_loss pref_ftx dpo_beta kto_desirable_weight beta
        reward_model rl_beta process_reward_model trl reward_funcs""",
    "it takes the base's tokenizer as it is; adapter.train_modules trains embeddings and head": """
        special_tokens tokens added_tokens_overrides resize_vocab resize_token_embeddings_to_32x tokenizer
        tokenizer_type tokenizer_config tokenizer_use_fast tokenizer_legacy use_fast_tokenizer tokenizer_name_or_path
        tokenizer_name split_special_tokens new_special_tokens eot_tokens pad_token eos_token bos_token
        unk_token add_eos_token add_bos_token padding_side pad_to_multiple_of""",
    "the base's config.json says it": """
        model_type type_of_model is_llama_derived_model is_falcon_derived_model is_mistral_derived_model model_config
        config_name model_config_type rope_scaling rope_theta overrides_of_model_config cls_model_config""",
    "it runs no code of a model's folder": "trust_remote_code trust_remote_code_model allow_remote_code",
    "it batches rows by length and shuffles them by train.seed": """
        group_by_length length_column_name pad_to_sequence_len pad_to_max_length shuffle shuffle_merged_datasets
        curriculum_sampling train_sampling_strategy shuffle_dataset dataloader_shuffle disable_shuffling
        mix_strategy interleave_probs dataset_shards""",
    "it evaluates as many rows at once as fit": """
        per_device_eval_batch_size eval_batch_size eval_accumulation_steps eval_sample_packing eval_packing
        val_batches test_batches eval_max_new_tokens eval_table_size""",
    "it has AdamW with torch's betas and epsilon": """
        adam_beta1 adam_beta2 adam_epsilon adam_eps beta1 beta2 betas eps optim_args optimizer_args momentum
        optim_target_modules galore_rank use_galore use_badam use_apollo lr_scheduler_kwargs lr_groups""",
    "it trains on the plain cross-entropy of the answers": """
        label_smoothing_factor loss neftune_noise_alpha noisy_embedding_alpha z_loss loss_type use_dft_loss
        use_eaft_loss dft_alpha""",
    "it trains the adapter's matrices alone, without biases": """
        bias lora_bias use_bias lora_task_type task_type use_peft inference_mode fan_in_fan_out lora_fan_in_fan_out
        loftq_config create_new_adapter layers_pattern peft_autoloss freeze_trainable_layers
        freeze_trainable_modules freeze_extra_modules unfrozen_parameters freeze lisa_n_layers relora_steps""",
    "lorakit eval answers with the likeliest token each time": """
        temperature top_p top_k do_sample num_beams predict_with_generate repetition_penalty generation_config
        generation_max_length""",
    "it checks recipe, rows, loss and merge without being asked": """
        strict debug sanity_check loss_watchdog_threshold loss_watchdog_patience detect_anomaly verbose
        save_safetensors save_only_model save_on_each_node safe_serialization safetensors""",
    "lorakit eval measures a run after it, and lorakit merge merges it": """
        test do_bench_eval do_causal_lm_eval test_file test_data predict export_dir export_size infer_backend""",
}

NO_COUNTERPART = {key: instead for instead, keys in _GROUPS.items() for key in keys.split()}
"""Their key -> what lorakit does instead."""
