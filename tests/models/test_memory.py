"""What glibc keeps is not fetched from the kernel again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from xpo.models.devices import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
before = 0
for i in range(40):
    torch.ones(2**24)  # 64 MiB, freed at once
    if i == 19:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    fresh, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in (False, True)
    )
    assert kept < fresh / 10
