"""`lorakit schema`"""

import json


def schema() -> None:
    """Print the JSON schema of a recipe, for editors.

    A recipe's first line can name a file that holds it: [cyan]# yaml-language-server: $schema=recipe.schema.json[/cyan]
    """
    from lorakit import console
    from lorakit.recipe.docs import json_schema

    console.result(json.dumps(json_schema(), indent=2, ensure_ascii=False))
