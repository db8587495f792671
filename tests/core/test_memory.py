import ctypes
import subprocess
import sys

import pytest

FAULTS_OF_FREED_MEMORY = """
import resource, sys
import numpy as np
from delineate.core.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def take_and_free():
    np.ones(2**26)  # 512 MiB: above what glibc learns to keep

take_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take_and_free()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)
def test_memory_that_was_freed_is_taken_again_without_page_faults():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS_OF_FREED_MEMORY, how], capture_output=True, check=True).stdout)
        for how in ("kept", "given back")
    )
    assert kept < 100 < given_back
