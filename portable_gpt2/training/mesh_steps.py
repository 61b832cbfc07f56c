"""The steps of a trainer on a mesh: each device computes with its part of the batch and of the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..checkpoint.tensors import stored
from ..config import GPT2Config
from ..divided import Split
from ..host import StoredTensor
from ..mesh import DATA, MODEL, Mesh, Spec
from ..params import Params, check_params, flatten, nest, shapes
from .optimizer import Moments, sum_of_squares, updated
from .recipe import Recipe

Gradient = Callable[[Params, Any, Split], tuple[Any, Params]]
"""A function of parameters, micro-batches [n, batch, seq + 1] and a split; returns the mean loss and its gradient."""


class MeshSteps:
    """The compiled functions of a trainer on a mesh, and the places of its parameters and moments.

    Parameters
    ----------
    mesh : Mesh
        The mesh.
    config : GPT2Config
        The model's shape.
    recipe : Recipe
        The options of training.
    gradient : callable
        The gradient of a device's own micro-batches.
    loss : callable
        The loss of a device's own windows: a function of parameters, windows [batch, seq + 1] and a split.
    shard_optimizer : bool
        Whether each device along ``data`` has only its part of the moments, and updates only this part of the
        parameters.

    Raises
    ------
    ValueError
        If the model, or a batch, cannot be divided over the mesh.

    Notes
    -----
    Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020: the first stage.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: GPT2Config,
        recipe: Recipe,
        gradient: Gradient,
        loss: Callable[[Params, Any, Split], Any],
        shard_optimizer: bool = False,
    ) -> None:
        mesh.check(config)
        if recipe.reproducible:
            raise ValueError("the recipe is reproducible, which needs one device; leave out the mesh")
        if recipe.batch_size % mesh.sizes[DATA]:
            raise ValueError(
                f"batch_size is {recipe.batch_size}; the mesh {mesh} divides each batch over data={mesh.sizes[DATA]}: "
                f"give a multiple of {mesh.sizes[DATA]}"
            )
        self.mesh, self.config, self.recipe = mesh, config, recipe
        self._gradient, self._loss = gradient, loss
        self._axes = {
            path: self._axis(path, mesh.shape(path, shape)) if shard_optimizer else None
            for path, shape in shapes(config).items()
        }
        self._params_spec = mesh.params_spec(config)
        of_moments = nest({path: self._moment_spec(path) for path in self._axes})
        self._moments_spec = Moments(of_moments, of_moments)
        self._step_of = functools.cache(self._compiled_step)
        self._loss_over = functools.cache(self._compiled_loss)

    # Arrays

    def _axis(self, path: str, shape: tuple[int, ...]) -> int | None:
        """Return the axis of a parameter over which its moments are divided along ``data``; None if they are whole."""
        if path.endswith("c_attn/b"):  # its queries, keys and values lie one after another
            return None
        n, spec = self.mesh.sizes[DATA], self._whole_spec(path, len(shape))
        axes = [0] if path.endswith("c_attn/w") else range(len(shape))
        return next((i for i in axes if n > 1 and spec[i] is None and shape[i] % n == 0), None)

    def _whole_spec(self, path: str, n_axes: int) -> Spec:
        return self.mesh.spec(path) or (None,) * n_axes

    def _moment_spec(self, path: str) -> Spec:
        axis = self._axes[path]
        if axis is None:
            return self.mesh.spec(path)
        spec = list(self._whole_spec(path, len(self.mesh.shape(path, shapes(self.config)[path]))))
        spec[axis] = DATA
        return tuple(spec)

    def place(self, path: str, tensor: StoredTensor, *, is_moment: bool = False) -> Any:
        """Return a parameter, or one of its moments, on the mesh."""
        return self.mesh.place(path, tensor, self._moment_spec(path) if is_moment else None)

    def checked(self, params: Params) -> Params:
        """Return the parameters, which are on the mesh already, or are arrays of NumPy that are placed here."""
        found = dict(flatten(params))
        if all(isinstance(x, np.ndarray) for x in found.values()):
            check_params(params, self.config)
            return nest({path: self.place(path, stored(x)) for path, x in found.items()})
        for path, shape in shapes(self.config).items():
            if path not in found or self.mesh.backend.shape(found[path]) != self.mesh.shape(path, shape):
                raise ValueError(f"{path} is not on the mesh; give it to `place` first, or give arrays of NumPy")
        return params

    def no_moments(self) -> Moments:
        """Return the moments before the first step, which are zeros."""

        def zeros() -> Params:
            return nest(
                {
                    path: self.place(path, StoredTensor(shape, self.recipe.master_dtype, _zeros(shape)), is_moment=True)
                    for path, shape in shapes(self.config).items()
                }
            )

        def _zeros(shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
            # A view of one element: no process has the zeros of a whole tensor in memory.
            return lambda: np.broadcast_to(np.zeros((), self.recipe.master_dtype), shape)

        return Moments(zeros(), zeros())

    def stored(self, tree: Params) -> dict[str, StoredTensor]:
        """Return parameters or moments of the mesh as tensors of their own shapes, which are gathered when read."""
        found = dict(flatten(tree))
        return {path: self.mesh.stored(path, found[path], shape) for path, shape in shapes(self.config).items()}

    # Steps

    def step(
        self, params: Params, moments: Moments, batches: np.ndarray, size: int, rates: np.ndarray
    ) -> tuple[Params, Moments, float, float]:
        """Take a step with batches [n, batch, seq + 1], of which a device computes `size` windows at a time.

        Returns
        -------
        params, moments
            The parameters and moments after the step.
        loss, norm : float
            The mean loss of all windows, and the norm of its gradient before it was clipped.
        """
        mesh = self.mesh
        given = mesh.put(batches.astype(np.int32), None, DATA, None), mesh.put(rates, None)
        params, moments, loss, norm = self._step_of(size)(params, moments, *given)
        return params, moments, float(mesh.backend.to_numpy(loss)), float(mesh.backend.to_numpy(norm))

    def loss(self, params: Params, windows: np.ndarray) -> float:
        """Return the mean loss of windows [n, seq + 1]. If n cannot be divided, each device computes all of them."""
        mesh, axis = self.mesh, self.mesh.batch_axis(len(windows))
        value = self._loss_over(axis)(params, mesh.put(windows.astype(np.int32), axis, None))
        return float(mesh.backend.to_numpy(value))

    def _compiled_loss(self, axis: str | None) -> Callable[..., Any]:
        mesh = self.mesh

        def loss(params: Params, windows: Any) -> Any:
            value = self._loss(mesh.local(params), windows, mesh.split(self.config.n_vocab))
            return value if axis is None else self._mean_over_data(value)

        return mesh.compile(loss, (self._params_spec, mesh.on(axis, None)), ())

    def _compiled_step(self, size: int) -> Callable[..., Any]:
        mesh, backend = self.mesh, self.mesh.backend

        def step(params: Params, moments: Moments, batches: Any, rates: Any) -> Any:
            local = mesh.local(params)
            n, batch, length = backend.shape(batches)
            micro_batches = backend.xp.reshape(batches, (n * batch // size, size, length))
            loss, grads = self._gradient(local, micro_batches, mesh.split(self.config.n_vocab))
            loss, grads = self._mean_over_data(loss), self._summed(grads)
            norm = self._norm(grads)
            after, (m, v) = updated(
                self._parts(local), grads, Moments(*map(mesh.local, moments)), rates, norm, self.recipe
            )
            return mesh.divided(self._joined(after)), Moments(mesh.divided(m), mesh.divided(v)), loss, norm

        specs = (self._params_spec, self._moments_spec, mesh.on(None, DATA, None), (None,))
        return mesh.compile(step, specs, (self._params_spec, self._moments_spec, (), ()))

    def _mean_over_data(self, x: Any) -> Any:
        n = self.mesh.sizes[DATA]
        return x if n == 1 else self.mesh.sum_along(x, DATA) / n

    def _summed(self, grads: Params) -> Params:
        """Return the mean of the gradients of all devices along ``data``: this device's part where moments are divided.

        A part is the sum of as many terms as an element of the whole, but the framework may add them in another order.
        """
        backend, n = self.mesh.backend, self.mesh.sizes[DATA]

        def part(x: Any, axis: int) -> Any:
            return backend.all_sum_part(x, backend.mesh_split(self.mesh.own, DATA)[1], axis) / n

        return self._mapped(grads, part, self._mean_over_data)

    def _norm(self, grads: Params) -> Any:
        """Return the norm of the whole gradient. The gradient of a whole parameter is the same along ``model``."""
        of: dict[tuple[bool, bool], list[Any]] = {}  # by whether they are divided over ``model`` and over ``data``
        for path, x in flatten(grads):
            along_model = self.mesh.sizes[MODEL] > 1 and MODEL in self.mesh.spec(path)
            of.setdefault((along_model, self._axes[path] is not None), []).append(x)
        squares = {key: sum_of_squares(found) for key, found in of.items()}

        def total(along_model: bool) -> Any:
            found = squares.get((along_model, False), 0)
            part = squares.get((along_model, True))
            return found if part is None else found + self.mesh.sum_along(part, DATA)

        if any(along_model for along_model, _ in of):
            return self.mesh.backend.xp.sqrt(total(False) + self.mesh.sum_along(total(True), MODEL))
        return self.mesh.backend.xp.sqrt(total(False))

    def _parts(self, tree: Params) -> Params:
        """Return this device's part along ``data`` of each tensor whose moments are divided."""
        return self._mapped(tree, self._part)

    def _part(self, x: Any, axis: int) -> Any:
        backend = self.mesh.backend
        index, _ = backend.mesh_split(self.mesh.own, DATA)
        n = backend.shape(x)[axis] // self.mesh.sizes[DATA]
        return backend.xp.take(x, backend.arange(n, like=x) + index * n, axis=axis)

    def _joined(self, tree: Params) -> Params:
        """Undo `_parts`, with the parts of the other devices."""
        backend = self.mesh.backend
        return self._mapped(
            tree, lambda x, axis: backend.all_concat(x, backend.mesh_split(self.mesh.own, DATA)[1], axis)
        )

    def _mapped(
        self, tree: Params, fn: Callable[[Any, int], Any], otherwise: Callable[[Any], Any] = lambda x: x
    ) -> Params:
        """Call one function with each tensor whose moments are divided, and their axis; another one with the others."""
        axes: Mapping[str, int | None] = self._axes
        return nest({path: otherwise(x) if (axis := axes[path]) is None else fn(x, axis) for path, x in flatten(tree)})
