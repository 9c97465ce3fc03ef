"""A recipe's lengths against the positions that its model has: what cannot work is refused, what is unwise is told."""

from lorakit.errors import UserError
from lorakit.model.positions import Positions
from lorakit.plan.model_info import ModelInfo
from lorakit.recipe.schema import Recipe


def refuse_lengths(recipe: Recipe, facts: ModelInfo | None) -> None:
    """Refuse lengths that the model has no positions for.

    Raises:
        UserError: `data.max_length` or `evaluate.max_new_tokens` is more than that.
    """
    positions = facts.positions if facts else None
    if positions is None or not positions.hard:
        return
    why = f"{positions.limit:,} positions ({positions.key}), each with an embedding of its own, and none for more"
    longest, answer = recipe.data.max_length, recipe.evaluate.max_new_tokens
    if longest > positions.limit:
        raise UserError(
            f"data.max_length: rows of {longest:,} tokens are allowed, but {recipe.model.base} has {why}. "
            f"Write max_length: {positions.limit} or less."
        )
    if answer > positions.limit:
        raise UserError(
            f"evaluate.max_new_tokens: answers of {answer:,} tokens are asked for, but {recipe.model.base} has {why}. "
            f"Write max_new_tokens: {max(1, positions.limit // 2)}, which leaves room for the prompt."
        )


def beyond_training(recipe: Recipe, facts: ModelInfo | None, longest: int | None = None) -> str:
    """A warning where rows are longer than what the model was trained on; empty where none is due.

    Args:
        longest: the longest row in tokens; None where no row has been read, which leaves `data.max_length`.
    """
    positions = facts.positions if facts else None
    length = recipe.data.max_length if longest is None else min(longest, recipe.data.max_length)
    if positions is None or positions.hard or length <= positions.limit:
        return ""
    rows = f"rows may have {length:,} tokens" if longest is None else f"the longest row has {length:,} tokens"
    return f"data.max_length: {rows}, {unseen(positions)}. Write max_length: {positions.limit}, or choose another model"


def unseen(positions: Positions) -> str:
    """A clause on what later positions mean for a model without a limit."""
    return (
        f"but the model was trained on {positions.limit:,} positions ({positions.key}): later ones are computed, but "
        "it has never seen any, and mostly predicts badly there"
    )
