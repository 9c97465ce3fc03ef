"""A LoRA by Unsloth on rendered examples, with the settings of the other trainings; written after its published
notebooks, and not yet run.

    gpu_unsloth.py BASE DATA.jsonl OUT STEPS ROWS_AT_ONCE nf4|none
"""

import sys

from unsloth import FastLanguageModel  # isort: skip  it changes the libraries below, where it is imported before them

from bench_rows import BATCH, RATE, SEED
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

base, data, out, steps, at_once, quantization = sys.argv[1:]
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=base, max_seq_length=4096, dtype=None, load_in_4bit=quantization == "nf4"
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    lora_alpha=32,
    lora_dropout=0,
    bias="none",
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    use_gradient_checkpointing="unsloth",
    random_state=SEED,
)
SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=load_dataset("json", data_files=data, split="train"),
    args=SFTConfig(
        output_dir=out,
        max_steps=int(steps),
        per_device_train_batch_size=int(at_once),
        gradient_accumulation_steps=BATCH // int(at_once),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_length=4096,
        bf16=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
    ),
).train()
