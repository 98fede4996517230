"""Attention over a packed row of pairs, through transformers' interface for attention functions.

A model keeps its code. Its layers are given :class:`Segments` as the keyword ``segments``, and call

    CUDA, 16 bit            one variable-length flash call: torch's own, or flash-attn where it takes more (softcaps)
    CUDA, what that lacks   FlexAttention with a block mask that is made from the segments
    elsewhere               scaled_dot_product_attention by segment

None makes a mask over the whole row. Calls without segments are what they were before. Private in transformers, all of
it here: ``_flash_attention_forward``, ``_attn_implementation``, ``_supports_sdpa``, ``_can_set_attn_implementation``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from . import sequence
from .packing import IGNORE, Packing, Segments, pack, to
from .sharding import gathers_itself
from .transformers import causal_lm, evaluating, head_inputs, virtual_tokens

# torch 2.11 takes as many heads of keys and values as of queries.
GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters
PREFIX = "packed-"
ran: set[str] = set()  # the functions that have run, for the log
BLOCK = 128  # tokens, of FlexAttention's block masks
# What a configuration says of attention that is not the attention function's alone. The rows of the check below are too
# short to show it.
OWN_ATTENTION = {
    "index_topk": "its layers pick the tokens that they attend to, by a mask of their own",
    "keep_window_size": "its layers pick the tokens that they attend to, by a mask of their own",
    "attn_temperature_tuning": "its attention's temperature goes by a token's place in the row",
}


def pack_rows(models: Iterable[nn.Module], group: ProcessGroup | None = None) -> str | None:
    """Prepares models for packed rows, if all of them compute on a packed row what they compute on padded ones.

    One small batch is run in each layout, and each of its rows alone, which says what rounding is. Where a model
    differs by more, or can't run, all are left as they were. To be called before models are wrapped, by all ranks.

    Args:
        models: causal language models, within PEFT or not; policy and reference.
        group: whose ranks will share a row's tokens, which is then run too.

    Returns:
        None where packed rows may be used, else the reason why not.
    """
    models = list(models)
    if any(map(virtual_tokens, models)):
        return "prompt learning puts virtual tokens before every row's own"
    inner = [causal_lm(model) for model in models]
    for model in inner:
        for name, why in OWN_ATTENTION.items():
            if getattr(model.config.get_text_config(), name, None):
                return f"{type(model).__name__} has {name}: {why}"
    before = [model.config._attn_implementation for model in inner]
    reason, everywhere = None, group is None or "meta" not in _of_all_ranks(inner[0].device.type)
    for model in inner:
        # What a model of any kind may raise when its row is not what it expects is not ours to foresee.
        try:
            take_segments(model)
            if gathers_itself(model):
                # Around its own call only: what holds of the policy holds of its like.
                reason = None if _alike(model, inner[0]) else "the reference is sharded, and not of the policy's kind"
            elif model.device.type != "meta":  # where FSDP's loading leaves the weights to the first rank
                reason = _difference(model, group if everywhere else None)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            break
    reason = next(filter(None, _of_all_ranks(reason)), None)
    if reason:
        for model, name in zip(inner, before, strict=True):
            if model.config._attn_implementation != name:
                model.set_attn_implementation(name)
    return reason


def _of_all_ranks(value: Any) -> list[Any]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _alike(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models differ in nothing but their weights."""
    own, others = one.config.to_dict(), other.config.to_dict()
    return all(own[name] == others.get(name) for name in own if name not in ("_name_or_path", "use_cache", "dtype"))


