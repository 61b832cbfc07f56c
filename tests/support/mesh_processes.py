"""One of the processes of a mesh: ``python mesh_processes.py ENGINE SIZES MODEL ROOM [ARGUMENT ...]``.

It calls the methods of a model, and writes what they return to ROOM. With further arguments, it then runs the command.
``python mesh_processes.py in_directories ROOM ARGUMENT ...`` only runs the command.
"""

import json
import os
import sys
from pathlib import Path

import portable_gpt2 as pg
from portable_gpt2 import cli, mesh

LONG = b"".join(i.to_bytes(4, "little") for i in range(70_000))  # more than a block, and no part is repeated


def error_of(fn):
    """Return the class and the message of the error that a function raises."""
    try:
        fn()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def own_mesh(engine, sizes):
    """Return the framework's own mesh of all processes."""
    if engine == "torch":
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    import jax
    import numpy as np

    return jax.sharding.Mesh(np.asarray(jax.devices()).reshape(*sizes.values()), tuple(sizes))


def main(engine, sizes, source, room, *arguments):
    model = pg.GPT2.load(source, backend=engine, mesh=mesh.parse(sizes))
    number, count = model.backend.process()
    of_framework = pg.GPT2.load(source, backend=engine, mesh=own_mesh(engine, mesh.parse(sizes)))
    ids = [1, 2, 3]

    def fail_in_the_last():
        if number == count - 1:
            raise OSError("no such disk")

    found = {
        "count": count,
        "seedless": [list(model.stream_ids(ids, max_new_tokens=12)) for _ in range(2)],
        "seeds": [completion.seed for completion in model.complete(["a", "b"], max_new_tokens=1)],
        "seed of each": error_of(lambda: list(model.stream_ids(ids, max_new_tokens=3, seed=number))),
        "prompt of each": error_of(lambda: list(model.stream_ids([number], max_new_tokens=3, seed=1))),
        "text of each": error_of(lambda: model.score_ids([number, 1, 2])),
        "common": model.mesh.common(LONG if number == 0 else b"another") == LONG,
        "empty": model.mesh.common(b"") == b"",
        "of the last": model.mesh.common(b"%d" % number, count - 1).decode(),
        "agree": [model.mesh.agree(True), model.mesh.agree(number == 0), model.mesh.agree(number > 0)],
        "together": error_of(lambda: model.mesh.together(fail_in_the_last)),
        "mesh of the framework": [
            str(of_framework.mesh),
            list(of_framework.stream_ids(ids, max_new_tokens=5, seed=3)),
        ],
        "export": error_of(lambda: model.export(f"{room}/model.onnx")),
    }
    model.save(f"{room}/saved")
    found["again"] = error_of(lambda: model.save(f"{room}/saved"))

    def no_space(file, tensors, progress):
        next(iter(tensors.values())).read()
        raise OSError("no space left on device")

    if number == 0:  # the disk is full after one tensor
        pg.checkpoint.writing.write_safetensors = no_space
    found["full"] = error_of(lambda: model.save(f"{room}/full"))
    found["still works"] = list(model.stream_ids(ids, max_new_tokens=5, seed=3))
    Path(room, f"{number}.json").write_text(json.dumps(found))
    if arguments:
        sys.argv = ["portable-gpt2", *arguments]
        sys.exit(cli.main())


def in_directories(room, *arguments):
    """Run the command in a directory of this process alone."""
    directory = Path(room, os.environ["RANK"])
    directory.mkdir()
    os.chdir(directory)
    sys.argv = ["portable-gpt2", *arguments]
    sys.exit(cli.main())


if __name__ == "__main__":
    if sys.argv[1] == "in_directories":
        in_directories(*sys.argv[2:])
    main(*sys.argv[1:])
