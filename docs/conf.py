"""How Sphinx builds the documentation: ``nox -s docs``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.util.docutils import SphinxRole

import mlmadapt
import mlmadapt.testing

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "mlmadapt"
author = "the mlmadapt contributors"
release = mlmadapt.__version__
html_title = f"mlmadapt {release}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_copyright = False
html_copy_source = False
pygments_dark_style = "github-dark"
exclude_patterns = ["_build"]
templates_path: list[str] = []

REPOSITORY = "https://github.com/mlmadapt/mlmadapt"
html_theme_options = {  # for "view this page" and "edit this page"
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# Copied is what a reader would type.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_custom_sections = ["Source"]
napoleon_use_ivar = True
napoleon_use_rtype = False

# Names of other libraries lead nowhere: without a network there are no inventories to look them up.
# And an object that is only looked at, such as a `MaskView`, is described in the text.
nitpick_ignore_regex = [("py:.*", r"(?!mlmadapt).*"), ("py:class", r".*\.(DomainWords|MaskView)")]

# Sphinx spells types out where it can evaluate them, and leaves the names of mlmadapt._types where
# it cannot. The pages show these for either; docs/api.md explains the names.
ROW = r"(?:Row|Mapping\[str, Any\])"
NAMES_OF_TYPES = {
    r"~?(?:collections\.abc|typing|mlmadapt\._types)\.(?=[A-Z])": "",
    r"(?<=: )(?:\S+ \| )*\S*_SupportsArray.*?(?= \| \S*Callable)": "ArrayLike",
    rf"Dataset \| Sequence\[{ROW}\]": "Rows",
    rf"Callable\[\[list\[dict\[str, Any\]\]\], {ROW}\]": "DataCollator",
    r"Callable\[\[str\], Sequence\[tuple\[int, int\]\]\]": "WordBoundaries",
    rf"Sequence\[{ROW}\]": "Features",
    r"(?<=: )Tokenizer\b": "PreTrainedTokenizerBase",
    r"(?<=: )Model\b": "PreTrainedModel",
    # At run time they are what HfArgumentParser can read.
    r"(?<=resume_from_checkpoint: )str \| None": "str | Literal[True] | None",
    r"(?<=lr_scheduler_kwargs: )str \| None": "dict[str, Any] | str | None",
    r"(?<=report_to: )str\b": "str | list[str]",
    r"<factory>": "[]",
}

# What single backticks may mean.
NAMES = {name: f"mlmadapt.{name}" for name in mlmadapt.__all__}
NAMES |= {name: f"mlmadapt.testing.{name}" for name in mlmadapt.testing.__all__}
default_role = "name"


class Name(SphinxRole):
    """A name in single backticks: a link where it is public here, code where it is not."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the nodes."""
        target = NAMES.get(self.text)
        if target is None:
            return [nodes.literal(self.rawtext, self.text)], []
        role = self.env.domains.python_domain.role("obj")
        text = f"{self.text} <{target}>"
        return role("py:obj", self.rawtext, text, self.lineno, self.inliner, {}, [])


def shorten(*event: Any) -> tuple[str | None, str | None]:
    """Show types by short names, the same ones in all signatures."""
    shown = list(event[-2:])
    for pattern, name in NAMES_OF_TYPES.items():
        shown = [each and re.sub(pattern, name, each) for each in shown]
    arguments, returns = shown
    return arguments, returns


def open_in_the_repository(app: Sphinx, page: str, source: list[str]) -> None:  # noqa: ARG001
    """Have links to tests and examples lead to the repository; Sphinx would offer a download."""
    inside = r"\]\((?:\.\./)+((?:examples|src|tests)/[^)]+)\)"
    source[0] = re.sub(inside, rf"]({REPOSITORY}/blob/main/\1)", source[0])


def leave_out_notes(app: Sphinx, tree: nodes.document) -> None:  # noqa: ARG001
    """Leave out of quoted code what is said to linters alone."""
    for block in tree.findall(nodes.literal_block):
        text = block.astext()
        if "# noqa" in text:
            block.rawsource = re.sub(r" *# noqa:.*", "", text)
            block[:] = [nodes.Text(block.rawsource)]


def setup(app: Sphinx) -> None:
    """Register all of them with Sphinx."""
    app.add_role("name", Name())
    app.connect("autodoc-process-signature", shorten)
    app.connect("source-read", open_in_the_repository)
    app.connect("doctree-read", leave_out_notes)
