"""Options of the CPU benchmark, and a pytest-benchmark report without the machine's name."""

import pytest
import torch

from . import measure


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=760, help="time that `make bench` may take for its cases")
    parser.addoption("--out", default=None, help="folder of the results; by default bench/results/<device>")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(measure.environment("cpu"))


@pytest.fixture(scope="session")
def progress():
    return measure.Progress()


@pytest.fixture(scope="session")
def results(request):
    """The file that all cases add to; each run begins it anew, because a ratio is of one run."""
    folder = request.config.getoption("--out")
    path = measure.Path(folder) if folder else measure.RESULTS / measure.device_name("cpu")
    return measure.Results(path / "speed.json", "cpu", fresh=True)


@pytest.fixture(scope="session")
def rate(results, progress):
    """FLOP/s of this machine's fp32 products, measured first: it decides how many rounds there is time for."""
    a, b = torch.randn(512, 4096), torch.randn(4096, 8192)
    out = torch.empty(512, 8192)
    times = [measure.seconds(lambda: torch.mm(a, b, out=out), "cpu") for _ in range(5)]
    rate = 2 * 512 * 4096 * 8192 / min(times)
    # A copy far larger than any cache, read and written.
    source, target = torch.zeros(1 << 27), torch.empty(1 << 27)
    bandwidth = 2 * source.nbytes / min(measure.seconds(lambda: target.copy_(source), "cpu") for _ in range(4))
    results.add(kind="device", flops=rate, bandwidth=bandwidth)
    progress(f"this machine: {rate / 1e9:.0f} GFLOP/s in fp32 products, {bandwidth / 1e9:.1f} GB/s copied")
    return rate
