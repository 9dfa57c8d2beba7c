"""Settings of the site. `python -m sphinx -W -c docs . build/site` builds it, and runs the tutorials."""

import gemma3_jax

project = "gemma3-jax"
author = "The gemma3-jax authors"
copyright = author
release = gemma3_jax.__version__

# The sources are those of the whole checkout, so that a link from one page to another is the same here and there.
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/notes/*.md", "*.md"]
exclude_patterns = [".*", "build", "dist"]
html_extra_path = ["front"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project

# Roles and links must lead somewhere; types in signatures lead to other packages, whose pages need network.
linkcheck_timeout = 10
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_show_tb = True  # beside the warning
nb_execution_timeout = 300  # seconds for one cell
nb_output_stderr = "remove"  # progress bars

# Docstrings have names and code between single backticks.
default_role = "literal"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # docstrings say more: shapes, and what None means
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
