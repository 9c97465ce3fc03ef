"""Names that other fine-tuning tools give to our settings and values, so that an error can name ours."""

_KEYS: dict[tuple[str, str], str] = {
    ("train", ""): "training training_args training_arguments",
    ("evaluate", ""): "evaluation",
    ("adapter", ""): "lora lora_config lora_parameters peft peft_config",
    ("name", ""): "run_name",
    ("model.base", ""): """
        base_model model_name model_id model_path model_name_or_path pretrained_model_name_or_path checkpointer
        checkpoint_dir model.name model.path model.id""",
    ("model.revision", ""): "model_revision hub_revision revision_of_model",
    ("model.dtype", "It takes auto, bfloat16, float16 or float32"): """
        bf16 fp16 precision mixed_precision torch_dtype compute_dtype bnb_4bit_compute_dtype""",
    ("model.dtype: bfloat16", ""): "pure_bf16",
    ("model.quantization: nf4", ""): "load_in_4bit",
    ("model.quantization: q8", ""): "load_in_8bit",
    ("model.quantization", "It takes none, q8, q4 or nf4"): """
        quantization_bit bnb_4bit_quant_type quantization_method bits""",
    ("model.double_quant", ""): "bnb_4bit_use_double_quant double_quantization",
    ("model.attention: flash_attention_2", ""): "flash_attention flash_attn",
    ("model.attention: sdpa", ""): "sdp_attention",
    ("model.attention: eager", ""): "eager_attention",
    ("model.attention: flex_attention", ""): "flex_attention",
    (
        "model.attention",
        "It takes auto, eager, sdpa, varlen, flash_attention_2, flash_attention_3 or flex_attention",
    ): """
        attn_implementation xformers_attention s2_attention""",
    ("model.chat_template", ""): "prompt_template prompt_style chat_template_jinja template",
    ("data.format", "It takes {template: {user: ..., assistant: ...}}"): "data.template",
    ("model.add_tokens", ""): "tokens add_special_tokens new_special_tokens added_tokens extra_tokens",
    ("model.template_variables", "It takes {enable_thinking: false}"): "chat_template_kwargs enable_thinking",
    ("adapter.kind", ""): """
        adapter_type peft_type finetuning_type fine_tune_type finetune_type peft_method adapter.type adapter.method
        adapter.name""",
    ("adapter.kind: none", ""): "full_finetuning",
    ("adapter.kind: dora", ""): "peft_use_dora use_dora",
    ("adapter.kind: rslora", ""): "peft_use_rslora use_rslora",
    ("adapter.kind: pissa", ""): "pissa_init",
    ("adapter.kind", "It takes pissa, olora, eva and loftq too"): "peft_init_lora_weights init_lora_weights",
    ("adapter.from", ""): """
        adapter_path adapter_name_or_path lora_model_dir resume_adapter_file peft_model_path adapter.path""",
    ("adapter.rank", ""): "r lora_r lora_rank",
    ("adapter.alpha", ""): "lora_alpha",
    ("adapter.dropout", ""): "lora_dropout",
    ("adapter.rank_overrides", ""): "rank_pattern",
    ("adapter.alpha_overrides", ""): "alpha_pattern",
    ("adapter.train_modules", ""): "additional_target modules_to_save lora_modules_to_save",
    ("adapter.targets", ""): "target_modules lora_target lora_target_modules",
    ("adapter.targets: all-linear", ""): "lora_target_linear",
    ("adapter.targets", "It takes all-linear, attention, mlp or module names"): """
        lora_attn_modules apply_lora_to_mlp apply_lora_to_output""",
    ("adapter.exclude", ""): "exclude_modules",
    ("adapter.layers", "It takes all, or a list of layer numbers and ranges"): """
        num_layers lora_layers peft_layers_to_transform layers_to_transform""",
    ("data.train", ""): """
        dataset datasets dataset_dir dataset_name dataset_path data_path train_data train_file train_dataset""",
    ("data.train: {path: FILE, take: N}", ""): "max_samples",
    ("data.eval", ""): "eval_file eval_dataset test_datasets validation validation_file",
    ("data.eval", "A fraction holds out that share of the training rows, a whole number so many"): """
        val_size val_split validation_split eval_split test_size val_set_size""",
    ("data.format", ""): "dataset_format",
    ("data.columns: {text: NAME}", ""): "dataset_text_field text_column",
    ("data.columns: {messages: NAME}", ""): "field_messages",
    ("data.system", ""): "default_system_message system_prompt system_message",
    ("data.train_on", "It takes assistant, last or all"): """
        train_on_inputs train_on_responses_only assistant_only_loss completion_only_loss train_on_prompt
        train_on_completions mask_prompt roles_to_train response_template instruction_template""",
    ("data.train_on: last", ""): "mask_history",
    ("data.packing", "It takes auto, on or off"): "sample_packing neat_packing padding_free",
    ("data.max_length", ""): """
        seq_len seq_length context_length block_size sequence_len cutoff_len max_seq_len max_seq_length
        model_max_length""",
    ("data.overlong", ""): "excess_length_strategy",
    ("train.learning_rate", ""): "lr",
    ("train.lora_plus", ""): "loraplus_lr_embedding loraplus_lr_ratio",
    ("train.optimizer", ""): "optim",
    ("train.betas: [0.9, 0.999]", ""): "adam_beta1 adam_beta2 beta1 beta2",
    ("train.epsilon", ""): "adam_epsilon adam_eps eps",
    ("train.min_rate", "It is a share of the peak rate"): """
        cosine_min_lr_ratio min_lr_ratio min_lr_rate min_lr lr_scheduler_kwargs""",
    ("train.batch_tokens", ""): "tokens_per_step tokens_per_batch max_batch_tokens",
    ("train.epochs", ""): "num_epochs n_epochs num_train_epochs max_epochs",
    ("train.steps", ""): "max_steps max_steps_per_epoch iters max_iters",
    ("train.seed", ""): "random_state data_seed random_seed",
    ("train.max_grad_norm", ""): "clip_grad_norm gradient_clip_val max_norm gradient_clipping",
    ("train.gradient_checkpointing", "It takes true, false or auto"): """
        grad_checkpoint enable_activation_checkpointing activation_checkpointing use_gradient_checkpointing
        gradient_checkpointing_kwargs""",
    ("train.kernels", "It takes auto, on or off"): "liger_kernel use_liger_kernel enable_liger_kernel use_kernels",
    ("train.compile", "It takes auto, on or off"): "torch_compile compile_model",
    ("train.sharding: fsdp", ""): "fsdp fsdp_config fsdp_version fsdp_transformer_layer_cls_to_wrap",
    ("train.sharding: zero-3", "zero-2 and zero-3 are DeepSpeed's"): "deepspeed deepspeed_config zero_stage zero3",
    ("train.sharding: none", "It is data parallel: every device holds the whole base"): """
        ddp ddp_timeout ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb""",
    ("train.sharding", "How many devices is an option of the command: lorakit train --devices N"): """
        num_gpus gpus n_gpu num_devices distributed local_rank world_size distributed_backend""",
    ("train.batch_size", "It is the effective batch: micro-batch times accumulation steps; lorakit splits it"): """
        train_batch_size total_batch_size global_batch_size grad_accum grad_accumulation_steps
        gradient_accumulation_steps""",
    ("train.micro_batch", "train.batch_size is the effective batch"): """
        micro_batch_size per_device_batch_size per_device_train_batch_size""",
    ("train.schedule", ""): "lr_scheduler lr_scheduler_type",
    ("train.warmup", "It takes a fraction or a number of steps"): "warmup_ratio warmup_steps",
    ("train.eval_every", "It takes a fraction of the run or a number of steps"): """
        eval_steps eval_strategy evaluation_strategy steps_per_eval evals_per_epoch""",
    ("train.save_every", "It takes a fraction of the run or a number of steps"): """
        saves_per_epoch save_steps save_strategy""",
    ("train.keep", ""): "save_total_limit",
    ("train.early_stopping: {patience: 3}", ""): "early_stopping_patience",
    ("evaluate.metrics", ""): "metric",
    ("evaluate.metrics", "Benchmarks are a command: lorakit benchmark"): "evaluate.tasks evaluate.benchmarks",
    ("evaluate.rows", ""): "evaluate.limit evaluate.num_samples",
    ("evaluate.max_new_tokens", ""): "evaluate.max_tokens",
    ("output.dir", ""): "output_dir save_dir output.path output.folder",
    ("output.merged", ""): "merge merge_lora",
    ("output.export", ""): "exports export_formats quantization_method",
}
"""What to write here (a key, or a key with a value), and why where that is not plain -> their names for it, some of
them in one section only."""

