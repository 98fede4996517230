"""Prints docs/record.md: what a record holds, from its schema."""

from .recorder import SCHEMA, STEPS_PER_PART

PAGE = """# The record of a run

Every training and evaluation batch appends one row a pair to `RUN/record/`. `python -m train` and `EpsilonDPOTrainer`
(`RUN` is their `output_dir`) do it by themselves; a loop of your own does with `epsdpo_kernels.record.Record`, as the
README shows. `epsdpo audit RUN` checks a record against itself; `epsdpo report RUN` draws it.

```python
from epsdpo_kernels.record import read

table = read("RUN/record")  # a pyarrow.Table; .to_pandas() for a data frame
```

A part is named `part-RANK-FIRSTSTEP-NUMBER.parquet`. It is closed at the end of a step once it holds {steps} steps or
16,384 rows, and whenever a checkpoint is saved; it appears under its name whole, or not at all. A run that is killed
loses the open part at most, and one that is resumed removes the rows past its checkpoint before it goes on.

Each part's metadata hold the SHA-256 of the rank's part before it (`sha256_before`), and `end-RANK.json` that of the
last, with `closed` once the run has said that it is over. Every rank keeps its own end, from its start on, so that none
waits for another; the files of all ranks belong into one folder. [What this proves, and what
not](report.md#what-is-proved-and-what-is-not).

`RUN/run.json` holds the run's settings, and how many pairs (`pairs`) and processes with pairs of their own (`ranks`)
there are; a loop of several processes says `facts={{"ranks": N}}`. A TRL run that begins anew in a folder finds the
record of the last one there: it goes to `RUN/earlier-1/` with its checkpoints, where it can be audited too. A run that
goes on from another checkpoint than its last moves the later ones there.

What is not known is null: the row and id of a pair where a data collator lost them, or your loop didn't give them; the
epoch where it wasn't given. Rows that fill up a rank's last batch are not recorded. A stream's row is the place in one
pass, and its epoch the number of that pass. Data that are given to `evaluate()`, other than those the trainer was made
with, have a split of their own, `eval@` and the fingerprint of the data; a stream that of its first 16 pairs, and no
rows. Where an earlier checkpoint is evaluated (`load_best_model_at_end`), `policy_step` says which, and its β is what
the audit expects.

Texts stay in the data set: `pair_id` and `row` lead there. Everything below is as the loss computed it, in its
precision, before the optimizer step. The table is made from the schema (`python -m epsdpo_kernels.record`).

| column | type | unit | |
| --- | --- | --- | --- |
"""


def document() -> str:
    """docs/record.md, from the schema."""
    page = PAGE.format(steps=STEPS_PER_PART)
    for field in SCHEMA:
        unit, description = (field.metadata[key].decode() for key in (b"unit", b"description"))
        kind = f"{field.type}, may be null" if field.nullable else str(field.type)
        page += f"| `{field.name}` | {kind} | {unit} | {description} |\n"
    return page


if __name__ == "__main__":
    print(document(), end="")
