"""Devices: their names, and that arrays are created where they should be."""

import numpy as np
import pytest

import portable_gpt2 as pg


def ones(backend, **options):
    return backend.from_numpy(np.ones((3, 3), np.float32), **options)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cpu:7", "", 3.5, object()], ids=lambda x: f"{x!r:.9}")
def test_an_unknown_device_is_refused(backend, device):
    """Catches a device that is taken for another, and a message that does not list the devices."""
    attempts = [
        lambda: pg.get_backend(backend, device=device),
        lambda: type(backend)(device),
        lambda: pg.use_backend(backend, device=device).__enter__(),
        lambda: ones(backend, device=device),
        lambda: backend.resolve_device(device),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="has no device") as caught:
            attempt()
        said = repr(device) if isinstance(device, str) else f"that is a {type(device).__name__};"
        assert said in str(caught.value)
        for name in backend.devices():
            assert name in str(caught.value)


def test_every_device_is_found_by_its_name_and_by_itself(backend):
    """Catches a name that stands for another device, a ``:0`` that is refused, and two names for one device."""
    assert backend.devices()
    for name in backend.devices():
        found = backend.resolve_device(name)
        assert backend.resolve_device(found) == found
        for other in (f"{name}:0", name.removesuffix(":0")):
            if ":" not in name or name.endswith(":0"):
                assert backend.resolve_device(other) == found
        assert [other for other in backend.devices() if backend.resolve_device(other) == found] == [name]
        for chosen in (pg.get_backend(backend, device=name), pg.get_backend(backend, device=found)):
            assert chosen.default_device == found
            assert name in repr(chosen) or str(found) in repr(chosen)
            assert backend.device(ones(chosen)) == name


def test_an_array_without_a_device_of_its_own_is_on_one_that_is_listed(backend):
    """Catches `device` that calls a device by another name than `devices`."""
    x = ones(backend)
    assert backend.device(x) in backend.devices()
    assert backend.device(ones(backend, device=backend.device(x))) == backend.device(x)


def test_arrays_are_created_on_the_chosen_device(backend):
    """Catches a device that is dropped: by `from_numpy`, by `arange` and `zeros`, or by a result."""
    compiled = backend.compile(
        lambda x: {
            "a compiled op": pg.gelu(x),
            "a compiled index": x[0, ...],
            "a compiled split": backend.split(x, 3)[1],
            "a compiled arange": backend.arange(2, like=x),
            "a compiled zeros": backend.zeros((2,), like=x),
        }
    )
    for name in backend.devices():
        x = ones(backend, device=name)
        assert np.array_equal(backend.to_numpy(x), np.ones((3, 3)))
        indices = backend.arange(3, like=x)
        rows = backend.zeros((1, 3), like=x)
        placed = backend.resolve_device(backend.placement(x))
        made = {
            "from_numpy": x,
            "from_numpy of integers": backend.from_numpy(np.arange(3, dtype=np.int32), device=name),
            "from_numpy on the placement": ones(backend, device=placed),
            "arange": indices,
            "zeros": rows,
            "take": backend.xp.take(x, indices, axis=0),
            "write": backend.write(backend.zeros((3, 3), like=x), rows, 1),
            "index_add": backend.index_add(backend.zeros((3, 3), like=x), indices, x),
            "relayout": backend.relayout("wte", x),
            **compiled(x),
            "a bound array": backend.compile(lambda x, n: x[n, ...], x)(1),
        }
        assert {what: backend.device(y) for what, y in made.items()} == dict.fromkeys(made, name)
