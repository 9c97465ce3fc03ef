"""The rows that lorakit is timed on: those of debian-json, and of the repository's free texts in two lengths.

Rows of free text begin differently: each has a system text of its own, so that nothing can be computed once for all.
About half of their tokens are trained.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.model.resolve import resolve_base
from lorakit.progress import Silent
from lorakit.recipe.load import load

ROOT = Path(__file__).resolve().parent.parent
DEBIAN = ROOT / "recipes/debian-json/recipe.yaml"
TEXTS = ROOT / "lorakit/data/general/texts.jsonl"
RATE, SEED, BATCH = 1e-3, 42, 8
SYSTEM_TOKENS = 24
FREE_TEXT = ("data.max_length=2048", "data.clean={near_duplicates: off, contradictions: off, style: off}")


@dataclass(frozen=True)
class RowKind:
    """A kind of rows: its tokens a row, and how it is trained in the comparison with `trl sft`."""

    what: str
    tokens: tuple[int, int] | None  # of rows of free text; None: the rows of the recipe
    steps: int  # that are compared
    ordered_steps: int  # whose losses are compared in the same order
    at_once: int = BATCH  # rows that TRL computes at once; lorakit chooses for itself


KINDS = {
    "debian-json": RowKind("the recipe's rows, about 60 tokens, 24 of them the same in all", None, 24, 6),
    "medium": RowKind("free text, 200 to 500 tokens, no shared beginning", (200, 500), 5, 1),
    "long": RowKind("free text, about 1,000 tokens, no shared beginning", (950, 1050), 2, 1, at_once=2),
}


def recipe_settings(kind: str, steps: int, work: Path, recipe: Path = DEBIAN, adapter: str = "lora") -> list[str]:
    """What is set in the recipe: one pass over so many steps' rows, written into `work`, at a constant rate."""
    work.mkdir(parents=True, exist_ok=True)
    rows = work / "rows.jsonl"
    model, data = load(recipe).recipe.model, load(recipe).recipe.data
    if limits := KINDS[kind].tokens:
        base = resolve_base(model.base, model.revision, Silent())
        rows.write_text("".join(free_rows(steps * BATCH, limits, tokenizer_of(base.folder))), encoding="utf-8")
    else:
        lines = Path(str(data.train)).read_text(encoding="utf-8").splitlines(keepends=True)
        rows.write_text("".join(lines[: steps * BATCH]), encoding="utf-8")
    return [
        f"data.train={rows}",
        "data.eval=null",
        *(FREE_TEXT if KINDS[kind].tokens else ()),
        "evaluate.metrics=[]",
        "model.dtype=float32",
        "train.epochs=1",
        "train.steps=null",
        f"adapter.kind={adapter}",
        f"train.batch_size={BATCH}",
        f"train.learning_rate={RATE}",
        f"train.seed={SEED}",
        "train.schedule=constant",
        "train.warmup=0",
        "train.save_every=100000",
    ]


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a base."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def free_rows(count: int, tokens: tuple[int, int], tokenizer: Any) -> Iterator[str]:
    """Lines of JSON: rows of free text whose lengths are spread evenly between the two, in an order of chance."""
    chance = random.Random(SEED)
    texts = [json.loads(line)["text"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    sentences = [sentence for text in texts for sentence in re.split(r"(?<=[.!?])\s+", text) if len(sentence) > 20]
    chance.shuffle(sentences)
    low, high = tokens
    lengths = [low + round((high - low) * (index + 0.5) / count) for index in range(count)]
    chance.shuffle(lengths)
    empty = [{"role": role, "content": ""} for role in ("system", "user", "assistant")]
    frame = len(tokenizer.apply_chat_template(empty, tokenize=True, return_dict=True)["input_ids"])

    def piece(length: int, first: str = "") -> str:
        text = first
        while len(ids := tokenizer(text, add_special_tokens=False)["input_ids"]) < length:
            text = f"{text} {chance.choice(sentences)}".strip()
        return str(tokenizer.decode(ids[:length])).strip(" \ufffd")

    for index, length in enumerate(lengths):
        answer = length // 2
        words = (
            piece(SYSTEM_TOKENS, sentences[index % len(sentences)]),
            piece(length - frame - SYSTEM_TOKENS - answer),
            piece(answer),
        )
        messages = [message | {"content": text} for message, text in zip(empty, words, strict=True)]
        yield json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
