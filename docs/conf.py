"""Sphinx: `sphinx-build -W docs build/docs` makes a site of these pages and of the docstrings."""

import rope_ext

project = "rope_ext"
author = "the rope_ext authors"
release = version = rope_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"rope_ext {release}"

myst_heading_anchors = 3
autodoc_typehints = "none"  # dtypes and shapes are in the text, types in the signature
autodoc_member_order = "bysource"
