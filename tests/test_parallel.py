"""Heads and completions that are spread over processes against one that has them whole: float64, kernels in fp32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "processes, subjects",
    [
        (2, ("vocabulary", "impossible", "kernels", "sequence", "nothing", "refused", "wrapped")),
        (3, ("vocabulary", "sequence")),
        (4, ("both",)),
    ],
    ids=str,
)
def test_spread_is_whole(tmp_path, processes, subjects):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        str(ROOT / "tests" / "parallel_worker.py"), str(tmp_path), *subjects,
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(processes):
        worst = json.loads((tmp_path / f"{rank}.json").read_text())
        assert worst.keys() == set(subjects)
        for subject, error in worst.items():
            assert error < (1e-5 if subject == "kernels" else 1e-10), (rank, subject)
