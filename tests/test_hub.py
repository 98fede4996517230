"""`make hub`: the folder loads with the kernels library from disk, and computes what the package computes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import make_case, relative_error, worst_error

kernels = pytest.importorskip("kernels", reason="the library that loads them is not installed")

import epsdpo_kernels  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "build"
    subprocess.run([sys.executable, ROOT / "hub" / "lay_out.py", out], check=True, cwd=out.parent)
    return out


def test_layout_is_what_the_library_takes(folder):
    build = kernels._rust.Build.open(folder)
    assert {str(backend).lower().split(".")[-1] for backend in build.general.backends} == {"cpu", "cuda", "rocm"}
    ids = set()
    for backend in ("cpu", "cuda", "rocm"):
        variant = folder / "build" / f"torch-{backend}"
        metadata = kernels.Metadata.read_from_file(variant / "metadata.json")
        assert metadata.name.python_name == "epsdpo_kernels" and metadata.license == "Apache-2.0"
        metadata.digest.validate(kernels._rust.Digest.hash_variant(metadata.digest.algorithm, variant))
        ids.add(metadata.id)
        assert not (variant / "integrations").exists()
    assert len(ids) == 3


def test_loaded_from_disk_it_computes_the_loss(folder):
    loaded = kernels.get_local_kernel(folder, backend="cpu")
    assert loaded.__name__.startswith("_epsdpo_kernels_cpu_") and loaded is not epsdpo_kernels
    assert str(folder) in loaded.linear_epsilon_dpo.__code__.co_filename
    case = make_case(4, vocabulary=211, drift=0.1, seed=3)
    args, more = case.arguments(torch.float32, grad=("hidden", "weight"))
    truth_args, _ = case.arguments(torch.float64, grad=("hidden", "weight"))
    out = loaded.linear_epsilon_dpo(*args, **more)
    truth = epsdpo_kernels.epsilon_dpo_reference(*truth_args, **more)
    assert torch.equal(out.step, truth.step) and truth.step.any()
    naive = epsdpo_kernels.epsilon_dpo_reference(*args, **more)
    assert worst_error(out, truth) <= worst_error(naive, truth) + 1e-6
    gradients = torch.autograd.grad(out.loss, args[:2])
    for g, t in zip(gradients, torch.autograd.grad(truth.loss, truth_args[:2]), strict=True):
        assert relative_error(g, t) < 1e-5
    # Beside the installed package: each keeps an op of its own.
    again = epsdpo_kernels.linear_epsilon_dpo(*args, **more)
    assert torch.equal(again.loss, out.loss)
    assert torch.equal(loaded.linear_epsilon_dpo(*args, **more).loss, out.loss)
    assert loaded.ops.single_pass._qualname != epsdpo_kernels.ops.single_pass._qualname
    loss_fn = loaded.EpsilonDPOLoss(beta=0.1, epsilon=0.01)
    loss_fn(*args, **more)
    loss_fn.update_beta()
    assert loss_fn.beta.item() == pytest.approx(0.1 / (1 + 0.01 * truth.step.double().mean().item()))


INTERPRETED = """
import sys, torch, kernels
from pathlib import Path
loaded = kernels.get_local_kernel(Path(sys.argv[1]), backend="cpu")
torch.manual_seed(0)
hidden, weight = torch.randn(4, 5, 32), torch.randn(151, 32) / 6
policy = [(t + 0.1 * torch.randn_like(t)).requires_grad_() for t in (hidden, weight)]
labels = torch.randint(0, 151, (4, 5))
losses, gradients = [], []
for engine in ("triton", "torch"):
    out = loaded.linear_epsilon_dpo(*policy, labels, hidden, weight, epsilon=0.02, engine=engine)
    losses.append(out)
    gradients.append(torch.autograd.grad(out.loss, policy))
assert torch.equal(losses[0].step, losses[1].step) and losses[0].step.any()
torch.testing.assert_close(losses[0].losses, losses[1].losses, rtol=1e-5, atol=1e-6)
for a, b in zip(*gradients, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
print("agree", loaded.__name__)
"""


def test_its_triton_kernels_in_the_interpreter(folder):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, folder], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and "agree _epsdpo_kernels_cpu_" in done.stdout, done.stderr[-3000:]


def test_its_own_tests_pass(folder):
    """As kernel-builder runs them: with the built package importable by its name."""
    code = (
        "import sys, kernels; from pathlib import Path; import pytest\n"
        "sys.modules['epsdpo_kernels'] = kernels.get_local_kernel(Path(sys.argv[1]), backend='cpu')\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1] + '/tests']))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, folder], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-3000:]


def test_an_import_that_the_hub_forbids_is_named(tmp_path):
    sys.path.insert(0, str(ROOT / "hub"))
    try:
        from lay_out import check_imports, lay_out
    finally:
        sys.path.pop(0)
    for line in ("from epsdpo_kernels import plan", "import transformers.utils"):
        (tmp_path / "bad.py").write_text(line + "\n")
        with pytest.raises(ImportError, match=r"bad.py: imports \w+"):
            check_imports(tmp_path / "bad.py")
    with pytest.raises(FileExistsError, match="folder: got .* with something else in it"):
        lay_out(tmp_path)


def test_only_what_it_made_itself_is_replaced(tmp_path):
    """A build.toml is no sign of that: the source holds one, and so does any other kernel."""
    for name in ("hub", "epsdpo_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    source, out, foreign, around = tmp_path / "hub", tmp_path / "out", tmp_path / "foreign", tmp_path
    foreign.mkdir()
    (foreign / "build.toml").write_text("mine")
    for _ in range(2):
        subprocess.run([sys.executable, source / "lay_out.py", out], check=True)
        assert sorted(path.name for path in out.iterdir()) == sorted(
            ["CARD.md", "build", "build.toml", "flake.nix", "tests", "torch-ext"]
        )
        (out / "old").write_text("goes")
    (around / "torch-ext" / "epsdpo_kernels").mkdir(parents=True)
    for folder in (foreign, around, source):
        before = sorted(folder.rglob("*"))
        done = subprocess.run([sys.executable, source / "lay_out.py", folder], capture_output=True, text=True)
        assert f"FileExistsError: folder: got {folder}, with something else in it, takes an empty" in done.stderr
        assert sorted(folder.rglob("*")) == before
