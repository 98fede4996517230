"""Options of the CPU benchmark, and a pytest-benchmark report without the machine's name."""

import pytest

from . import measure


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=700, help="time that `make bench` may take for its cases")
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
    """The file that all cases add to; a case that runs again takes the place of its own old figures alone."""
    folder = request.config.getoption("--out")
    path = measure.Path(folder) if folder else measure.RESULTS / measure.device_name("cpu")
    return measure.Results(path / "speed.json", "cpu")


@pytest.fixture(scope="session")
def rate(results, progress):
    """FLOP/s of this machine's fp32 products, measured first: it decides how many rounds there is time for."""
    found = measure.cpu_ceilings()
    results.drop(kind="device")
    results.add(kind="device", **found)
    progress(f"this machine: {found['flops'] / 1e9:.0f} GFLOP/s in fp32 products, {found['bandwidth'] / 1e9:.1f} GB/s")
    return found["flops"]
