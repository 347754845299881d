"""What a forward frees stays with the process, unless the operator has said otherwise."""

import platform
import subprocess
import sys

import pytest

_PROBE = """
import resource, torch
from oppu.lm.hardware import keep_freed_memory
kept = keep_freed_memory()
def forward():
    return [torch.ones(4 << 20) for _ in range(6)]
for _ in range(3):
    forward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    forward()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_PAGES = 5 * 6 * (16 << 20) // (2 << 20) // 2
"""Half of the page faults that 5 times 6 tensors of 16 MiB meet where the kernel gives pages of 2 MiB, its largest."""


def _faults(**env: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True, env={"PATH": "", **env}
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_activations_are_used_again_and_the_operators_own_setting_stands() -> None:
    kept, faults = _faults()
    assert kept == "True" and faults < _PAGES
    kept, faults = _faults(MALLOC_MMAP_THRESHOLD_="131072")
    assert kept == "False" and faults >= _PAGES
