"""`trl sft` on examples that lorakit rendered: its options, and what it prints."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_rows import RATE, SEED

if TYPE_CHECKING:
    from lorakit.prepare import Prepared


def trl_kind(adapter: str, quantization: str) -> list[str]:
    """The options of `trl sft` for an adapter kind, and a quantization like lorakit's."""
    dora = ["--use_dora"] if adapter == "dora" else []
    nf4 = ["--load_in_4bit", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant"]
    return dora + (nf4 if quantization == "nf4" else [])


def trl_options(prepared: "Prepared", examples: list[Any], steps: int, micro_batch: int, folder: Path) -> list[str]:
    """The options of `trl sft` that hold on every device; the examples are written into the folder."""
    data = folder / "data"
    data.mkdir(parents=True)
    lines = [json.dumps({"input_ids": row["input_ids"], "labels": row["labels"]}) for row in examples]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--model_name_or_path", str(prepared.base.folder), "--dataset_name", str(data)]
    options += ["--output_dir", str(folder / "out"), "--max_steps", str(steps), "--seed", str(SEED)]
    options += ["--per_device_train_batch_size", str(micro_batch)]
    options += ["--learning_rate", str(RATE), "--lr_scheduler_type", "constant"]
    options += ["--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True"]
    options += ["--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0.0"]
    return [*options, "--lora_target_modules", "all-linear"]


def trl_figures(out: str) -> dict[str, Any]:
    """Seconds of the loop and each step's loss, from what `trl sft` prints."""
    runtime = re.search(r"'train_runtime': '?([0-9.e+-]+)", out)
    if runtime is None:
        raise SystemExit(f"trl printed no train_runtime:\n{out[-3000:]}")
    return {
        "seconds": float(runtime[1]),
        "losses": [float(match) for match in re.findall(r"'loss': '?([0-9.e+-]+)", out)],
    }