_OF_A_SOURCE = {
    "format": "type dataset_type",
    "path": "name dataset file",
    "take": "samples num_samples max_samples",
    "subset": "config config_name dataset_config subset_name configuration",
    "weight": "prob probability",
}
"""Our key of a source of rows -> theirs."""

_QUANTIZATIONS = {"q4": "fp4", "q8": "int8 8 8bit 8-bit", "nf4": "int4 4 4bit 4-bit bnb bitsandbytes"}
_DTYPES = {"float32": "fp32 float", "float16": "fp16 half", "bfloat16": "bf16"}
_ATTENTIONS = {
    "flash_attention_2": "flash fa2 flash_attn",
    "flash_attention_3": "fa3",
    "sdpa": "xformers sdp",
    "flex_attention": "flex",
}
_ADAMW_8BIT = {"adamw-8bit": "adamw_torch_8bit adamw_8bit adamw_bnb_8bit", "paged-adamw-8bit": "paged_adamw_8bit"}
_OPTIMIZERS = {"adamw": "adam adamw_torch adamw_torch_fused", "paged-adamw": "paged_adamw_32bit", **_ADAMW_8BIT}
_COSINES = "cosine_with_restarts cosine_with_min_lr"
_SCHEDULES = {"constant": "constant_with_warmup", "cosine": _COSINES, "linear": "polynomial"}
_ROUGE = {"rouge-l": "rougel", "rouge-1": "rouge1", "rouge-2": "rouge2"}
_METRICS = {"token-f1": "f1", "exact-match": "accuracy acc em exact", "json-valid": "json", **_ROUGE}
_ROWS = {
    "messages": "chat chatml openai chat_template",
    "sharegpt": "conversations",
    "prompt-completion": "input_output",
}
_TEXTS = {"alpaca": "instruct instruction", "text": "completion raw"}
_TURNS = {"assistant": "response responses answers completions output"}
_ACTIONS = {"drop": "skip", "fix": "remove", "report": "warn", "off": "ignore"}
_ADAPTERS = {"lora": "qlora", "none": "full", "all-linear": "all linear"}
_VALUES: dict[str, str] = {
    "semantic-similarity": "bertscore",
    **_QUANTIZATIONS,
    **_DTYPES,
    **_ATTENTIONS,
    **_OPTIMIZERS,
}
_VALUES |= {**_SCHEDULES, **_METRICS, **_ROWS, **_TEXTS, **_TURNS, **_ACTIONS, **_ADAPTERS}
"""Our word -> theirs for it, where a field takes ours."""

