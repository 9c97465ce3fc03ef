"""A prepared recipe in the trainer's terms: steps, rows, and transformers' training arguments."""

from trl import SFTConfig

from lorakit.model.tokenizer import pad_token_id
from lorakit.plan.schedule import interval_steps, warmup_steps
from lorakit.prepare import Prepared
from lorakit.run_dir import Run
from lorakit.train.batch_sampler import Plan
from lorakit.train.optimizer import OPTIMIZERS


def plan_of(prepared: Prepared) -> Plan:
    """The run in steps and rows."""
    recipe = prepared.recipe
    return Plan(
        batch_size=recipe.train.batch_size,
        micro_batch=int(recipe.train.micro_batch),
        seed=recipe.train.seed,
        eval_steps=interval_steps(recipe.train.eval_every, prepared.steps),
        keep=recipe.train.keep,
        pad_token_id=pad_token_id(prepared.tokenizer),
        longest=int(prepared.train.lengths().max()),
        packing=recipe.data.packing == "on",
        flat=recipe.model.attention == "flash_attention_2",
        lora_plus=recipe.train.lora_plus,
        schedule=recipe.train.schedule,
        warmup=warmup_steps(recipe.train, prepared.steps),
    )


def training_arguments(prepared: Prepared, run: Run, plan: Plan) -> SFTConfig:
    """What SFTTrainer is told."""
    settings, dtype = prepared.recipe.train, prepared.recipe.model.dtype
    steps, on_gpu = prepared.steps, prepared.machine.is_gpu
    arguments = SFTConfig(
        output_dir=str(run.folder),
        max_steps=steps,
        per_device_train_batch_size=plan.batch_size,
        gradient_accumulation_steps=1,  # the trainer's batch is a whole step
        learning_rate=float(settings.learning_rate),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=OPTIMIZERS[settings.optimizer],
        seed=settings.seed,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=not on_gpu,
        activation_checkpointing=False,  # we turn it on ourselves, see recomputing.py
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if prepared.held_out else "no",
        eval_steps=plan.eval_steps,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_strategy="steps",
        save_steps=interval_steps(settings.save_every, steps),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,  # our loss is that of the rows alone
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device; Trainer would spread over all that it sees
    return arguments
