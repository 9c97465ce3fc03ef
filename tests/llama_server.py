"""llama.cpp's server in this process, with a LoRA on a GGUF file: the log-probabilities of the next token."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_LETTER = 108  # "g" among the byte tokens of a SentencePiece vocabulary of the tests


def next_log_probs(model: Path, adapter: Path | None, ids: Sequence[int], vocabulary: int) -> np.ndarray:
    """The log-probability of each token after `ids`, keys and values in float32."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.n_ctx, settings.n_gpu_layers, settings.warmup, settings.verbosity = 128, 0, False, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(settings)  # listens on 127.0.0.1 until it is freed, at the end of this function
    request = {"prompt": list(ids), "n_predict": 1, "temperature": 0, "n_probs": vocabulary, "cache_prompt": False}
    # The server keeps back a byte that is no letter, and its probabilities with it: a letter is chosen. Probabilities
    # are those before sampling, which the bias is a part of.
    request["logit_bias"] = [[_LETTER, 1000.0]]
    answer = server.handle_completions(request)
    found = np.full(vocabulary, np.nan)
    for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[token["id"]] = token["logprob"]
    assert not np.isnan(found).any()
    return found
