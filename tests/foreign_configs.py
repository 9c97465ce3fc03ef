"""Configs of other tools, of the common shapes: a text, what the recipe must say, and the keys that must be refused."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """`text` after the tool's common lines (a key that it writes again replaces theirs); `says`: dotted keys of the
    loaded recipe; `refused`: the keys that have no counterpart."""

    text: str
    says: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


AXOLOTL = """\
base_model: org/base
datasets:
  - path: rows.jsonl
    type: chat_template
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 3
learning_rate: 2e-4
"""
AXOLOTL_CASES = {
    "the least": Case(
        "",
        {
            "train.batch_size": 6,
            "train.epochs": 1,
            "data.max_length": 512,
            "data.overlong": "drop",
            "data.train_on": "assistant",
            "train.schedule": "cosine",
            "train.warmup": 0.03,
            "train.learning_rate": 2e-4,
            "adapter.dropout": 0.0,
            "adapter.targets": "all-linear",
            "data.eval": None,
            "model.quantization": "none",
        },
    ),
    "qlora": Case(
        "adapter: qlora\nload_in_4bit: true\nbf16: auto\noptimizer: paged_adamw_32bit\nlora_dropout: 0.05\n"
        "sequence_len: 2048\nnum_epochs: 4\nval_set_size: 0.05\nevals_per_epoch: 4\nsaves_per_epoch: 1\n",
        {
            "model.quantization": "nf4",
            "model.double_quant": True,
            "model.dtype": "auto",
            "train.optimizer": "paged-adamw",
            "adapter.dropout": 0.05,
            "data.eval": 0.05,
            "train.eval_every": 0.0625,
            "train.save_every": 0.25,
        },
    ),
    "eight bits": Case(
        "load_in_8bit: true\noptimizer: adamw_bnb_8bit\nfp16: true\nbf16: false\n",
        {"model.quantization": "q8", "train.optimizer": "adamw-8bit", "model.dtype": "float16"},
    ),
    "from and value": Case(
        "datasets:\n  - path: rows.jsonl\n    type: chat_template\n    field_messages: talk\n"
        "    message_property_mappings:\n      role: from\n      content: value\n    roles_to_train: [assistant]\n"
        "    train_on_eos: turn\n    roles:\n      user: [human, seeker]\n      assistant: [gpt]\n",
        {
            "data.train.format.sharegpt.roles": {"seeker": "user"},
            "data.train.columns": {"conversations": "talk"},
            "data.train_on": "assistant",
        },
    ),
    "all tokens": Case(
        "train_on_inputs: true\nmax_steps: 60\nwarmup_steps: 10\nlr_scheduler: linear\nseed: 7\nmax_grad_norm: 0.3\n",
        {
            "data.train_on": "all",
            "train.steps": 60,
            "train.epochs": None,
            "train.warmup": 10,
            "train.schedule": "linear",
            "train.seed": 7,
            "train.max_grad_norm": 0.3,
        },
    ),
    "documents": Case(
        "datasets:\n  - path: rows.jsonl\n    type: completion\n    field: body\n",
        {"data.train.format": "text", "data.train.columns": {"text": "body"}, "data.overlong": "split"},
    ),
    "full fine-tuning": Case(
        "adapter:\nlora_r:\nlora_alpha:\nlora_target_linear:\nweight_decay: 0.1\n",
        {"adapter.kind": "none", "train.weight_decay": 0.1},
    ),
    "dora on some modules": Case(
        "lora_target_linear: false\nlora_target_modules: [q_proj, v_proj]\npeft_use_dora: true\n"
        "lora_modules_to_save: [embed_tokens]\npeft_layers_to_transform: [0, 1]\nloraplus_lr_ratio: 16\n",
        {
            "adapter.kind": "dora",
            "adapter.targets": ["q_proj", "v_proj"],
            "adapter.train_modules": ["embed_tokens"],
            "adapter.layers": [0, 1],
            "train.lora_plus": 16,
        },
    ),
    "test data and plugins for speed": Case(
        "test_datasets:\n  - path: more.jsonl\n    type: chat_template\n    split: train\neval_steps: 50\n"
        "plugins:\n  - axolotl.integrations.liger.LigerPlugin\nliger_rope: true\nspecial_tokens:\n  pad_token: <pad>\n"
        "deepspeed: deepspeed_configs/zero2.json\ndataset_exact_deduplication: true\n",
        {"train.eval_every": 50, "data.clean.duplicates": "fix", "train.sharding": "auto"},
    ),
    "packed": Case(
        "sample_packing: true\npad_to_sequence_len: true\n", {"train.batch_tokens": 3072, "data.packing": "on"}
    ),
    "prompts as plain text": Case(
        "base_model: Qwen/Qwen2.5-0.5B\ndatasets:\n  - path: org/rows\n    type: alpaca\nchat_template: chatml\n",
        {"data.train.format.template.assistant": "{output}", "data.train_on": "assistant"},
    ),
    "plain text on a base of which nothing is known": Case(
        "datasets:\n  - path: org/rows\n    type: alpaca\n", {}, ("datasets[0].type",)
    ),
    "a prompt of one's own": Case(
        "base_model: mistralai/Mistral-7B-v0.1\ndatasets:\n  - path: org/rows\n    type:\n      system_prompt: ''\n"
        "      field_instruction: question\n      field_output: answer\n      format: '[INST] {instruction} [/INST]'\n"
        "      no_input_format: '[INST] {instruction} [/INST]'\n",
        {"data.train.format.template.assistant": "{answer}"},
    ),
    "a prompt with a place that nothing fills": Case(
        "base_model: mistralai/Mistral-7B-v0.1\ndatasets:\n  - path: org/rows\n    type:\n"
        "      format: '[INST] {question} [/INST]'\n",
        {},
        ("datasets[0].type.format",),
    ),
    "what has no counterpart": Case(
        "neftune_noise_alpha: 5\ntrust_remote_code: true\nlr_scheduler: rex\noptimizer: muon\n"
        "chat_template: metharme\nval_set_size: 1.5\nplugins: [my.plugin]\nadam_beta2: 2\n"
        "sequence_len_: 3\nspecial_tokens: {eos_token: <y>}\nliger_use_token_scaling: true\n"
        "attn_implementation: sage\ndatasets:\n  - path: rows.jsonl\n    type: chat_template\n    split: train[5%:]\n",
        {},
        (
            *("optimizer", "neftune_noise_alpha", "trust_remote_code", "lr_scheduler", "adam_beta2"),
            *("chat_template", "val_set_size", "plugins", "sequence_len_", "special_tokens.eos_token"),
            *("liger_use_token_scaling", "attn_implementation", "datasets[0].split"),
        ),
    ),
    "tokens that the vocabulary lacks": Case(
        "tokens: ['<|im_start|>', '<|im_end|>', <x>]\nspecial_tokens:\n  eos_token: <|im_end|>\n"
        "chat_template: chatml\n",
        {"model.add_tokens": ["<|im_start|>", "<|im_end|>", "<x>"], "model.chat_template": "chatml"},
    ),
    "trackers, secrets and switches that are off": Case(
        "wandb_project: p\nhub_model_id: me/x\nhf_use_auth_token: true\ncomet_api_key: abcdef\nneftune_noise_alpha:\n"
        "rl:\nfsdp:\nfsdp_config:\ngroup_by_length: false\nstrict: false\neot_tokens: [<|eot_id|>]\n"
        "adam_beta1: 0.9\ncosine_min_lr_ratio: 0\nchat_template: tokenizer_default\n",
    ),
}

LLAMA_FACTORY = """\
model_name_or_path: org/base
stage: sft
do_train: true
finetuning_type: lora
dataset: talks
dataset_dir: .
output_dir: saves/x
learning_rate: 1.0e-4
"""
DATASET_INFO = {
    "talks": {"file_name": "rows.jsonl", "formatting": "sharegpt"},
    "chat": {
        "hf_hub_url": "org/chat",
        "formatting": "sharegpt",
        "split": "validation",
        "columns": {"messages": "messages", "system": "sys"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
    "instructions": {"file_name": "more.jsonl"},
    "questions": {"file_name": "more.jsonl", "columns": {"prompt": "question", "response": "answer"}, "num_samples": 9},
    "pairs": {"file_name": "more.jsonl", "ranking": True, "columns": {"chosen": "a", "rejected": "b"}},
    "pictures": {"file_name": "more.jsonl", "columns": {"prompt": "p", "response": "r", "images": "i"}},
}
LLAMA_FACTORY_CASES = {
    "the least": Case(
        "",
        {
            "adapter.rank": 8,
            "adapter.alpha": 16,
            "adapter.targets": "all-linear",
            "data.max_length": 2048,
            "data.overlong": "truncate",
            "data.train_on": "assistant",
            "train.batch_size": 8,
            "train.epochs": 3,
            "train.schedule": "linear",
            "train.warmup": 0,
            "train.learning_rate": 1e-4,
            "data.train.format": "sharegpt",
        },
    ),
    "qlora": Case(
        "quantization_bit: 4\nquantization_method: bnb\nbf16: true\nlora_rank: 16\nlora_target: q_proj,v_proj\n"
        "per_device_train_batch_size: 1\ngradient_accumulation_steps: 8\n"
        "lr_scheduler_type: cosine\nwarmup_ratio: 0.1\n",
        {
            "model.quantization": "nf4",
            "model.double_quant": True,
            "model.dtype": "bfloat16",
            "adapter.rank": 16,
            "adapter.alpha": 32,
            "adapter.targets": ["q_proj", "v_proj"],
            "train.batch_size": 8,
            "train.schedule": "cosine",
            "train.warmup": 0.1,
        },
    ),
    "fp4, without double quantization": Case(
        "quantization_bit: 4\nquantization_type: fp4\ndouble_quantization: false\n",
        {"model.quantization": "q4", "model.double_quant": False},
    ),
    "several data sets": Case(
        "dataset: talks, questions\nmax_samples: 1000\ncutoff_len: 512\n",
        {"data.train.1.format": "prompt-completion", "data.train.1.take": 9, "data.train.0.take": 1000},
    ),
    "a data set of the hub": Case(
        "dataset: chat\neval_dataset: questions\neval_strategy: steps\neval_steps: 20\nmask_history: true\n",
        {
            "data.train.format": "messages",
            "data.train.columns": {"system": "sys"},
            "data.train.split": "validation",
            "data.train_on": "last",
            "train.eval_every": 20,
            "data.eval.format": "prompt-completion",
        },
    ),
    "full fine-tuning": Case(
        "finetuning_type: full\ndeepspeed: examples/deepspeed/ds_z3_config.json\npure_bf16: true\n",
        {"adapter.kind": "none", "model.dtype": "bfloat16", "train.sharding": "auto"},
    ),
    "instructions with inputs": Case("dataset: instructions\n", {"data.train.format.template.assistant": "{output}"}),
    "pissa": Case("pissa_init: true\npissa_iter: -1\n", {"adapter.kind.pissa.iterations": None}),
    "lora plus": Case(
        "loraplus_lr_ratio: 16.0\nuse_rslora: true\nadditional_target: embed_tokens,lm_head\nseed: 1\n",
        {"train.lora_plus": 16, "adapter.kind": "rslora", "adapter.train_modules": ["embed_tokens", "lm_head"]},
    ),
    "every token, a share held out": Case(
        "train_on_prompt: true\nval_size: 0.1\neval_strategy: epoch\nsave_strategy: epoch\nmax_steps: -1\n",
        {"data.train_on": "all", "data.eval": 0.1, "train.eval_every": 0.333333, "train.save_every": 0.333333},
    ),
    "tokens that the vocabulary lacks": Case(
        "add_tokens: <a>,<b>\nadd_special_tokens: <|im_end|>\nresize_vocab: true\n",
        {"model.add_tokens": ["<a>", "<b>", "<|im_end|>"]},
    ),
    "preferences": Case("dataset: pairs\nstage: dpo\npref_beta: 0.3\n", {}, ("stage",)),
    "rows that are preferences": Case("dataset: pairs\n", {}, ("dataset",)),
    "pictures": Case("dataset: pictures\n", {}, ("dataset",)),
    "a misspelt name": Case("dataset: talk\n", {}, ("dataset",)),
    "packed, and what has no counterpart": Case(
        "packing: true\nneftune_noise_alpha: 5\ntemplate: glm4\nshift_attn: true\nlora_ranks: 3\n",
        {},
        ("packing", "neftune_noise_alpha", "template", "shift_attn", "lora_ranks"),
    ),
    "defaults that are off": Case(
        "report_to: none\noverwrite_cache: true\nplot_loss: true\npref_beta: 0.1\nuse_galore: false\nflash_attn: fa2\n"
        "ddp_timeout: 180000000\nresume_from_checkpoint: null\nenable_liger_kernel: true\nhf_hub_token: abc\n",
        {"model.attention": "flash_attention_2"},
    ),
}

UNSLOTH = """\
model: org/base
data:
  local_dataset: [rows.jsonl]
  format_type: chatml
