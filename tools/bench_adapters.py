"""Every adapter kind on every quantization, trained on the same rows for as many steps: one table.

Each pair is `lorakit train` in a process of its own, scored on held-out rows. A pair that is in the file of figures
already is not trained again, so that a bench that was interrupted goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lorakit.console import Terminal, result_table
from lorakit.evaluate.models import models_of_run
from lorakit.evaluate.run import default_settings, score_models
from lorakit.prepare import reopen_run
from lorakit.recipe.load import load
from lorakit.registry import ADAPTERS, QUANTIZERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/adapters.md"
_BEGIN, _END = "<!-- bench-adapters -->", "<!-- /bench-adapters -->"


def main() -> None:
    """Train and score what is missing, print the table and put it into docs/adapters.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/debian-json/recipe.yaml")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of the recipe's batch")
    parser.add_argument("--held-out", type=int, default=64, help="held-out rows, for the loss and for exact-match")
    parser.add_argument("--figures", type=Path, default=ROOT / "runs/bench-adapters.json", help="kept and gone on from")
    parser.add_argument("--write", action="store_true", help="put the table into docs/adapters.md")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.score:
        sys.stdout.write(json.dumps(scores_of(options.score)))
        return
    figures = json.loads(options.figures.read_text()) if options.figures.is_file() else {}
    for kind, quantization in pairs():
        name = f"{kind} {quantization}"
        if name not in figures:
            figures[name] = measured(options.recipe, kind, quantization, options.steps, options.held_out)
            options.figures.parent.mkdir(parents=True, exist_ok=True)
            options.figures.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            sys.stderr.write(f"{name}: {json.dumps(figures[name])}\n")
    title = f"{options.steps} steps, {options.held_out} held-out rows, {os.cpu_count()} cores"
    result_table(title, _COLUMNS, [row(name, figures[name]) for name in figures])
    if options.write:
        write(figures)


def pairs() -> list[tuple[str, str]]:
    """Every kind with every quantization that it goes with."""
    return [
        (kind.name, quantization)
        for kind in ADAPTERS
        for quantization in QUANTIZERS.names()
        if quantization in (kind.quantizations or (quantization,))
    ]


def measured(recipe: Path, kind: str, quantization: str, steps: int, held_out: int) -> dict[str, Any]:
    """One training with its scores."""
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as work:
        path = Path(work) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_for(recipe, kind, quantization, steps, held_out)), encoding="utf-8")
        train = [sys.executable, "-m", "lorakit", "train", str(path), "--json", "--quiet", "-o", f"{work}/run"]
        outcome = json.loads(run(train))
        manifest = json.loads(Path(work, "run/manifest.json").read_text())
        scores = json.loads(run([sys.executable, __file__, "--score", f"{work}/run"]))
    return {
        "trainable": manifest["parameters"]["trainable"],
        "learning_rate": next(c["value"] for c in manifest["auto"] if c["path"] == "train.learning_rate"),
        "loss": scores["loss"],
        "exact-match": scores["exact-match"],
        "peak_bytes": outcome["peak_memory"],
        "seconds_a_step": outcome["seconds_a_step"],
    }


def recipe_for(recipe: Path, kind: str, quantization: str, steps: int, held_out: int) -> dict[str, Any]:
    """The recipe with this kind and quantization, and paths that hold anywhere."""
    given = load(recipe).recipe
    adapter: dict[str, Any] = {"kind": kind}
    if kind != "none":
        adapter |= {"rank": given.adapter.rank, "alpha": given.adapter.alpha}
    return {
        "model": {"base": given.model.base, "quantization": quantization},
        "adapter": adapter,
        "data": {
            "train": str(given.data.train),
            "eval": {"path": str(given.data.eval), "take": held_out},
            "max_length": given.data.max_length,
        },
        "train": {
            "steps": steps,
            "batch_size": given.train.batch_size,
            "learning_rate": "auto",
            "eval_every": steps,
            "save_every": steps,
        },
        "evaluate": {"metrics": ["exact-match"], "max_new_tokens": given.evaluate.max_new_tokens},
    }


def run(command: list[str]) -> str:
    """What a command prints; its errors where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def scores_of(folder: Path) -> dict[str, float]:
    """The scores of what a run trained, without its base's."""
    quiet = Terminal(quiet=True)
    model_set = models_of_run(*reopen_run(folder, quiet))
    trained = replace(model_set, specs=model_set.specs[1:2])
    return score_models(trained, None, default_settings(model_set.prepared), quiet).models[0].scores


_COLUMNS = ["kind", "quantization", "trainable", "learning rate", "held-out loss", "exact-match", "peak GB", "s a step"]


def row(name: str, figures: dict[str, Any]) -> list[str]:
    """One line of the table."""
    return [
        *name.split(),
        f"{figures['trainable']:,}",
        f"{figures['learning_rate']:g}",
        f"{figures['loss']:.4f}",
        f"{figures['exact-match']:.1%}",
        f"{figures['peak_bytes'] / 1e9:.2f}",
        f"{figures['seconds_a_step']:.2f}",
    ]


def write(figures: dict[str, Any]) -> None:
    """Put the table between the marks in docs/adapters.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---|---|" + "---:|" * (len(_COLUMNS) - 2)]
    names = [f"{kind} {quantization}" for kind, quantization in pairs()]
    lines += ["| " + " | ".join(row(name, figures[name])) + " |" for name in names]
    PAGE.write_text(f"{before}{_BEGIN}\n" + "\n".join(lines) + f"\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
