"""Of Sphinx: how `make docs` builds the site. Warnings are errors there."""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).parent))
import option_pages

import xpo
import xpo.judges
import xpo.objectives.losses
import xpo.rewards

logger = logging.getLogger(__name__)

project = "xpo"
author = "the authors of xpo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"  # the source is the repository, so that pages link to what lies beside docs/
include_patterns = ["docs/*.md", "CONTRIBUTING.md", "experiments/**/*.md", "xpo/data/assets/*/README.md"]
exclude_patterns = [".*", "site", "outputs", "multirun", "mlruns", "tests", "conf"]
myst_heading_anchors = 3
default_role = "code"  # single backquotes in docstrings
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!xpo\.).*")]  # of other libraries, or spelled for a reader
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
smartquotes = False  # dashes in commands are two dashes
html_theme = "furo"
html_title = "xpo"
html_static_path = ["static"]
html_extra_path = ["static/index.html"]  # leads to docs/index.html
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def generate(app: Any, docname: str, source: list[str]) -> None:
    """The configuration reference, from the options themselves."""
    if docname == "docs/configuration":
        source[0] += option_pages.markdown()


def read_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A warning for a public name without a docstring. |y| is a length there, no substitution of RST's."""
    if not any(lines):
        logger.warning("%s has no docstring", name)
    lines[:] = [re.sub(r"(`[^`]*`)|\|(?=\S)", lambda found: found[1] or r"\|", line) for line in lines]


def check_complete(app: Any, env: Any) -> None:
    """A warning for a public name that no page describes."""
    there = {name.rpartition(".")[2] for name in env.domains.python_domain.objects}
    public = {*xpo.__all__, *xpo.judges.__all__, *(name for name in vars(xpo.rewards) if name[0].isupper())}
    for name in sorted(public - there):
        logger.warning("no page describes the public name %s; api.md should", name)


def setup(app: Any) -> None:
    app.connect("source-read", generate)
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("env-check-consistency", check_complete)
