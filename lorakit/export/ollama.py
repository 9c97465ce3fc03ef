"""`ollama`: the merged model as a GGUF file, with the Modelfile that tells Ollama how it was trained to be asked."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import UserError
from lorakit.export.gguf import MODULES, PLAIN, QUANTIZED, describe_formats, gguf_facts, write_gguf
from lorakit.export.source import Check, Export, ExportSource
from lorakit.progress import Progress
from lorakit.registry import EXPORTERS

if TYPE_CHECKING:
    from lorakit.data.chat_template import ChatTemplate
    from lorakit.export.chat_shape import ChatShape
    from lorakit.model.gguf_file import GgufFile

_USUAL_CONTEXT = 4096  # what Ollama takes where graphics memory is small, else more (envconfig/config.go)


@EXPORTERS.register("ollama", weights="merged", arguments=(*PLAIN, *QUANTIZED), default="q8_0", modules=MODULES)
def export_ollama(source: ExportSource, argument: str, folder: Path, progress: Progress) -> Export:
    """The merged model as a GGUF file with a Modelfile for Ollama, whose TEMPLATE writes the training's prompts."""
    from lorakit.export.gguf_checks import check_tokenizer
    from lorakit.export.modelfile import write_modelfile
    from lorakit.export.ollama_checks import check_prompts
    from lorakit.export.ollama_template import write_go_template
    from lorakit.model.gguf_file import read_gguf
    from lorakit.model.llama_cpp import GgufModel

    template = prompt_template(source)
    shape = learn_proved_shape(template)  # what cannot be written is refused before the work
    system = [("SYSTEM", source.system)] if source.system else []
    write_modelfile(system)
    path = folder / f"{source.name}-{argument.upper()}.gguf"
    write_gguf(source, argument, path, progress)
    rest, beginning = leave_out_beginning(shape, path)
    text, written = write_go_template(rest), read_gguf(path)
    stops, context = stop_texts(source), context_length(written, source.max_length)
    model = [("FROM", f"./{path.name}"), ("TEMPLATE", text), *system]
    parameters = [("PARAMETER num_ctx", str(context)), *(("PARAMETER stop", word) for word in stops)]
    (folder / "Modelfile").write_text(write_modelfile([*model, *parameters]), encoding="utf-8")
    with GgufModel(path) as loaded:
        checks = check_prompts(template, rest, text, beginning, loaded)
    facts = gguf_facts(path, written, argument) | {"stop": stops, "num_ctx": context}
    types = Check("types", True, describe_formats(facts, argument))
    return Export(facts, (types, *check_tokenizer(source, path, written), *checks), _readme(source))


def prompt_template(source: ExportSource) -> "ChatTemplate":
    """The chat template as the prompts of the training were written by it; a UserError where there is none."""
    from lorakit.data.chat_template import ChatTemplate

    if not source.tokenizer.chat_template:
        raise UserError(
            f"ollama: {source.folder} has no chat template, so there are no prompts of conversations to write. Export "
            "gguf instead, and give its server plain texts."
        )
    stops = tuple(stop_texts(source))
    return ChatTemplate(source.tokenizer, stop_words=stops, variables=source.variables, date=source.date)


def learn_proved_shape(template: "ChatTemplate") -> "ChatShape":
    """What the chat template writes around messages, proved on conversations; a UserError where Ollama's language
    cannot write it."""
    from lorakit.data.rows import RowError
    from lorakit.data.template_source import writes_date
    from lorakit.export.chat_shape import UnknownShape, learn_shape
    from lorakit.export.ollama_checks import compare
    from lorakit.export.ollama_template import write_go_template

    try:
        if template.date is None and writes_date(template.source):
            raise UnknownShape("it writes today's date in a form of its own")
        shape = learn_shape(template)
        difference = compare(template, shape, write_go_template(shape)).difference
    except (UnknownShape, RowError) as error:
        difference = str(error)
    if difference:
        what = f"the chat template cannot be written in Ollama's template language: {difference}"
        raise UserError(
            f"ollama: {what}. Export gguf instead, and serve it with llama-server --jinja, which reads the chat "
            "template itself."
        )
    return shape


def leave_out_beginning(shape: "ChatShape", path: Path) -> tuple["ChatShape", str]:
    """The shape without the beginning of sequence, where llama.cpp puts that before every prompt, and its text. A file
    whose prompts were trained without it is told not to."""
    from lorakit.model.gguf_file import write_flag
    from lorakit.model.llama_cpp import GgufModel

    with GgufModel(path) as model:
        text = "".join(model.piece(token) for token in model.opening)
    if not text:
        return shape, ""
    if rest := shape.without_beginning(text):
        return rest, text
    write_flag(path, "tokenizer.ggml.add_bos_token", False)
    return shape, ""


def stop_texts(source: ExportSource) -> list[str]:
    """The texts of the tokens that end an answer."""
    texts = (source.tokenizer.decode([token], skip_special_tokens=False) for token in source.stop_ids)
    return [text for text in texts if text.strip()]


def context_length(written: "GgufFile", max_length: int | None) -> int:
    """The num_ctx of a model: Ollama's own, or as many tokens as the rows of the training had where these were more,
    and never more positions than the model has. Ollama silently drops the oldest messages of a longer conversation,
    and reserves memory for all of num_ctx."""
    positions = written.metadata.get(f"{written.metadata['general.architecture']}.context_length")
    return int(min(max(max_length or 0, _USUAL_CONTEXT), positions or _USUAL_CONTEXT))


def _readme(source: ExportSource) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", source.name.lower()).strip("-._") or "model"
    system = " The SYSTEM line is the training's own system prompt." if source.system else ""
    return f"""\
`export.json` has what was checked. In this folder:

```bash
ollama create {name} -f Modelfile
ollama run {name}
```

The TEMPLATE of the Modelfile writes the prompts that the training's chat template writes, with texts of conversations;
Ollama refuses messages that the chat template refuses, and those of tools.{system}
"""
