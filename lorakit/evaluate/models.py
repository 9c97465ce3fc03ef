"""Subjects: what `lorakit eval` is given (runs, adapters, models, `base`) -> the models to be scored."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorakit.atomic_io import sha256_of
from lorakit.errors import UserError
from lorakit.evaluate.arguments import BASE, argument_kind, run_folder, short_names
from lorakit.hardware.machine import Machine, usable_machine
from lorakit.model.base import Base, find_base
from lorakit.model.load import attentions_of, quiet_libraries
from lorakit.model.peft_adapter import adapter_config
from lorakit.model.stored import check_quantization
from lorakit.plan.auto import settle
from lorakit.plan.facts import facts_in
from lorakit.prepare import Prepared, reopen_run
from lorakit.progress import Progress
from lorakit.recipe.kinds import trains_all
from lorakit.recipe.schema import Data, Model, Recipe
from lorakit.run_dir import MERGED, Run

Kind = Literal["base", "adapter", "model", "merged"]


@dataclass(frozen=True)
class EvalModelSpec:
    """One model to be scored. `given` is the argument that it comes from; `settings` how its base is held in memory;
    `prepared` what its run was trained from, where it has a run."""

    name: str
    given: str
    kind: Kind
    base: Base
    settings: Model
    adapter: Path | None = None
    prepared: Prepared | None = None

    @property
    def base_key(self) -> tuple[Any, ...]:
        """What must be the same for two subjects to share one base in memory."""
        settings = self.settings
        double = settings.double_quant and settings.quantization in ("q4", "nf4")
        how = (settings.dtype, settings.quantization, double, settings.attention)
        return (*sorted(weight_digests(self.base).items()), sha256_of(self.base.folder / "config.json"), how)

    def identity(self, device: str) -> dict[str, Any]:
        """All that decides what this model computes."""
        files = ("adapter_model.safetensors", "adapter_config.json")
        adapter = {name: sha256_of(self.adapter / name) for name in files} if self.adapter else None
        config = sha256_of(self.base.folder / "config.json")
        return {"base": self.base_key, "config": config, "adapter": adapter, "device": device}


@dataclass(frozen=True)
class ModelSet:
    """The models to be scored, in the order given, and the first run, which brings rows and settings."""

    specs: tuple[EvalModelSpec, ...]
    run: Run | None
    prepared: Prepared | None
    machine: Machine


def weight_digests(base: Base) -> dict[str, str]:
    """The sha256 of each weights file of a base."""
    return {path.name: sha256_of(path) for path in base.files() if path.suffix == ".safetensors"}


@contextmanager
def lock_runs(given: Sequence[str]) -> Iterator[None]:
    """While the runs among the arguments are read and scored no training replaces them.

    Raises:
        UserError: an argument is nothing that can be scored, or a training goes on in a run's folder.
    """
    with ExitStack() as held:
        for one in given:
            if argument_kind(one) == "run":
                held.enter_context(Run(run_folder(one)).shared())
        yield


def resolve_models(given: Sequence[str], progress: Progress) -> ModelSet:
    """The models that the arguments mean. One run alone means its base, its adapter and its merged model.

    Raises:
        UserError: an argument is none of these, is given twice, or its model cannot be had.
    """
    quiet_libraries()
    twice = next((one for one in given if list(given).count(one) > 1), None)
    if twice:
        raise UserError(f"{twice}: is given twice. Leave one out.")
    kinds = {one: argument_kind(one) for one in given}
    opened = {one: reopen_run(run_folder(one), progress) for one in given if kinds[one] == "run"}
    run, prepared = next(iter(opened.values()), (None, None))
    machine = prepared.machine if prepared else usable_machine(progress)
    if len(given) == 1 and opened and Run(Path(given[0])).holds_results():
        (found,) = opened.values()
        return models_of_run(*found)
    names, specs = short_names(given), []
    for one in given:
        if one in opened:
            specs.append(_of_run(names[one], one, *opened[one]))
        elif kinds[one] == "adapter":
            specs.append(_of_adapter(names[one], one, prepared, machine, progress))
        elif kinds[one] != BASE:
            specs.append(_of_model(names[one], one, kinds[one], prepared, machine, progress))
    if BASE in given:
        specs.insert(list(given).index(BASE), _of_base(specs))
    return ModelSet(tuple(specs), run, prepared, machine)


def models_of_run(run: Run, prepared: Prepared) -> ModelSet:
    """The models of one run: its base, what it trained, and its merged model where there is one."""
    given = str(run.folder)
    base = EvalModelSpec(BASE, given, "base", prepared.base, prepared.model, prepared=prepared)
    whole = trains_all(prepared.recipe.adapter)
    found = [base, _of_run("model" if whole else "adapter", given, run, prepared)]
    if (run.merged / MERGED).is_file():
        plain = prepared.model.model_copy(update={"quantization": "none"})
        folder = Base(str(run.merged), run.merged, "merged")
        found.append(EvalModelSpec("merged", given, "merged", folder, plain))
    return ModelSet(tuple(found), run, prepared, prepared.machine)


def add_quantizations(model_set: ModelSet, words: Sequence[str]) -> ModelSet:
    """The same with every adapter also on its base in these quantizations.

    Raises:
        UserError: there is no adapter, or a base whose checkpoint is quantized already.
    """
    found: list[EvalModelSpec] = []
    if not any(spec.adapter for spec in model_set.specs):
        raise UserError("--quantizations: is for adapters, and none is among these models. Leave it out.")
    for spec in model_set.specs:
        found.append(spec)
        for word in words if spec.adapter else ():
            if word == spec.settings.quantization:
                continue
            settings = spec.settings.model_copy(update={"quantization": word})
            try:
                check_quantization(spec.base, settings)
            except UserError as error:
                reason = str(error).removeprefix("model.quantization: ").partition(" Write none")[0]
                raise UserError(f"--quantizations: {spec.name}: {reason} Leave {word} out.") from error
            found.append(replace(spec, name=f"{spec.name} on {word}", settings=settings))
    return replace(model_set, specs=tuple(found))


def _of_run(name: str, given: str, run: Run, prepared: Prepared) -> EvalModelSpec:
    if trains_all(prepared.recipe.adapter):
        trained = Base(str(run.model), run.model, "trained")
        return EvalModelSpec(name, given, "model", trained, prepared.model, prepared=prepared)
    return EvalModelSpec(name, given, "adapter", prepared.base, prepared.model, run.adapter, prepared)


def _of_adapter(name: str, given: str, first: Prepared | None, machine: Machine, progress: Progress) -> EvalModelSpec:
    folder = Path(given)
    config = adapter_config(folder)
    if config.is_prompt_learning:
        raise UserError(f"{given}: is of PEFT's kind {config.peft_type.value}, which lorakit does not put on a model.")
    base = _base_of(given, config, first, progress)
    ours = first is not None and weight_digests(base) == weight_digests(first.base)
    settings = first.model if first and ours else _settings(base, first, machine)
    if settings.quantization != "none":
        progress.warn(
            f"{given}: put on its base in {settings.quantization}, as the first run was trained. Without that run, or "
            "behind another, it is put on the unquantized base, and its scores are others"
        )
    return EvalModelSpec(name, given, "adapter", base, settings, folder)


def _base_of(given: str, config: Any, first: Prepared | None, progress: Progress) -> Base:
    """The base that an adapter names; where that cannot be had, the first run's. Both are said."""
    named = config.base_model_name_or_path
    if first and named == first.base.name:
        return first.base
    try:
        if not named:
            raise UserError("its adapter_config.json names no base model")
        base = find_base(named, config.revision or "main", progress)
    except UserError as error:
        reason = str(error).removeprefix("model.base: ")
        if first is None:
            remedy = (
                f"Write where its base lies now as base_model_name_or_path into {Path(given) / 'adapter_config.json'}, "
                "or give a run that was trained on that base as well."
            )
            raise UserError(f"{given}: {reason.rstrip('.')}. {remedy}") from error
        progress.warn(
            f"{given}: put on {first.base.name}, the base of the run, since its own could not be found: {reason}"
        )
        return first.base
    progress.say(f"{given}: put on {base.name} ({base.origin}), which its adapter_config.json names")
    if first and weight_digests(base) != weight_digests(first.base):
        progress.warn(f"{given}: its base, {base.name}, is another one than that of the run, {first.base.name}")
    return base


