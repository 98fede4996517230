"""Compiles every Triton kernel for GPUs that need not be there, and says no to what would be slow or fail on them.

    python tests/kernel_gate.py --out build/kernels

A kernel passes if it becomes machine code, its stack is at most 64 bytes (more is a spill), its shared memory is within
the architecture's limit, and its products run on the matrix units where the dtype has them. The block sizes are those
of the package's tables; ``--blocks`` puts others in the place of the logit-free kernel's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what a launch does; triton 3.9 asks to say so
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from epsdpo_kernels import tiles_triton, triton_blocks, triton_project  # noqa: E402

STACK = 64
# Target, bytes of shared memory that a program may have, and the matrix instruction of the logit-free kernel.
ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10, "mma.sync"),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10, "wgmma.mma_async"),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10, "tcgen05.mma"),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 << 10, "mma.sync"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10, "v_mfma"),
}
DTYPES = ("bf16", "fp16", "fp32")
VARIANTS = ("plain", "softcap", "bias")
# The logit-free kernel as scoring uses it, as training does, and on a head that both models share.
KERNELS = ("sweep", "gradient", "project", "project_store", "project_shared")
HIDDEN = (1024, 4096)
COLUMNS = (
    "kernel",
    "arch",
    "dtype",
    "variant",
    "hidden",
    "blocks",
    "registers",
    "stack",
    "shared",
    "seconds",
    "verdict",
)

# Types of the kernels' arguments by name; a bias has the head's dtype.
TYPES = {
    "a_ptr": "*fp32", "b_ptr": "*fp32", "part_ptr": "*fp32", "swept_ptr": "*fp32", "coefficient_ptr": "*fp32",
    "sums_ptr": "*fp64", "labels_ptr": "*i64", "completion_ptr": "*i64", "bounds_ptr": "*i64",
    "arrived_ptr": "*i32", "finished_ptr": "*i32", "step_ptr": "*i8",
    "a_stride": "i32", "b_stride": "i32", "out_stride": "i32", "swept_stride": "i32", "first": "i32", "rows": "i32",
    "vocabulary": "i32", "hidden": "i32", "ref_hidden": "i32", "pairs": "i32",
    "scale": "fp32", "ref_scale": "fp32", "epsilon": "fp32", "softcap": "fp32", "ref_softcap": "fp32",
}  # fmt: skip
# What a launch finds divisible by 16, as heads of every size in use are: wide loads.
DIVISIBLE = ("vocabulary", "hidden", "ref_hidden", "a_stride", "b_stride", "out_stride")


def source(kernel: str, arch: str, dtype: str, variant: str, hidden: int, blocks) -> tuple[ASTSource, dict]:
    """What a launch of the package would compile, and with which options."""
    row = triton_blocks.row(arch)
    itemsize = 4 if dtype == "fp32" else 2
    types = TYPES | {"bias_ptr": f"*{dtype}", "ref_bias_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    constants = {} if variant == "softcap" else {"softcap": None, "ref_softcap": None}
    constants |= {} if variant == "bias" else {"bias_ptr": None, "ref_bias_ptr": None}
    constants |= {"PERTURB": True, "WORDS": row.words, "TOKENS": row.tokens}
    options = {"num_warps": row.warps, "num_stages": 1}
    function = {"sweep": tiles_triton._sweep_kernel, "gradient": tiles_triton._gradient_kernel}.get(kernel)
    if function is None:
        function = triton_project._project_kernel
        blocks = blocks or triton_blocks.product(arch, itemsize, hidden)
        descriptors = arch in triton_blocks.DESCRIPTORS
        for name, size in (("x", blocks.rows), ("ref_x", blocks.rows), ("weight", blocks.words)):
            types[name] = f"tensordesc<{dtype}[{size}, {blocks.hidden}]>" if descriptors else f"*{dtype}"
        types["ref_weight"] = types["weight"]
        constants |= {
            "SHARED": kernel == "project_shared", "DESCRIPTORS": descriptors, "SPLITS": triton_blocks.splits(arch),
            "ROWS": blocks.rows, "WORDS": blocks.words, "HIDDEN": blocks.hidden,
        }  # fmt: skip
        if kernel != "project_store":
            constants["a_ptr"] = None
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (name in DIVISIBLE and name not in constants)
    }
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned), options


def resources(compiled) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return tuple(
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
        )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return tuple(int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))


def check(case: tuple) -> dict:
    """One line of the table."""
    kernel, arch, dtype, variant, hidden, blocks = case
    target, limit, instruction = ARCHITECTURES[arch]
    built, options = source(*case)
    line = dict(zip(COLUMNS, case, strict=False))
    sizes = {k: v for k, v in built.constants.items() if isinstance(v, int) and not isinstance(v, bool)}
    line["blocks"] = "×".join(str(v) for k, v in sizes.items())
    begin = time.perf_counter()
    try:
        compiled = triton.compile(built, target=target, options=options)
    except Exception as error:  # whatever stops a compilation is a verdict
        return line | {"seconds": round(time.perf_counter() - begin, 2), "verdict": f"does not compile: {error}"[:200]}
    registers, stack = resources(compiled)
    line |= {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}
    line["seconds"] = round(time.perf_counter() - begin, 2)
    faults = []
    if stack > STACK:
        faults.append(f"stack {stack} > {STACK}")
    if compiled.metadata.shared > limit:
        faults.append(f"shared {compiled.metadata.shared} > {limit}")
    if kernel.startswith("project") and dtype != "fp32":
        text = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
        if instruction not in text:
            faults.append(f"no {instruction}")
    return line | {"verdict": "; ".join(faults) or "ok"}
