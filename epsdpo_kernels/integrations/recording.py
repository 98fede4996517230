"""When a trainer's record begins, is written and ends, and how TRL's batches keep saying which pairs they hold."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..linear import EpsilonDPOOutput
from ..record import Record, parts, set_aside, sources
from ..record.recorder import TRAIN
from .checkpoints import beginning, check_settings, checkpoint_of, checkpoint_step, set_later_aside

# Columns that travel with a pair through TRL's preparation of the data, and tensors of a batch: (2B,) int64, chosen
# rows first, so that whoever takes rows out of a batch takes these too. The place is that in a stream's pass, of what
# is left of it.
ROW, PAIR_ID, PLACE = "epsdpo_row", "epsdpo_pair_id", "epsdpo_place"
IDENTITY = {ROW: -1, PAIR_ID: 0, PLACE: -1}  # and what stands for an unknown one
NO_ROW, NO_ID, NO_PLACE = IDENTITY.values()


class RecordElsewhere:
    """In the place of a :class:`Record` on a rank whose pairs another one records."""

    def append(self, out: EpsilonDPOOutput, **_: Any) -> None:
        pass

    def flush(self) -> None:
        pass

    close = flush


class Recorded:
    """A trainer with a record, and with files of its own in checkpoints.

    To be named before a transformers.Trainer among a trainer's bases. Rows past a checkpoint come again when it is
    resumed; rows before it would not, so they are written first.
    """

    args: Any
    accelerator: Any
    state: Any
    record: Any = None  # a Record, a RecordElsewhere, or None
    _best_step: int | None = None  # in the best checkpoint, where its policy and β are in the last step's place

    def train(self, *args, **kwargs):
        self._best_step = None
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            # What led to it is on record.
            if self.record:
                self.record.flush()
            raise

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        begun = super()._init_training_state(  # type: ignore[misc]
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or self.state.global_step < max_steps:
            return begun
        # transformers sees that a run is at its end after a step alone.
        self.accelerator.print(
            f"resume_from_checkpoint: {resume_from_checkpoint} has {self.state.global_step} steps of {max_steps}: "
            "nothing is left to train", flush=True,
        )  # fmt: skip
        return num_train_epochs, 0

    def save_own(self, checkpoint: Path) -> None:
        """Writes what belongs to a checkpoint beside transformers' files."""
        raise NotImplementedError

    def load_own(self, checkpoint: Path) -> None:
        """Reads it, when the checkpoint's model is loaded."""
        raise NotImplementedError

    def _save_checkpoint(self, model, trial):
        if self.record:
            self.record.flush()
        # First of all, so that the state that transformers writes last marks the checkpoint as complete.
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"  # type: ignore[attr-defined]
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.save_own(folder)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_best_model(self):
        super()._load_best_model()  # type: ignore[misc]
        best = str(self.state.best_model_checkpoint)
        self._best_step = checkpoint_step(best)
        self.load_own(Path(best))


