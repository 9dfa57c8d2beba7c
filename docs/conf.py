"""Settings of the site. `python -m sphinx -W -c docs . build/site` builds it, and runs the tutorials."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # the cells compile small programs and run each once

import gemma3_jax

sys.path.insert(0, str(Path(__file__).parent))  # for the extension `cells`

project = "gemma3-jax"
author = "The gemma3-jax authors"
copyright = author
release = gemma3_jax.__version__

# The sources are those of the whole checkout, so that a link from one page to another is the same here and there.
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/notes/*.md", "*.md"]
exclude_patterns = [".*", "build", "dist"]
html_extra_path = ["front"]

extensions = ["cells", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["cells.css"]

# Roles and links must lead somewhere; types in signatures lead to other packages, whose pages need network.
linkcheck_timeout = 10
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Docstrings have names and code between single backticks.
default_role = "literal"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # docstrings say more: shapes, and what None means
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
