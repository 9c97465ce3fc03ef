"""What a GGUF file says of tokens, template and ends of answers, compared with what the run was trained with."""

from pathlib import Path

from lorakit.export.source import Check, ExportSource
from lorakit.model.gguf_file import GgufFile
from lorakit.model.gguf_tokenizer import describe_differences, missed_stops
from lorakit.model.llama_cpp import GgufModel


def check_tokenizer(source: ExportSource, path: Path, written: GgufFile) -> tuple[Check, ...]:
    """The file's tokenizer, chat template and stop tokens against those of the training."""
    template = source.tokenizer.chat_template
    same = written.chat_template == template or not template
    checks = [Check("chat template", same, "the training's" if same else "another one than the training's")]
    with GgufModel(path) as model:
        texts = source.texts
        differing = describe_differences(source.tokenizer, model, texts)
        detail = f"{len(texts) - len(differing)} of {len(texts)} rows become the tokens of the training"
        detail += f"; the first other one: {differing[0]}" if differing else ""
        # Some pre-tokenizers of llama.cpp are approximations, wrong for rare stretches of text.
        checks.append(Check("tokens", not differing, detail, fatal=2 * len(differing) > len(texts)))
        if source.added_tokens:
            unread = describe_differences(source.tokenizer, model, source.added_tokens)
            detail = unread[0] if unread else ", ".join(source.added_tokens)
            checks.append(Check("added tokens", not unread, detail))
        missed = missed_stops(model, source.stop_ids)
        words = ", ".join(map(str, source.tokenizer.convert_ids_to_tokens(missed or list(source.stop_ids))))
        checks.append(Check("stop tokens", not missed, f"llama.cpp does not stop at {words}" if missed else words))
    return tuple(checks)
