"""Compiles every Triton kernel for GPUs that need not be there, and says no to what would be slow or fail on them.

    python tests/kernel_gate.py --out build/kernels [--update]

A kernel passes if it becomes machine code, its stack is at most 64 bytes (more is a spill), its shared memory is within
the architecture's limit, its products run on the matrix units where the dtype has them, it adds no floats by atomics,
whose order nobody knows, threads that join their sums all come to the same one, and its main loop takes at most 5 %
more instructions for a pair of logits than the committed count, which ``--update`` renews (then ``python -m
bench.tables`` writes docs/kernels.md). The block sizes are those of the package's tables; ``--blocks`` puts others in
the place of the logit-free kernel's. The table goes to standard output and, with the same in JSON, into the folder.
Times are what bench/roofline.py predicts of the kernel alone, 8192 rows of a 16-bit head on the architecture's card.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what a launch does; triton 3.9 asks to say so
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)]

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import machine_code  # noqa: E402
from bench import results, tables  # noqa: E402
from epsdpo_kernels.engines import triton_blocks, triton_engine, triton_project  # noqa: E402

STACK = 64
# By how much more instructions a logit may take than the committed table has.
MORE = 0.05
# Target, bytes of shared memory that a program may have on every card of the generation (an A100 has 163 KiB, 8.6 and
# 8.9 have 99), and the matrix instruction of the logit-free kernel.
ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 99 << 10, "mma.sync"),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10, "wgmma.mma_async"),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10, "tcgen05.mma"),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 << 10, "mma.sync"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10, "v_mfma"),
}
# The policy's, and the reference's where that is another.
DTYPES = ("bf16", "fp16", "fp32", "bf16+fp32", "fp32+bf16")
# What changes the code beside the dtype: scale and softcap, scale and bias, no ε, a vocabulary and a hidden size that
# are no multiple of 16 (the latter is loaded without the copy engine).
VARIANTS = ("plain", "softcap", "bias", "no epsilon", "odd V", "odd H")
# The logit-free kernel as scoring uses it, as training does, and on a head that both models share.
KERNELS = ("sweep", "gradient", "project", "project_store", "project_shared", "scale")
CASE = ("kernel", "arch", "dtype", "variant")
COUNTED = ("blocks", *tables.RESOURCES)
COLUMNS = (*CASE, *COUNTED, "predicted", "seconds", "verdict")

# Types of the kernels' arguments by name; the matrices, biases and the gradient have dtypes of their own.
TYPES = {
    "a_ptr": "*fp32", "b_ptr": "*fp32", "part_ptr": "*fp32", "swept_ptr": "*fp32", "coefficient_ptr": "*fp32",
    "g_ptr": "*fp32", "factor_ptr": "*fp32", "sums_ptr": "*fp64",
    "labels_ptr": "*i64", "completion_ptr": "*i64", "bounds_ptr": "*i64",
    "arrived_ptr": "*i32", "finished_ptr": "*i32", "step_ptr": "*i8",
    "a_stride": "i32", "b_stride": "i32", "out_stride": "i32", "swept_stride": "i32", "first": "i32", "rows": "i32",
    "elements": "i32", "vocabulary": "i32", "hidden": "i32", "ref_hidden": "i32", "pairs": "i32",
    "scale": "fp32", "ref_scale": "fp32", "epsilon": "fp32", "softcap": "fp32", "ref_softcap": "fp32",
}  # fmt: skip
# What a launch finds divisible by 16: rows of tiles always, the others as heads of nearly all sizes in use are.
STRIDES, SIZES = ("a_stride", "b_stride", "out_stride"), ("vocabulary", "hidden", "ref_hidden", "elements")


def source(case: tuple, blocks=None) -> tuple[ASTSource, dict]:
    """What a launch of the package would compile, and with which options."""
    kernel, arch, dtype, variant = case
    policy, reference = dtype.split("+") if "+" in dtype else (dtype, dtype)
    row = triton_blocks.row(arch)
    types = TYPES | {"bias_ptr": f"*{policy}", "ref_bias_ptr": f"*{reference}", "out_ptr": f"*{policy}"}
    absent = ["softcap", "ref_softcap"] if variant != "softcap" else []
    absent += ["bias_ptr", "ref_bias_ptr"] if variant != "bias" else []
    absent += ["scale", "ref_scale"] if variant not in ("softcap", "bias") else []
    absent += ["a_ptr"] if kernel in ("project", "project_shared") else []
    constants = dict.fromkeys(absent)
    constants |= {"PERTURB": variant != "no epsilon", "LANES": row.lanes, "DEPTH": row.depth, "WORDS": row.words}
    constants["TOKENS"] = row.tokens
    options = {"num_warps": row.warps, "num_stages": 1}
    of_rows = {"sweep": triton_engine._sweep_kernel, "gradient": triton_engine._gradient_kernel}
    function = (of_rows | {"scale": triton_engine._scale_kernel}).get(kernel)
    if function is None:
        function = triton_project._project_kernel
        descriptors = arch in triton_blocks.DESCRIPTORS and variant != "odd H"
        blocks = blocks or triton_blocks.product(arch, 4 if "fp32" in dtype else 2, descriptors)
        matrices = {"x": (policy, blocks.rows), "weight": (policy, blocks.words)}
        matrices |= {"ref_x": (reference, blocks.rows), "ref_weight": (reference, blocks.words)}
        for name, (of, size) in matrices.items():
            types[name] = f"tensordesc<{of}[{size}, {blocks.hidden}]>" if descriptors else f"*{of}"
        constants |= {
            "SHARED": kernel == "project_shared", "DESCRIPTORS": descriptors, "SPLITS": triton_blocks.splits(arch),
            "GROUP": triton_blocks.GROUP, "ROWS": blocks.rows, "WORDS": blocks.words, "HIDDEN": blocks.hidden,
            "SHARE": blocks.share, "WIDTH": blocks.width,
        }  # fmt: skip
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    divisible = STRIDES + {"odd V": SIZES[1:], "odd H": ()}.get(variant, SIZES)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and (signature[name].startswith("*") or name in divisible)
    }
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned), options


def exists(case: tuple) -> bool:
    """Whether it is code of its own: only a head reads two dtypes, or an odd H, and only a sweep reads ε."""
    kernel, arch, dtype, variant = case
    projects = kernel.startswith("project")
    if kernel == "scale":
        return variant == "plain" and "+" not in dtype
    if "+" in dtype:
        return projects and kernel != "project_shared" and variant == "plain"
    if variant in VARIANTS[3:]:
        needed = {"no epsilon": kernel != "gradient", "odd V": True, "odd H": projects}[variant]
        return needed and dtype != "fp16" and not arch.startswith("gfx")
    return True


def fuses_exchanged(ptx: str) -> bool:
    """Whether a thread adds what it was handed to a product of its own without rounding that.

    Threads that exchange addends then have different last digits in what is the same sum, and all of them may store it.
    """
    handed = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    return any(handed & set(re.findall(r"%\w+", line)) for line in re.findall(r"fma\.rn\.f32(.*);", ptx))


def check(case: tuple, blocks=None) -> dict:
    """One line of the table."""
    kernel, arch, dtype, variant = case
    target, limit, instruction = ARCHITECTURES[arch]
    built, options = source(case, blocks)
    line = dict(zip(CASE, case, strict=True))
    sizes = {name: built.constants.get((i,)) for i, name in enumerate(built.fn.arg_names)}
    shape = [str(sizes[name]) for name in ("ROWS", "WORDS", "HIDDEN", "LANES", "DEPTH") if sizes.get(name)]
    line["blocks"] = f"{'×'.join(shape)}, {options['num_warps']} warps, {options['num_stages']} stages"
    begin = time.perf_counter()
    try:
        compiled = triton.compile(built, target=target, options=options)
    except Exception as error:  # whatever stops a compilation is a verdict
        return line | {"seconds": round(time.perf_counter() - begin, 2), "verdict": f"does not compile: {error}"[:200]}
    line["shared"] = compiled.metadata.shared
    if "cubin" in compiled.asm:
        line["registers"], line["stack"] = machine_code.resources(compiled.asm["cubin"])
        # Pairs of logits that a thread works on in one turn.
        words = {"sweep": sizes.get("DEPTH", 0) * 4 * 32, "gradient": sizes.get("WORDS", 0) // options["num_warps"]}
        pairs = words.get(kernel, (sizes.get("ROWS") or 0) * sizes.get("WORDS", 0) // options["num_warps"]) / 32
        if kernel != "scale":  # which goes round no loop
            line["instructions"] = round(machine_code.instructions(compiled.asm["cubin"]) / pairs, 1)
    else:
        keys = {"registers": "vgpr_count", "stack": "private_segment_fixed_size"}
        line |= {k: int(re.search(rf"\.{v}:\s+(\d+)", compiled.asm["amdgcn"])[1]) for k, v in keys.items()}
    line["seconds"] = round(time.perf_counter() - begin, 2)
    faults = []
    if fuses_exchanged(compiled.asm.get("ptx", "")):
        faults.append("copies of a sum differ")
    if line["stack"] > STACK:
        faults.append(f"stack {line['stack']} > {STACK}")
    if compiled.metadata.shared > limit:
        faults.append(f"shared {compiled.metadata.shared} > {limit}")
    if kernel.startswith("project") and "fp32" not in dtype and variant != "odd H":
        text = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
        if instruction not in text:
            faults.append(f"no {instruction}")
    if re.search(r"tt\.atomic_rmw f|tt\.atomic_\w+ .*tensor<\S*f\d+>", compiled.asm["ttir"]):
        faults.append("float atomics")
    return line | {"verdict": "; ".join(faults) or "ok"}


def committed(case: tuple) -> float | None:
    """The instructions that a case had with this Triton when they were last committed, else with the newest then."""
    key = dict(zip(CASE, case, strict=True))
    found = results.kernels(triton.__version__, **key) or results.kernels(**key)
    return max(found, key=lambda line: line["triton"]).get("instructions") if found else None


def distinct(cases: list[tuple], blocks) -> dict[tuple, list[tuple]]:
    """One case for each thing to compile, and all cases that it is: the sweep's fp32 tiles know no other dtype, say."""
    groups: dict[str, list[tuple]] = {}
    for case in cases:
        built, options = source(case, blocks)
        key = repr((built.fn.__name__, case[1], built.signature, built.constants, built.attrs, options, case[0]))
        groups.setdefault(key, []).append(case)
    return {group[0]: group for group in groups.values()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the table, as Markdown and as JSON")
    parser.add_argument("--blocks", help="ROWS,WORDS,HIDDEN,warps,stages of the logit-free kernel, for all cases")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--update", action="store_true", help="commit the counts of this Triton")
    choices = {"kernel": KERNELS, "arch": tuple(ARCHITECTURES), "dtype": DTYPES, "variant": VARIANTS}
    for name, values in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=values)
    options = parser.parse_args()
    blocks = options.blocks and triton_blocks.Product(*map(int, options.blocks.split(",")))

    begin = time.perf_counter()
    cases = list(product(*(getattr(options, name) for name in choices)))
    cases = [case for case in cases if exists(case)]
    groups = distinct(cases, blocks)
    print(f"triton {triton.__version__}: {len(cases)} cases, {len(groups)} to compile", file=sys.stderr)
    lines = {}
    with ProcessPoolExecutor(options.processes) as pool:
        running = {pool.submit(check, case, blocks): case for case in groups}
        for future in as_completed(running):
            case, line = running[future], future.result()
            line["predicted"] = tables.predicted(case, {triton.__version__: line})
            count, before = line.get("instructions"), None if blocks or options.update else committed(case)
            if count and before and count > (1 + MORE) * before:
                line["verdict"] = f"{count} instructions, where {before} are committed; {line['verdict']}"
            for name, values in zip(CASE, zip(*groups[case], strict=True), strict=True):
                line[name] = ", ".join(map(str, dict.fromkeys(values)))
            lines[case] = line
            what = " ".join(line[name] for name in CASE)
            print(f"{len(lines)}/{len(groups)} {what}: {line['verdict']}", file=sys.stderr, flush=True)
    table = [lines[case] for case in groups]
    rows = [COLUMNS, ["---"] * len(COLUMNS), *([line.get(c, "") for c in COLUMNS] for line in table)]
    text = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"triton-{triton.__version__}.md").write_text(text)
    (options.out / f"triton-{triton.__version__}.json").write_text(json.dumps(table, indent=1) + "\n")
    failed = sum(line["verdict"] != "ok" for line in table)
    if options.update:
        counted = json.loads(results.KERNELS.read_text()) if results.KERNELS.exists() else {}
        kept = [{name: line[name] for name in (*CASE, *COUNTED) if name in line} for line in table]
        counted[triton.__version__] = kept
        text = ",\n".join(f'"{v}": [\n' + ",\n".join(map(json.dumps, ls)) + "\n]" for v, ls in counted.items())
        results.KERNELS.write_text(f"{{{text}}}\n")
    seconds = time.perf_counter() - begin
    print(f"{len(table)} kernels in {seconds:.0f} s, {failed} of them fail", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
