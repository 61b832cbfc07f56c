"""The verdict of a comparison in one sentence, and sentences on what the comparison does not cover."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..host import float_dtypes
from .findings import Growth, LogitsFinding, OpFinding, WeightFinding
from .shape import n_vocab
from .trace import Trace
from .weights import merged

_PADDED = re.compile(r"\d+ rows (added|missing) at the end(, all .*|, of standard deviation \S+, that of a is \S+)?")


def unexpected(found: Iterable[WeightFinding], a: Trace, b: Trace) -> list[WeightFinding]:
    """Return the differences of weights that do not follow from the dtypes or the vocabularies of two sides."""
    rounded = {""}
    if a.dtype != b.dtype:
        through = f"rounded through {b.dtype}"
        rounded |= {through, f"a is rounded through {a.dtype}", f"{through}, a through {a.dtype}"}

    def follows(each: WeightFinding) -> bool:
        kind = re.sub("^own in [ab], wte in [ab]: ", "", each.kind)
        first, _, second = kind.partition(" and ")
        is_padded = each.path in ("wte", "lm_head") and n_vocab(a) != n_vocab(b) and _PADDED.fullmatch(first)
        return each.kind in rounded or "absent" in each.kind or bool(is_padded and second in rounded)

    return merged(each for each in found if not follows(each))


@dataclass(frozen=True)
class Evidence:
    """What the verdict follows from.

    Parameters
    ----------
    vocabularies : pair of int
        The numbers of token ids of a and b.
    changed : list of WeightFinding
        The weights that differ, as `unexpected` returns them.
    ops : list of OpFinding
        The results that were judged.
    complete : bool
        Whether all results were judged that determine the logits.
    growth : list of Growth
        The results that both sides have.
    logits : LogitsFinding or None
        The difference of the logits.
    n_tokens : int
        The number of tokens.
    jump : pair, optional
        The result at which the difference grows most, and by which factor, as `largest_jump` returns them.
    """

    vocabularies: tuple[int, int]
    changed: list[WeightFinding]
    ops: list[OpFinding]
    complete: bool
    growth: list[Growth]
    logits: LogitsFinding | None
    n_tokens: int
    jump: tuple[str, float] | None = None

    @property
    def wrong(self) -> list[OpFinding]:
        """The results beyond their bounds."""
        return [op for op in self.ops if not op.within]

    @property
    def has_one_vocabulary(self) -> bool:
        """Whether both sides have the same number of token ids."""
        return self.vocabularies[0] == self.vocabularies[1]

    @property
    def too_large(self) -> list[str]:
        """The results whose difference is larger than rounding can be expected to cause."""
        return [each.name for each in self.growth if each.difference > each.rounding]

    @property
    def is_explained(self) -> bool:
        """Whether rounding explains the difference: certainly, or as far as can be expected."""
        is_expected = all(each.difference == 0 or each.difference <= each.rounding for each in self.growth)
        return not self.wrong and (self.complete or (bool(self.growth) and is_expected))

    @property
    def equal(self) -> bool:
        """Whether rounding explains all differences that were found."""
        return self.is_explained and not self.changed and self.has_one_vocabulary

    def verdict(self) -> str:
        """Return one sentence: where the models part, or that rounding explains the difference."""
        parts = [*self._of_vocabularies(), *self._of_weights()]
        if self.wrong:
            parts.append(self._of_ops())
        elif self.changed:
            parts.append(self._of_judged())
        else:
            parts.append(self._of_rounding())
        sentence = f"{', '.join(parts[:-1])}, and {parts[-1]}." if len(parts) > 1 else f"{parts[0]}."
        return sentence[0].upper() + sentence[1:]

    def _of_vocabularies(self) -> Iterator[str]:
        if not self.has_one_vocabulary:
            a, b = self.vocabularies
            yield f"the vocabularies differ ({a:,} token ids in the reference, {b:,} in the judged model)"
        if self.logits is not None and self.logits.outside:
            yield (
                f"the most likely next token is an id that only one side has at {self.logits.outside} of "
                f"{self.n_tokens} positions"
            )

    def _of_weights(self) -> Iterator[str]:
        if self.changed:
            first, *others = self.changed
            kind = first.kind.partition(":")[0]
            yield f"the weights differ ({first.path}: {kind}{f', and {len(others)} more' if others else ''})"

    def _of_ops(self) -> str:
        """Name the first result beyond its bound, the cause, and the number of the others."""
        first, *others = self.wrong
        if first.ratio < math.inf:
            error = f"the error of {first.op} is {first.ratio:.2g} times what rounding permits"
        else:
            error = f"{first.op} has an element that rounding cannot change"
        cause = f": {first.guess}" if first.guess else ", and no guess explains it"
        count = "one more result is beyond its bound"
        if len(others) > 1:
            count = f"{len(others)} more results are beyond their bounds"
        more = f" ({count})" if others else ""
        return f"the models part at {first.name}, where {error}{cause}{more}"

    def _of_judged(self) -> str:
        return "every op that could be judged is within its bound" if self.ops else "no op could be judged"

    def _of_rounding(self) -> str:
        which = "" if self.has_one_vocabulary else " that both have"
        size = ""
        if self.logits is not None:
            size = f" of the logits{which}, which is at most {self.logits.largest:.2g}"
            if not self.logits.largest:
                size = f", and the logits{which} are equal"
                if self.complete:
                    return f"every op is within its bound{size}"
        if self.complete:
            return f"every op is within its bound, so rounding explains the difference{size}"
        judged = self._of_judged()
        if self.too_large:
            return (
                f"{judged}, but the difference at {self.too_large[0]} is larger than rounding can be expected to "
                f"cause; trace more results"
            )
        if not any(each.difference for each in self.growth) and self.growth:
            return f"{judged}, and all results that both sides have are equal"
        if self.is_explained:
            return f"{judged}, and rounding can be expected to cause the difference{size}"
        return f"{judged}, and it is not known whether rounding explains the difference{size}"


def notes(a: Trace, b: Trace, evidence: Evidence) -> Iterator[str]:
    """Yield what a comparison does not cover and what was assumed, as sentences."""
    if not evidence.has_one_vocabulary:
        yield (
            f"Logits are compared for the {min(evidence.vocabularies):,} token ids that both sides have. The KL "
            f"divergence is that of the distributions under the condition that the next token is one of these ids. The "
            f"most likely next token is one of all ids of its side."
        )
    if a.config is None and b.config is None:
        yield (
            "Neither side has a configuration. The shape follows from the results; the options are assumed to be those "
            "of the published GPT-2 models: eps is 1e-05, and the scale of attention is 1/sqrt(head_size)."
        )
    if not a.weights and not b.weights:
        yield (
            "The weights are known of neither side. So the ops that read weights are not judged, and it is not known "
            "how large a difference rounding can cause. Compare with a checkpoint, or add the weights to a trace "
            "(`portable-gpt2 trace --weights`)."
        )
        if evidence.jump is not None and evidence.jump[1] > 1:
            name, factor = evidence.jump
            yield (
                f"The difference grows most at {name}: relative to the largest element, it is {factor:.2g} times that "
                f"of the inputs."
            )
    if narrow := [name for name, x in b.arrays.items() if x.dtype.itemsize < float_dtypes[b.dtype].itemsize]:
        yield (
            f"The judged model computes in {b.dtype}, and {len(narrow):,} of its {len(b.arrays):,} results have fewer "
            f"bits, such as {narrow[0]} ({b.arrays[narrow[0]].dtype.name}). If they were rounded when they were "
            f"written, an op that reads them read other inputs, and may be called wrong for that reason."
        )
    judged, elements = (sum(getattr(op, name) for op in evidence.ops) for name in ("judged", "elements"))
    if judged < elements:
        yield (
            f"The results above have {elements:,} elements, and {judged:,} were judged. In float64, only a selection "
            f"is judged. An element that may overflow, or that is computed from NaN or infinity, has no bound."
        )
