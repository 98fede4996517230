"""The wheel: what is in it, what an import needs, and that the commands work from it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra 'record' is not installed")

from records import write_run  # noqa: E402

ROOT = Path(__file__).parent.parent
# What the core does without, and what the record does without beside it.
CORE = ("pyarrow", "datasets", "matplotlib", "pandas", "transformers", "trl", "accelerate", "peft", "safetensors",
        "tokenizers", "huggingface_hub")  # fmt: skip
RECORD = CORE[4:9]
WITHOUT = """
import sys
class Without:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel installs."""
    pytest.importorskip("setuptools", minversion="77", reason="nothing to build a wheel with")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "epsdpo_kernels", source / "epsdpo_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(source)]
    subprocess.run([*command, "--wheel-dir", str(folder)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed: Path, code: str, *arguments: str, without=()) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT.format(packages=tuple(without)) + code, *arguments]
    return subprocess.run(command, env=environment, cwd=installed, capture_output=True, text=True, check=False)


def test_what_is_in_the_wheel(installed):
    there = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    kinds = (".py", ".html", ".css", ".js")
    sources = {path for path in (ROOT / "epsdpo_kernels").rglob("*") if path.suffix in kinds}
    assert {str(path.relative_to(ROOT)) for path in sources} == {name for name in there if "dist-info" not in name}
    assert {f"epsdpo_kernels/record/page.{suffix}" for suffix in ("html", "css", "js")} <= there
    (entry,) = installed.glob("*.dist-info/entry_points.txt")
    assert "epsdpo = epsdpo_kernels.__main__:main" in entry.read_text()


def test_the_core_needs_torch_triton_and_numpy(installed):
    code = "import epsdpo_kernels, torch; print(epsdpo_kernels.__file__, epsdpo_kernels.EpsilonDPOLoss().beta.item())"
    done = run(installed, code, without=CORE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "epsdpo_kernels" / "__init__.py"), "0.10000000149011612"]
    done = run(installed, "from epsdpo_kernels.__main__ import main; sys.exit(main())", "audit", "x", without=CORE)
    assert done.returncode == 2 and "pip install 'epsdpo_kernels[record]'" in done.stderr


def test_audit_and_report_need_the_extra_alone(installed, tmp_path):
    made = write_run(tmp_path / "run")
    both = """
from epsdpo_kernels.__main__ import main
sys.exit(main(["audit", sys.argv[1]]) or main(["report", sys.argv[1]]))
"""
    done = run(installed, both, str(made), without=RECORD)
    assert done.returncode == 0 and ": OK, 92 rows, 20 training steps, 1 part" in done.stdout, done.stderr
    assert "</html>" in (made / "report" / "report.html").read_text(encoding="utf-8")
    assert (made / "report" / "curves.png").is_file()
    module = "import runpy; sys.argv[0] = 'epsdpo'; runpy.run_module('epsdpo_kernels', run_name='__main__')"
    same = run(installed, module, "audit", str(made), without=RECORD)
    assert same.returncode == 0 and done.stdout.startswith(same.stdout)
    # A loop of its own records with as little.
    loop = """
import torch
from epsdpo_kernels import EpsilonDPOLoss
from epsdpo_kernels.record import Record
loss_fn = EpsilonDPOLoss()
record = Record(sys.argv[1], loss_fn)
x, w, labels = torch.randn(4, 5, 8), torch.randn(11, 8), torch.randint(0, 11, (4, 5))
record.append(loss_fn(x, w, labels, x + 0.1, w), step=1, row=[3, 4], epoch=0)
record.close()
from epsdpo_kernels.__main__ import main
sys.exit(main(["audit", sys.argv[1]]))
"""
    done = run(installed, loop, str(tmp_path / "mine"), without=RECORD)
    assert done.returncode == 0 and "OK, 2 rows, 1 training step, 1 part" in done.stdout, done.stderr


def test_the_gpus_tests_are_found_without_the_extras():
    code = "import pytest; sys.exit(pytest.main(['-m', 'gpu', '--collect-only', '-q', '-p', 'no:cacheprovider']))"
    command = [sys.executable, "-c", WITHOUT.format(packages=CORE) + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == {"tests/test_gpu.py"}