_NO_COUNTERPART: dict[str, str] = {
    "it writes every logged step into log.jsonl in the run's folder; track names the trackers that get it too": """
        logging_steps log_every_n_steps logging_strategy logging_first_step logging_dir log_level steps_per_report
        metric_logger plot_loss report_to wandb wandb_project wandb_entity wandb_name wandb_watch wandb_run_id
        wandb_mode use_wandb use_mlflow mlflow_tracking_uri use_comet use_tensorboard use_swanlab""",
    "it uploads nothing, and takes tokens from the environment alone (HF_TOKEN)": """
        hub_model_id hub_strategy push_to_hub hub_token hub_private_repo hf_token token push_dataset_to_hub""",
    "it takes the device, the processes and the memory that the machine has": """
        dataset_num_proc preprocessing_num_workers dataloader_num_workers dataloader_pin_memory num_workers num_proc
        dataset_processes low_cpu_mem_usage streaming no_cuda use_cpu device device_map max_memory gpu_memory_limit
        enable_activation_offloading activation_offloading""",
    "it shares out rows over devices, and with train.sharding the base, but no parts of a row or of a product": """
        context_parallel_size tensor_parallel_size sequence_parallel_degree pipeline_parallel_size""",
    "it keeps prepared rows in its own cache (LORAKIT_CACHE), by content": """
        dataset_prepared_path overwrite_cache cache_dir tokenized_path skip_prepare_dataset""",
    "it is an option of the command: lorakit train --resume": """
        resume_from_checkpoint auto_resume_from_checkpoints resume resume_training""",
    "it is an option of the command: lorakit train --overwrite": "overwrite_output_dir",
    "it takes its own kernels where they fit": """
        plugins lora_mlp_kernel lora_qkv_kernel lora_o_kernel use_unsloth tf32 cut_cross_entropy""",
    "it trains on answers (supervised fine-tuning) and nothing else": """
        stage rl do_train do_eval do_predict pref_beta pref_loss dpo_beta beta reward_model trl reward_funcs""",
    "it takes the base's tokenizer, with what model.add_tokens adds; adapter.train_modules trains whole embeddings": """
        special_tokens added_tokens_overrides resize_vocab tokenizer tokenizer_type tokenizer_config
        use_fast_tokenizer tokenizer_name_or_path tokenizer_name eot_tokens pad_token eos_token
        bos_token unk_token add_eos_token add_bos_token padding_side pad_to_multiple_of""",
    "the base's config.json says it": "model_type type_of_model model_config config_name rope_scaling rope_theta",
    "it runs no code of a model's folder": "trust_remote_code trust_remote_code_model allow_remote_code",
    "it batches rows by length and shuffles them by train.seed": """
        group_by_length length_column_name pad_to_sequence_len pad_to_max_length shuffle shuffle_merged_datasets
        curriculum_sampling shuffle_dataset mix_strategy interleave_probs""",
    "it evaluates as many rows at once as fit": """
        per_device_eval_batch_size eval_batch_size eval_accumulation_steps eval_sample_packing val_batches""",
    "it has AdamW alone, with betas, epsilon and weight decay": """
        optim_args optimizer_args momentum use_galore use_badam use_apollo""",
    "it trains the adapter's matrices alone, by the plain cross-entropy of the answers": """
        label_smoothing_factor loss neftune_noise_alpha noisy_embedding_alpha loss_type bias lora_bias use_bias
        lora_task_type task_type use_peft inference_mode fan_in_fan_out loftq_config freeze_trainable_layers
        unfrozen_parameters relora_steps""",
    "lorakit eval answers with the likeliest token each time": """
        temperature top_p top_k do_sample num_beams predict_with_generate repetition_penalty generation_config""",
    "it checks recipe, rows, loss and merge without being asked": """
        strict debug sanity_check detect_anomaly verbose save_safetensors save_only_model safe_serialization""",
    "lorakit eval measures a run after it, and lorakit merge merges it": """
        test do_bench_eval do_causal_lm_eval test_file test_data predict export_dir infer_backend""",
}
"""What lorakit does instead -> their settings for which it has nothing."""

