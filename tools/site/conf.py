"""The documentation as a site: every page of the repository that links to another, with a search (`make site`)."""

from sphinx.application import Sphinx

project = "lorakit"
copyright = "the lorakit authors"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = [
    "README.md",
    "docs/*.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "configs/README.md",
    "recipes/README.md",
    "recipes/*/README.md",
    "lorakit/data/general/README.md",
]
html_theme = "furo"
html_title = "lorakit"
html_show_sourcelink = False
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]  # console transcripts, and YAML that is wrong on purpose

_PAGES = {
    "Use": ["guide", "recipe", "data", "adapters", "planning", "speed", "evaluation", "merging"],
    "Know": ["architecture", "benchmarks", "reliability"],
}
_BESIDE = {
    "Use": ["configs/README", "recipes/README", "recipes/*/README"],
    "Know": ["SECURITY", "CONTRIBUTING", "CHANGELOG", "lorakit/data/general/README"],
}


def _add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """The first page holds the table of contents, which a reader of the repository does not need."""
    if page != root_doc:
        return
    for caption, pages in _PAGES.items():
        names = "\n".join([*(f"docs/{name}" for name in pages), *_BESIDE[caption]])
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{names}\n```\n"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_contents)
