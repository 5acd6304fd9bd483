"""Sphinx: pages in MyST-Markdown, tutorials by sphinx-gallery, references made as it builds."""

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import bayesdiff  # noqa: E402

project = "bayesdiff"
author = "the authors of bayesdiff"
release = version = bayesdiff.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "_ext.repository_links",
    "_ext.mathml",
    "_ext.generated",
]
exclude_patterns = ["_build", "_ext", "tutorials", "**/sg_execution_times.rst", ".DS_Store"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
myst_dmath_allow_digits = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# What only an extra brings: a page of the reference does without it.
autodoc_mock_imports = [
    name
    for name in ("accelerate", "diffusers", "optuna", "transformers", "wandb")
    if find_spec(name) is None
]

html_theme = "furo"
html_math_renderer = "mathml"
html_title = "bayesdiff"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
# Only what is typed: neither prompts nor what a command prints.
copybutton_prompt_text = r"^(>>> |\.\.\. |\$ )"
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

if list((HERE / "tutorials").glob("[0-9]*.py")):
    # Modules that tutorials write: sphinx-gallery forgets what a script adds to sys.path.
    for own in ("my_network", "my_parts"):
        folder = HERE / "tutorials" / "outputs" / "tutorials" / own
        folder.mkdir(parents=True, exist_ok=True)
        sys.path.append(str(folder))

    extensions.append("sphinx_gallery.gen_gallery")
    sphinx_gallery_conf = {
        "examples_dirs": "tutorials",
        "gallery_dirs": "gallery",
        "filename_pattern": r"/\d\d_",
        "ignore_pattern": r"__init__\.py",
        "within_subsection_order": "FileNameSortKey",
        "download_all_examples": False,
        "remove_config_comments": True,
        "show_memory": False,
        "show_signature": False,
        "copyfile_regex": "",
    }


def setup(app):
    """What ``-D plot_gallery=0`` sets is known also where there is no tutorial."""
    if "sphinx_gallery.gen_gallery" not in extensions:
        app.add_config_value("plot_gallery", "True", "html")
