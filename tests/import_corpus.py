"""Configs as people publish them, in shapes of their own: a model card's, an example's, a launcher's. `refused` are the
keys that have no counterpart; `OTHER` is a config for something else than supervised fine-tuning of text."""

from typing import Any, NamedTuple

OTHER = "other"


class Shape(NamedTuple):
    """A config's text and what becomes of it. `says`: dotted keys of the recipe."""

    text: str
    refused: tuple[str, ...] | str = ()
    says: dict[str, Any] = {}
    options: dict[str, Any] = {}


_CARD = """\
base_model: NousResearch/Meta-Llama-3-8B
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
strict: false
adapter: lora
lora_model_dir:
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
lora_fan_in_fan_out:
micro_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 2e-4
sequence_len: 2048
wandb_project: mine
wandb_entity:
hub_model_id: me/mine
bf16: auto
fp16:
tf32: false
flash_attention: true
xformers_attention:
logging_steps: 1
debug:
deepspeed: deepspeed_configs/zero2.json
fsdp:
fsdp_config:
"""
_ROWS = "datasets: [{path: org/rows, type: chat_template}]\n"
AXOLOTL = {
    "packs on a card": Shape(
        _CARD + _ROWS + "chat_template: llama3\nsample_packing: true\npad_to_sequence_len: true\nval_set_size: 0.05\n"
        "special_tokens: {pad_token: <|end_of_text|>}\nevals_per_epoch: 4\nsaves_per_epoch: 1\nnum_epochs: 3\n",
        (),
        {"train.batch_tokens": 16384, "data.packing": "on", "model.chat_template": "llama-3", "data.eval": 0.05},
    ),
    "packs, and how many rows fill one": Shape(
        _CARD + _ROWS + "sample_packing: true\n", (), {"train.batch_size": 40}, {"rows_per_pack": 5}
    ),
    "a part, a configuration and a number of rows": Shape(
        _CARD + "datasets:\n  - {path: org/rows, name: main, split: 'train[:10%]', type: chat_template}\n"
        "  - {path: org/rows, name: more, data_files: [a.jsonl, b.jsonl], type: chat_template}\nval_set_size: 500\n",
        (),
        {
            "data.train.0.subset": "main",
            "data.train.0.split": "train[:10%]",
            "data.train.1.data_files": ["a.jsonl", "b.jsonl"],
            "data.eval": 500,
        },
    ),
    "sharegpt without a template": Shape(_CARD + "datasets: [{path: org/rows, type: sharegpt}]\n"),
    "sharegpt in chatml, which ends by its own token": Shape(
        _CARD + "datasets: [{path: org/rows, type: sharegpt, conversation: chatml}]\nchat_template: chatml\n"
        "special_tokens: {eos_token: <|im_end|>, bos_token: <|begin_of_text|>, pad_token: <pad>}\n",
        (),
        {"model.chat_template": "chatml", "data.train.format": "sharegpt", "model.add_tokens": ["<|im_end|>"]},
    ),
    "a prompt of its own": Shape(
        _CARD + "datasets:\n  - path: org/rows\n    type:\n      field_instruction: context\n"
        "      field_output: target\n      format: '[INST] {instruction} [/INST]'\n"
        "      no_input_format: '[INST] {instruction} [/INST]'\n",
        (),
        {"data.train.format.template.assistant": "{target}"},
    ),
    "rows with system prompts as plain text": Shape(
        _CARD + "datasets: [{path: Open-Orca/OpenOrca, type: alpaca_w_system.load_open_orca}]\n"
    ),
    "questions as plain text": Shape(_CARD + "datasets: [{path: org/rows, type: alpaca_chat.load_qa}]\n"),
    "the same rows twice": Shape(
        _CARD + "datasets: [{path: org/rows, type: chat_template}, {path: org/rows, type: chat_template}]\n",
        (),
        {"data.train.weight": 2},
    ),
    "AdamW's numbers and a least rate": Shape(
        _CARD + _ROWS + "adam_beta2: 0.95\nadam_epsilon: 0.00001\nlr_scheduler: cosine\ncosine_min_lr_ratio: 0.1\n",
        (),
        {"train.betas": [0.9, 0.95], "train.epsilon": 1e-5, "train.min_rate": 0.1},
    ),
    "code that the base does not bring": Shape(_CARD + _ROWS + "trust_remote_code: true\n"),
    "code that it brings": Shape(
        _CARD.replace("NousResearch/Meta-Llama-3-8B", "org/custom") + _ROWS + "trust_remote_code: true\n",
        ("trust_remote_code",),
    ),
    "noise, other weights, parts of attention": Shape(
        _CARD + _ROWS + "neftune_noise_alpha: 5\nunfrozen_parameters: [lm_head]\nsequence_parallel_degree: 2\n",
        ("neftune_noise_alpha", "unfrozen_parameters", "sequence_parallel_degree"),
    ),
    "one of ten shards": Shape(
        _CARD + "datasets: [{path: org/rows, type: chat_template, shards: 10}]\n", (), {"data.train.take": 0.1}
    ),
    "words of bitsandbytes, as Axolotl has it anyway": Shape(
        _CARD + _ROWS + "bnb_4bit_quant_type: nf4\nbnb_4bit_use_double_quant: true\nbnb_4bit_compute_dtype: bfloat16\n"
    ),
    "preferences": Shape(_CARD + "rl: dpo\ndatasets: [{path: org/pairs, type: chat_template.default}]\n", OTHER),
    "rewards": Shape(_CARD + _ROWS + "rl: grpo\ntrl: {beta: 0.1}\nhub_token: hf_abcdefghijklmnop\n", OTHER),
    "pictures": Shape(_CARD + _ROWS + "processor_type: AutoProcessor\nskip_prepare_dataset: true\n", OTHER),
    "a stream of texts": Shape(_CARD + "pretraining_dataset: [{path: org/web, type: pretrain}]\nmax_steps: 9\n", OTHER),
}

