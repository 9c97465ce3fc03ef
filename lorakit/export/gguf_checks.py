"""What a GGUF file says of tokens, template and ends of answers, compared with what the run was trained with."""

from pathlib import Path

from lorakit.export.source import Check, ExportSource
from lorakit.model.gguf_file import GgufFile
from lorakit.model.llama_cpp import GgufModel
from lorakit.recipe.problem import quote


def check_tokenizer(source: ExportSource, path: Path, written: GgufFile) -> tuple[Check, ...]:
    """The file's tokenizer, chat template and stop tokens against those of the training."""
    template = source.tokenizer.chat_template
    same = written.chat_template == template or not template
    checks = [Check("chat template", same, "the training's" if same else "another one than the training's")]
    with GgufModel(path) as model:
        texts, differing = source.texts, []
        for text in texts:
            ours, its = source.tokenizer(text, add_special_tokens=False)["input_ids"], model.tokenize(text)
            if ours != its:
                differing.append(_first_difference(source, model, ours, its))
        detail = f"{len(texts) - len(differing)} of {len(texts)} rows become the tokens of the training"
        detail += f"; the first other one: {differing[0]}" if differing else ""
        # Some pre-tokenizers of llama.cpp are approximations, wrong for rare stretches of text.
        checks.append(Check("tokens", not differing, detail, fatal=2 * len(differing) > len(texts)))
        deaf = [token for token in source.stop_ids if not model.ends_answers(token)]
        words = ", ".join(map(str, source.tokenizer.convert_ids_to_tokens(deaf or list(source.stop_ids))))
        checks.append(Check("stop tokens", not deaf, f"llama.cpp does not stop at {words}" if deaf else words))
    return tuple(checks)


def _first_difference(source: ExportSource, model: GgufModel, ours: list[int], its: list[int]) -> str:
    at = next((at for at, (one, other) in enumerate(zip(ours, its, strict=False)) if one != other), len(its) - 1)
    trained = " ".join(quote(str(word)) for word in source.tokenizer.convert_ids_to_tokens(ours[at : at + 4]))
    read = " ".join(quote(model.piece(token)) for token in its[at : at + 4])
    return f"{trained} where llama.cpp reads {read}"
