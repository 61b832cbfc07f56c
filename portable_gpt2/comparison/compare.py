"""Where do two models part? The weights, each op in isolation, and the growth of the difference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import GPT2Config
from ..fingerprint import hash_of_logits
from ..host import StoredTensor
from .findings import Comparison, OpFinding
from .growth import growth, largest_jump, of_logits
from .guesses import Case, Function, explain
from .progress import Progress, silent
from .shape import configurations, knows_heads
from .sides import open_side, traces
from .steps import call, judge, results, steps, weights_of, with_infinite_scores
from .trace import Trace
from .verdict import Evidence, notes, unexpected
from .weights import differences

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
    progress: Progress = silent,
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
        The model that is judged. If its weights are not known, it is judged with those of a. If these are not known
        either, only ops that read no weights are judged, such as attention.
    text : str or ints, optional
        The text, or its token ids [seq]. It may be left out if a or b is a trace, whose tokens are then used.
    allow_special : bool or collection of str
        Which special tokens, such as ``<|endoftext|>``, are read as tokens where a text contains them; see
        `GenerationOptions`.
    progress : function, optional
        Called as ``progress(items, what, unit)`` for each stage, such as ``progress(tensors, "comparing weights",
        "tensors")``. It returns the items, and may show how many are left, as ``tqdm(items, what, unit=unit)`` does.
        The stages are the traces of a and b, the comparison of the weights, the judgement of each result, and the
        simulation of rounding errors.

    Returns
    -------
    Comparison
        The verdict in one sentence, and the findings of each level. In float64, where the exact result is slow to
        compute, a selection of each result's elements is judged.

    Raises
    ------
    ValueError
        If the two do not have the same shape, except for n_vocab, or did not read the same tokens.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> model = pg.GPT2(config, pg.init_params(config, backend="numpy"))
    >>> pg.compare(model, model, [1, 2, 3]).verdict
    'Every op is within its bound, and the logits are equal.'
    """
    a, b = traces(open_side(a), open_side(b), text, allow_special=allow_special, progress=progress)
    config_a, config_b = configurations(a, b)
    known = bool(a.weights) and bool(b.weights)
    found = differences(a.weights, b.weights, a.config, b.config, progress) if known else None
    ops, missing = judged(b, config_b, weights_of(a.weights, b.weights, config_b), progress)
    weights = weights_of(b.weights, a.weights, config_a) if knows_heads(a, b) else {}
    grown = growth(a, b, config_a, weights, [step.name for step in steps(config_a)], progress)
    both = "logits" in a.arrays and "logits" in b.arrays
    logits = of_logits(a.arrays["logits"], b.arrays["logits"]) if both else None
    if not ops and not grown:
        raise ValueError("nothing can be compared: the traces share no results, and no result of b has its inputs")
    evidence = Evidence(
        vocabularies=(config_a.n_vocab, config_b.n_vocab),
        changed=unexpected(found or [], a, b),
        ops=ops,
        complete=all(name.rpartition("/")[2] in _OPTIONAL for name in missing),
        growth=grown,
        logits=logits,
        n_tokens=b.tokens.shape[1],
        jump=largest_jump(a, b, config_a, {each.name: each for each in grown}),
    )
    return Comparison(
        a=_described(a),
        b=_described(b),
        tokens=b.tokens[0].tolist(),
        verdict=evidence.verdict(),
        equal=evidence.equal,
        weights=found,
        ops=ops,
        growth=grown,
        logits=logits,
        missing=missing,
        notes=[*notes(a, b, evidence), *_fingerprint(a, b)],
    )


def _fingerprint(a: Trace, b: Trace) -> Iterator[str]:
    """Yield a sentence if both traces have the same logits in float32, of which `GPT2.fingerprint` is a hash."""
    both = [(each, each.arrays["logits"][0]) for each in (a, b) if "logits" in each.arrays]
    hashes = [hash_of_logits(each.tokens[0].tolist(), x) for each, x in both if x.dtype == np.float32]
    if len(hashes) == 2 and hashes[0] == hashes[1]:
        yield f"The logits are equal to the last bit. Their fingerprint is {hashes[0]}."


def _described(side: Trace) -> str:
    """Return the source of a trace with its dtype, which the source of a file may lack."""
    return side.source if side.source.endswith(side.dtype) else f"{side.source}, {side.dtype}"


def judged(
    b: Trace, config: GPT2Config, weights: Mapping[str, StoredTensor], progress: Progress = silent
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
    for step in progress(steps(config), "judging", "results"):
        # c_attn follows from q, k and v; a part that is derived from c_attn would only be compared with itself.
        is_known = step.name in b.arrays or step.name.endswith("c_attn")
        whole = computed = result(step.name) if is_known else None
        made = None if computed is None else call(step, b.tokens, result, weights, config, b.dtype, b.numerics)
        seen.append(step.name)
        if whole is None or computed is None or made is None:
            missing.append(step.name)
            continue
        if step.op == "unembed":  # only the first rows of its matrix may be known
            computed = computed[..., : made.params["w"].shape[0]]
        if step.op == "attention_scores":
            computed = with_infinite_scores(computed, made.options["mask"])
        found = judge(made, computed)
        if not found.judged:
            missing.append(step.name)
            continue
        guess = ""
        if not found.ratio <= 1:
            case = Case(step, made, computed, result, weights, config, suspects, found.element)
            if searches < _SEARCHES or explained[step.op]:
                guess, functions = explain(case, explained[step.op], only_first=searches >= _SEARCHES)
                explained[step.op] += [f for f in functions if f not in explained[step.op]]
                searches += 1
            suspects.add(step.name)
        ops.append(OpFinding(step.name, step.op, *found[:5], guess, found.judged, whole.size))
    return ops, missing
