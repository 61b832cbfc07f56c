"""Trainer: a training step, and the loss of held-out text, on one backend."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from .. import gradients
from ..backend import Backend
from ..checkpoint.tensors import stored
from ..checks import flag, positions, shown, token_ids
from ..config import GPT2Config
from ..correct_rounding import mode
from ..divided import WHOLE, Split
from ..host import StoredTensor
from ..mesh import DATA, Mesh
from ..model import loss
from ..op import interpreted
from ..ops import add
from ..params import Params, check_params, flatten, map_tree, nest
from ..registry import get_backend
from .mesh_steps import MeshSteps
from .optimizer import Moments, no_moments, rates, reproducible_update, update
from .recipe import Recipe

# Only NumPy warns of an overflow. The loss or the gradient then is NaN, which `train` reports.
_QUIET = functools.partial(np.errstate, all="ignore")

_MICRO_BATCH, _EAGER_MICRO_BATCH = 1024, 2048


def micro_batch_tokens(backend: Backend, x: Any) -> int | None:
    """Return the number of tokens in a micro-batch on the device of x, or None if a batch is not split.

    A gradient is computed for one micro-batch at a time. On a CPU, the activations of a large batch are allocated and
    freed in each step, which costs page faults; the activations of small micro-batches use the same memory again. A
    framework that records each op for automatic differentiation while it runs has a cost per op, so its micro-batches
    are larger. On an accelerator, the framework keeps its memory, and large batches are faster. The measurements are in
    docs/decisions/0017.
    """
    if not _is_on_cpu(backend, x):
        return None
    is_eager = _has_gradients(backend) and not backend.compiles_per_shape
    return _EAGER_MICRO_BATCH if is_eager else _MICRO_BATCH


def _is_on_cpu(backend: Backend, x: Any) -> bool:
    return backend.device(x).startswith("cpu")


def _has_gradients(backend: Backend) -> bool:
    """Return whether the framework has automatic differentiation."""
    return backend.value_and_grad(lambda x: x) is not NotImplemented


class State(NamedTuple):
    """The state of a run. Together with the data and the recipe, it determines the steps that follow."""

    step: int
    """The number of steps that were taken."""
    params: Params
    moments: Moments


def tensors_of(state: State) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Return the parameters of a state on one device by path, and its moments by ``m/`` or ``v/`` and path."""
    params, m, v = ({path: stored(x) for path, x in flatten(tree)} for tree in (state.params, *state.moments))
    return params, {f"{scope}/{path}": x for scope, tree in (("m", m), ("v", v)) for path, x in tree.items()}


class Diverged(ArithmeticError):
    """A loss, a gradient, a parameter or a moment is NaN or infinite."""


