"""The models to score: what `lorakit eval` is given (runs, adapters, models, the word `base`) -> ModelSet."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorakit.amounts import counted
from lorakit.atomic_io import sha256_of
from lorakit.errors import BaseModelError, UserError
from lorakit.evaluate.gguf_source import GgufSource, open_gguf
from lorakit.hardware.machine import Machine, usable_machine
from lorakit.model.endpoint import Endpoint, is_endpoint, open_endpoint, short_address, shown_address
from lorakit.model.load import attentions_of
from lorakit.model.new_rows import with_rows_of
from lorakit.model.peft_adapter import adapter_config
from lorakit.model.quantization_config import check_quantization
from lorakit.model.resolve import Base, resolve_base
from lorakit.model.tokenizer import quiet_libraries
from lorakit.plan.auto import resolve_auto
from lorakit.plan.model_info import read_model_info
from lorakit.prepare import Prepared, prepare_run, reopen_run
from lorakit.progress import Progress
from lorakit.recipe.adapter_kind import trains_all
from lorakit.recipe.load import load
from lorakit.recipe.schema import Data, Model, Recipe
from lorakit.run_dir import MERGED, Run, missing_run, suggest_run
from lorakit.run_inputs import changed_weights, recorded_base, warn_of_other_base

Choice = Literal["seed", "similar"]
Kind = Literal["base", "adapter", "model", "merged", "gguf", "endpoint"]
BASE = "base"
# In this order: a manifest.json alone may be another program's.
_SIGNS = {"adapter": "adapter_config.json", "merged": MERGED, "model": "config.json", "run": "manifest.json"}


@dataclass(frozen=True)
class Prompting:
    """What a prompt has besides the row's own messages. `system` takes the place of the row's system text; `few_shot`
    training rows stand before the question, chosen by the seed or as the nearest to it."""

    few_shot: int = 0
    choose: Choice = "seed"
    system: str | None = None
    seed: int = 0

    def __str__(self) -> str:
        parts = ["system text"] if self.system is not None else []
        nearest = "nearest " if self.choose == "similar" else ""
        parts += [counted(self.few_shot, f"{nearest}example")] if self.few_shot else []
        return ", ".join(parts)


@dataclass(frozen=True)
class EvalModelSpec:
    """One model to score. `given` is the argument it comes from; `settings` say how its base is loaded, and both are
    None of a GGUF file and of a server's model; `prepared` is what its run was trained from, if it has a run;
    `prompting`: what its prompts have besides the rows' own messages."""

    name: str
    given: str
    kind: Kind
    base: Base | None
    settings: Model | None
    adapter: Path | None = None
    prepared: Prepared | None = None
    gguf: GgufSource | None = None
    endpoint: Endpoint | None = None
    prompting: Prompting | None = None

    @property
    def loaded(self) -> tuple[Base, Model]:
        """The base and how it is loaded, of a model that torch runs."""
        if self.base is None or self.settings is None:
            raise TypeError(f"{self.name}: of the kind {self.kind}, which torch does not run")
        return self.base, self.settings

    @property
    def base_key(self) -> tuple[Any, ...]:
        """Models with the same key share one base in memory."""
        if self.gguf:
            return ("gguf", *self.gguf.identity()["gguf"])
        if self.endpoint:
            return ("endpoint", self.endpoint.url, self.endpoint.model)
        base, settings = self.loaded
        double = settings.double_quant and settings.quantization in ("q4", "nf4")
        how = (settings.dtype, settings.quantization, double, settings.attention, *base.new_rows)
        return (*sorted(base.sha256(".safetensors").items()), sha256_of(base.folder / "config.json"), how)

    def identity(self, device: str) -> dict[str, Any]:
        """All that decides what this model computes."""
        if self.gguf:
            return self.gguf.identity()
        if self.endpoint:
            return self.endpoint.identity()
        files = ("adapter_model.safetensors", "adapter_config.json")
        adapter = {name: sha256_of(self.adapter / name) for name in files} if self.adapter else None
        config = sha256_of(self.loaded[0].folder / "config.json")
        return {"base": self.base_key, "config": config, "adapter": adapter, "device": device}


def have_same_weights(one: Base, other: Base) -> bool:
    """Whether two bases have the same files of weights, wherever they are."""
    return one.sha256(".safetensors") == other.sha256(".safetensors")