class RecordedTRL(Recorded):
    """A trainer of TRL that records every pair into ``output_dir/record``.

    The record begins with the training, or with an evaluation before it. A run that begins anew in a folder sets the
    record that it finds there aside; one that is resumed goes on with it. An evaluation alone leaves another run's
    record as it is.
    """

    model: Any
    loss_fn: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any
    is_in_train: bool
    data_ranks: int
    data_rank: int
    first_of_row: bool
    _is_vision_dataset: bool
    _facts: dict[str, Any] | None = None  # of the run; None where nothing is to be recorded
    _files: list[str] | None = None  # that the training data were read from
    _evaluation = "eval"  # the split of the evaluation that is under way
    _given = True  # whether its data are others than the trainer was made with
    _epoch = -1  # begun last
    _trained = False  # whether the record is that of a training, which began on all ranks alike
    _resumed: Path | None = None  # the checkpoint that train() goes on from
    _own_file = ""
    _own_names: Collection[str] = ()
    _settings: dict[str, Any]  # that a run keeps when it goes on from a checkpoint

    def keep_identities(self, own: str, names: Collection[str]) -> None:
        """To be called once, when the trainer has everything: its batches say which pairs they hold.

        ``own`` is the file by which its checkpoints are known, ``names`` are those of the tensors in it.
        """
        self._own_file, self._own_names = own, names
        self.data_collator = WithIdentity(self.data_collator)
        self.add_callback(_Moments(self))  # type: ignore[attr-defined]

    def numbered(self, dataset: Any, name: str = "eval") -> Any:
        """A data set with images, or several by name, or None, with its rows' numbers: TRL prepares nothing of them."""
        if isinstance(dataset, dict):
            return {name: self.numbered(one, name) for name, one in dataset.items()}
        return None if dataset is None else identified(dataset, self.args, name, images=True)

    def start_recording(self, options: dict[str, Any]) -> None:
        """To be called after that, where there is to be a record; ``options`` are those that run.json is to hold."""
        options = {"dataset": self._files} | options
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        named = {TRAIN: self.train_dataset} | {"_".join(filter(None, ("eval", k))): v for k, v in sets.items()}
        named = {split: data for split, data in named.items() if data is not None}
        self._facts = {
            "transformers": transformers.__version__,
            "options": options,
            "training_arguments": self.args.to_sanitized_dict(),
            "pairs": {split: len(data) for split, data in named.items() if isinstance(data, datasets.Dataset)},
            "streams": [split for split, data in named.items() if not isinstance(data, datasets.Dataset)],
        }

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._resumed = None
        if resume_from_checkpoint not in (None, False):
            asked, run = resume_from_checkpoint, self.args.output_dir
            self._resumed = checkpoint_of(None if asked is True else asked, run)
            if self._resumed is None:
                raise ValueError(f"resume_from_checkpoint: got {asked}, but {run} has no complete checkpoint")
            check_settings(self._resumed / self._own_file, self._settings, self._own_names)
        return super().train(self._resumed and str(self._resumed), *args, **kwargs)

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        self._given = not (eval_dataset is None or isinstance(eval_dataset, str))
        if self._given and self._is_vision_dataset:
            eval_dataset = self.numbered(eval_dataset)
        try:
            return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._given = True

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None,
                        metric_key_prefix="eval"):  # fmt: skip
        self._evaluation = metric_key_prefix
        if self._given:  # whose rows are not those of the evaluation that has this name
            data = getattr(dataloader.dataset, "dataset", dataloader.dataset)  # which accelerate deals out
            stream = isinstance(data, Undivided)
            name = beginning(data.stream, PAIR_ID) if stream else getattr(data, "_fingerprint", "given")
            # Each process has a fingerprint of its own of data in memory.
            self._evaluation += "@" + broadcast_object_list([name[:8]])[0]
        if self._evaluation == TRAIN and self._facts is not None:
            raise ValueError(
                f"metric_key_prefix: got {TRAIN!r}, which is the training's own name in the record, takes another"
            )
        if self.record is None and self._facts is not None:
            # Whether other ranks have parts there is for all to know.
            if broadcast_object_list([bool(parts(Path(self.args.output_dir, "record")))])[0]:
                warnings.warn(
                    f"output_dir: {self.args.output_dir} holds the record of another run; this evaluation is not "
                    "recorded", stacklevel=2,
                )  # fmt: skip
            else:
                self._open(None)
        return super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )

    def _begin(self, step: int) -> None:
        """The record of a training that begins after ``step``; one that only holds evaluations before it goes on."""
        run = Path(self.args.output_dir).resolve()
        elsewhere = self._resumed is not None and self._resumed.resolve().parent != run
        aside = None
        with self.args.main_process_first(local=self.args.save_on_each_node, desc="setting checkpoints aside"):
            if self.args.should_save:
                aside = set_later_aside(run, 0 if elsewhere else step, self._own_file)
        if self._facts is None or step == 0 and self.record and not self._trained:
            return
        if self.record:
            self.record.close()
        self._open(step if step and not elsewhere else None, begins_after=step if elsewhere else 0, aside=aside)

    def _open(self, resume_step: int | None, begins_after: int = 0, aside: Path | None = None) -> None:
        """``aside`` is where checkpoints of the run before have gone, and its record is to go."""
        with self.args.main_process_first(local=self.args.save_on_each_node, desc="the record"):
            if resume_step is None and self.args.should_save and (aside := set_aside(self.args.output_dir, aside)):
                warnings.warn(
                    f"output_dir: {self.args.output_dir} held the record of another run, which is now in {aside}",
                    stacklevel=2,
                )
            self._trained = False
            facts = dict(self._facts or {}) | {"ranks": self.data_ranks}
            if begins_after:
                facts["begins_after"] = begins_after
            self.record = RecordElsewhere() if not self.first_of_row else Record(
                self.args.output_dir, self.loss_fn, options=facts.pop("options"), facts=facts,
                rank=self.data_rank, resume_step=resume_step,
            )  # fmt: skip

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if self._files is None:  # the training data come first
            self._files = _files(dataset)
        dataset = identified(dataset, args, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)  # type: ignore[misc]

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if isinstance(dataset, datasets.IterableDataset):
            dataset = Undivided(dataset)
        return super()._get_dataloader(  # type: ignore[misc]
            dataset, description, batch_size, sampler_fn, is_training, dataloader_key
        )

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """As transformers does, which takes all steps of a stream for those of its first pass."""
        passes, batches = super()._init_training_state(  # type: ignore[misc]
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        state = Path(resume_from_checkpoint or "", TRAINER_STATE_NAME)
        left = self.state.global_step < max_steps
        if left and isinstance(self.train_dataset, datasets.IterableDataset) and state.is_file():
            saved = TrainerState.load_from_json(str(state))
            passes = math.ceil(saved.epoch) - 1
            # An epoch is a pass, and in it every step the share 1 / max_steps.
            steps = 0 if self.args.ignore_data_skip else round((saved.epoch - passes) * saved.max_steps)
            batches = steps * self.args.gradient_accumulation_steps
        self._epoch = passes - 1
        return passes, batches

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        self._signature_columns += [name for name in IDENTITY if name not in self._signature_columns]

    def own_pairs(self, batch: dict[str, Tensor]) -> int:
        """How many pairs of a loader's batch are not the repeats that fill a last one up; they come first."""
        pairs, ranks = len(batch["input_ids"]) // 2, self.data_ranks
        first = pairs * self.data_rank
        if ranks == 1:
            return pairs
        if PLACE in batch and NO_PLACE not in (places := batch[PLACE][:pairs].tolist()):
            # A batch of all ranks begins at a multiple of its size. The repeats are from the pass's beginning.
            return sum(place % (pairs * ranks) == first + i for i, place in enumerate(places))
        state = self.accelerator.gradient_state
        data = getattr(state.active_dataloader, "dataset", None)
        if not (state.end_of_dataloader and isinstance(data, datasets.Dataset)) or self.args.dataloader_drop_last:
            return pairs
        # accelerate's own remainder is not there when a run is resumed within an epoch.
        real = len(data) % (pairs * ranks) or pairs * ranks
        return min(max(real - first, 0), pairs)

    def named(self, batch: dict[str, Tensor], chosen: Tensor) -> str:
        """Some of the pairs of all ranks' batches in words, by their rows in the data or else their ids.

        To be called by all ranks alike; ``chosen`` is their (pairs,), gathered and padded.
        """
        pairs = len(batch["input_ids"]) // 2
        found = torch.tensor([NO_ROW, NO_ID], device=chosen.device).expand(pairs, 2)
        if ROW in batch:
            found = torch.stack([batch[ROW][:pairs], batch[PAIR_ID][:pairs]], 1)
        found = self.accelerator.gather(self.accelerator.pad_across_processes(found))
        rows, ids = found[chosen.to(found.device)].T.tolist()
        if NO_ROW not in rows:
            return f"at rows {sorted(set(rows))} of the data"
        if NO_ID not in ids:
            return f"with the ids {', '.join(map(_hex, ids))}"
        return f"{chosen.nonzero().flatten().tolist()} of a micro-batch of {len(chosen)}"

    def append_to_record(self, out: EpsilonDPOOutput, inputs: dict[str, Tensor]) -> None:
        """Adds the pairs of a batch, or of its part."""
        if self.record is None:
            return
        training = self.model.training
        epoch = max(float(self.state.epoch or 0), self._epoch, 0.0)
        row = pair_id = None
        if ROW in inputs:
            row, ids = (inputs[name][: len(out.losses)].tolist() for name in (ROW, PAIR_ID))
            pair_id = [None if one == NO_ID else _hex(one) for one in ids]
            if NO_PLACE not in inputs[PLACE]:
                if training:  # a step's share of a pass is nothing, where nobody knows its steps
                    epoch = float(self._epoch)
                elif self._given:  # a stream that is known by its first pairs alone
                    row = None
        self.record.append(
            out, step=self.state.global_step + training, policy_step=self._best_step, row=row, pair_id=pair_id,
            epoch=epoch, split=TRAIN if training else self._evaluation,
        )  # fmt: skip


class _Moments(TrainerCallback):
    """Tells a trainer's record when training and its epochs begin, and when something is over."""

    def __init__(self, trainer: RecordedTRL):
        self.trainer, self.begins_after = trainer, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begins_after = state.global_step
        self.trainer._begin(state.global_step)
        self.trainer._trained = True

    def on_epoch_begin(self, args, state, control, **kwargs):
        # The state's own epoch is that of the last step, which in a stream may end anywhere.
        self.trainer._epoch += 1

    def on_epoch_end(self, args, state, control, **kwargs):
        # A stream that goes on at the end of a pass comes to that end once more.
        at_step = (entry for entry in state.log_history if entry["step"] == state.global_step)
        if state.global_step == self.begins_after and any(
            name.startswith("eval_") for entry in at_step for name in entry
        ):
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer.record:
            self.trainer.record.close()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.trainer.record and not self.trainer.is_in_train:
            self.trainer.record.close()

    on_predict = on_evaluate  # type: ignore[assignment]


class WithIdentity:
    """Any collator of pairs, and in its batches which pairs they are.

    A batch of another number of pairs than there were examples, or examples that have lost their columns, leaves the
    rows unknown.
    """

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        identity = {name: [one.get(name, unknown) for one in examples] for name, unknown in IDENTITY.items()}
        batch = dict(self.collator([{k: v for k, v in one.items() if k not in IDENTITY} for one in examples]))
        ids = batch.get("input_ids")
        if ids is not None and len(ids) == 2 * len(examples):
            batch |= {name: torch.tensor(values, dtype=torch.int64).repeat(2) for name, values in identity.items()}
        return batch


class Undivided(IterableDataset):
    """A `datasets` stream of which every rank reads all rows, in one worker process, to be dealt out row by row.

    accelerate gives ranks, and `datasets` gives workers, whole shards where there are enough. Ranks have then different
    numbers of batches, and wait for ever for one that is at its end; and the order of pairs, and what `take` and `skip`
    leave of them, would be one of ranks and workers.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is None or worker.id == 0:
            for place, row in enumerate(self.stream.iter(batch_size=1)):  # which knows of no workers
                yield {name: column[0] for name, column in row.items()} | {PLACE: place}

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)


def identified(dataset: Any, args: Any, name: str, images: bool = False) -> Any:
    """A data set as the user gave it, with each pair's row in it and its id by its texts.

    Pairs with ``images`` have no id, which would be that of the same words about another image.
    """
    if ROW in next(iter(dataset), {}):
        return dataset
    if images and isinstance(dataset, datasets.Dataset):  # without images read, and written once more
        return dataset.add_column(ROW, list(range(len(dataset))))
    fn_kwargs = {"code": hash_of(sources.__file__)}
    if isinstance(dataset, datasets.Dataset):
        return dataset.map(
            _identity, with_indices=True, fn_kwargs=fn_kwargs, num_proc=args.dataset_num_proc,
            desc=f"Numbering {name} dataset",
        )  # fmt: skip
    return dataset.with_format(None).map(_identity, with_indices=True, fn_kwargs=fn_kwargs)


def hash_of(file: str) -> str:
    """Of a module's text. `datasets` keeps results by the function's name: other code would find those of this one."""
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()


def _files(dataset: Any) -> list[str]:
    """The Arrow files in which `datasets` keeps a data set; none of one in memory, and of a stream."""
    if not isinstance(dataset, datasets.Dataset):
        return []
    return datasets.table.list_table_cache_files(dataset.data)


def _hex(pair_id: int) -> str:
    """A pair's id as the record writes it, of the signed 64 bits that a tensor holds."""
    return f"{pair_id % 2**64:016x}"


def _identity(example: Any, row: int, code: str) -> dict[str, int]:
    try:
        pair_id = int(sources.pair_of(dict(example)).id(), 16)
    except (sources.NoPair, ValueError):
        pair_id = NO_ID
    # As signed 64 bits, which a tensor holds.
    return {ROW: row, PAIR_ID: pair_id - (pair_id >> 63 << 64)}
