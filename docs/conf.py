"""The site: ``make docs`` builds it into build/docs, without a network."""

from importlib.metadata import version as _version

project = "graph_capture"
author = "the authors of graph_capture"
version = release = _version("graph-capture")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

default_role = "code"  # a name in single backticks, as docstrings here write it
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_use_ivar = True
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "graph_capture"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#3357d6", "color-brand-content": "#3357d6"},
    "dark_css_variables": {"color-brand-primary": "#7d9bff", "color-brand-content": "#7d9bff"},
}
html_copy_source = False
html_show_sphinx = False
exclude_patterns = ["build"]
