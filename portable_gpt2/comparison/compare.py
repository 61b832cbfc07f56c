"""Where do two models part? The weights, each op in isolation, and the growth of the difference."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from ..config import GPT2Config
from ..host import StoredTensor
from .findings import Comparison, LogitsFinding, OpFinding, WeightFinding
from .growth import growth, of_logits
from .guesses import Case, Function, explain
from .sides import open_side, traces
from .steps import Step, call, judge, results, steps, weights_of, with_infinite_scores
from .trace import Trace
from .weights import differences, merged

Progress: TypeAlias = Callable[[Iterable[Step]], Iterable[Step]]

_SEARCHES = 12
"""The number of results for which all guesses are tried. Later results only try the guesses that explained others."""

_OPTIONAL = ("q", "k", "v", "scores", "weights")
"""Results that need not be judged: the others follow from each other without them."""


def compare(
    a: Any,
    b: Any,
    text: str | Sequence[int] | None = None,
    *,
    allow_special: bool | Collection[str] = False,
    progress: Progress = iter,
) -> Comparison:
    """Find where two models part.

    The comparison has three levels. First, the weights of the two models are compared. Then each result of b is
    compared with the exact result of its op on b's own inputs: an error above the op's bound is not caused by rounding,
    and the first such result is where b departs from the definition. Last, the growth of the difference from layer to
    layer is compared with the difference that rounding can be expected to cause.

    Parameters
    ----------
    a : GPT2, Trace, path, str, or a model of another program
        The reference. Its configuration says what b should compute. A path or a str is the file of a trace, or a
        checkpoint that `GPT2.load` loads. A model of another program is traced as `probe` describes.
    b : as a
        The model that is judged. If its weights are not known, it is judged with those of a.
    text : str or ints, optional
        The text, or its token ids [seq]. It may be left out if a or b is a trace, whose tokens are then used.
    allow_special : bool or collection of str
        Which special tokens, such as ``<|endoftext|>``, are read as tokens where a text contains them; see
        `GenerationOptions`.
    progress : function, optional
        Passes the steps of b on while they are judged, and may show how many are left.

    Returns
    -------
    Comparison
        The verdict in one sentence, and the findings of each level. In float64, where the exact result is slow to
        compute, a selection of each result's elements is judged.

    Raises
    ------
    ValueError
        If the two do not have the same shape or did not read the same tokens, or the configuration or the weights are
        known of neither.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> model = pg.GPT2(config, pg.init_params(config, backend="numpy"))
    >>> pg.compare(model, model, [1, 2, 3]).verdict
    'Every op is within its bound, so rounding explains the difference of the logits, which is at most 0.'
    """
    a, b = traces(open_side(a), open_side(b), text, allow_special=allow_special)
    config = a.config or b.config
    if config is None:
        raise ValueError("neither side has a configuration, which says how many heads there are; give one of them one")
    _check(a, b, config)
    weights = weights_of(a.weights, b.weights, config)
    known = bool(a.weights) and bool(b.weights)
    found = differences(a.weights, b.weights, a.config, b.config) if known else None
    ops, missing = judged(b, config, weights, progress)
    names = [step.name for step in steps(config)]
    grown = growth(a, b, config, a.weights or b.weights, names)
    both = "logits" in a.arrays and "logits" in b.arrays
    logits = of_logits(a.arrays["logits"], b.arrays["logits"]) if both else None
    if not ops and not grown:
        raise ValueError("nothing can be compared: the traces share no results, and no result of b has its inputs")
    complete = all(name.rpartition("/")[2] in _OPTIONAL for name in missing)
    expected = all(not g.difference > g.rounding for g in grown)
    wrong = [finding for finding in ops if not finding.ratio <= 1]
    changed = merged(each for each in found or [] if each.kind not in _rounded(a, b) and "absent" not in each.kind)
    return Comparison(
        a=a.source,
        b=b.source,
        tokens=b.tokens[0].tolist(),
        verdict=_verdict(wrong, changed, logits, complete, [g.name for g in grown if g.difference > g.rounding]),
        equal=not wrong and not changed and (complete or expected),
        weights=found,
        ops=ops,
        growth=grown,
        logits=logits,
        missing=missing,
        notes=list(_notes(ops)),
    )


def judged(
    b: Trace, config: GPT2Config, weights: Mapping[str, StoredTensor], progress: Progress = iter
) -> tuple[list[OpFinding], list[str]]:
    """Judge each result of a trace in isolation.

    Parameters
    ----------
    b : Trace
        The trace.
    config : GPT2Config
        The shape and the options that define the ops.
    weights : dict of StoredTensor
        The parameters by path.
    progress : function, optional
        As for `compare`.

    Returns
    -------
    ops : list of OpFinding
        The results that were judged, in the order of computation.
    missing : list of str
        The results that the trace lacks, whose inputs or parameters are not known, or none of whose elements has a
        bound.
    """
    result = results(b.arrays, config)
    ops, missing, seen, suspects = list[OpFinding](), list[str](), list[str](), set[str]()
    explained: dict[str, list[Function]] = defaultdict(list)
    searches = 0
    for step in progress(steps(config)):
        # c_attn follows from q, k and v; a part that is derived from c_attn would only be compared with itself.
        is_known = step.name in b.arrays or step.name.endswith("c_attn")
        computed = result(step.name) if is_known else None
        made = None if computed is None else call(step, b.tokens, result, weights, config, b.dtype, b.numerics)
        seen.append(step.name)
        if computed is None or made is None:
            missing.append(step.name)
            continue
        if step.op == "attention_scores":
            computed = with_infinite_scores(computed, made.options["mask"])
        found = judge(made, computed)
        if not found.judged:
            missing.append(step.name)
            continue
        guess = ""
        if not found.ratio <= 1:
            case = Case(step, made, computed, result, weights, config, seen[:-1], suspects, found.element)
            if searches < _SEARCHES or explained[step.op]:
                guess, functions = explain(case, explained[step.op], only_first=searches >= _SEARCHES)
                explained[step.op] += [f for f in functions if f not in explained[step.op]]
                searches += 1
            suspects.add(step.name)
        ops.append(OpFinding(step.name, step.op, *found[:5], guess, found.judged, computed.size))
    return ops, missing


def _check(a: Trace, b: Trace, config: GPT2Config) -> None:
    """Refuse sides that cannot be compared."""
    if a.config is not None and b.config is not None:
        for name in ("n_layer", "n_head", "n_embd", "n_vocab", "n_hidden"):
            if (x := getattr(a.config, name)) != (y := getattr(b.config, name)):
                found = merged(differences(a.weights, b.weights, a.config, b.config)) if a.weights and b.weights else []
                said = "; ".join(f"{each.path}: {each.kind}" for each in found[:3])
                raise ValueError(
                    f"{name} is {x} in {a.source} and {y} in {b.source}; the shapes must be equal"
                    + (f" (the weights differ: {said})" if said else "")
                )
    if not a.weights and not b.weights:
        raise ValueError("the weights are known of neither side; give the checkpoint of one of them")
    for side in (a, b):
        try:
            replace(side, config=config)  # a trace checks its shapes
        except ValueError as error:
            raise ValueError(f"{side.source}: {error}") from None


def _rounded(a: Trace, b: Trace) -> set[str]:
    """Return the kinds of differences of weights that follow from the dtypes of the two sides."""
    if a.dtype == b.dtype:
        return set()
    through = f"rounded through {b.dtype}"
    return {through, f"a is rounded through {a.dtype}", f"{through}, a through {a.dtype}"}


def _notes(ops: Sequence[OpFinding]) -> Iterator[str]:
    """Yield what a comparison does not cover, as sentences."""
    judged, elements = (sum(getattr(op, name) for op in ops) for name in ("judged", "elements"))
    if judged < elements:
        yield (
            f"Of the {elements:,} elements of the results that were judged, {judged:,} were judged: in float64 a "
            f"selection is judged, and an element that is computed from NaN, infinity or a sum that may overflow has "
            f"no bound."
        )


def _verdict(
    wrong: list[OpFinding],
    changed: list[WeightFinding],
    logits: LogitsFinding | None,
    complete: bool,
    grown: list[str],
) -> str:
    """Return one sentence: where the models part, or that rounding explains the difference."""
    of_ops = _of_ops(wrong)
    if changed:
        first, *others = changed
        kind = first.kind.partition(":")[0]
        more = f", and {len(others)} more" if others else ""
        found = f"and {of_ops}" if of_ops else "and every op that was judged is within its bound"
        return f"The weights differ ({first.path}: {kind}{more}), {found}."
    if of_ops:
        return f"The models part: {of_ops}."
    size = "" if logits is None else f" of the logits, which is at most {logits.largest:.2g}"
    if complete:
        return f"Every op is within its bound, so rounding explains the difference{size}."
    if grown:
        return (
            f"Every op that could be judged is within its bound, but the difference at {grown[0]} is larger than "
            f"rounding can be expected to cause; trace more results."
        )
    return (
        f"Every op that could be judged is within its bound, and rounding can be expected to cause a difference{size}."
    )


def _of_ops(wrong: list[OpFinding]) -> str:
    """Name the first result beyond its bound, the cause, and the number of the others."""
    if not wrong:
        return ""
    first, *others = wrong
    if first.ratio < math.inf:
        error = f"the error of {first.op} at {first.name} is {first.ratio:.2g} times what rounding permits"
    else:
        error = f"{first.op} at {first.name} has an element that rounding cannot change"
    cause = f", because {first.guess}" if first.guess else ", and no guess explains it"
    more = f" ({len(others)} more results are beyond their bounds)" if others else ""
    return f"{error}{cause}{more}"
