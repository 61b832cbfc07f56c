"""Shapes are part of every signature: jaxtyping's import hook checks them, with beartype, while the package computes.

The hook has to be there before the package is imported, so that it runs in a process of its own. Where a dimension is
unknown, or torch.compile traces, it raises false alarms; kernels have no annotations: theirs are the definition's.
"""

import re
from pathlib import Path

import processes

from portable_gpt2 import ops

TESTS = Path(__file__).parent
PATH = [TESTS / "support", TESTS / "third_party"]
OPS = sorted(name for name, op in vars(ops).items() if hasattr(op, "reference"))
HOOKED = """
from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook(["portable_gpt2", "mistaken"], "beartype.beartype"):
    import portable_gpt2 as pg
    import portable_gpt2.model
"""


def test_every_op_and_the_model_keep_to_their_annotations(backend):
    """Catches a result of another shape than its signature says, and a signature that says what is not so."""
    code = f"""{HOOKED}
import numpy as np
from portable_gpt2.testing.cases import CASES, FORMS, form_of

backend = pg.get_backend({backend.name!r})
for name, case in CASES.items():
    for form in FORMS:
        form_of(case.op, form)(*case.on(backend, "float32").values(), **case.options)
assert "jaxtyping" in repr(pg.ops.Float)

config = pg.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
params = pg.init_params(config, backend=backend)
cache = pg.new_cache(params, config, batch=3)
for seq in (2, 1):
    tokens = backend.from_numpy(np.zeros((3, seq), np.int32))
    logits, cache = pg.gpt2(params, tokens, config, cache)
logits, none = pg.gpt2(params, tokens, config)
print(*backend.shape(logits))
"""
    assert processes.run(code, path=PATH).split()[-3:] == ["3", "1", "16"]


def test_the_hook_checks_the_package():
    """Catches an import hook without effect: annotations other than jaxtyping's are silently not checked."""
    code = f"""{HOOKED}
import numpy as np

for wrong in (np.ones((2, 3)), np.ones((2, 3, 4), np.int32)):
    try:
        pg.model.split_heads(wrong, 2)
    except TypeCheckError as error:
        assert "batch seq n" in str(error)
        print("refused")
"""
    assert processes.run(code, path=PATH).split() == ["refused"] * 2


def test_a_wrong_annotation_is_found(tmp_path):
    """Catches annotations that are checked in name only: with an axis too many in its result, each op is refused."""
    source = Path(ops.__file__).read_text("utf-8").replace("from .", "from portable_gpt2.")
    mistaken, count = re.subn(r'(\) -> Float\[Array, "[^"]*)("\]:)', r"\1 mistaken\2", source)
    assert count == len(OPS)
    (tmp_path / "mistaken.py").write_text(mistaken)
    code = f"""{HOOKED}
    import mistaken
from portable_gpt2.testing.cases import CASES

for case in CASES.values():
    name = case.op.__name__
    try:
        getattr(mistaken, name).reference(*case.arrays.values(), **case.options)
    except TypeCheckError as error:
        assert "mistaken" in str(error)
        print(name)
"""
    assert sorted(set(processes.run(code, path=[*PATH, tmp_path]).split())) == OPS