KEY_ALIASES = {alias: ours for ours, aliases in _KEYS.items() for alias in aliases.split()}
OF_A_SOURCE = {alias: ours for ours, aliases in _OF_A_SOURCE.items() for alias in aliases.split()}
VALUE_ALIASES = {alias: ours for ours, aliases in _VALUES.items() for alias in aliases.split()}
NO_COUNTERPART = {alias: instead for instead, aliases in _NO_COUNTERPART.items() for alias in aliases.split()}

VALUE_REMEDIES = {
    ("adapter", "qlora"): "Write {kind: lora}, and model.quantization: nf4, which makes it QLoRA.",
    ("adapter.kind", "qlora"): "Write lora, and model.quantization: nf4, which makes it QLoRA.",
    ("adapter.kind", "ia3"): "lorakit has no ia3. Write for example lora.",
    ("data.train_on", "completion"): "Did you mean assistant?",
    ("evaluate.metrics", "loss"): "The loss is always measured. Write for example exact-match.",
    ("evaluate.metrics", "perplexity"): "Perplexity is always measured. Write for example exact-match.",
    ("train.eval_every", "epoch"): "Write a fraction of the run: with epochs: 4, once an epoch is 0.25.",
    ("train.save_every", "epoch"): "Write a fraction of the run: with epochs: 4, once an epoch is 0.25.",
}
"""What to write for one value of one key (of a list's items, the list's)."""

SWITCHES = {True: ("on", "report", "nf4"), False: ("off", "none")}
"""Words that stand for true and for false where a field takes no switch but one of them."""
