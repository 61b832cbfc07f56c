"""exp, tanh and log err by no more than the adapter states: the bounds of the ops rest on these errors."""

import pytest

from portable_gpt2.testing import measure, strategies

pytestmark = pytest.mark.every_device


@pytest.mark.about("exp")
@strategies.wide_dtypes
def test_exp_errs_by_no_more_than_is_stated(backend, dtype, numerics):
    """Catches an error of exp that is larger than is stated, and a stated error that is 100 times what is seen.

    The bounds of softmax, attention and cross_entropy rest on this error. The exp of the kernels is measured too.
    """
    measure.assert_stated(measure.measure(backend, dtype, "exp"), numerics)


@pytest.mark.about("tanh")
@strategies.wide_dtypes
def test_tanh_errs_by_no_more_than_is_stated(backend, dtype, numerics):
    """Catches an error of tanh that is larger than is stated, and a stated error that is 100 times what is seen.

    The bound of gelu rests on this error.
    """
    measure.assert_stated(measure.measure(backend, dtype, "tanh"), numerics)


@pytest.mark.about("log")
@strategies.wide_dtypes
def test_log_errs_by_no_more_than_is_stated(backend, dtype, numerics):
    """Catches an error of log that is larger than is stated, and a stated error that is 100 times what is seen.

    The bound of cross_entropy rests on this error.
    """
    measure.assert_stated(measure.measure(backend, dtype, "log"), numerics)
