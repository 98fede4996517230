"""What a kernel compiled to: registers, stack, and the instructions of its loops, from NVIDIA's disassembly."""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from functools import cached_property
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(.*?);")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")


def run(tool: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    text = run("cuobjdump", "--dump-resource-usage", cubin=cubin)
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
    return registers, stack


class Code:
    """The flow of a kernel: blocks of instructions that are executed together, and the blocks that may follow each."""

    def __init__(self, text: str):
        """Reads what ``nvdisasm -c`` says of one kernel."""
        self.blocks: list[list[str]] = [[]]
        labels: dict[str, int] = {}
        ends: list[tuple[int, str | None, bool]] = []  # block, where to, whether it may also go on
        for line in text.splitlines():
            if label := LABEL.match(line):
                if self.blocks[-1]:
                    self.blocks.append([])
                labels[label[1]] = len(self.blocks) - 1
            elif found := INSTRUCTION.search(line):
                predicate, name, operands = found.groups()
                self.blocks[-1].append(name)
                if name.split(".")[0] in ("BRA", "EXIT", "RET"):
                    to = TARGET.search(operands)
                    # Some branches name a predicate among their operands.
                    conditional = predicate is not None or (to is not None and to.start() > 0)
                    ends.append((len(self.blocks) - 1, to and to[1], conditional))
                    self.blocks.append([])
        self.next: list[set[int]] = [{i + 1} for i in range(len(self.blocks))]
        self.next[-1] = set()
        for block, to, conditional in ends:
            self.next[block] = {labels[to]} if to in labels else set()
            if conditional and block + 1 < len(self.blocks):
                self.next[block].add(block + 1)

    @cached_property
    def loops(self) -> list[tuple[int, set[int]]]:
        """(first block, all blocks) of every loop, in the order of the code."""
        before: list[set[int]] = [set() for _ in self.blocks]
        for i, following in enumerate(self.next):
            for j in following:
                before[j].add(i)
        # The blocks that every way to a block leads through; a way back to one of them closes a loop.
        everything = set(range(len(self.blocks)))
        through = [{0}] + [everything for _ in self.blocks[1:]]
        changed = True
        while changed:
            changed = False
            for i in range(1, len(self.blocks)):
                new = {i} | (set.intersection(*(through[j] for j in before[i])) if before[i] else set())
                changed |= new != through[i]
                through[i] = new
        found: dict[int, set[int]] = {}
        for i, following in enumerate(self.next):
            for head in following & through[i]:
                inside, waiting = found.setdefault(head, {head}), [i]
                while waiting:
                    j = waiting.pop()
                    if j not in inside:
                        inside.add(j)
                        waiting += before[j]
        return sorted(found.items())

    def own(self, head: int, inside: set[int]) -> set[int]:
        """A loop's blocks without those of the loops in it."""
        return inside - set().union(*(b for h, b in self.loops if h != head and b < inside))

    def iteration(self, head: int, inside: set[int]) -> int:
        """Instructions of a loop's cheapest way round, without those of the loops in it."""
        own = self.own(head, inside)
        queue, done = [(len(self.blocks[head]), head)], set()
        while queue:
            total, i = heapq.heappop(queue)
            if head in self.next[i]:
                return total
            if i not in done:
                done.add(i)
                for j in self.next[i] & inside:
                    heapq.heappush(queue, (total + len(self.blocks[j]) * (j in own), j))
        raise ValueError("no way round")


def instructions(cubin: bytes) -> int:
    """Instructions of one turn of the kernel's main loop: the first that takes exponentials.

    Branches that hardly any turn takes are not counted, nor are the products of an inner loop.
    """
    code = Code(run("nvdisasm", "-c", cubin=cubin))
    for head, inside in code.loops:
        if any(name.startswith("MUFU.EX2") for i in code.own(head, inside) for name in code.blocks[i]):
            return code.iteration(head, inside)
    raise ValueError("no loop takes an exponential")
