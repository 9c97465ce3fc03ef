"""`lorakit check`"""

from dataclasses import asdict
from pathlib import Path

from lorakit.cli.options import Json, Overrides, RecipePath
from lorakit.errors import UserError


def check(recipe: RecipePath, overrides: Overrides = [], as_json: Json = False) -> None:  # noqa: B006
    """Validate a recipe; print it resolved, and every [bold]auto[/bold] with its reason.

    Every error of the file is reported in one pass, then what a run would refuse of the base's files where they lie
    here. No model is loaded, no network is used. Exit code 0 or 2.
    """
    from lorakit import console
    from lorakit.hardware.machine import this_machine
    from lorakit.plan import model_info
    from lorakit.plan.auto import resolve_auto
    from lorakit.plan.memory import effective_quantization, quantization_line
    from lorakit.recipe.adapter_kind import adapter_spec
    from lorakit.recipe.load import RecipeErrors, load, to_yaml
    from lorakit.recipe.problem import LocatedError, Location, Problem
    from lorakit.recipe.sharding import missing_package

    try:
        loaded = load(recipe, overrides)
        model, own = loaded.recipe.model, adapter_spec(loaded.recipe.adapter).quantizes
        with loaded.locating():
            info = model_info.find_model_info(model.base, model.revision, model.add_tokens)
            model_info.refuse_by_config(loaded.recipe, info)
            settled, choices = resolve_auto(loaded.recipe, this_machine(), info)
            # Last: what the recipe and the config say is reported without weights too.
            model_info.check_local_base(loaded.recipe)
    except UserError as error:
        if not as_json:
            raise
        whole = Problem(Location(recipe.absolute()), "", "", str(error), "")
        problems = error.problems if isinstance(error, RecipeErrors | LocatedError) else [whole]
        console.result_json({"valid": False, "problems": [problem.to_dict() for problem in problems]})
        raise SystemExit(error.exit_code) from error
    quantization = quantization_line(settled.model, own, info)
    concerns = (model_info.beyond_training(loaded.recipe, info), missing_package(settled.train.sharding))
    warnings = [concern for concern in concerns if concern]
    if as_json:
        effective, _ = effective_quantization(settled.model, own, info)
        console.result_json(
            {
                "valid": True,
                "recipe": settled.model_dump(),
                "auto": [asdict(choice) for choice in choices],
                "quantization": {"requested": model.quantization, "effective": effective, "said": quantization},
                "warnings": warnings,
            }
        )
        return
    console.result(to_yaml(settled, Path.cwd()))
    notes = [*map(str, choices), f"model.quantization: {quantization}"]
    for note in notes + [f"warning: {warning.removesuffix('.')}." for warning in warnings]:
        console.result_wrapped(f"# {note}", under="#   ")
