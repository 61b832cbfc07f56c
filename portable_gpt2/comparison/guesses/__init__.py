"""Guesses at the cause of a wrong result: other definitions of an op.

A guess is a sentence and an alternative: what each element of the result is under another definition, with a bound on
the error of computing it. It is accepted only if it explains every element within this bound, and halves the errors of
the worst element and of its row. So a guess is never a mere resemblance. Two definitions that rounding cannot tell
apart, such as eps = 1e-6 and eps = 1e-12 for a large variance, are both named.

An alternative is made in one of four ways (`Case`): the same op on other inputs, parameters or options (``but``), with
the derived bounds of `portable_gpt2.numerics.bounds`; another formula, which bounds itself (``formula``; see
`Computed`); a formula of the right result (``then``); or an array that was copied (``copy``).

- `layer_norms`, `products`, `attention` and `activations` have the guesses about an op, `everywhere` those that fit
  all, `stepwise` those about roundings to 16 bits at known places within GELU and attention, and `precision` those that
  an op computes in 16 bits.
- `search` has the tables, and tries them.
"""

from .case import Case, Function
from .search import GUESSES, explain

__all__ = ["GUESSES", "Case", "Function", "explain"]
