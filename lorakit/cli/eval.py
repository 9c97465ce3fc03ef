"""`lorakit eval`"""

from lorakit.cli.options import Json, Quiet, RunFolder


def evaluate(run: RunFolder, as_json: Json = False, quiet: Quiet = False) -> None:
    """Score a run's base model and adapter on the held-out rows.

    Loss and perplexity are taken on every trained token; the recipe's evaluate.metrics on greedy answers. The scores
    and every answer are kept in the run's eval/ folder.
    """
    from lorakit import console

    progress = console.Terminal(quiet)
    from lorakit.evaluate.run import evaluate as evaluate_run
    from lorakit.plan.prepare import reopen_run

    opened, prepared = reopen_run(run, progress)
    scored, path = evaluate_run(opened, prepared, progress)
    if as_json:
        console.result_json({"file": str(path), "models": {model.name: model.scores for model in scored}})
        return
    rows = len(scored[0].answers) or len(prepared.held_out.rows if prepared.held_out else [])
    held = opened.read_manifest()["base"].get("quantization", "none")
    names = list(dict.fromkeys(name for model in scored for name in model.scores))
    console.result_table(
        f"{prepared.recipe.name}: {rows} held-out rows" + ("" if held == "none" else f", base in {held}"),
        ["", *(model.name for model in scored)],
        [[name, *(_shown(name, model.scores.get(name)) for model in scored)] for name in names],
    )
    console.result(f"every answer: {path.with_suffix('.jsonl')}")


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name in ("loss", "perplexity"):
        return f"{value:.4f}" if value < 1e4 else f"{value:.3g}"
    return f"{value:.1%}"