class Trainer:
    """Trains a model of one shape by one recipe, on the device of the parameters that it is given.

    Parameters
    ----------
    config : GPT2Config
        The model's shape.
    recipe : Recipe
        The options of training.
    backend : Backend or str
        The backend that runs the model.
    mesh : Mesh, dict or the framework's own mesh, optional
        The devices over which the model and each batch are divided, such as ``{"data": 2, "model": 2}``; see `Mesh`.
        JAX and PyTorch have meshes.
    shard_optimizer : bool
        Whether the moments are divided along ``data`` as well, so that each device has fewer of them (ZeRO-1). The
        results are the same within rounding.

    Raises
    ------
    ValueError
        If the model, or a batch, cannot be divided over the mesh; or if the recipe is reproducible and a mesh is given.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> from portable_gpt2.training import Recipe, Trainer
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> trainer = Trainer(config, Recipe(learning_rate=0.1, warmup=0), pg.get_backend("numpy"))
    >>> state = trainer.start(pg.init_params(config, backend="numpy"))
    >>> text = np.asarray([[1, 2, 3, 4, 5]])
    >>> for _ in range(20):
    ...     state, value, norm = trainer.step(state, [text])
    >>> value < 0.1, state.step
    (True, 20)
    """

    def __init__(
        self,
        config: GPT2Config,
        recipe: Recipe,
        backend: Backend | str,
        mesh: Any = None,
        *,
        shard_optimizer: bool = False,
    ) -> None:
        for name, given, kind in (("config", config, GPT2Config), ("recipe", recipe, Recipe)):
            if not isinstance(given, kind):
                raise TypeError(f"{name} is {shown(given)}; expected a {kind.__name__}")
        backend = get_backend(backend)
        backend.dtype(recipe.dtype)
        self.config, self.recipe, self.backend = config, recipe, backend
        self.mesh = mesh if mesh is None or isinstance(mesh, Mesh) else Mesh(backend, mesh)
        if flag("shard_optimizer", shard_optimizer) and self.mesh is None:
            raise ValueError("shard_optimizer is true, which needs a mesh with an axis data")
        self._on_mesh: MeshSteps | None = None
        if self.mesh is not None:
            gradient = functools.partial(self._gradient_of, True)
            self._on_mesh = MeshSteps(self.mesh, config, recipe, gradient, self._loss_of, shard_optimizer)
            return
        compile: Callable[..., Any] = backend.compile
        self._update: Callable[..., Any]
        if recipe.reproducible:
            mode.check(backend, recipe.dtype)
            interpreter = mode.Interpreter()
            # The mode compiles each op by itself.
            compile = functools.partial(functools.partial, _call_interpreted, interpreter)
            self._update = functools.partial(reproducible_update, recipe=recipe, interpreter=interpreter)
        else:
            self._update = backend.compile(
                lambda params, grads, moments, rates: update(params, grads, moments, rates, recipe)
            )
        self._loss = compile(self._loss_of)
        self._gradient = {
            is_handwritten: compile(functools.partial(self._gradient_of, is_handwritten))
            for is_handwritten in (True, False)
        }
        self._add = compile(self._sum_of)

    def place(self, path: str, tensor: StoredTensor, *, is_moment: bool = False) -> Any:
        """Return a parameter, or one of its moments, where the trainer computes, in the dtype of the tensor.

        On a mesh, each process reads only the parts of its own devices.
        """
        is_moment = flag("is_moment", is_moment)
        if self._on_mesh is not None:
            return self._on_mesh.place(path, tensor, is_moment=is_moment)
        return self.backend.from_numpy(tensor.read(), tensor.dtype)

    def tensors(self, state: State) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
        """Return the parameters of a state by path, and its moments by ``m/`` or ``v/`` and path.

        Those of a mesh are gathered when they are read. All processes must read the same tensors in the same order.
        """
        on_mesh = self._on_mesh
        if on_mesh is None:
            return tensors_of(state)
        m, v = map(on_mesh.stored, state.moments)
        return on_mesh.stored(state.params), {
            f"{scope}/{path}": x for scope, tree in (("m", m), ("v", v)) for path, x in tree.items()
        }

    def start(self, params: Params) -> State:
        """Return the state before the first step.

        On a mesh, the parameters are those that `place` returned, or arrays of NumPy, which are placed here.

        Raises
        ------
        ValueError
            If the parameters do not fit the configuration, or their dtype is not `Recipe.master_dtype`.
        TypeError
            If the parameters are not arrays of the trainer's backend.
        """
        if self._on_mesh is None:
            check_params(params, self.config)
        else:
            params = self._on_mesh.checked(params)
        for path, x in flatten(params):
            is_own: bool = isinstance(x, self.backend.array_types)
            if not is_own:
                raise TypeError(f"{path} is a {type(x).__name__}; expected an array of {self.backend.name}")
            if (dtype := self.backend.dtype_names.get(x.dtype)) != self.recipe.master_dtype:
                raise ValueError(
                    f"{path} is {dtype}; a recipe of dtype {self.recipe.dtype} trains {self.recipe.master_dtype}"
                )
        return State(0, params, no_moments(params) if self._on_mesh is None else self._on_mesh.no_moments())

    def step(self, state: State, batches: Iterable[np.ndarray]) -> tuple[State, float, float]:
        """Take a step.

        Parameters
        ----------
        state : State
            The state before the step. It is not changed.
        batches : int arrays [batch, seq + 1]
            Windows of text, in any integer dtype: one array for each batch whose gradient is accumulated.

        Returns
        -------
        state : State
            The state after the step.
        loss : float
            The mean loss of the batches, before the step.
        norm : float
            The norm of the gradient, before it is clipped.

        Raises
        ------
        ValueError
            If the number of batches is not the recipe's gradient_accumulation_steps; or if a batch does not have two
            axes, has no window, has windows longer than n_ctx + 1, or has an id that is not in the vocabulary.
        TypeError
            If a batch does not consist of integers, or state is not a State.
        """
        if not isinstance(state, State):
            raise TypeError(f"state is {shown(state)}; expected the State that `start` or `step` returns")
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches is {shown(batches)}; expected arrays of windows, int [batch, seq + 1]")
        backend, wte = self.backend, state.params["wte"]
        given = [self._windows(tokens) for tokens in batches]
        if len(given) != self.recipe.gradient_accumulation_steps:
            raise ValueError(
                f"{len(given)} batches were given; the recipe's gradient_accumulation_steps is "
                f"{self.recipe.gradient_accumulation_steps}"
            )
        # In the reproducible mode, the sums over the rows of a batch are rounded once.
        size = None if self.recipe.reproducible else micro_batch_tokens(backend, wte)
        if self._on_mesh is not None:
            return self._step_on_mesh(self._on_mesh, state, given, size)
        device = backend.placement(wte)
        windows = [_split(tokens, size) for tokens in given]
        # An accelerator computes while the host prepares its next calls. A copy to or from the device waits until the
        # device is done, so all copies are before the first call or after the last.
        with _QUIET():
            now = rates(state.step, self.recipe)
            if not self.recipe.reproducible:
                now = backend.from_numpy(now, self.recipe.master_dtype, device)
            micro_batches = [backend.from_numpy(each, device=device) for each in windows]
            gradient, values, grads = self._gradient[self._is_handwritten(wte)], [], None
            for each in micro_batches:
                value, more = gradient(state.params, each)
                values.append(value)
                grads = more if grads is None else self._add(grads, more)
            params, moments, norm = self._update(state.params, grads, state.moments, now)
            losses = [float(backend.to_numpy(value)) for value in values]
            norm = norm if self.recipe.reproducible else float(backend.to_numpy(norm))
            return State(state.step + 1, params, moments), math.fsum(losses) / len(losses), norm

    def _step_on_mesh(
        self, on_mesh: MeshSteps, state: State, given: list[np.ndarray], size: int | None
    ) -> tuple[State, float, float]:
        n = on_mesh.mesh.sizes[DATA]
        shape = given[0].shape
        if any(tokens.shape != shape for tokens in given) or shape[0] % n:
            shapes = ", ".join(str(list(tokens.shape)) for tokens in given)
            raise ValueError(
                f"the batches have the shapes {shapes}; on a mesh, expected one shape [a multiple of {n}, seq + 1]"
            )
        with _QUIET():
            now = rates(state.step, self.recipe).astype(self.recipe.master_dtype)
            batches, size = np.stack(given), _micro_batch(shape[0] // n, shape[1], size)
            params, moments, loss, norm = on_mesh.step(state.params, state.moments, batches, size, now)
            return State(state.step + 1, params, moments), loss, norm

    def evaluate(self, params: Params, windows: np.ndarray) -> float:
        """Return the mean loss of windows of text, int [n, seq + 1], in nats per token. Errors are those of `step`."""
        windows = self._windows(windows)
        device = None if self._on_mesh is not None else self.backend.placement(params["wte"])
        size, losses = self.recipe.batch_size, []
        with _QUIET():
            for i in range(0, len(windows), size):
                batch = windows[i : i + size]
                if self._on_mesh is not None:
                    loss = self._on_mesh.loss(params, batch)
                else:
                    value = self._loss(params, self.backend.from_numpy(batch, device=device))
                    loss = float(self.backend.to_numpy(value))
                losses.append(len(batch) * loss)
        return math.fsum(losses) / len(windows)

    def _windows(self, given: Any) -> np.ndarray:
        tokens = token_ids("token ids", given, self.config.n_vocab, axes=2)
        if tokens.shape[1] < 2:
            raise ValueError("a window has one token, so there is nothing to predict; expected int [batch, seq + 1]")
        positions(tokens.shape[1] - 1, self.config.n_ctx)
        return tokens

    def _sum_of(self, one: Params, other: Params) -> Params:
        paths, xs = zip(*flatten(one), strict=True)
        ys = [y for _, y in flatten(other)]
        return nest(dict(zip(paths, self.backend.for_each(add, xs, ys), strict=True)))

    def _loss_of(self, params: Params, tokens: Any, split: Split = WHOLE) -> Any:
        return loss(self._computing(params), tokens, self.config, split)

    def _is_handwritten(self, x: Any) -> bool:
        """Return whether the gradient comes from `gradients`: where it is faster, or is the only one.

        The hand-written gradient is faster where a whole step is compiled for a CPU: it took 0.73 times as long as
        jax.value_and_grad and 0.91 times as long as tf.GradientTape. Eagerly it is slower: it took 1.4 times as long as
        PyTorch's autograd. On an accelerator, attention in thirds takes long to compile, and uses no fused kernel.
        """
        if self.recipe.reproducible or not _has_gradients(self.backend):
            return True
        is_wide = self.recipe.dtype == self.recipe.master_dtype
        return is_wide and self.backend.handwritten_gradient_is_faster and _is_on_cpu(self.backend, x)

    def _gradient_of(
        self, is_handwritten: bool, params: Params, micro_batches: Any, split: Split = WHOLE
    ) -> tuple[Any, Params]:
        """Return the mean loss of n micro-batches [n, batch, seq + 1] and its gradient, one micro-batch at a time."""
        backend = self.backend
        own = functools.partial(self._handwritten_gradient, split)
        of_one = own if is_handwritten else self._own_gradient
        n = backend.shape(micro_batches)[0]
        if n == 1:
            return of_one(params, micro_batches[0, ...], 1.0)

        def add(state: tuple[Any, Any, Params]) -> tuple[Any, Any, Params]:
            i, total, sums = state
            value, grads = of_one(params, micro_batches[i, ...], 1 / n)
            return i + 1, total + value, map_tree(lambda x, y: x + y, sums, grads)

        zeros = map_tree(lambda x: backend.zeros(backend.shape(x), like=x), params)
        start = (0, backend.zeros((), like=params["wte"]), zeros)
        _, total, sums = backend.while_loop(lambda state: state[0] < n, add, start)
        return total, sums

    def _own_gradient(self, params: Params, tokens: Any, share: float) -> tuple[Any, Params]:
        """Return the loss times a share, and its gradient by the framework's automatic differentiation."""
        differentiated = self.backend.value_and_grad(lambda params: share * self._loss_of(params, tokens))
        return differentiated(params)  # type: ignore[no-any-return]

    def _handwritten_gradient(self, split: Split, params: Params, tokens: Any, share: float) -> tuple[Any, Params]:
        """Return the loss times a share, and its gradient by `gradients`.

        Here 16-bit dtypes are for storage: the rounded parameters are converted back, and arithmetic is in float32.
        """
        xp, rounded = self.backend.xp, self._computing(params)
        rounded = map_tree(lambda x, p: xp.astype(x, p.dtype, copy=False), rounded, params)
        value, backward = gradients.loss(rounded, tokens, self.config, split)
        return share * value, backward(share)

    def _computing(self, params: Params) -> Params:
        """Return the parameters in the dtype of the recipe."""
        if self.recipe.dtype == self.recipe.master_dtype:
            return params
        xp, dtype = self.backend.xp, self.backend.dtype(self.recipe.dtype)
        return map_tree(lambda x: xp.astype(x, dtype), params)


def _call_interpreted(interpreter: mode.Interpreter, fn: Callable[..., Any], *args: Any) -> Any:
    """Call a function in the reproducible mode."""
    with interpreted(interpreter):
        return fn(*args)


def _split(tokens: np.ndarray, size: int | None) -> np.ndarray:
    """Split windows [batch, seq + 1] into equal micro-batches, [n, batch / n, seq + 1], of about `size` tokens each.

    There is one micro-batch if size is None, or if no number of windows near the size divides the batch.

    Examples
    --------
    >>> _split(np.zeros((12, 257)), 1024).shape, _split(np.zeros((7, 257)), 1024).shape
    ((3, 4, 257), (1, 7, 257))
    """
    batch, length = tokens.shape
    return tokens.reshape(-1, _micro_batch(batch, length, size), length)


def _micro_batch(batch: int, length: int, size: int | None) -> int:
    """Return the number of windows in a micro-batch of about `size` tokens, which divides the batch."""
    if size is None:
        return batch
    divisors = (n for n in range(1, batch + 1) if batch % n == 0)
    return min(divisors, key=lambda n: abs(math.log(n * (length - 1) / size)))
