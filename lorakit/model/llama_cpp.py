"""llama.cpp through the bindings of cyllama: GGUF files loaded, run, and quantized."""

import os
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from lorakit.errors import LorakitError, UserError
from lorakit.hardware.threads import usable_processors

_MOST_LINES = 40
_FLOAT32 = 0  # ggml.h: GGML_TYPE_F32
# llama.h: the enum llama_ftype, which the bindings take as a number.
_FILE_TYPES = {
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
}


class Token(NamedTuple):
    """One token of a batch: its sequence, its position there, its id, and whether its logits are wanted."""

    sequence: int
    position: int
    id: int
    wanted: bool


class _Library:
    """The loaded bindings. What llama.cpp reports is collected, for the message of an error, instead of printed."""

    def __init__(self) -> None:
        try:
            from cyllama.llama import llama_cpp as bindings
        except ImportError as error:
            raise UserError(f"GGUF files are run by llama.cpp: pip install 'lorakit[export]' ({error}).") from error

        class LlamaModel(bindings.LlamaModel):
            @property
            def n_vocab(self) -> int:  # which get_logits_ith of cyllama 0.2.18 reads, and its class lacks
                return int(self.get_vocab().n_vocab)

        self.bindings, self.model_class, self.lines = bindings, LlamaModel, list[str]()
        bindings.set_log_callback(self._collect)
        bindings.ggml_backend_load_all()
        bindings.llama_backend_init()

    def _collect(self, level: int, text: str) -> None:
        self.lines = [*self.lines, text.strip()][-_MOST_LINES:]

    def reason(self, error: Exception | None = None) -> str:
        """What llama.cpp said about an error, in one line."""
        telling = [line for line in self.lines if any(word in line.lower() for word in ("error", "fail", "unknown"))]
        return telling[0] if telling else str(error or "it gives no reason")


@cache
def llama_cpp() -> _Library:
    """llama.cpp's bindings; a UserError that names the extra where they are not installed."""
    return _Library()


def llama_cpp_version() -> str:
    """The release of the bindings."""
    return f"cyllama {version('cyllama')}"


def threads() -> int:
    """How many threads llama.cpp gets: OMP_NUM_THREADS, as torch does, else one for each core. More than there are free
    cores make it slower by far: its threads wait for each other in loops."""
    written = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(written) if written.isdigit() and int(written) else usable_processors()


def quantize(source: Path, target: Path, word: str) -> None:
    """Write a GGUF file of 16 or 32 bits in a type such as q4_k_m."""
    library = llama_cpp()
    library.lines.clear()
    settings = library.bindings.LlamaModelQuantizeParams()
    settings.nthread = usable_processors()
    settings.ftype = _FILE_TYPES[word]
    try:
        library.bindings.model_quantize(str(source), str(target), settings)
    except (RuntimeError, ValueError, OSError) as error:
        raise LorakitError(f"llama.cpp could not quantize {source.name} to {word}: {library.reason(error)}.") from error


