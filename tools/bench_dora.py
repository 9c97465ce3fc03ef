"""A step of DoRA by PEFT's forward against lorakit's, and plain LoRA beside them. Prints seconds and ratios.

One process, one model, one set of rows; the kinds take turns, and the least of all rounds counts. A step is forward,
backward and optimizer. "PEFT" and "lorakit" differ in nothing but the adapter's forward: both take lorakit's loss.
"PEFT alone" takes the model's own, of all positions. A part is what a step of DoRA takes longer than one of plain LoRA.
"""

import argparse
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from lorakit.console import Terminal, result_table
from lorakit.data.batches import collate, epoch_batches
from lorakit.model.fused_lora import fused_lora
from lorakit.model.load import load_model
from lorakit.model.loss import supervised_loss
from lorakit.model.tokenizer import pad_token_id
from lorakit.prepare import Prepared, prepare_run
from lorakit.recipe.load import load

ROOT = Path(__file__).resolve().parent.parent
SEED, BATCH = 42, 8
SHAPES = {"512 tokens": (1, 512), "2048 tokens": (4, 512)}


@dataclass
class Contender:
    """A model that is trained one way, and its optimizer."""

    model: Any
    fused: bool
    own_loss: bool
    optimizer: torch.optim.Optimizer

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Train one step; the seconds that it took."""
        begin = time.perf_counter()
        if self.own_loss:
            self.model(**batch, use_cache=False).loss.backward()
        else:
            loss, count = supervised_loss(self.model, **batch)
            (loss / count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin


def main() -> None:
    """Measure every shape, print the table, and leave it as JSON where --json says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/debian-json/recipe.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    prepared = prepare_run(load(options.recipe).recipe, Terminal(quiet=True))
    made = contenders(prepared)
    figures = {name: measure(made, batch, options.rounds) for name, batch in batches(prepared).items()}
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def contenders(prepared: Prepared) -> dict[str, Contender]:
    """The recipe's model with DoRA both ways and with plain LoRA, all linear layers, rank and alpha of the recipe."""
    made, settings = {}, prepared.recipe.adapter
    for name in ("PEFT alone", "PEFT", "lorakit", "plain LoRA"):
        chosen = {"r": settings.rank, "lora_alpha": settings.alpha, "use_dora": name != "plain LoRA"}
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **chosen)
        torch.manual_seed(SEED)
        model = get_peft_model(load_model(prepared.base, prepared.recipe.model, "cpu"), config).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        made[name] = Contender(model, not name.startswith("PEFT"), name == "PEFT alone", optimizer)
    return made


def batches(prepared: Prepared) -> dict[str, dict[str, torch.Tensor]]:
    """A batch of the recipe's rows, and two of random tokens, a third of them trained."""
    chosen = epoch_batches(prepared.train.lengths(), BATCH, SEED, 0)
    rows = [prepared.train.rows[index] for index in chosen[len(chosen) // 2]]
    made = {"the recipe's rows": collate(rows, pad_token_id(prepared.tokenizer))}
    generator = torch.Generator().manual_seed(SEED)
    for name, shape in SHAPES.items():
        tokens = torch.randint(1000, 20000, shape, generator=generator)
        labels = tokens.where(torch.arange(shape[1]) >= 2 * shape[1] // 3, -100)
        made[name] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return made


def measure(made: dict[str, Contender], batch: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    """The least seconds a step of every contender, taking turns, after one step each that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in made}
    with ExitStack() as fused:
        for contender in made.values():
            if contender.fused:
                fused.enter_context(fused_lora(contender.model))
        for _ in range(rounds + 1):
            for name, contender in made.items():
                taken[name].append(contender.step(batch))
    seconds = {name: min(times[1:]) for name, times in taken.items()}
    theirs, ours, plain = seconds["PEFT"], seconds["lorakit"], seconds["plain LoRA"]
    return {
        "shape": list(batch["input_ids"].shape),
        "seconds": seconds,
        "step_ratio": theirs / ours,
        "ratio_to_peft_alone": seconds["PEFT alone"] / ours,
        "adapter_seconds": {"PEFT": theirs - plain, "lorakit": ours - plain},
        "adapter_ratio": (theirs - plain) / max(ours - plain, 1e-9),
    }


def show(figures: dict[str, Any]) -> None:
    """The table of all shapes."""
    rows = []
    for name, one in figures.items():
        seconds, part = one["seconds"], one["adapter_seconds"]
        size = "{} x {}".format(*one["shape"])
        times = [f"{value:.2f}" for value in (*seconds.values(), part["PEFT"], part["lorakit"])]
        ratios = [f"{one[ratio]:.2f}" for ratio in ("ratio_to_peft_alone", "step_ratio", "adapter_ratio")]
        rows.append([name, size, *times, *ratios])
    columns = ["seconds", "batch", "PEFT alone", "PEFT", "lorakit", "plain LoRA", "PEFT's part", "lorakit's part"]
    columns += ["PEFT alone : lorakit", "PEFT : lorakit", "parts"]
    result_table("one step of DoRA, least of all rounds", columns, rows)


if __name__ == "__main__":
    main()
