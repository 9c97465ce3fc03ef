"""Samples as it learns (`evaluate.samples`): a few held-out rows that the model answers at each evaluation.

Always the same rows, answered as `lorakit eval` does it (model/generation.py). Nothing that the next step depends on
is touched: answers are greedy and draw nothing at random, and no gradient, mode or cached cast is left behind.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers.generation.utils import GenerateDecoderOnlyOutput

from lorakit.data.answers import decode_answer, reference_of
from lorakit.distributed.processes import from_first, is_first
from lorakit.errors import LorakitError, first_line
from lorakit.hardware.memory import OutOfMemory, free_memory, within_memory
from lorakit.model.attention import plain_attention
from lorakit.model.generation import Answer, greedy_answers
from lorakit.model.loss import causal_of
from lorakit.model.tokenizer import pad_token_id
from lorakit.prepare import Prepared
from lorakit.train.micro_batching import MicroBatchRunner, autocast

_SHOWN = 100  # characters of an answer that are said


@dataclass(frozen=True)
class SampledRow:
    """A held-out row that is answered: its place, the token ids of its prompt, and the texts of prompt and answer."""

    where: str
    tokens: list[int]
    prompt: str
    reference: str

    def to_dict(self) -> dict[str, str]:
        return {"where": self.where, "prompt": self.prompt, "reference": self.reference}


def sampled_rows(prepared: Prepared) -> list[SampledRow]:
    """The first held-out rows that have a prompt and an answer, as many as `evaluate.samples` says. Of a row that
    became several examples it is the first one."""
    wanted = prepared.recipe.evaluate.samples
    if not wanted or prepared.held_out is None:
        return []
    rows, tokenizer = prepared.held_out.rows, prepared.tokenizer
    first: dict[str, int] = {}
    for at, (where, answer) in enumerate(zip(rows["where"], rows["answer"], strict=True)):
        if answer > 0:
            first.setdefault(where, at)
        if len(first) == wanted:
            break
    sampled = []
    for where, at in first.items():
        row = rows[at]
        prompt = row["input_ids"][: row["answer"]]
        reference = reference_of(row, tokenizer, prepared.stop_ids)
        sampled.append(SampledRow(where, prompt, tokenizer.decode(prompt), reference))
    return sampled


class SampleAnswers:
    """Answers the sampled rows of a run, until that fails: the run then goes on without. All processes call it."""

    def __init__(self, runner: MicroBatchRunner) -> None:
        self.runner, self.progress = runner, runner.progress
        self.rows = sampled_rows(runner.prepared)
        wanted, held_out = runner.recipe.evaluate.samples, runner.prepared.held_out
        if held_out and len(self.rows) < wanted:
            some = f"only {len(self.rows)} of the {len(held_out.rows):,} held-out rows"
            self.progress.warn(f"evaluate.samples: {wanted}: {some} have a prompt and an answer")

    def answer(self, step: int) -> list[dict[str, Any]]:
        """The answers of the model as it is after a step, as the log has them, on the first process; none elsewhere,
        and none where no row is answered. The model is in evaluation mode."""
        sharding = self.runner.sharding
        if not self.rows:
            return []
        if sharding.is_collective:
            answers = sharding.attempt(partial(self._answer_rows, self._generate_together))
        elif is_first():
            try:
                answers = self._answer_rows()
            except Exception as error:  # whatever a model's own code raises: the training does not depend on it
                self._give_up(step, first_line(error))
                return []
        if not is_first():
            return []
        tokenizer, samples = self.runner.prepared.tokenizer, list[dict[str, Any]]()
        for row, answer in zip(self.rows, answers, strict=True):
            text = decode_answer(answer.tokens, tokenizer)
            samples.append({"row": row.where, "answer": text} | ({} if answer.ended else {"cut": True}))
            line = " ".join(text.split())
            shown = line if len(line) <= _SHOWN else f"{line[:_SHOWN]} ..."
            self.progress.say(f"after step {step}, {row.where}: {shown}")
        return samples

    def _answer_rows(self, generate: Any = None) -> list[Answer]:
        runner, prepared = self.runner, self.runner.prepared
        prompts, recipe = [row.tokens for row in self.rows], prepared.recipe
        once = runner.sharding.is_collective
        # Varlen attention takes no mask; no inference mode: a step would meet tensors that were made in it.
        with plain_attention(causal_of(runner.model)), autocast(runner.device, recipe.model.dtype, not once):
            return greedy_answers(
                runner.model,
                prompts,
                prepared.stop_ids,
                recipe.evaluate.max_new_tokens,
                pad_token_id(prepared.tokenizer),
                "samples",
                self.progress,
                generate=generate,
            )

    def _generate_together(self, **given: Any) -> GenerateDecoderOnlyOutput:
        """The model's `generate` by processes that hold it in parts: all make as many passes, and all take the first
        one's tokens and go on without its cache. Where memory runs out on one the others wait inside a pass, so that
        the run ends."""
        generate = partial(causal_of(self.runner.model).generate, synced_gpus=True, **given)
        output = within_memory(partial(self.runner.run, generate))
        if isinstance(output, OutOfMemory):
            free_memory()
            raise LorakitError(
                "out of memory while held-out rows were answered. --resume --set evaluate.samples=0 goes on without "
                "them from the last checkpoint."
            )
        return GenerateDecoderOnlyOutput(sequences=from_first(output.sequences.cpu()))

    def _give_up(self, step: int, reason: str) -> None:
        self.rows = []
        free_memory()
        self.progress.warn(
            f"evaluate.samples: after step {step} the rows could not be answered ({reason}). The run goes on without."
        )
