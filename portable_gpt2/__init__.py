"""GPT-2 written once against the array API standard, and run by NumPy, TensorFlow, JAX and PyTorch.

The public names are those of `portable_gpt2.api`, which is imported when one of them is used for the first time. Until
then next to nothing is imported: the command must be able to answer Ctrl-C before NumPy is there.
"""

TYPE_CHECKING = False  # that of typing takes 3 ms to import

if TYPE_CHECKING:
    from . import gradients as gradients
    from . import training as training
    from .api import *  # noqa: F403
else:

    def __getattr__(name):
        """Return a submodule, or a public name."""
        from importlib import import_module
        from importlib.machinery import PathFinder

        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if PathFinder.find_spec(f"{__name__}.{name}", __spec__.submodule_search_locations) is not None:
            return import_module(f".{name}", __name__)
        api = import_module(".api", __name__)
        public = {each: getattr(api, each) for each in api.__all__} | {"__all__": api.__all__}
        globals().update(public)  # from now on they are found without this function
        if name not in public:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return public[name]

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