def _of_model(
    name: str, given: str, kind: str, first: Prepared | None, machine: Machine, progress: Progress
) -> EvalModelSpec:
    try:
        base = find_base(given, "main", progress)
    except UserError as error:
        raise UserError(str(error).removeprefix("model.base: ")) from error
    held: Kind = "merged" if kind == "merged" else "model"
    return EvalModelSpec(name, given, held, base, _settings(base, first, machine))


def _of_base(others: Sequence[EvalModelSpec]) -> EvalModelSpec:
    """The base of the first run or adapter."""
    owner = next((one for one in others if one.adapter), None) or next((one for one in others if one.prepared), None)
    if owner is None:
        raise UserError("'base' needs a run or an adapter beside it. Or give the model's own folder or hub id.")
    base = owner.prepared.base if owner.prepared else owner.base
    return EvalModelSpec(BASE, BASE, "base", base, owner.settings, prepared=owner.prepared)


def _settings(base: Base, first: Prepared | None, machine: Machine) -> Model:
    """How a model that no run holds is held: unquantized, in the number format and attention of the first run."""
    like = first.model if first else Model(base=base.name)
    attentions = attentions_of(base)
    attention = "auto" if like.attention not in attentions else like.attention
    update = {"base": base.name, "quantization": "none", "chat_template": None, "attention": attention}
    recipe = Recipe(model=like.model_copy(update=update), data=Data(train="-"))
    return settle(recipe, machine, facts_in(base.folder), 1, attentions).recipe.model
