"""lm-eval's model around one in memory: its requests counted, shared among processes, answered in lorakit's batches.

Imports lm-eval (the extra `tasks`): import this module only where a benchmark is run.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from lorakit.distributed.sharing import share_out
from lorakit.model.generation import greedy_answers
from lorakit.model.loss import causal_of
from lorakit.progress import Progress, Silent

_BATCH_SIZE = 8
# Settings of a generation_config.json that change nothing where always the likeliest token is taken.
_OF_NO_EFFECT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("typical_p", "max_length", "transformers_version", "_from_model_config", "use_cache", "output_attentions"),
    *("output_hidden_states", "cache_implementation", "return_dict_in_generate", "output_scores"),
}


class LmEvalModel(HFLM):
    """lm-eval's model around one in memory, whose requests lorakit's progress counts. To lm-eval each process is the
    only one: all make the same requests, and share what the model answers."""

    def __init__(
        self, model: Any, tokenizer: Any, variables: Mapping[str, Any] | None, label: str, progress: Progress
    ) -> None:
        # lm-eval ties the weights again of a model that it is given, which breaks a head trained beside an adapter.
        model.tie_weights = lambda: None
        try:
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives one without a padding token such a token
                batch_size=_BATCH_SIZE,
                softmax_dtype="float32",
                chat_template_args=dict(variables or {}),
            )
        finally:
            del model.tie_weights
        self._label, self._progress = label, progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._share_out("likelihoods", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._share_out("texts", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._share_out("answers", requests, self._generate)

    def _generate(self, requests: list[Any]) -> list[str]:
        """Greedy answers as lorakit generates them, in batches that shrink as rows end; all else as lm-eval does."""
        kinds: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(at)
        answers: dict[int, str] = {}
        for numbers in kinds.values():
            some = [requests[at] for at in numbers]
            texts = self._greedy(some) if self._is_greedy(some[0].args[1]) else super().generate_until(some)
            answers |= zip(numbers, texts, strict=True)
        return [answers[at] for at in range(len(requests))]

    def _is_greedy(self, settings: dict[str, Any]) -> bool:
        """Whether always the likeliest token is taken, by these settings and those of the model's own file."""
        wanted = normalize_gen_kwargs(settings, self.max_gen_toks)
        own = causal_of(self.model).generation_config.to_diff_dict()
        others = {key: wanted[key] for key in wanted if key not in ("until", "max_gen_toks")}
        plain = others in ({"do_sample": False}, {"do_sample": False, "temperature": 0.0})
        return plain and own.keys() <= _OF_NO_EFFECT and self.max_length > wanted["max_gen_toks"]

    def _greedy(self, requests: list[Any]) -> list[str]:
        """What lm-eval's own generate_until answers to requests of the same settings."""
        settings = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        until = handle_stop_sequences(settings["until"], self.tok_decode(self.eot_token_id, skip_special_tokens=False))
        until = [text for text in until if text]
        room = self.max_length - settings["max_gen_toks"]
        encode = partial(self.tok_batch_encode, left_truncate_len=room, truncation=self.truncation)
        prompts = [encode([request.args[0]])[0][0].tolist() for request in requests]
        ends = causal_of(self.model).generation_config.eos_token_id

        def count(done: Mapping[int, Any]) -> None:
            for _ in done:
                self.cache_hook.add_partial()

        answers = greedy_answers(
            self.model,
            prompts,
            [ends] if isinstance(ends, int) else ends or [],
            settings["max_gen_toks"],
            self.tokenizer.pad_token_id,
            "",
            Silent(),
            count,
            stop_texts=until,
            tokenizer=self.tokenizer,
        )
        return [postprocess_generated_text(self.tok_decode(list(one.tokens)), until, None) for one in answers]

    def _share_out(self, what: str, requests: list[Any], answer: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """The answers to all requests. Those of one document are one process's: lm-eval computes what they have in
        common once."""
        documents: dict[Any, list[int]] = {}
        for at, request in enumerate(requests):
            documents.setdefault((request.task_name, request.doc_id), []).append(at)
        groups = list(documents.values())

        def answer_share(numbers: list[int]) -> list[dict[int, Any]]:
            share = sorted(at for number in numbers for at in groups[number])
            with self._progress.bar(f"{self._label}: {what}", total=len(share)) as bar:
                # lm-eval hands each answer to its cache: they are counted there.
                self.set_cache_hook(SimpleNamespace(add_partial=lambda *answered: bar.advance()))
                answers = dict(zip(share, answer([requests[at] for at in share]), strict=True))
            return [{at: answers[at] for at in groups[number]} for number in numbers]

        lengths = [sum(len(str(requests[at].args)) for at in group) for group in groups]
        answers = {at: one for of_group in share_out(lengths, answer_share) for at, one in of_group.items()}
        return [answers[at] for at in range(len(requests))]
