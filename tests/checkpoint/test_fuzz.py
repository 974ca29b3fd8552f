"""Some seconds of the fuzzer, which is run for longer by hand; and that it sees what it looks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SEEN = """
import sys
sys.path.insert(0, sys.argv[1])
import fuzz
from freemerge.checkpoint import architecture

for number, fault in fuzz.cases(1, iter(range(1 << 30)), 8):
    assert fault is None, f"seed 1 case {number}: {fault.told}"
print("no faults in", number + 1)
architecture.entry = lambda directory, name: directory / name  # follows links out of the directory
(outside,) = [fault for _, fault in fuzz.cases(1, iter([140]), 60)]
print(outside.told)
fuzz.attempt = lambda base, model: 1 / (base.parent.name != "case")
print([fault.told for _, fault in fuzz.cases(1, iter([0]), 60)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory and time as Linux tells them")
def test_damaged_inputs_end_in_errors_of_freemerge() -> None:
    command = [sys.executable, "-c", SEEN, str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "file of config.json): opens" in run.stdout
    assert "ZeroDivisionError" in run.stdout
