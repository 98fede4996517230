"""The compile gate says yes to the package's blocks and no to what would spill or not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
GATE = Path(__file__).with_name("kernel_gate.py")


def gate(out: Path, *options: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """A process of its own: what this one interprets cannot be compiled here."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, GATE, "--out", out, *options], capture_output=True, text=True, env=environment
    )
    (table,) = out.glob("*.json")
    return result, json.loads(table.read_text())


def test_every_kernel_of_the_table_passes(tmp_path):
    result, table = gate(tmp_path)
    assert result.returncode == 0, result.stdout
    covered = {
        (line["kernel"], arch, dtype, variant)
        for line in table
        for arch in line["arch"].split(", ")
        for dtype in line["dtype"].split(", ")
        for variant in line["variant"].split(", ")
    }
    assert len(covered) == 5 * 5 * 3 * 3
    for line in table:
        assert line["verdict"] == "ok" and line["stack"] <= 64 and line["registers"] > 0


def test_blocks_that_are_too_large_fail(tmp_path):
    """Two accumulators of 128 × 256 fill every register of 8 warps."""
    options = ("--kernel", "project", "--arch", "sm_90", "--dtype", "bf16", "--variant", "plain")
    result, (line,) = gate(tmp_path, "--blocks", "128,256,64,8,3", *options)
    assert result.returncode == 1
    assert "stack" in line["verdict"] and line["stack"] > 64
    result, (line,) = gate(tmp_path, "--blocks", "128,128,128,8,6", *options)
    assert result.returncode == 1
    assert "shared" in line["verdict"]