def _difference(model: PreTrainedModel, group: ProcessGroup | None) -> str | None:
    """Says in what the hidden states of a packed row, or of this rank's share of it, are not those of padded rows."""
    vocabulary = model.config.get_text_config().vocab_size
    # Hard cases: one token, the same first tokens of both answers, prompts longer than a window (of 4, below).
    lengths, rows, scored = [(1, 1, 3), (4, 2, 1), (7, 5, 9), (12, 4, 5)], [], []
    for side in (1, 2):
        for pair, length in enumerate(lengths):
            prompt, answer = torch.arange(length[0]) + 31 * pair, torch.arange(length[side]) * (2 * side + 1) + 5
            rows.append((torch.cat((prompt, answer)) * 7 + 1) % vocabulary)
            scored.append(torch.cat((torch.full_like(prompt[1:], IGNORE), answer, torch.tensor([IGNORE]))))
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
    ids = pad_sequence(rows, batch_first=True).to(model.device)
    labels = pad_sequence(scored, batch_first=True, padding_value=IGNORE).to(model.device)
    row = pack(ids, mask, labels)
    packing = to(row, model.device)
    with evaluating(model), _windows_of(model, 4):
        with _embeddings(model) as embeddings:
            packed = head_inputs(model, ids, packing).hidden
        strangers = _strangers(packing, packed, embeddings[0])
        with torch.no_grad():
            padded = head_inputs(model, ids, mask).hidden[labels != IGNORE]
            shared = _run_share(model, row, packed, group)
            alone = []
            for row_ids, real, own in zip(ids, mask.bool(), labels, strict=True):
                states = head_inputs(model, row_ids[real][None], torch.ones_like(row_ids[real])[None]).hidden
                alone.append(states[0, own[real] != IGNORE])
    # How each of them differs from rows alone, in units of a token's length; the padded one's is rounding.
    exact = torch.cat(alone).float()
    errors = [((a.float() - exact).norm(dim=1) / exact.norm(dim=1)).max().item() for a in (packed, padded, shared)]
    allowed = min(4 * torch.finfo(packed.dtype).eps + 4 * errors[1], 0.1)
    if strangers:
        return f"the layers of {type(model).__name__} carry something along a row, from one answer to the next"
    if not errors[0] <= allowed:
        return (
            f"the hidden states of {type(model).__name__} in a packed row are off by {errors[0]:.2g} of their length, "
            f"where {allowed:.2g} is rounding"
        )
    if not errors[2] <= allowed:
        return (
            f"with a row's tokens on several ranks, the hidden states of {type(model).__name__} are off by "
            f"{errors[2]:.2g} of their length, where {allowed:.2g} is rounding"
        )
    return None


def _run_share(model: PreTrainedModel, row: Packing, packed: Tensor, group: ProcessGroup | None) -> Tensor:
    """The packed row's hidden states, those of this rank's tokens from a run with them alone."""
    if group is None:
        return packed
    share = sequence.share(row, group, model.device)
    own = head_inputs(model, share.input_ids, to(share, model.device)).hidden
    return packed.detach().index_copy(0, share.own.to(own.device), own)


def _strangers(packing: Packing, hidden: Tensor, embeddings: Tensor) -> bool:
    """Whether a completion's states depend on tokens that are not its own: exact in any dtype, by gradients."""
    bounds, start = packing.cu_seqlens.tolist(), 0
    pairs = len(packing.segments.lengths)
    for i, (p, c, r) in enumerate(packing.segments.lengths):
        place = torch.arange(start, start + p + c + r)
        for j, own in ((i, place[: p + c]), (pairs + i, torch.cat((place[:p], place[p + c :])))):
            (gradient,) = torch.autograd.grad(hidden[bounds[j] : bounds[j + 1]].sum(), embeddings, retain_graph=True)
            moved = gradient[0].ne(0).any(1)
            moved[own.to(moved.device)] = False
            if moved.any():
                return True
        start += p + c + r
    return False


