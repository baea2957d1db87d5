"""The site: ``sphinx-build -W --keep-going -b html docs DIR``. It needs no network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import gmoe  # noqa: E402

project = "gmoe"
author = "The gmoe developers"
project_copyright = f"2026, {author}"
release = gmoe.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "auto_examples/*.ipynb"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"gmoe {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
mathjax_path = "mathjax/tex-svg.js"  # MathJax 3.2.2 with its fonts, in one file of _static
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False  # torch's and PyG's link to their own sites
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings tell
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shapes"]

nitpicky = True  # a reference that leads nowhere is a warning, but for those to other projects
nitpick_ignore_regex = [
    ("py:.*", r"(abc|torch|torch_geometric|torchmetrics|torchvision|huggingface_hub)\..*"),
    ("py:class", r"(lightning|transformers)\..*"),
    # Bases and records that are not public.
    ("py:class", r"gmoe\.(conv\.open_widths\.OpenWidths|conv\.explain\.HidesPrototype)"),
    ("py:class", r"gmoe\.(stack\.Stack|recorded\.Recorded)"),
    ("py:class", r"gmoe\.(moe\.MoELayer|models\.layered\.LayeredGNN)"),
    ("py:class", r"gmoe\.routers\.from_call\.FromCall"),
]

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples"),
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"\.py$",  # run all of them, and show what they print
    "reset_argv": "docs.plots.gallery.arguments",
    "remove_config_comments": True,
    "write_computation_times": False,  # a page that loads scripts from other sites
    "download_all_examples": False,
    "show_signature": False,
    "within_subsection_order": "docs.plots.gallery.place",
}


def public_bases(_: Any, __: str, ___: type, ____: dict[str, Any], bases: list[type]) -> None:
    """Show a private base class as its own public one."""
    bases[:] = [
        base.__base__ if base.__name__.startswith("_") and base.__base__ else base for base in bases
    ]


def module_of_source(_: Any, module: str, name: str | None) -> str | None:
    """Where viewcode looks for a source; ``None`` leaves it to follow the import.

    It links a file back to the API under one package, which is that of SoftSlots in its file. So
    SoftRouting, which has another, is looked for where it is not, and has no link.
    """
    # Of gmoe.saved, whose names have their pages under gmoe: the links would lead nowhere.
    if name and name.startswith("Pretrained"):
        return "gmoe"
    return module if name and name.startswith("SoftRouting") else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-bases", public_bases)
    app.connect("viewcode-follow-imported", module_of_source)
