"""Two revisions of this package, interleaved call by call: the ratio of their times, case by case.

    python -m bench.compare BASE [--rounds N]

BASE is any git revision, which is checked out under build/, or a folder that holds one. Each runs in a process of its
own, one at a time.
Exits with 1 where this tree is slower by more than --allow, beyond what the rounds scatter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def worker(tree: str) -> None:
    """Takes cases and answers with seconds, a JSON value a line. The package is the tree's, all else is this one's."""
    sys.path.insert(0, tree)
    import epsdpo_kernels

    assert Path(epsdpo_kernels.__file__).is_relative_to(tree), epsdpo_kernels.__file__
    sys.path.insert(0, str(ROOT))
    from bench import measure, variants
    from bench.cases import Case, make_inputs

    device, run = "cpu", None
    for line in sys.stdin:
        request = json.loads(line)
        if request:
            device = request.pop("device")
            run = variants.call("ours", make_inputs(Case(**request), device))
            run()
            print(json.dumps("ready"), flush=True)
        else:
            assert run is not None
            print(json.dumps(measure.seconds(run, device)), flush=True)


class Revision:
    """A process that runs one revision."""

    def __init__(self, tree: Path):
        self.tree = tree
        command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / "compare.py"), "--worker", str(tree)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: dict | None):
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.tree}: stopped with exit status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def check_out(revision: str) -> Path:
    """The folder, or a worktree of the revision under build/, made where it is not there yet."""
    if (Path(revision) / "epsdpo_kernels").is_dir():
        return Path(revision).resolve()
    found = subprocess.run(
        ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode:
        raise ValueError(f"BASE: got {revision!r}, takes a git revision or a folder with the package")
    tree = ROOT / "build" / f"revision-{found.stdout[:12]}"
    if not tree.exists():
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
        add = ["git", "worktree", "add", "--quiet", "--detach", str(tree), found.stdout.strip()]
        subprocess.run(add, cwd=ROOT, check=True)
    return tree


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2])
    sys.path.insert(0, str(ROOT))
    from bench import measure
    from bench.cases import Case

    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", help="git revision, or its folder, to compare this tree with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--case", nargs="+", help="names of cases, by default all")
    parser.add_argument("--allow", type=float, default=0.05, help="how much slower is not worth an error")
    options = parser.parse_args()
    if not options.base:
        parser.error("BASE is missing: make bench-compare BASE=<revision>")
    cases = [
        Case("smollm2", 128), Case("smollm2", 128, mode="frozen"), Case("smollm2", 128, mode="score"),
        Case("smollm2", 16, pairs=8, masked=0.5), Case("smollm2", 128, dtype="bfloat16"), Case("mistral", 64),
        Case("32768x1024", 1536), Case("tiny-softcap", 2048), Case("tiny", 8, pairs=64),
    ]  # fmt: skip
    if options.device == "cuda":
        heads = ("llama3", "gemma2", "smollm2")
        cases = [Case(head, 4096, mode=mode, dtype="bfloat16") for head in heads for mode in ("train", "score")]
    if options.case:
        cases = [case for case in cases if case.name in options.case]
    progress = measure.Progress()
    try:
        base, here = Revision(check_out(options.base)), Revision(ROOT)
    except ValueError as error:
        sys.exit(f"error: {error}")
    slower = []
    print(f"{'case':44s} {'ratio':>7s} {'range':>15s}   this tree against {options.base}")
    for case in cases:
        for revision in (base, here):
            revision.ask(asdict(case) | {"device": options.device})
        pairs = [(here.ask(None), base.ask(None)) for _ in range(options.rounds)]
        mine, theirs = map(list, zip(*pairs, strict=True))
        found = measure.ratio(mine, theirs)
        print(f"{case.name:44s} {found['ratio']:7.3f} {found['least']:7.3f}–{found['most']:.3f}", flush=True)
        if found["ratio"] > 1 + options.allow and found["least"] > 1:
            slower.append(case.name)
        progress(f"{case.name} done")
    base.close()
    here.close()
    if slower:
        sys.exit(f"slower: {', '.join(slower)}")


if __name__ == "__main__":
    main()
