"""One of two processes that run the ops on distributed tensors of PyTorch: ``python ranks.py STORE RANK``."""

import os
import sys

import torch
from torch.distributed import barrier, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import portable_gpt2 as pg
from portable_gpt2.testing.cases import CASES, FORMS, UNIT, form_of

BATCHED = ("x", "q", "k", "v", "ids")
WHOLE, BATCH = Replicate(), Shard(0)


def placements(name):
    """Yield placements by array: all replicated; the batch split; the columns of the weight split; both split."""
    yield {}
    yield dict.fromkeys(BATCHED, BATCH)
    columns = {"conv1d": {"w": Shard(1), "b": Shard(0)}, "unembed": {"w": Shard(0)}}.get(name)
    if columns:
        yield columns
        yield {"x": BATCH, **columns}


def run(fn, arrays):
    """Return the result, and the gradient of the sum of its squares with respect to each float."""
    arrays = [a.detach().requires_grad_(a.is_floating_point()) for a in arrays]
    result = fn(*arrays)
    (result * result).sum().backward()
    return [result, *(a.grad for a in arrays if a.requires_grad)]


def main(store, rank):
    init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    backend = pg.get_backend("torch")
    compared = 0
    for name, case in CASES.items():
        plain = case.on(backend, "float32")
        for placement in placements(name):
            distributed = {key: distribute_tensor(a, mesh, [placement.get(key, WHOLE)]) for key, a in plain.items()}
            for form in FORMS:
                op = form_of(case.op, form)
                expected = run(lambda *a: op(*a, **case.options), plain.values())  # noqa: B023
                found = run(lambda *a: op(*a, **case.options), distributed.values())  # noqa: B023
                for e, f in zip(expected, found, strict=True):
                    bound = 64 * UNIT["float32"]
                    torch.testing.assert_close(f.full_tensor(), e, rtol=bound, atol=bound, msg=f"{name} {placement}")
                    compared += 1
                if any(placement.get(key) == BATCH for key in plain):
                    assert not found[0].placements[0].is_replicate(), f"{name}: gathered"
        for key, a in distributed.items():
            like = backend.arange(3, like=a), backend.zeros((2, 2), like=a)
            assert all(x.device_mesh == mesh and x.placements == (WHOLE,) for x in like), key
            assert (backend.to_numpy(a) == backend.to_numpy(plain[key])).all()
    barrier()
    destroy_process_group()
    print(f"compared {compared}", flush=True)
    os._exit(0)  # because gloo's threads may abort an interpreter that shuts down normally


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
