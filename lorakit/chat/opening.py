"""The models of a chat: what `lorakit chat` is given, and the bases of its adapters."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lorakit.chat.endpoint_model import EndpointModel
from lorakit.chat.gguf_engine import GgufEngine
from lorakit.chat.models import ChatModel, Engine, TokenModel
from lorakit.chat.torch_engine import TorchEngine
from lorakit.errors import UserError
from lorakit.evaluate.inference import ModelLoader
from lorakit.evaluate.models import BASE, EvalModelSpec, ModelSet
from lorakit.evaluate.rendering import load_tokenizers, positions_of_model, prompt_stop_ids, prompt_template
from lorakit.model.tokenizer import pad_token_id
from lorakit.progress import Progress


def open_chat_models(model_set: ModelSet, progress: Progress) -> list[ChatModel]:
    """Every model of the set, and the base of each adapter, which comes before it; nothing is loaded yet. A server's
    gets the system prompt and the variables of the first run. A UserError where one has no chat template."""
    specs = _with_bases(model_set.specs)
    local = replace(model_set, specs=tuple(spec for spec in specs if not spec.endpoint))
    opened: dict[str, TokenModel] = {model.name: model for model in _open_local(local, progress)}
    reference = opened[local.specs[local.reference].name].template if local.specs else None
    models: list[ChatModel] = []
    for spec in specs:
        if spec.endpoint and reference:
            given = (reference.system, reference.variables, reference.tokenizer)
            models.append(EndpointModel(spec.name, spec.endpoint, *given))
        else:
            models.append(EndpointModel(spec.name, spec.endpoint) if spec.endpoint else opened[spec.name])
    return models


def _open_local(model_set: ModelSet, progress: Progress) -> Iterator[TokenModel]:
    if not model_set.specs:
        return
    device = model_set.machine.device
    torch_loader, gguf_loader = ModelLoader(device), ModelLoader(device)  # so that neither closes what the other has
    tokenizers = load_tokenizers(model_set, progress)
    for spec, tokenizer in zip(model_set.specs, tokenizers, strict=True):
        if not tokenizer.chat_template:
            raise UserError(
                f"{spec.given}: has no chat template, which a chat needs. Give a run as well, whose template is then "
                "used."
            )
        template = prompt_template(spec, tokenizer, model_set)
        positions, stops = positions_of_model(spec), prompt_stop_ids(spec, template)
        limit = positions.limit if positions else None
        engine: Engine = TorchEngine(spec, torch_loader, pad_token_id(tokenizer))
        if spec.gguf:
            engine = GgufEngine(spec, gguf_loader)
        yield TokenModel(spec.name, _describe(spec), template, stops, limit, engine, progress)


def first_model(models: Sequence[ChatModel], model_set: ModelSet) -> ChatModel:
    """Who answers first: the first one given, of a run alone what it trained, of a recipe its base."""
    alone = len(model_set.specs) > 1 and len({spec.given for spec in model_set.specs}) == 1
    names = [spec.name for spec in model_set.specs if not (alone and spec.kind == "base")]
    return next(model for model in models if model.name == names[0])


def _with_bases(specs: Sequence[EvalModelSpec]) -> list[EvalModelSpec]:
    """The models, and before them the base of each adapter, unless it is among them."""
    bases: list[EvalModelSpec] = []
    for spec in (spec for spec in specs if spec.adapter):
        if not any(one.adapter is None and one.base_key == spec.base_key for one in (*specs, *bases)):
            names = {one.name for one in (*specs, *bases)}
            name = f"base of {spec.name}" if BASE in names else BASE
            bases.append(replace(spec, name=name, kind="base", adapter=None))
    return [*bases, *specs]


def _describe(spec: EvalModelSpec) -> str:
    if spec.gguf:
        return str(spec.gguf.path)
    base, settings = spec.loaded
    quantized = "" if settings.quantization == "none" else f" in {settings.quantization}"
    if spec.adapter:
        return f"{spec.adapter} on {base.name}{quantized}"
    return f"{base.folder if spec.kind in ('merged', 'model') else base.name}{quantized}"