@contextlib.contextmanager
def _embeddings(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects what the model embeds, as leaves of its graph."""
    found = []

    def keep(module, args, output):
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def _windows_of(model: PreTrainedModel, size: int) -> Iterator[None]:
    """Shrinks windows, so that a short row tells whether the attention knows of them."""
    places = [
        (owner, name, getattr(owner, name))
        for owner in (model.config.get_text_config(), *model.modules())
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(getattr(owner, name, None), int)
    ]
    try:
        for owner, name, value in places:
            setattr(owner, name, min(size, value))
        yield
    finally:
        for owner, name, value in places:
            setattr(owner, name, value)


def take_segments(model: PreTrainedModel) -> None:
    """Sets the model's attention to one that takes ``segments``, and without them is what it was.

    Raises:
        ValueError: the model's layers do not call transformers' attention interface.
    """
    name = model.config._attn_implementation
    if name.startswith(PREFIX):
        return
    # Flash and flex of a model's own choice serve other calls than training's: sdpa does as well there.
    plain = name if name in ("sdpa", "eager") else "sdpa" if model._supports_sdpa else "eager"
    AttentionInterface.register(PREFIX + plain, functools.partial(packed_attention, plain))
    AttentionMaskInterface.register(PREFIX + plain, ALL_MASK_ATTENTION_FUNCTIONS[plain])
    if model._can_set_attn_implementation():
        model.set_attn_implementation(PREFIX + plain)
    if model.config._attn_implementation != PREFIX + plain:
        raise ValueError(f"the layers of {type(model).__name__} do not call transformers' attention interface")


@torch.compiler.disable  # by segment, lengths are Python's numbers: a graph of its own would be compiled for each batch
def packed_attention(
    plain: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' call of an attention function; query (1, heads, N, D), key and value (1, KV heads, N, D).

    Raises:
        ValueError: a packed row came without its segments, or with a bias that they do not know.
    """
    if segments is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and query.shape[2] > 1:
            raise ValueError(f"{type(module).__name__} was given a packed row without its segments")
        return _plain_attention(plain, module)(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None or kwargs.get("is_causal") is False:
        raise ValueError(f"the attention of {type(module).__name__} is not causal, or biased by position")
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        # Rotary positions in fp32 leave queries and keys in it; fused attention is autocast's to cast.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    options = {name: kwargs.get(name) for name in ("scaling", "sliding_window", "softcap", "s_aux")}
    if (group := segments.group) is not None:
        query, key, value = sequence.all_tokens((query, key, value), group, segments.tokens)
        if options["s_aux"] is not None:
            options["s_aux"] = sequence.own_heads(options["s_aux"], group)
    name = backend(query, value, kwargs.get("dropout", 0.0), options["softcap"], options["s_aux"])
    ran.add(name)
    out = globals()[name](module, query, key, value, segments, dropout=kwargs.get("dropout", 0.0), **options)
    return (out if group is None else sequence.all_heads(out, group)), None


def backend(query: Tensor, value: Tensor, dropout: float, softcap: float | None, s_aux: Tensor | None) -> str:
    """Name of the function below that runs a call: by device, dtype and what the model asks for."""
    if query.device.type != "cuda":
        return "by_segment"
    flash = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256 and not torch.version.hip
    if flash and query.shape[-1] == value.shape[-1] and not dropout and softcap is None and s_aux is None:
        if torch.cuda.get_device_capability(query.device) >= (8, 0):
            return "torch_varlen"
    if flash and is_flash_attn_2_available() and s_aux is None:
        return "flash_varlen"
    # FlexAttention has no dropout.
    return "by_segment" if dropout else "flex"


def torch_varlen(module, query, key, value, segments, *, scaling, sliding_window, **_) -> Tensor:
    """One call of torch.nn.attention.varlen.varlen_attn, (1, N, heads, D)."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    window = -1 if sliding_window is None else sliding_window - 1  # keys before a query's own
    k, v, groups = k[segments.keys], v[segments.keys], q.shape[1] // k.shape[1]
    grouped: dict[str, Any] = {"enable_gqa": groups > 1} if GROUPED else {}
    if groups > 1 and not GROUPED:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    out: Any = varlen_attn(
        q.contiguous(), k, v, segments.cu_queries, segments.cu_keys, segments.max_queries, segments.max_keys,
        scale=scaling, window_size=(window, 0), **grouped,
    )  # fmt: skip
    return out[None]


def flash_varlen(module, query, key, value, segments, *, scaling, sliding_window, softcap, dropout, s_aux) -> Tensor:
    """One call of flash-attn, (1, N, heads, D), by transformers' own wrapper of it."""
    width = value.shape[-1]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    v = nn.functional.pad(v, (0, q.shape[-1] - width))
    out = _flash_attention_forward(
        q, k[:, segments.keys], v[:, segments.keys], None, q.shape[1], is_causal=True, dropout=dropout,
        softmax_scale=scaling, sliding_window=sliding_window, softcap=softcap, cu_seq_lens_q=segments.cu_queries,
        cu_seq_lens_k=segments.cu_keys, max_length_q=segments.max_queries, max_length_k=segments.max_keys,
        attn_implementation="flash_attention_2",
    )  # fmt: skip
    return out[..., :width]


def flex(module, query, key, value, segments, *, scaling, sliding_window, softcap, dropout, s_aux) -> Tensor:
    """FlexAttention, (1, N, heads, D), by transformers' own wrapper of it."""
    mask = block_mask(segments.lengths, sliding_window, query.device)
    return flex_attention_forward(module, query, key, value, mask, scaling=scaling, softcap=softcap, s_aux=s_aux)[0]


@functools.lru_cache(maxsize=4)  # of a micro-batch, for all its layers: with windows and without
def block_mask(lengths: tuple[tuple[int, int, int], ...], window: int | None, device: torch.device) -> BlockMask:
    """The mask of a packed row of N tokens, made in blocks: O(N) numbers and (N / 128)² flags.

    A query sees [first, shared) of the row, its prompt, and [own, itself], its segment, both within the window.
    """
    columns, start = [], 0
    for p, c, r in lengths:
        columns += [(start, start, start, start)] * p + [(start, start + p, start + p, start + p)] * c
        # Places of a rejected completion are c ahead of their positions.
        columns += [(start, start + p, start + p + c, start + p)] * r
        start += p + c + r
    n, blocks = start, -(-start // BLOCK)
    first, shared, own, begin = torch.tensor(columns).T
    place = torch.arange(n)
    position = place - own + begin
    # Blocks that some query of a block may look into: flags of ranges, up at the first block and down past the last.
    touched = torch.zeros(blocks, blocks + 1, dtype=torch.int32)
    reach = n if window is None else window
    for low, high in (
        (torch.maximum(first, position - reach + 1), shared),
        (torch.maximum(own, place - reach + 1), place + 1),
    ):
        some = (low < high).to(torch.int32)
        touched.index_put_((place // BLOCK, low.clamp_max(n - 1) // BLOCK), some, accumulate=True)
        touched.index_put_((place // BLOCK, (high - 1).clamp_min(0) // BLOCK + 1), -some, accumulate=True)
    visible = touched.cumsum(1)[:, :-1] > 0
    count = visible.sum(1).to(torch.int32)
    order = visible.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    first, shared, own, position = (t.to(device) for t in (first, shared, own, position))

    def sees(batch, head, q, kv):
        within = ((kv >= first[q]) & (kv < shared[q])) | ((kv >= own[q]) & (kv <= q))
        return within if window is None else within & (position[q] - position[kv] < window)

    return BlockMask.from_kv_blocks(
        count.to(device)[None, None], order.to(device)[None, None], BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(n, n)
    )


def by_segment(module, query, key, value, segments, *, scaling, sliding_window, softcap, dropout, s_aux) -> Tensor:
    """A call of scaled_dot_product_attention for [P C] and one for [R] of each pair, (1, N, heads, D)."""
    if softcap is None and s_aux is None:
        attend = functools.partial(_fused, scaling=scaling, dropout=dropout)
    else:
        attend = functools.partial(_explicit, scaling=scaling, dropout=dropout, softcap=softcap, sinks=s_aux)
    # split, whose backward joins the parts, where the backward of slices would add up rows of zeros
    queries = [n for p, c, r in segments.lengths for n in (p + c, r)]
    parts: list[Any] = list(zip(*(t.split(queries, 2) for t in (query, key, value)), strict=True))
    out = []
    for (p, c, r), chosen, rejected in zip(segments.lengths, parts[::2], parts[1::2], strict=True):
        if p + c:
            q, k, v = chosen
            out.append(_causal(q, k, v, sliding_window, attend))
        if r and p < r:
            # Shorter than masked out: the prompt's queries once more, so that queries and keys are the same.
            q, k, v = (torch.cat((a[:, :, :p], b), 2) for a, b in zip(chosen, rejected, strict=True))
            out.append(_causal(q, k, v, sliding_window, attend)[:, :, p:])
        elif r:
            k, v = (torch.cat((a[:, :, :p], b), 2) for a, b in zip(chosen[1:], rejected[1:], strict=True))
            out.append(_causal(rejected[0], k, v, sliding_window, attend))
    return torch.cat(out, 2).transpose(1, 2).contiguous()


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int | None, attend: Callable[..., Tensor]) -> Tensor:
    """Causal to the lower right; a window in stretches of queries, so that work and memory grow with the window."""
    n, m = query.shape[2], key.shape[2]
    if window is None or window >= m:
        return attend(query, key, value, None)
    out = []
    for start in range(0, n, max(window, BLOCK)):
        end = min(start + max(window, BLOCK), n)
        last = m - n + end
        first = max(0, last - (end - start) - window + 1)
        out.append(attend(query[:, :, start:end], key[:, :, first:last], value[:, :, first:last], window))
    return torch.cat(out, 2)


def _fused(query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling, dropout) -> Tensor:
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    n, m = query.shape[2], key.shape[2]
    if n == m and window is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    mask = _reversed_mask(n, m, window, query)
    return scaled_dot_product_attention(query.flip(2), key, value, attn_mask=mask, **options).flip(2)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling, dropout, softcap, sinks
) -> Tensor:
    """With scores in memory, for what the fused kernels have not: a softcap, and a learned sink of each head."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + _reversed_mask(query.shape[2], key.shape[2], window, query).flip(0)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), 3)
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(query.dtype)
    return nn.functional.dropout(weights[..., : key.shape[2]], dropout) @ value


def _reversed_mask(n: int, m: int, window: int | None, like: Tensor) -> Tensor:
    """(n, m) numbers to add to the scores of m keys and n queries, the queries from the last to the first.

    What a query sees of a key is a matter of their distance alone. With the queries reversed, entries of equal distance
    lie at equal i + j, so the mask is a view of n + m − 1 numbers.
    """
    before = m - 1 - torch.arange(n + m - 1, device=like.device)  # keys between a query and a key, itself being 0
    seen = (before >= 0) if window is None else (before >= 0) & (before < window)
    line = torch.zeros(n + m - 1, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)
    mask = line.as_strided((n, m), (1, 1))
    return mask if like.device.type == "cpu" else mask.contiguous()  # GPU kernels want rows that are aligned


def _plain_attention(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    # FSDP2 gives a module a class of its own, in a module of its own.
    modules = [sys.modules[cls.__module__] for cls in type(module).__mro__]
    return next(m.eager_attention_forward for m in modules if hasattr(m, "eager_attention_forward"))
