"""The site: ``sphinx-build -W --keep-going -b html docs DIR``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
REPOSITORY = "https://github.com/gmoe/gmoe"
sys.path.insert(0, str(ROOT))  # experiments and vision, which are not installed, and this checkout's gmoe
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = str(ROOT)  # of what examples start

import gmoe  # noqa: E402

project = "gmoe"
author = "The gmoe developers"
project_copyright = f"2026, {author}"
version = release = gmoe.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"gmoe {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # the docstrings say them
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shapes"]

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|torch_geometric|torchmetrics|torchvision|timm|numpy|networkx|matplotlib)(\..*)?"),  # other sites
]

examples = sorted((ROOT / "examples").glob("*.py"))
if examples:
    extensions.append("sphinx_gallery.gen_gallery")
    sphinx_gallery_conf = {
        "examples_dirs": str(ROOT / "examples"),
        "gallery_dirs": "auto_examples",
        "plot_gallery": False,  # CI runs the examples in a step of its own
        "download_all_examples": False,
        "show_signature": False,
    }
else:
    suppress_warnings = ["toc.not_readable"]
