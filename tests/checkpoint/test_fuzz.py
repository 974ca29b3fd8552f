"""Some cases of the fuzzer, of which more are run by hand; and that it sees what it looks for."""

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

for number, fault in fuzz.cases(1, range(1200)):
    assert fault is None, f"seed 1 case {number}: {fault.told}"
architecture.entry = lambda directory, name: directory / name  # follows links out of the directory
(outside,) = [fault for _, fault in fuzz.cases(1, [140])]
print(outside.told)
fuzz.attempt = lambda base, model: 1 / (base.parent.name != "case")
print([fault.told for _, fault in fuzz.cases(1, [0])])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
def test_damaged_inputs_end_in_errors_of_freemerge() -> None:
    command = [sys.executable, "-c", SEEN, str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "file of config.json): opens" in run.stdout
    assert "ZeroDivisionError" in run.stdout
