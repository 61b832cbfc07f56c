"""The site: ``nox -s docs`` builds it. docs/decisions/0048 says why with these tools."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from command_reference import page as command_reference  # noqa: E402

_ABOUT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

project = "portable_gpt2"
author = "the portable_gpt2 authors"
version = release = _ABOUT["version"]
html_title = f"{project} {release}"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
]
exclude_patterns = ["conf.py", "_build", "benchmarks/partial"]
nitpicky = True

# Pages. A page is Markdown, which can also be read where the repository is shown.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# A link to one of these files leads to the page that shows the file.
PAGES_OF_FILES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

# Notebooks are percent scripts, so that they can be read, tested and compared as code.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 3600  # seconds for each cell: a minute of work takes 20 minutes on a machine that is very busy
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # the messages of frameworks

# Docstrings. A name in single backticks becomes a link if it is a name of this package, and looks like code if not.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", ".*"), ("py:class", ".*")]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the sections of parameters have the types, with the shapes of arrays
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
suppress_warnings = ["mystnb.unknown_mime_type"]


def _change_source(app, docname, source):
    """Let links to files above docs/ lead to their pages or name the file, and complete the page that is generated."""
    up = "../" * docname.count("/")
    for file, page in PAGES_OF_FILES.items():
        source[0] = source[0].replace(f"]({up}../{file}", f"]({up}{page}")
    source[0] = re.sub(rf"\[([^]]*)\]\({up}\.\./([^.)][^)]*)\)", r"\1 (`\2`)", source[0])
    if docname == "reference/command":
        source[0] += command_reference()


def _escape(app, what, name, obj, options, lines):
    """Escape the mathematics and shapes of docstrings that Sphinx would read as markup, such as |x| and [*batch, n]."""
    is_example = False
    for i, line in enumerate(lines):
        is_example = bool(line.strip()) and (is_example or line.lstrip().startswith(">>>"))
        if not is_example:
            texts = line.split("``")  # those with odd indices are literal
            texts[::2] = [re.sub(r"\|", r"\|", re.sub(r"\[\*(?=[\w#])", r"[\*", text)) for text in texts[::2]]
            lines[i] = "``".join(texts)


def setup(app):
    """Connect the changes of sources and docstrings to Sphinx."""
    app.connect("source-read", _change_source)
    app.connect("autodoc-process-docstring", _escape, priority=100)  # before numpydoc reads the sections
