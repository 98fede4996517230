"""How a trainer's batches of pairs go through its models: packed or padded, in parts of bounded size.

What both trainers share. A batch stays the same pairs whatever its layout, and every pair weighs alike, so decisions do
not know of it.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from . import attention
from .checks import check_gradient, check_resume
from .memory import GIB, expected_memory
from .packing import IGNORE, Packing, pack, part, to
from .sequence import SharedRows, share
from .sharding import whole_shape
from .transformers import causal_lm, lm_head, positions, rows_alone_up_to, virtual_tokens

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class PackedBatches(SharedRows):
    """To be named before a transformers.Trainer among a trainer's bases.

    The trainer calls :meth:`set_layout` when it has its models, :meth:`lay_out` on the batches of an optimizer step,
    :meth:`loss_of` on one of an evaluation, and :meth:`packing_of` where it computes a loss; it says what of a batch is
    to be predicted.
    """

    accelerator: Any
    args: Any
    train_dataset: Any
    eval_dataset: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    packed: bool = False
    by_batch: bool = False  # whether a pair's loss depends on the batch that it is in
    max_tokens: int | None = None
    _tr_loss: Tensor
    _ran = (0, 0)  # tokens through the backbone since the last line of the log, and what padded rows would have been
    _clock: float | None = None

    def labels_of(self, batch: dict[str, Tensor]) -> Tensor:
        """(2B, T) what each hidden state of the batch has to predict, −100 where nothing."""
        raise NotImplementedError

    def blank_of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A pair of the batch's kind of which nothing is scored."""
        raise NotImplementedError

    def set_layout(
        self, models: Sequence[nn.Module], packed: bool, max_tokens: int | None, images: bool = False
    ) -> None:
        """Chooses packed rows where they are wanted and all models can, and says what was chosen and why.

        Args:
            models: policy and reference, where that is a second one.
            packed: whether packed rows are wanted.
            max_tokens: of a micro-batch; one of more is cut.
            images: whether batches have images, which belong to rows as each processor has it.

        Raises:
            ValueError: max_tokens is not positive, or a batch may not be cut; rows that are to be spread over ranks
                cannot be packed; the data hold what a model has no place for, or all of them would be dropped.
        """
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens_per_batch: got {max_tokens}, takes a positive number of tokens")
        if max_tokens is not None and self.by_batch:
            raise ValueError(
                "max_tokens_per_batch: got a loss whose β is a batch's, which cutting would change; takes none"
            )
        if max_tokens is not None and images:
            raise ValueError(
                f"max_tokens_per_batch: got {max_tokens} with images, which are no rows that could be cut; takes none. "
                "Set per_device_train_batch_size"
            )
        if self.by_batch and self.sequence_group is not None:
            raise ValueError("parallelism_config: got sp_size with a loss whose β is a batch's, takes none")
        self.max_tokens, self._models = max_tokens, list(models)
        self._check_data(models, images)
        reason: str | None = "packed is False"
        if packed and images:
            reason = "a prompt's images are read in each of its rows"
        elif packed and self.args.neftune_noise_alpha:
            reason = "neftune_noise_alpha: transformers makes its noise the weaker, the longer a row is"
        elif packed:
            with self.accelerator.autocast():
                reason = attention.pack_rows(models, self.sequence_group)
        if reason and self.sequence_group is not None:
            raise ValueError(
                f"parallelism_config: got sp_size={self.sequence_ranks}, takes rows that can be packed: {reason}"
            )
        self.add_callback(OrderOfEpoch())  # type: ignore[attr-defined]
        if not packed:
            return
        self.packed = reason is None
        self.accelerator.print(
            f"rows: packed, attention by {', '.join(sorted(attention.ran))}"
            if self.packed
            else f"rows: padded. {reason}",
            flush=True,
        )

    def _check_data(self, models: Sequence[nn.Module], images: bool) -> None:
        max_length = getattr(self.args, "max_length", None)
        sets = named_sets(self.train_dataset, "train_dataset") | named_sets(self.eval_dataset, "eval_dataset")
        for name, dataset in sets.items():
            pairs = getattr(dataset, "pairs", dataset)
            size = self.args.train_batch_size if name == "train_dataset" else self.args.eval_batch_size
            self._check_set(pairs, name, size, max_length)
            tokenised = hasattr(pairs, "with_format") and set(COLUMNS) <= set(pairs.column_names or ())
            for model in models:
                if tokenised and not images:
                    check_fits(pairs, model, name, max_length)
                if self.max_tokens is not None and pairs is not None:
                    check_rows_alone(pairs if tokenised else None, model, name, "max_tokens_per_batch", max_length)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        check_resume(self, resume_from_checkpoint)
        self._check_weights()
        self._say_memory()
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        if not isinstance(eval_dataset, str):  # the name of one that the trainer has
            self._check_given(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]

    def predict(self, test_dataset, *args, **kwargs):
        self._check_given(test_dataset, "test_dataset")
        return super().predict(test_dataset, *args, **kwargs)  # type: ignore[misc]

    def _check_given(self, given: Any, argument: str) -> None:
        for name, one in named_sets(given, argument).items():
            self._check_set(getattr(one, "pairs", one), name, self.args.eval_batch_size)

    def _check_set(self, pairs: Any, name: str, batch_size: int, max_length: int | None = None) -> None:
        check_whole(pairs, name, self.data_ranks)
        check_any(pairs, name, max_length)
        if self.args.dataloader_drop_last and hasattr(pairs, "__len__"):
            check_kept(len(pairs), name, batch_size, self.data_ranks)

    def _check_weights(self) -> None:
        """Says what 16 bits of a weight keep of its steps.

        Raises:
            ValueError: weights in float16 train.
        """
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and self.accelerator.mixed_precision != "no"):
            return  # which step in float32
        dtypes = {p.dtype for p in self._models[0].parameters() if p.requires_grad}
        if torch.float16 in dtypes:
            raise ValueError(
                "model: got weights in float16 that train, takes float32, under fp16=True, or bfloat16: AdamW "
                "keeps squares of gradients in the weights' dtype, where those of gradients below 2e-4 are 0, and "
                "divides by them"
            )
        if torch.bfloat16 in dtypes:
            self.accelerator.print(
                f"weights: in bfloat16, which keeps 8 bits: a step of learning_rate={self.args.learning_rate:g} is "
                f"lost in weights above {256 * self.args.learning_rate:.1g}. In float32, under bf16=True, none is",
                flush=True,
            )  # fmt: skip

    def _say_memory(self) -> None:
        """Prints what the run expects to need and, on CUDA, what is there."""
        policy, *reference = self._models
        data = getattr(self.train_dataset, "pairs", self.train_dataset)
        known = hasattr(data, "__len__") and set(COLUMNS) <= set(getattr(data, "column_names", COLUMNS))
        # What DeepSpeed casts, copies, buffers and offloads is its own.
        if not known or self.is_deepspeed_enabled or causal_lm(policy).device.type == "meta":
            return
        tokens, scored = self._rows_of_pairs(data)
        longest = tokens.topk(min(self.args.per_device_train_batch_size, len(tokens)))
        total = int(longest.values.sum())
        if self.max_tokens:
            total = min(total, max(self.max_tokens, int(longest.values[0])))
        most_scored = min(total, int(scored.topk(len(longest.values)).values.sum()))
        shards = self.accelerator.num_processes if self.is_fsdp_enabled else 1
        by_fsdp = self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.activation_checkpointing
        try:
            with self.accelerator.autocast():
                expected: Any = expected_memory(
                    policy, reference[0] if reference else None, tokens=-(-total // self.sequence_ranks),
                    scored=-(-most_scored // self.sequence_ranks), optimizer=OptimizerNames(self.args.optim).value,
                    packed=self.packed, checkpointing=self.args.gradient_checkpointing or by_fsdp, shards=shards,
                )  # fmt: skip
        except Exception as error:  # it is only said; the run may well do what its measurement cannot
            expected = f"memory: not foreseen ({type(error).__name__}: {error})"
        text = f"{expected}; the longest micro-batch has at most {total:,} tokens"
        if self.accelerator.device.type == "cuda":
            free, there = torch.cuda.mem_get_info(self.accelerator.device)
            text += f". {self.accelerator.device} has {there / GIB:.2f} GiB, {free / GIB:.2f} of them free"
        self.accelerator.print(text, flush=True)

    def dealt(self, sampler: Any, dataset: Any) -> Any:
        """The sampler with an optimizer step's pairs dealt by tokens, where rows are packed."""
        if not self.packed or self.by_batch or not set(COLUMNS) <= set(getattr(dataset, "column_names", COLUMNS)):
            return sampler
        tokens, _ = self._rows_of_pairs(dataset)
        batches = self.data_ranks * self.args.gradient_accumulation_steps
        return DealtSampler(sampler, tokens.tolist(), self.args.train_batch_size, batches)

    def _rows_of_pairs(self, dataset: Any) -> tuple[Tensor, Tensor]:
        """:func:`rows_of_pairs` as a collator will cut them that has max_length to see to."""
        max_length = getattr(self.args, "max_length", None)
        mode = getattr(self.args, "truncation_mode", "keep_start")
        return rows_of_pairs(pair_lengths(dataset), self.packed, max_length, mode)

    def lay_out(self, batches: list[dict[str, Any]]) -> None:
        """Packs the batches of an optimizer step, and cuts those of more than max_tokens; one read of them by the host.

        Every rank cuts as often as the one with the most to cut, because FSDP's ranks gather parameters together.
        """
        cut = [list(self._parts(batch)) for batch in batches]
        if self.max_tokens and self.accelerator.num_processes > 1:
            counts = torch.tensor([list(map(len, cut))], device=self.accelerator.device)
            most = self.accelerator.gather(counts).amax(0).tolist()
            for batch, parts, count in zip(batches, cut, most, strict=True):
                parts += [self._packed(self.blank_of(batch)) for _ in range(count - len(parts))]
        for batch, parts in zip(batches, cut, strict=True):
            batch["parts"] = parts

    def packing_of(self, batch: dict[str, Any]) -> Packing | None:
        """The packed row of a batch or part, or None where rows are padded."""
        return batch["packing"] if "packing" in batch else self._packed(batch)["packing"]

    def training_step(self, model, inputs, num_items_in_batch=None):
        *others, last = inputs.pop("parts")
        state, loss = self.accelerator.gradient_state, 0.0
        sync = state.sync_gradients
        for one in others:
            # Gradients are reduced with the last part.
            state._set_sync_gradients(False)
            with self.accelerator.no_sync(model):
                loss += super().training_step(model, self._counted(one), num_items_in_batch)  # type: ignore[misc]
        state._set_sync_gradients(sync)
        loss += super().training_step(model, self._counted(last), num_items_in_batch)  # type: ignore[misc]
        # Of ranks that share rows each has the whole of their loss, and transformers logs the mean over ranks.
        return loss / self.sequence_ranks

    @torch.no_grad()
    def loss_of(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """() the mean loss of a batch's pairs, outside of training, in such parts as training would make of it."""
        self.lay_out([batch])
        parts = batch.pop("parts")
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            losses = torch.stack([self.compute_loss(model, one) for one in parts])  # type: ignore[attr-defined]
        pairs = [(self.labels_of(one) != IGNORE).any(1).view(2, -1).all(0).sum() for one in parts]
        scored = torch.stack(pairs)
        return (losses * scored).sum() / scored.sum().clamp(min=1)

    def _finalize_training(self, *args, **kwargs):
        # transformers takes this rank's own for the mean since the last line of the log.
        self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")
        return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self, *args, **kwargs):
        self._clock = self._clock or time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        check_gradient(norm, self)
        return norm

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        start = time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        if self._clock:  # tokens per second are those of steps
            self._clock += time.perf_counter() - start

    def log(self, logs, start_time=None):
        if "loss" in logs and self._clock:
            tokens, padded = self.count_once(torch.tensor(self._ran, device=self.accelerator.device)).tolist()
            logs["tokens"], logs["padding_saved"] = tokens, 1 - tokens / max(padded, 1)
            logs["tokens_per_second"] = tokens / (time.perf_counter() - self._clock)
            # The clock starts again with the next batches.
            self._ran, self._clock = (0, 0), None
        super().log(logs, start_time)  # type: ignore[misc]

    def _parts(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        whole = self._packed(batch)
        width = 2 * batch["input_ids"].shape[1]
        pairs = len(batch["input_ids"]) // 2
        tokens = [sum(n) for n in whole["packing"].segments.lengths] if self.packed else [width] * pairs
        first, total = 0, 0
        for i, n in enumerate(tokens):
            if self.max_tokens and i > first and total + n > self.max_tokens:
                yield self._packed(part(batch, first, i))
                first, total = i, 0
            total += n
        yield self._packed(part(batch, first, pairs)) if first else whole

    def _packed(self, batch: dict[str, Any]) -> dict[str, Any]:
        packing = None
        if self.packed:
            device = batch["input_ids"].device
            packing = pack(batch["input_ids"], batch["attention_mask"], self.labels_of(batch))
            if self.sequence_group is not None:
                packing = share(packing, self.sequence_group, device)
            packing = to(packing, device)
        return batch | {"packing": packing}

    def _counted(self, one: dict[str, Any]) -> dict[str, Any]:
        padded = one["input_ids"].numel()
        own = padded if one["packing"] is None else one["packing"].segments.tokens
        self._ran = self._ran[0] + own, self._ran[1] + padded
        return one


class OrderOfEpoch(TrainerCallback):
    """Tells the sampler which epoch begins, where a resumed run skips into it.

    transformers tells the loader that skips, which does not reach a sampler that several ranks share.
    """

    def on_epoch_begin(self, args, state, control, **kwargs):
        kwargs["train_dataloader"].set_epoch(int(state.epoch or 0))


class SeededSampler(Sampler[int]):
    """Another sampler's order, drawn by seed and epoch alone, so that all ranks and a resumed run agree on it.

    Args:
        sampler: draws from its ``generator``.
    """

    def __init__(self, sampler: Any, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0
        sampler.generator = torch.Generator(torch.get_default_device())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.seed + self.epoch)
        yield from self.sampler


class DealtSampler(Sampler[int]):
    """Another sampler's pairs, those of an optimizer step dealt so that its batches have about equal tokens.

    Batches that ranks run at the same time are next to each other, and the most alike.

    Args:
        sampler: gives pairs in an order that all ranks agree on.
        tokens: of each pair; a pair past the end has none.
        batch_size: pairs a batch.
        batches: of all ranks in an optimizer step.
    """

    def __init__(self, sampler: Any, tokens: Sequence[int], batch_size: int, batches: int):
        self.sampler, self.tokens, self.batch_size, self.batches = sampler, tokens, batch_size, batches

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        window = []
        for pair in self.sampler:
            window.append(pair)
            if len(window) == self.batch_size * self.batches:
                yield from deal(window, self._tokens, self.batch_size)
                window = []
        yield from deal(window, self._tokens, self.batch_size)

    def _tokens(self, pair: int) -> int:
        return self.tokens[pair] if pair < len(self.tokens) else 0


def deal(pairs: list[int], tokens: Callable[[int], int], batch_size: int) -> list[int]:
    """The pairs in batches of about equal tokens, heaviest first; a short batch stays the last.

    The longest pair goes first, each to the lightest batch that has room.
    """
    full, rest = divmod(len(pairs), batch_size)
    room = [batch_size] * full + [rest] * (rest > 0)
    batches: list[list[int]] = [[] for _ in room]
    light = [(0, i) for i in range(len(room))]
    for pair in sorted(pairs, key=tokens, reverse=True):
        total, i = heapq.heappop(light)
        batches[i].append(pair)
        if len(batches[i]) < room[i]:
            heapq.heappush(light, (total + tokens(pair), i))
    short = batches.pop() if rest else []
    batches.sort(key=lambda batch: sum(map(tokens, batch)), reverse=True)
    return [pair for batch in [*batches, short] for pair in batch]


def check_fits(dataset: Any, model: nn.Module, name: str, max_length: int | None = None) -> None:
    """Raises ValueError where pairs have ids or positions that a model has no place for.

    Args:
        dataset: a datasets.Dataset with token ids.
        name: what errors call it.
        max_length: to which rows are cut later, if they are.
    """
    inner = causal_lm(model)
    if not len(dataset):
        return
    lengths, largest = pair_lengths(dataset), -1
    for table in dataset.select_columns(list(COLUMNS)).with_format("arrow").iter(4096):
        found = (pc.max(pc.list_flatten(table[column])).as_py() for column in COLUMNS)
        largest = max([largest, *(one for one in found if one is not None)])
    words = whole_shape(lm_head(inner).weight)[0]
    if largest >= words:
        raise ValueError(
            f"{name}: got the token id {largest}, takes ids below {words}, the vocabulary of {type(inner).__name__}. "
            "Resize its embeddings to its tokenizer, or take the tokenizer that it was trained with"
        )
    longest, places = _longest(lengths, max_length), positions(model)
    if places is not None and longest > places:
        virtual = virtual_tokens(model)
        raise ValueError(
            f"{name}: got rows of {longest} tokens, takes up to {places}, the positions of {type(inner).__name__}"
            + (f" beside {virtual} virtual tokens" if virtual else "")
            + f". Set max_length to {places}, or take a model of more"
        )


def check_rows_alone(dataset: Any, model: nn.Module, name: str, argument: str, max_length: int | None = None) -> None:
    """Raises ValueError where an argument puts rows into other batches, and a row's positions go by those beside it.

    Args:
        dataset: a datasets.Dataset with token ids; None where no row's length is known before.
        name: what errors call it.
        max_length: to which rows are cut later, if they are.
    """
    inner = causal_lm(model)
    if (limit := rows_alone_up_to(inner)) is None:
        return
    longest = max_length
    if dataset is not None:
        longest = _longest(pair_lengths(dataset), max_length) if len(dataset) else 0
    if longest is None or longest > limit:
        raise ValueError(
            f"{argument}: got rows of {longest or 'any number of'} tokens in {name}, takes up to {limit} with "
            f"{type(inner).__name__}, whose rotary positions go by the longest row of a batch beyond: log-probs would "
            f"depend on how pairs are put together. Leave {argument} out, or set max_length to {limit}"
        )


def _longest(lengths: Tensor, max_length: int | None) -> int:
    longest = int((lengths[:, 0] + lengths[:, 1:].amax(1)).max())
    return min(longest, max_length or longest)


def named_sets(given: Any, argument: str) -> dict[str, Any]:
    """Data sets, or None, by what errors call them: one under its argument, several with their names too."""
    if isinstance(given, dict):
        return {f"{argument}[{name!r}]": one for name, one in given.items()}
    return {argument: given}


def check_any(dataset: Any, name: str, max_length: int | None = None) -> None:
    """Raises ValueError where a data set, if it is given, has no pair, also a stream's first.

    Args:
        name: what the error calls it.
        max_length: what may have dropped all of them.
    """
    if dataset is None or (len(dataset) if hasattr(dataset, "__len__") else next(iter(dataset), None) is not None):
        return
    left = "" if max_length is None else f" that max_length={max_length} leaves a completion"
    raise ValueError(f"{name}: got no pair{left}, takes at least one")


def check_whole(dataset: Any, name: str, ranks: int) -> None:
    """Raises ValueError where a stream was split over ranks before the trainer does so, which would leave pairs out."""
    if ranks > 1 and getattr(dataset, "_distributed", None) is not None:
        raise ValueError(
            f"{name}: got a stream that split_dataset_by_node has split, takes a whole one: every rank is given its "
            "own pairs here"
        )


def check_kept(pairs: int, name: str, batch_size: int, ranks: int) -> None:
    """Raises ValueError where a data set is less than a batch on every rank, and dataloader_drop_last would drop it."""
    if pairs < batch_size * ranks:
        raise ValueError(
            f"dataloader_drop_last: got True with {pairs} pairs in {name}, of which nothing would be left: takes at "
            f"least {batch_size * ranks}, a batch of {batch_size}" + (f" on each of {ranks} ranks" if ranks > 1 else "")
        )


def rows_of_pairs(lengths: Tensor, packed: bool, max_length: int | None, mode: str) -> tuple[Tensor, Tensor]:
    """(pairs,) tokens of each pair's rows, and how many of them are scored; both at most.

    Padded rows are counted as long as the longest of all.

    Args:
        lengths: (pairs, 3), as :func:`pair_lengths` gives them.
        max_length: tokens that each of a pair's two rows is cut to, later; None where it is not.
        mode: TRL's word for what is kept of it.
    """
    prompts, answers = lengths[:, 0], lengths[:, 1:]
    rows = prompts[:, None] + answers
    if max_length is not None:
        cut = (rows - max_length).clamp(min=0)
        rows = rows - cut
        if mode == "keep_start":
            answers = (answers - cut).clamp(min=0)
        else:  # rows that begin at different places share no prompt
            answers, prompts = torch.minimum(answers, rows), prompts * (cut == 0).all(1)
    tokens = rows.sum(1) - prompts if packed else (2 * rows.amax()).expand(len(rows))
    return tokens, answers.sum(1)


def pair_lengths(dataset: Any) -> Tensor:
    """(pairs, 3) tokens of prompt, chosen and rejected of every pair of a data set."""
    if hasattr(dataset, "with_format"):  # a datasets.Dataset, whose rows would be slow to read one by one
        columns: list[list[Tensor]] = [[], [], []]
        for table in dataset.select_columns(list(COLUMNS)).with_format("arrow").iter(4096):
            for column, name in zip(columns, COLUMNS, strict=True):
                column.append(torch.from_numpy(pc.list_value_length(table[name]).to_numpy().copy()))
        return torch.stack([torch.cat(column) for column in columns], 1).long()
    return torch.tensor([[len(pair[name]) for name in COLUMNS] for pair in dataset])
