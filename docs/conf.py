"""Sphinx: `sphinx-build -W docs build/docs` makes a site of these pages and of the docstrings."""

import re
from pathlib import Path

import rope_ext

project = "rope_ext"
author = "the rope_ext authors"
release = version = rope_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"rope_ext {release}"
html_static_path = ["_static"]
html_js_files = ["versions.js"]
templates_path = ["_templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
        "sidebar/versions.html",
    ]
}
project_file = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
if repository := re.search(r'^repository = "(.*)"', project_file, re.M)[1]:
    html_theme_options = {
        "source_repository": repository,
        "source_branch": "main",
        "source_directory": "docs/",
    }

myst_heading_anchors = 3
myst_enable_extensions = ["html_image"]
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_mock_imports = ["cycler", "matplotlib"]  # of the extra viz: signatures name them


def setup(app):
    """Links to Markdown outside of docs/, which is no page of the site, are downloads."""

    def mark(name, page, source):
        outside = "../" * (page.count("/") + 1)
        source[0] = re.sub(rf"\]\(({outside}[^.)#][^)#]*\.md)\)", r"](path:\1)", source[0])

    app.connect("source-read", mark)