@dataclass(frozen=True)
class ModelSet:
    """The models to score, in the order given, and the first run, which brings rows and settings. `prepared` without a
    run is a recipe's."""

    specs: tuple[EvalModelSpec, ...]
    run: Run | None
    prepared: Prepared | None
    machine: Machine

    @property
    def reference(self) -> int:
        """The number of the model by whose tokenizer and chat template a server's rows are rendered: the first run,
        else the first model that is no server's."""
        of_run = (at for at, spec in enumerate(self.specs) if self.prepared and spec.prepared is self.prepared)
        return next(of_run, next(at for at, spec in enumerate(self.specs) if not spec.endpoint))


def argument_kind(given: str) -> str:
    """What an argument is: run, adapter, merged, model, gguf, endpoint, recipe or base; an error if it is none of
    these."""
    path = Path(given)
    if is_endpoint(given):
        return "endpoint"
    if given == BASE and not path.exists():
        return BASE
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.exists():
            raise UserError(f"{given}: there is no such file.")
        return "gguf"
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return "recipe"
    if not path.exists():
        if given.count("/") != 1 or path.is_absolute() or path.parent.is_dir():
            raise missing_run(path)
        return "model"
    kind = next((kind for kind, name in _SIGNS.items() if (path / name).is_file()), None)
    if kind is None:
        reason, remedy = "a file", "Give the folder of one."
        if path.is_dir():
            reason = f"it has none of {', '.join(_SIGNS.values())}"
            remedy = suggest_run(path) or "Give the folder of one."
        raise UserError(f"{given}: is not a run, an adapter or a model: {reason}. {remedy}")
    return "run" if kind == "adapter" and run_folder(given) != path else kind


def run_folder(given: str) -> Path:
    """The folder of the run whose adapter/ was given, otherwise the argument itself."""
    path = Path(given)
    parent = Run(path.resolve().parent)
    return parent.folder if parent.holds_results() and parent.adapter == path.resolve() else path


def place_of(given: str) -> str:
    """By what an argument is the same as another: the folder or file where it is one, the run of an adapter/."""
    is_file = not is_endpoint(given) and Path(given).exists()
    return str(run_folder(given).resolve()) if is_file else given


def _short_names(given: Sequence[str]) -> dict[str, str]:
    """A short name for each argument; the whole argument where two short names would be equal."""
    short = {one: one for one in given}
    for one in given:
        if is_endpoint(one):
            short[one] = short_address(one)
        elif one != BASE and Path(one).exists():
            parts = Path(one).resolve().parts
            short[one] = "/".join(parts[-2:]) if parts[-1] in ("adapter", "merged", "model") else parts[-1]
    names = list(short.values())
    return {one: one if names.count(name) > 1 else name for one, name in short.items()}


@contextmanager
def lock_runs(given: Sequence[str]) -> Iterator[None]:
    """Keep training from replacing the runs among the arguments meanwhile; an error if one is being trained."""
    with ExitStack() as locks:
        for one in given:
            if argument_kind(one) == "run":
                locks.enter_context(Run(run_folder(one)).shared())
        yield


