"""The instruction set that every machine has and no other test runs with; `tests/test_wheel.py` has them all."""

import pytest

from tests.ops.isas import run_tests


@pytest.mark.slow("kernels")
def test_portable_kernels_equal_torch():
    assert " passed" in run_tests("portable")
