"""GPT-2 written once against the array API standard, and run by NumPy, TensorFlow, JAX and PyTorch.

The public names are those of `portable_gpt2.api`, which is imported when one of them is used for the first time. Until
then, not even NumPy is imported, so that the command-line program can handle Ctrl-C from its start.
"""

TYPE_CHECKING = False  # importing the constant from typing would take 3 ms

if TYPE_CHECKING:
    from . import gradients as gradients
    from . import pages as pages
    from . import training as training
    from .api import *  # noqa: F403
    from .ops import *  # noqa: F403

    __version__: str
else:

    def __getattr__(name):
        """Return a submodule, a public name, or the version of the package that is installed."""
        from importlib import import_module
        from importlib.machinery import PathFinder

        if name == "__version__":  # its only source is pyproject.toml
            return import_module("importlib.metadata").version("portable-gpt2")
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if PathFinder.find_spec(f"{__name__}.{name}", __spec__.submodule_search_locations) is not None:
            return import_module(f".{name}", __name__)
        api = import_module(".api", __name__)
        public = {each: getattr(api, each) for each in api.__all__} | {"__all__": api.__all__}
        globals().update(public)  # so that they are found without a call of this function
        if name not in public:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return public[name]

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
