"""The tokenizer of a recipe's base model with the chat template that its rows are rendered by."""

from datetime import date
from typing import TYPE_CHECKING

from lorakit.data.template_source import check_template_date, writes_date
from lorakit.model.base_files import has_tokenizer
from lorakit.model.resolve import Base
from lorakit.plan.model_info import find_model_folder
from lorakit.recipe.schema import Recipe

if TYPE_CHECKING:
    from lorakit.data.chat_template import ChatTemplate


def load_template(recipe: Recipe, base: Base) -> "ChatTemplate":
    """The tokenizer in the base's folder with the recipe's chat template, or its own.

    Raises:
        UserError: the tokenizer cannot be loaded, or the template does not read the recipe's variables or day.
    """
    # transformers, and torch with it
    from lorakit.data.chat_template import ChatTemplate
    from lorakit.model.tokenizer import load_tokenizer, quiet_libraries, stop_words

    quiet_libraries()
    tokenizer = load_tokenizer(base, recipe.model.chat_template)
    given, writes = recipe.model.template_date, writes_date(tokenizer.chat_template)
    check_template_date(given, writes)
    template = ChatTemplate(
        tokenizer,
        recipe.data.train_on,
        recipe.data.system,
        stop_words(base, tokenizer),
        recipe.model.template_variables,
        (date.today().isoformat() if given == "auto" else given) if writes else None,
    )
    template.check_variables()
    return template


def find_template(recipe: Recipe) -> "ChatTemplate | None":
    """`load_template` where the tokenizer is on this machine, whether the weights are or not; else None.

    Raises:
        UserError: as `load_template`.
    """
    folder = find_model_folder(recipe.model.base, recipe.model.revision)
    if folder is None or not has_tokenizer(folder):
        return None
    return load_template(recipe, Base(recipe.model.base, folder, "on this machine"))
