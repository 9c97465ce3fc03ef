"""Modules that are trained whole beside the adapter: `adapter.train_modules` -> PEFT's modules_to_save."""

from collections import Counter
from typing import Any

from peft.utils.constants import EMBEDDING_LAYER_NAMES

from lorakit.errors import UserError


def select_train_modules(model: Any, names: list[str], adapted: list[str]) -> tuple[list[str], bool]:
    """The full paths of the modules that names mean, and whether embeddings are among them that the model ties.

    A name is a full path or its end in whole parts. Of tied embeddings both ends are given, so that PEFT keeps them
    tied: input first.

    Args:
        adapted: the paths that get an adapter, which cannot be trained whole as well.

    Raises:
        UserError: a name that means nothing, or something that cannot be trained whole.
    """
    modules = dict(model.named_modules())
    paths: list[str] = []
    for name in names:
        hit = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not hit:
            raise UserError(
                f"adapter.train_modules: {name!r} is not a module of this model, which has {_has(modules)}."
            )
        for path in hit:
            _check(path, modules[path], adapted)
        paths += [path for path in hit if path not in paths]
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    whole, tied = _with_tied(model, modules, outer)
    # PEFT compares the ends of paths as texts.
    others = [path for path in modules if path.endswith(tuple(whole)) and path not in whole] if whole else []
    if others:
        raise UserError(f"adapter.train_modules: PEFT cannot tell {', '.join(others)} from {', '.join(names)}.")
    return whole, tied


def _check(path: str, module: Any, adapted: list[str]) -> None:
    both = [name for name in adapted if f"{name}.".startswith(f"{path}.")]
    if both:
        raise UserError(
            f"adapter.train_modules: {path} would be trained whole, and {both[0]} by an adapter. Remove it here, or "
            f"write adapter.exclude: [{path.rsplit('.', 1)[-1]}]."
        )
    weights = list(module.parameters())
    if not weights:
        raise UserError(f"adapter.train_modules: {path} has no weights to train. Remove it.")
    if not all(weight.is_floating_point() for weight in weights):
        raise UserError(f"adapter.train_modules: {path} is quantized, and cannot be trained whole. Remove it.")


def _with_tied(model: Any, modules: dict[str, Any], paths: list[str]) -> tuple[list[str], bool]:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return paths, False
    ends = [next(path for path, module in modules.items() if module is end) for end in (embeddings, head)]
    if not set(ends) & set(paths):
        return paths, False
    if not any(path.rsplit(".", 1)[-1] in EMBEDDING_LAYER_NAMES for path in ends):
        raise UserError(
            f"adapter.train_modules: {ends[0]} and {ends[1]} are one weight, which PEFT would part: it keeps only "
            f"{' and '.join(EMBEDDING_LAYER_NAMES)} together. Remove it."
        )
    return [*ends, *(path for path in paths if path not in ends)], True


def _has(modules: dict[str, Any]) -> str:
    own = (path for path, module in modules.items() if any(True for _ in module.parameters(recurse=False)))
    counts = Counter(path.rsplit(".", 1)[-1] for path in own)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())