"""
UNSLOTH_CASES = {
    "the least": Case(
        "",
        {
            "model.quantization": "nf4",
            "adapter.rank": 64,
            "adapter.alpha": 16,
            "adapter.targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "data.max_length": 2048,
            "data.overlong": "truncate",
            "data.train_on": "all",
            "train.batch_size": 8,
            "train.epochs": 3,
            "train.learning_rate": 2e-4,
            "train.warmup": 5,
            "train.schedule": "linear",
            "train.optimizer": "adamw-8bit",
            "train.weight_decay": 0.01,
            "train.seed": 3407,
        },
    ),
    "zero steps are off": Case(
        "training:\n  max_steps: 0\n  num_epochs: 2\n  save_steps: 0\n", {"train.epochs": 2, "train.steps": None}
    ),
    "steps": Case(
        "training:\n  max_steps: 30\n  num_epochs: 0\n  save_steps: 30\n",
        {"train.steps": 30, "train.epochs": None, "train.save_every": 30},
    ),
    "completions": Case("training:\n  train_on_completions: true\n", {"data.train_on": "assistant"}),
    "sixteen bits": Case("training:\n  load_in_4bit: false\n", {"model.quantization": "none"}),
    "full": Case("training:\n  training_type: full\n", {"adapter.kind": "none", "model.quantization": "none"}),
    "dora": Case(
        "lora:\n  use_dora: true\n  lora_r: 16\n  target_modules: q_proj,v_proj\n",
        {"adapter.kind": "dora", "adapter.targets": ["q_proj", "v_proj"]},
    ),
    "loftq": Case("lora:\n  use_loftq: true\n", {"adapter.kind": "loftq", "model.quantization": "none"}),
    "sharegpt": Case("data:\n  dataset: org/rows\n  format_type: sharegpt\n", {"data.train.format": "sharegpt"}),
    "documents": Case("data:\n  dataset: org/rows\n  format_type: raw\n", {"data.train.format": "text"}),
    "alpaca": Case(
        "model: unsloth/Qwen2.5-0.5B\ndata:\n  dataset: org/rows\n  format_type: alpaca\n",
        {"data.train.format.template.assistant": "{output}", "data.train_on": "all"},
    ),
    "rows of any kind": Case("data:\n  dataset: org/rows\n  format_type: auto\n", {}, ("data.dataset",)),
    "of the studio": Case(
        "training:\n  optim: adamw_torch\n  lr_scheduler_type: cosine\n  gradient_checkpointing: unsloth\n"
        "  packing: true\n  weight_dekay: 1\nlogging:\n  enable_wandb: true\n  wandb_token: abc\n  log_frequency: 10\n",
        {},
        ("training.weight_dekay",),
    ),
}

TRL = """\
model_name_or_path: org/base
dataset_name: rows.jsonl
use_peft: true
lora_target_modules: all-linear
"""
TRL_CASES = {
    "the least": Case(
        "",
        {
            "model.dtype": "bfloat16",
            "adapter.rank": 16,
            "adapter.dropout": 0.05,
            "data.train_on": "all",
            "data.max_length": 1024,
            "data.overlong": "truncate",
            "train.batch_size": 8,
            "train.learning_rate": 2e-5,
            "train.schedule": "linear",
            "train.warmup": 0,
            "train.epochs": 3,
        },
    ),
    "qlora": Case(
        "load_in_4bit: true\nlora_target_modules: [q_proj, v_proj]\nlora_r: 32\n",
        {
            "model.quantization": "nf4",
            "model.double_quant": False,
            "adapter.targets": ["q_proj", "v_proj"],
            "adapter.rank": 32,
        },
    ),
    "nested quantization": Case("load_in_4bit: true\nuse_bnb_nested_quant: true\n", {"model.double_quant": True}),
    "answers alone": Case("assistant_only_loss: true\n", {"data.train_on": "assistant"}),
    "full fine-tuning": Case(
        "use_peft: false\nlora_target_modules:\ndtype: float32\nbf16: false\n",
        {"adapter.kind": "none", "model.dtype": "float32"},
    ),
    "half precision": Case("fp16: true\nbf16: false\n", {"model.dtype": "float16"}),
    "steps": Case(
        "max_steps: 100\nwarmup_steps: 0.1\nlr_scheduler_type: cosine\nsave_steps: 50\nsave_total_limit: 3\nseed: 3\n",
        {"train.steps": 100, "train.warmup": 0.1, "train.keep": 3, "train.save_every": 50, "train.seed": 3},
    ),
    "a constant rate": Case(
        "lr_scheduler_type: constant\nwarmup_ratio: 0.1\n", {"train.schedule": "constant", "train.warmup": 0}
    ),
    "a constant rate after a warm-up": Case(
        "lr_scheduler_type: constant_with_warmup\nwarmup_steps: 7\n", {"train.schedule": "constant", "train.warmup": 7}
    ),
    "a split of the hub": Case(
        "dataset_name: org/rows\ncompletion_only_loss: true\ndataset_train_split: train_sft\neval_strategy: steps\n"
        "eval_steps: 10\ndataset_test_split: test_sft\n",
        {
            "data.train.split": "train_sft",
            "data.eval.split": "test_sft",
            "train.eval_every": 10,
            "data.train_on": "assistant",
        },
    ),
    "a chat template in the config": Case(
        "chat_template: '{% for m in messages %}{{ m.content + eos_token }}{% endfor %}'\n"
    ),
    "a mixture": Case(
        "dataset_name:\ndatasets:\n  - path: rows.jsonl\n  - path: json\n    data_files: [more.jsonl]\n"
        "    fraction: 0.5\n",
        {"data.train.1.take": 0.5},
    ),
    "modules of the family": Case(
        "model_name_or_path: Qwen/Qwen2.5-0.5B\nlora_target_modules:\n", {"adapter.targets": ["q_proj", "v_proj"]}
    ),
    "what has no counterpart": Case(
        "packing: true\npacking_strategy: wrapped\nlr_scheduler_type: warmup_stable_decay\n"
        "lr_scheduler_kwargs: {num_decay_steps: 10}\nneftune_noise_alpha: 5\nloss_type: dft\n"
        "trust_remote_code: true\nmax_lenght: 3\nlora_target_modules:\n",
        {},
        (
            *("packing_strategy", "lr_scheduler_type", "lr_scheduler_kwargs.num_decay_steps"),
            *("neftune_noise_alpha", "loss_type", "trust_remote_code", "max_lenght", "lora_target_modules"),
        ),
    ),
    "trackers, secrets and switches that are off": Case(
        "report_to: [wandb]\nhub_token: hf_abcdefghijklmnop\npush_to_hub: true\nlabel_smoothing_factor: 0.0\n"
        "adam_beta2: 0.999\nddp_timeout: 1800\nuse_liger_kernel: true\ngradient_checkpointing: true\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\nfsdp: ''\nneftune_noise_alpha: null\n",
        {"train.gradient_checkpointing": True},
    ),
}
