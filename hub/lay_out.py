"""Lays the kernels out in the format of the Hub's ``kernels`` library: ``python hub/lay_out.py FOLDER``.

    FOLDER/build.toml, CARD.md, flake.nix, tests/   what kernel-builder takes
    FOLDER/torch-ext/epsdpo_kernels/                the package; its op is named by ``_ops``, which the builder makes
    FOLDER/build/torch-{cpu,cuda,rocm}/             what kernel-builder makes of that, ready to load or to upload

There is nothing to compile, so the same Python serves every backend ("noarch", once called universal). The integrations
and the record stay behind: a kernel may import torch, triton and itself alone.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "epsdpo_kernels"
BACKENDS = ("cpu", "cuda", "rocm")
NAME = "epsdpo-kernels"
# Several versions of a kernel may be loaded in one process, so each names its op after itself.
OP = 'return f"epsdpo_kernels::{name}"'
IMPORT = "from . import engines, plan\n"


def check_imports(path: Path) -> None:
    """Raises ImportError where a module imports anything but torch, triton, Python's own and its neighbours."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            if top not in ("torch", "triton") and top not in sys.stdlib_module_names:
                raise ImportError(f"{path.name}: imports {name}, takes torch, triton and relative imports")


def ops_module(namespace: str) -> str:
    return (
        f"import torch\n\nops = torch.ops.{namespace}\n\n\n"
        f'def add_op_namespace_prefix(op_name: str) -> str:\n    return f"{namespace}::{{op_name}}"\n'
    )


def lay_out(folder: Path) -> None:
    """Writes the package into ``folder``, whose former contents go."""
    earlier = (folder / "torch-ext" / "epsdpo_kernels").is_dir()
    if HERE.is_relative_to(folder.resolve()) or folder.exists() and not earlier and any(folder.iterdir()):
        raise FileExistsError(f"folder: got {folder}, with something else in it, takes an empty one or one made before")
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "torch-ext" / "epsdpo_kernels"
    source.mkdir(parents=True)
    (source / "engines").mkdir()
    for path in sorted((*PACKAGE.glob("*.py"), *PACKAGE.glob("engines/*.py"))):
        if path.name == "__main__.py":  # the record's commands
            continue
        check_imports(path)
        text = path.read_text()
        if path.name == "ops.py":
            assert text.count(OP) == text.count(IMPORT) == 1, "ops.py: the name is not where this script expects it"
            text = text.replace(OP, "return add_op_namespace_prefix(name)")
            text = text.replace(IMPORT, IMPORT + "from ._ops import add_op_namespace_prefix\n")
        (source / path.relative_to(PACKAGE)).write_text(text)
    for name in ("build.toml", "CARD.md", "flake.nix"):
        shutil.copy(HERE / name, folder)
    shutil.copytree(HERE / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    content = hashlib.sha1(b"".join(path.read_bytes() for path in files(source))).hexdigest()
    for backend in BACKENDS:
        build_variant(source, folder / "build" / f"torch-{backend}", backend, content[:7])


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def build_variant(source: Path, variant: Path, backend: str, content: str) -> None:
    shutil.copytree(source, variant)
    identifier = f"_{source.name}_{backend}_{content}"
    (variant / "_ops.py").write_text(ops_module(identifier))
    digests = {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files(variant)
    }
    metadata = {
        "id": identifier, "name": NAME, "version": 0, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": backend}, "digest": {"algorithm": "sha256", "files": digests},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {', '.join(f'build/torch-{backend}' for backend in BACKENDS)}")