def resolve_models(
    given: Sequence[str], progress: Progress, servers_alone: bool = False, base_option: str | None = None
) -> ModelSet:
    """The models that the arguments mean. One run alone means its base, its adapter and its merged model.
    `servers_alone`: whether servers may be without another model, which brings rows and a tokenizer. `base_option`:
    where the base of the runs and adapters, or of some of them, lies now."""
    quiet_libraries()
    places = [place_of(one) for one in given]
    twice = next((one for at, one in enumerate(given) if places[at] in places[:at]), None)
    if twice:
        raise UserError(f"{shown_address(twice)}: is given twice. Leave one out.")
    kinds = {one: argument_kind(one) for one in given}
    if recipe := next((one for one in given if kinds[one] == "recipe"), None):
        if len(given) > 1 or base_option:
            raise UserError(
                f"{recipe}: a recipe, whose own base and rows are scored before anything is trained. Give it alone, "
                "without --base, or give a run."
            )
        return _models_of_recipe(recipe, progress)
    option = _open_base_option(base_option, kinds, progress)
    moved = {one: base_option for one in given if option and _takes(one, kinds[one], option, alone=len(given) == 1)}
    if option and not moved:
        raise UserError(
            f"--base: {option.name}: none of these was trained on its weights. Leave it out, or name theirs."
        )
    runs = {one: reopen_run(run_folder(one), progress, moved.get(one)) for one in given if kinds[one] == "run"}
    run, prepared = next(iter(runs.values()), (None, None))
    if run and prepared and len(given) == 1 and Run(Path(given[0])).holds_results():
        if not prepared.has_base:
            progress.say(f"{given[0]}: its base model is not here, and is left out. --base says where it is")
        return models_of_run(run, prepared)
    machine = prepared.machine if prepared else usable_machine(progress)
    names, specs = _short_names(given), []
    for one in given:
        if one in runs:
            specs.append(_trained_model(names[one], one, *runs[one]))
        elif kinds[one] == "adapter":
            own = option if one in moved else None
            specs.append(_adapter(names[one], one, prepared, machine, progress, own))
        elif kinds[one] == "endpoint":
            served = open_endpoint(one, progress)
            specs.append(EvalModelSpec(names[one], shown_address(one), "endpoint", None, None, endpoint=served))
        elif kinds[one] == "gguf":
            specs.append(gguf_model(names[one], one, runs, progress))
        elif kinds[one] != BASE:
            base = resolve_base(one, "main", progress)
            kind: Kind = "merged" if kinds[one] == "merged" else "model"
            specs.append(EvalModelSpec(names[one], one, kind, base, _settings(base, prepared, machine)))
    if not servers_alone and all(spec.endpoint for spec in specs) and BASE not in given:
        raise UserError(
            f"{specs[0].given}: a server alone brings neither rows nor the tokenizer and chat template that its "
            "prompts are compared with. Give the run, or the model's folder, beside it."
        )
    if BASE in given:
        owners = [one for one in specs if one.adapter] + [one for one in specs if one.prepared and one.base]
        if not owners:
            raise UserError("'base' needs a run or an adapter beside it. Or give the model's own folder or hub id.")
        if owners[0].prepared and not owners[0].prepared.has_base:
            raise UserError(f"'base': the base model of {owners[0].given} is not here. Write --base with its place.")
        (base, settings), of_run = owners[0].loaded, owners[0].prepared
        base = of_run.base if of_run else base
        specs.insert(list(given).index(BASE), EvalModelSpec(BASE, BASE, "base", base, settings, prepared=of_run))
    return ModelSet(tuple(specs), run, prepared, machine)


def _models_of_recipe(given: str, progress: Progress) -> ModelSet:
    """The base of a recipe of which nothing has been trained, with its rows and settings."""
    loaded = load(Path(given))
    with loaded.locating():
        prepared = prepare_run(loaded.recipe, progress)
    spec = EvalModelSpec(BASE, given, "base", prepared.base, prepared.model, prepared=prepared)
    return ModelSet((spec,), None, prepared, prepared.machine)


def models_of_run(run: Run, prepared: Prepared) -> ModelSet:
    """The models of one run: its base, what it trained, and its merged model if there is one."""
    given = str(run.folder)
    name = "model" if trains_all(prepared.recipe.adapter) else "adapter"
    specs = [EvalModelSpec(BASE, given, "base", prepared.base, prepared.model, prepared=prepared)]
    specs = [*(specs if prepared.has_base else []), _trained_model(name, given, run, prepared)]
    if (run.merged / MERGED).is_file():
        settings = prepared.model.model_copy(update={"quantization": "none"})
        base = Base(str(run.merged), run.merged, "merged")
        specs.append(EvalModelSpec("merged", given, "merged", base, settings))
    return ModelSet(tuple(specs), run, prepared, prepared.machine)


def add_quantizations(model_set: ModelSet, words: Sequence[str]) -> ModelSet:
    """Score every adapter also on its base in these quantizations, unless the base is quantized already."""
    if not any(spec.adapter for spec in model_set.specs):
        raise UserError("--quantizations: is for adapters, and none of these models is one. Leave it out.")
    specs: list[EvalModelSpec] = []
    for spec in model_set.specs:
        specs.append(spec)
        if spec.adapter is None:
            continue
        base, own = spec.loaded
        for word in [word for word in words if word != own.quantization]:
            settings = own.model_copy(update={"quantization": word})
            try:
                check_quantization(base, settings)
            except UserError as error:
                reason = str(error).removeprefix("model.quantization: ").partition(" Write none")[0]
                raise UserError(f"--quantizations: {spec.name}: {reason} Leave {word} out.") from error
            specs.append(replace(spec, name=f"{spec.name} on {word}", settings=settings))
    return replace(model_set, specs=tuple(specs))


def _trained_model(name: str, given: str, run: Run, prepared: Prepared) -> EvalModelSpec:
    if trains_all(prepared.recipe.adapter):
        base = Base(str(run.model), run.model, "trained")
        return EvalModelSpec(name, given, "model", base, prepared.model, prepared=prepared)
    return EvalModelSpec(name, given, "adapter", prepared.base, prepared.model, run.adapter, prepared)