_LLAMA_FACTORY = """\
### model
model_name_or_path: Qwen/Qwen3-4B
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### output
output_dir: saves/x
plot_loss: true
overwrite_output_dir: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
_DEMO = "dataset: identity,alpaca_en_demo\ncutoff_len: 2048\nmax_samples: 1000\npreprocessing_num_workers: 16\n"
LLAMA_FACTORY = {
    "its example": Shape(_LLAMA_FACTORY + _DEMO + "template: qwen3_nothink\n", (), {"model.chat_template": "chatml"}),
    "thoughts that are trained": Shape(_LLAMA_FACTORY + _DEMO + "template: qwen3\n", (), {"data.train.0.take": 1000}),
    "thoughts that are not": Shape(_LLAMA_FACTORY + _DEMO + "template: qwen3\nenable_thinking: false\n"),
    "a template of turns": Shape(
        _LLAMA_FACTORY.replace("Qwen/Qwen3-4B", "meta-llama/Llama-2-7b-hf") + _DEMO + "template: llama2\n"
    ),
    "packs": Shape(_LLAMA_FACTORY + _DEMO + "template: qwen3\nneat_packing: true\n", (), {"train.batch_tokens": 16384}),
    "packs whose rows see each other": Shape(_LLAMA_FACTORY + _DEMO + "template: qwen3\npacking: true\n", ("packing",)),
    "rows of its own": Shape(_LLAMA_FACTORY + "dataset: mine\ntemplate: qwen3\n", ("dataset",)),
    "another optimizer": Shape(_LLAMA_FACTORY + _DEMO + "template: qwen\nuse_galore: true\n", ("use_galore",)),
    "pretraining": Shape(_LLAMA_FACTORY.replace("sft", "pt", 1) + "dataset: c4_demo\n", OTHER),
    "answers": Shape("model_name_or_path: a/b\ntemplate: qwen\ninfer_backend: huggingface\n", OTHER),
    "a merge": Shape("model_name_or_path: a/b\ntemplate: qwen\nfinetuning_type: lora\nexport_dir: out\n", OTHER),
    "pictures": Shape(_LLAMA_FACTORY.replace("Qwen3-4B", "Qwen2.5-VL-7B-Instruct") + "dataset: mllm_demo\n", OTHER),
}

_TRL = """\
model_name_or_path: Qwen/Qwen2.5-Coder-7B-Instruct
model_revision: main
torch_dtype: bfloat16
attn_implementation: flash_attention_2
bf16: true
do_eval: false
eval_strategy: 'no'
gradient_accumulation_steps: 8
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
hub_strategy: every_save
learning_rate: 1.0e-05
log_level: info
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
max_grad_norm: 0.2
max_length: 32768
per_device_train_batch_size: 2
push_to_hub: true
report_to: [wandb]
warmup_ratio: 0.03
"""
TRL = {
    "a configuration and a least rate": Shape(
        _TRL + "dataset_name: open-r1/codeforces-cots\ndataset_config: solutions\npacking: false\n",
        (),
        {"data.train.subset": "solutions", "train.min_rate": 0.1, "adapter.kind": "none"},
    ),
    "packs": Shape(
        _TRL + "dataset_name: trl-lib/Capybara\npacking: true\neos_token: <|im_end|>\n",
        (),
        {"train.batch_tokens": 524288},
    ),
    "a mixture": Shape(
        _TRL
        + "dataset_mixture:\n  datasets:\n    - {id: org/a, config: x, split: s, columns: [messages], weight: 0.5}\n"
        "    - {id: org/b, columns: [messages], weight: 1.0}\n  seed: 0\n  test_split_size: 100\n",
        (),
        {"data.train.0.take": 0.5, "data.train.0.subset": "x", "data.train.0.split": "s", "data.train_on": "all"},
    ),
    "a mixer": Shape(
        _TRL.replace("eval_strategy: 'no'", "eval_strategy: epoch") + "dataset_mixer: {org/a.b: 0.25}\n"
        "dataset_splits: [train_sft, test_sft]\npreprocessing_num_workers: 12\n",
        (),
        {"data.train.take": 0.25, "data.eval.split": "test_sft", "data.train.format": "messages"},
    ),
    "rows of which nothing is known": Shape(_TRL + "dataset_name: org/rows\n", ("dataset_name",)),
    "preferences": Shape(_TRL + "dataset_name: org/pairs\nbeta: 0.1\nmax_prompt_length: 512\n", OTHER),
    "rewards": Shape(_TRL + "dataset_name: org/tasks\nnum_generations: 8\nreward_funcs: [accuracy]\n", OTHER),
}

_UNSLOTH = """\
model: unsloth/Qwen3-0.6B
data: {dataset: yahma/alpaca-cleaned, format_type: auto}
training: {training_type: lora, max_seq_length: 2048, load_in_4bit: true}
lora: {lora_r: 16, target_modules: 'q_proj,v_proj'}
logging: {hf_token: hf_abcdefghijklmnop}
"""
UNSLOTH = {
    "its rows": Shape(_UNSLOTH),
    "packs": Shape(_UNSLOTH.replace("load_in_4bit", "packing: true, load_in_4bit"), (), {"train.batch_tokens": 16384}),
    "an embedding's rate": Shape(
        _UNSLOTH.replace("load_in_4bit", "embedding_learning_rate: 1e-5, load_in_4bit"),
        ("training.embedding_learning_rate",),
    ),
    "sounds": Shape(_UNSLOTH + "audio_type: speech\n", OTHER),
}
CORPUS = {"axolotl": AXOLOTL, "llama-factory": LLAMA_FACTORY, "trl": TRL, "unsloth": UNSLOTH}

NOT_OF_THE_TOOLS = {
    "accelerate's launcher": ("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n", "accelerate's launcher"),
    "DeepSpeed's": ("zero_optimization: {stage: 2}\ntrain_batch_size: auto\n", "DeepSpeed"),
    "a trained adapter's": ("peft_type: LORA\nr: 8\n", "adapter.from"),
    "a model's": ("architectures: [X]\nmodel_type: llama\n", "configuration of a model"),
    "LLaMA-Factory's next": ("model: a/b\ntrain_dataset: x\nmicro_batch_size: 1\n", "trainer v1"),
    "torchtune's": ("model: {_component_: x}\n", "torchtune"),
    "mergekit's": ("merge_method: ties\nmodels: []\n", "mergekit"),
    "Unsloth's without sections": ("model: a/b\ndata: rows.jsonl\ntraining: lora\n", "a mapping of settings"),
}
