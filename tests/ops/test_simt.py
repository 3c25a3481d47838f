"""The emulator of CUDA finds the faults that it is for, and none where there is none."""

import subprocess
from pathlib import Path

import pytest

from tests.ops import simt

pytestmark = pytest.mark.slow("kernels")

FAULTS = {
    "product": "no fault",
    "pass_on": "no fault",
    "no_wait": "the product is wrong",
    "no_warp_barrier": "the product is wrong",
    "no_barrier_before": "a number is wrong",
    "no_barrier_behind": "a number is wrong",
    "divergent_barrier": "wait at different places: thread 0 at __syncthreads, thread 32 at its end",
    "divergent_warp": "wait at different places: thread 5 at __syncthreads, thread 0 at __syncwarp",
    "partial_mask": "a mask other than 0xffffffff",
    "misaligned": "an asynchronous copy is not aligned",
    "never_waited": "ends with copies that it never waited for",
}


@pytest.fixture(scope="module")
def selftest() -> Path:
    return simt.build("simt_selftest") / "simt_selftest"


@pytest.mark.parametrize(("case", "fault"), FAULTS.items(), ids=FAULTS)
def test_what_the_emulator_finds(selftest, case, fault):
    done = subprocess.run([selftest, case], capture_output=True, text=True, check=True)
    assert fault in done.stdout