def gguf_model(name: str, given: str, runs: Mapping[str, tuple[Run, Prepared]], progress: Progress) -> EvalModelSpec:
    """A GGUF file; with what it was trained from, if it was exported from the adapter of one of these runs."""
    gguf = open_gguf(Path(given))
    adapter, prepared = gguf.export.get("adapter_sha256"), None
    adapters = {folder: run.adapter / "adapter_model.safetensors" for folder, (run, _) in runs.items()}
    sha256s = {folder: sha256_of(file) for folder, file in adapters.items() if file.is_file()}
    if adapter and sha256s:
        origin = next((folder for folder, sha256 in sha256s.items() if sha256 == adapter), None)
        prepared = runs[origin][1] if origin else None
        if origin is None:
            progress.warn(
                f"{given}: was exported from another adapter than that of {', '.join(sha256s)}: its export.json names "
                f"{gguf.export.get('source')}, as it was then. Export again what was trained since"
            )
    return EvalModelSpec(name, given, "gguf", None, None, prepared=prepared, gguf=gguf)


def _open_base_option(named: str | None, kinds: Mapping[str, str], progress: Progress) -> Base | None:
    if named is None:
        return None
    if not {"run", "adapter"} & {*kinds.values()}:
        raise UserError("--base: none of these is a run or an adapter, which it is for. Leave it out.")
    try:
        return resolve_base(named, "main", progress)
    except BaseModelError as error:
        raise UserError(f"--base: {error}") from error


def _takes(given: str, kind: str, base: Base, alone: bool) -> bool:
    """Whether --base is of this argument: of several only of those that were trained on its weights."""
    if kind not in ("run", "adapter"):
        return False
    recorded = Run(run_folder(given)).read_manifest()["base"]["sha256"] if kind == "run" else recorded_base(Path(given))
    return alone or recorded is None or not changed_weights(base, recorded)


def _adapter(
    name: str, given: str, first: Prepared | None, machine: Machine, progress: Progress, option: Base | None = None
) -> EvalModelSpec:
    """An adapter on the base of --base, else that of the first run where it is the same, else the one that it names, or
    on the first run's if that one could not be found."""
    config, recorded = adapter_config(Path(given)), recorded_base(Path(given))
    if config.is_prompt_learning:
        raise UserError(f"{given}: is of PEFT's kind {config.peft_type.value}, which lorakit does not put on a model.")
    named = config.base_model_name_or_path
    base, reason = option, "its adapter_config.json names no base model"
    if base:
        progress.say(f"{given}: put on {base.name} ({base.origin}), which --base names")
    elif first and (named == first.base.name or (recorded and not changed_weights(first.base, recorded))):
        base = first.base
    elif named:
        try:
            base = resolve_base(named, config.revision or "main", progress)
            progress.say(f"{given}: put on {base.name} ({base.origin}), which its adapter_config.json names")
        except UserError as error:
            reason = str(error).rstrip(".")
    if base is None:
        if first is None:
            raise UserError(
                f"{given}: {reason}. Write --base with the folder or hub id where its base is now, or add a run that "
                "was trained on it."
            )
        base = first.base
        progress.warn(f"{given}: put on {base.name}, the base of the run, since its own could not be found: {reason}")
    warn_of_other_base(Path(given), base, recorded, progress)
    base = with_rows_of(Path(given), base)
    alike = first and have_same_weights(base, first.base)
    settings = first.model if first and alike else _settings(base, first, machine)
    if first and not alike:
        progress.warn(f"{given}: its base, {base.name}, differs from that of the run, {first.base.name}")
    if settings.quantization != "none":
        progress.warn(
            f"{given}: put on its base in {settings.quantization}, as the first run was trained. Without that run, or "
            "after another one, it is put on the unquantized base and scores differently"
        )
    return EvalModelSpec(name, given, "adapter", base, settings, Path(given))


def _settings(base: Base, first: Prepared | None, machine: Machine) -> Model:
    """How a model without a run is loaded: unquantized, in the dtype and attention of the first run."""
    like = first.model if first else Model(base=base.name)
    attentions = attentions_of(base)
    attention = like.attention if like.attention in attentions else "auto"
    update = {"base": base.name, "quantization": "none", "chat_template": None, "attention": attention}
    recipe = Recipe(model=like.model_copy(update=update), data=Data(train="-"))
    return resolve_auto(recipe, machine, read_model_info(base.folder), 1, attentions)[0].model