class GgufModel:
    """A GGUF file as llama.cpp runs it. `exact`: keys and values in float32 instead of llama.cpp's float16.
    `limit`: the positions that it has embeddings for, if it has no rotations; llama.cpp ends the process at a later
    one."""

    def __init__(self, path: Path, exact: bool = False, limit: int | None = None) -> None:
        self._library, self._exact, self.limit = llama_cpp(), exact, limit
        self._context: Any = None
        self._sampler: Any = None
        self._size, self._sequences = 0, 0
        self._library.lines.clear()
        if not path.is_file():
            raise UserError(f"{path}: there is no such file.")
        try:
            self._model = self._library.model_class(str(path), verbose=False)
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{path}: llama.cpp cannot load it: {self._library.reason(error)}.") from error
        self._vocab = self._model.get_vocab()
        self.vocabulary = int(self._vocab.n_vocab)
        self.trained_positions = int(self._model.n_ctx_train)

    @property
    def bytes_per_token(self) -> int:
        """What the keys and values of one token take."""
        model, bytes_each = self._model, 4 if self._exact else 2
        return int(2 * bytes_each * model.n_layer * model.n_head_kv * model.n_embd // max(model.n_head, 1))

    def __enter__(self) -> "GgufModel":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory; it is not usable any more."""
        if self._context is not None:
            self._context.close()
            self._context = None
        self._model.close()

    def reserve(self, tokens: int, sequences: int) -> None:
        """Make room for so many tokens, over so many sequences at once; a smaller context is replaced."""
        if self._context is not None:
            if tokens <= self._size and sequences <= self._sequences:
                return
            self._context.close()
            self._context = None
        tokens, sequences = max(tokens, self._size), max(sequences, self._sequences)
        settings = self._library.bindings.LlamaContextParams()
        settings.n_ctx = settings.n_batch = tokens
        settings.n_ubatch = min(tokens, 512)
        settings.n_seq_max = sequences
        settings.kv_unified = True
        settings.n_threads = settings.n_threads_batch = threads()
        settings.no_perf = True
        if self._exact:
            settings.type_k = settings.type_v = _FLOAT32
            settings.flash_attn_type = 0
        self._library.lines.clear()
        try:
            self._context = self._library.bindings.LlamaContext(self._model, settings, verbose=False)
        except (ValueError, RuntimeError, MemoryError) as error:
            what = f"llama.cpp could not make room for {tokens:,} tokens"
            raise LorakitError(f"{what}: {self._library.reason(error)}.") from error
        self._size, self._sequences = tokens, sequences

    def decode(self, tokens: Sequence[Token]) -> np.ndarray:
        """Run tokens after what their sequences hold; the logits of those wanted (wanted, vocabulary), in float32."""
        rows = self._run(tokens)
        logits = np.empty((len(rows), self.vocabulary), dtype=np.float32)
        for number, at in enumerate(rows):
            logits[number] = self._context.get_logits_ith(at)
        return logits

    def decode_greedily(self, tokens: Sequence[Token]) -> list[int]:
        """Run tokens likewise; the likeliest next token after each one wanted, without a copy of all logits."""
        if self._sampler is None:
            self._sampler = self._library.bindings.LlamaSampler(self._library.bindings.LlamaSamplerChainParams())
            self._sampler.add_greedy()
        return [int(self._sampler.sample(self._context, at)) for at in self._run(tokens)]

    def _run(self, tokens: Sequence[Token]) -> list[int]:
        """Run tokens; the places of those wanted."""
        batch = self._library.bindings.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for token in tokens:
            batch.add(token.id, token.position, [token.sequence], token.wanted)
        self._library.lines.clear()
        try:
            self._context.decode(batch)
        except (ValueError, RuntimeError) as error:
            what = f"llama.cpp could not run {len(tokens):,} tokens"
            raise LorakitError(f"{what}: {self._library.reason(error)}.") from error
        return [at for at, token in enumerate(tokens) if token.wanted]

    def copy(self, sequence: int, target: int) -> None:
        """Let an empty sequence hold what another one does; keys and values are shared, not copied."""
        self._context.memory_seq_cp(sequence, target, -1, -1)

    def forget(self, sequence: int | None = None) -> None:
        """Drop what one sequence holds, or all of them."""
        if sequence is None:
            self._context.kv_cache_clear(True)
        else:
            self._context.memory_seq_rm(sequence, -1, -1)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are written out, and nothing is put before or after it."""
        return [int(token) for token in self._vocab.tokenize(text, False, True)]

    def tokenize_prompt(self, text: str) -> list[int]:
        """The ids of a prompt as servers read it: with what the file puts before and after every text."""
        return [int(token) for token in self._vocab.tokenize(text, True, True)]

    @property
    def opening(self) -> list[int]:
        """The tokens that the file puts before every prompt."""
        prompt = self.tokenize_prompt("a")
        return prompt[: len(prompt) - len(self.tokenize("a"))]

    def piece(self, token: int) -> str:
        """The text of a token, of a special one its name."""
        return str(self._vocab.token_to_piece(token, 0, True))

    def ends_answers(self, token: int) -> bool:
        """Whether llama.cpp ends an answer at a token."""
        return bool(self._vocab.is_eog(token))
