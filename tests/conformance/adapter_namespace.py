"""The namespace that the official array API tests are run on, for the backend that PORTABLE_GPT2_BACKEND names.

The functions under test are the adapter's own. The suite needs more than they are to do its work, creation and
comparison above all: what an adapter lacks comes from elsewhere, and `conformance_plugin` lets nothing test it.
"""

import importlib

import portable_gpt2 as pg

_BACKEND = pg.get_backend()
_REST = {"tensorflow": "rest_of_tensorflow", "torch": "array_api_compat.torch"}
_SOURCES = [importlib.import_module(_REST[_BACKEND.name])] if _BACKEND.name in _REST else []

for _source in (*_SOURCES, _BACKEND.xp):
    globals().update({name: getattr(_source, name) for name in dir(_source) if not name.startswith("_")})
