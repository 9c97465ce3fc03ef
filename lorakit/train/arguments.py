"""A recipe in the terms of transformers' Trainer: arguments, the batches of an epoch, the groups of an optimizer."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import Sampler
from trl import SFTConfig

from lorakit.data.batches import run_batches
from lorakit.data.mixture import Mixture
from lorakit.plan.schedule import interval_steps
from lorakit.prepare import Prepared
from lorakit.run_dir import Run

# Our words -> transformers' names.
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}


class StepBatchSampler(Sampler[list[int]]):
    """The rows of every step of one epoch, as Trainer counts epochs: all as long as the first, though weights make
    some of the run's own longer than others."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, mixture: Mixture) -> None:
        self.lengths, self.batch_size, self.seed, self.mixture = lengths, batch_size, seed, mixture
        self.epoch = 0

    @property
    def batch_sampler(self) -> "StepBatchSampler":
        """Trainer hands the epoch to `dataloader.batch_sampler.batch_sampler`, where accelerate's wrapper would be."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * len(self)
        return islice(run_batches(self.lengths, self.batch_size, self.seed, self.mixture, first), len(self))

    def __len__(self) -> int:
        return max(1, self.mixture.steps_in(0, self.batch_size))


def training_arguments(prepared: Prepared, run: Run) -> SFTConfig:
    """A prepared recipe in transformers' terms."""
    settings, dtype, steps = prepared.recipe.train, prepared.recipe.model.dtype, prepared.steps
    arguments = SFTConfig(
        output_dir=str(run.folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=1,  # the trainer's batch is a whole step
        learning_rate=float(settings.learning_rate),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.epsilon,
        max_grad_norm=settings.max_grad_norm,
        optim=OPTIMIZERS[settings.optimizer],
        seed=settings.seed,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=not prepared.machine.is_gpu,
        activation_checkpointing=False,  # we turn it on ourselves, see micro_batching.py
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if prepared.held_out else "no",
        eval_steps=interval_steps(settings.eval_every, steps),
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


def with_faster_b(groups: list[dict[str, Any]], model: Any, ratio: float) -> list[dict[str, Any]]:
    """An optimizer's groups with the B matrices in separate groups, whose learning rate is `ratio` times as high: LoRA+
    (arXiv 2402.12354). DoRA's magnitudes and modules trained whole, of which it says nothing, keep the rate of A."""
    fast = {id(parameter) for name, parameter in model.named_parameters() if ".lora_B." in name}
    split = []
    for group in groups:
        b = [parameter for parameter in group["params"] if id(parameter) in fast]
        others = [parameter for parameter in group["params"] if id(parameter) not in fast]
        split += [{**group, "params": others}, {**group, "params": b, "lr": group["lr"] * ratio}]
    return [group for group in split if group["params"]]
