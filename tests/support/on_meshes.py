"""Run a model on meshes and print what it computes: ``python on_meshes.py ENGINE DIRECTORY SIZES...``.

With the engine ``torch`` it is one of several processes that torchrun starts. The first process prints, for each mesh,
a line of JSON: logits, texts and scores, and how often the devices communicated in a decode step, a score and a call of
`logits`. ``test_mesh.py`` compares them with one device.
"""

import contextlib
import json
import os
import re
import sys

import numpy as np

import portable_gpt2 as pg

PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12]]
TEXT = [5, 6, 7, 8, 9, 10, 11, 60, 1, 0, 2, 30, 31, 32]
IDS = np.random.default_rng(0).integers(0, 61, (4, 12))
SAMPLINGS = (
    {"temperature": 0, "seed": 1},
    {"top_k": 5, "seed": 7},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 8},
)
ALL_LOGITS = (
    {"top_k": None, "temperature": 3.0, "seed": 9},
    {"top_k": 1, "repetition_penalty": 3.0, "seed": 10},
)


def texts(model, options):
    """Return the new tokens of each prompt, generated as one batch, and those of the first prompt alone."""
    from portable_gpt2.generation.decoder import Generation
    from portable_gpt2.sampling import Sampling

    batch = [Generation(list(p), Sampling(**options), i) for i, p in enumerate(PROMPTS)]
    for _ in model._decoder.stream(batch, 20):
        pass
    found = [generation.tokens[len(p) :] for generation, p in zip(batch, PROMPTS, strict=True)]
    return found, list(model.stream_ids(PROMPTS[0], max_new_tokens=20, **options))


def computed(model):
    """Return everything that is compared, as lists."""
    score = model.score_ids(3 * TEXT, stride=6, alternatives=3)  # three windows, the last one shorter
    return {
        "logits": model.backend.to_numpy(model.logits(IDS)).tolist(),
        "one row": model.backend.to_numpy(model.logits(IDS[:1])).tolist(),
        "texts": [texts(model, options) for options in (*SAMPLINGS, *ALL_LOGITS)],
        "log_probs": score.log_probs[1:].tolist(),
        "ranks": score.ranks.tolist(),
        "likeliest": score.likeliest.tolist(),
        "likeliest_log_probs": score.likeliest_log_probs[1:].tolist(),
    }


@contextlib.contextmanager
def counted():
    """Collect the collectives of PyTorch by name, with their number of elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if name.startswith("c10d."):
                first = args[0] if "allgather" not in name else args[1]
                found.append([re.sub(r"c10d\.(\w+?)_\..*", r"\1", name), first[0].numel()])
            return function(*args, **(kwargs or {}))

    with Look():
        yield found


def of_hlo(text):
    """Return the collectives in the text of a compiled function, by name, with their number of elements."""
    found = []
    for shape, name in re.findall(
        r"= \(?(\w+\[[\d,]*\]).*? (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(", text
    ):
        dims = [int(n) for n in re.findall(r"\d+", shape.partition("[")[2])]
        found.append([name, int(np.prod(dims))])
    return found


def collectives(model, engine):
    """Return the collectives of a decode step, of a score, and of `logits`."""
    decoder, cache = model._decoder, model._decoder.new_cache(4, 16, None)
    _, cache = decoder.read([[1, 2, 3]] * 4, cache, 4)
    calls = {
        "step": lambda: decoder.read([[4]] * 4, cache, 4),
        "score": lambda: decoder.score([(TEXT[:9], 1)], 0),
        "logits": lambda: decoder.logits(IDS),
    }
    found = {}
    for name, call in calls.items():
        if engine == "torch":
            with counted() as seen:
                call()
            found[name] = seen
        else:
            texts, original = [], decoder._once

            def once(key, make, original=original, texts=texts):
                function = original(key, make)

                def lowered(*args):
                    texts.append(function.lower(*args).compile().as_text())
                    return function(*args)

                return lowered

            decoder._once = once
            call()
            decoder._once = original
            found[name] = of_hlo(texts[-1])
    return found


def main(engine, directory, *meshes):
    for text in meshes:
        sizes = pg.mesh.parse(text)
        model = pg.GPT2.load(directory, backend=engine, mesh=sizes)
        local = sum(map(held, (x for _, x in pg.params.flatten(model.params))))
        found = {"mesh": text, **computed(model), "collectives": collectives(model, engine), "elements": local}
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(found), flush=True)
    if engine == "torch":
        import torch

        torch.distributed.barrier()
        os._exit(0)  # because gloo's threads may abort an interpreter that shuts down normally


def held(x):
    """Return how many elements of an array one device has."""
    local = x.to_local() if hasattr(x, "to_local") else x.addressable_data(0)
    return int(np.prod(local.shape))


if __name__ == "__main__":
    main(*sys.argv[1:])
