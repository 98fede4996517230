"""Packed rows: a pair's prompt once and no padding give what padded rows give, or the run says why not."""

import contextlib
import dataclasses

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")

from epsdpo_kernels import linear_epsilon_dpo  # noqa: E402
from epsdpo_kernels.integrations import attention, packing  # noqa: E402
from epsdpo_kernels.integrations.attention import pack_rows, take_segments  # noqa: E402
from epsdpo_kernels.integrations.packing import pack  # noqa: E402
from epsdpo_kernels.integrations.transformers import head_inputs  # noqa: E402
from test_models import MODELS, SMALL, build  # noqa: E402

CARRIES_STATE = {"FalconH1"}
# (prompt, chosen, rejected) tokens: one-token prompts and answers, and prompts longer than Mistral's window of 4
LENGTHS = [(1, 1, 5), (7, 3, 1), (2, 6, 4), (9, 1, 2), (5, 9, 7)]


def padded(lengths, padding=3, seed=1):
    """input_ids, attention_mask, labels; both answers of a pair begin with the same token."""
    g = torch.Generator().manual_seed(seed)
    width = max(p + max(c, r) for p, c, r in lengths) + padding
    ids, mask = torch.zeros(2 * len(lengths), width, dtype=torch.int64), torch.zeros(2 * len(lengths), width)
    labels = torch.full_like(ids, -100)
    for i, (p, *answers) in enumerate(lengths):
        shared = torch.randint(2, 97, (p + 1,), generator=g)
        for row, n in zip((i, len(lengths) + i), answers, strict=True):
            tokens = torch.cat((shared, torch.randint(2, 97, (n - 1,), generator=g)))
            ids[row, : p + n], mask[row, : p + n] = tokens, 1
            labels[row, p - 1 : p + n - 1] = tokens[p:]
    return ids, mask.long(), labels


def shifted(model):
    """A reference a little away from the policy, so that pairs have something to decide."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.dtype))
    return model


@contextlib.contextmanager
def all_float64():
    """Models round norms and softmax to fp32 whatever their dtype; here they are float64 throughout."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float", "float32"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def loss_and_gradients(policy, reference, ids, mask, labels, packed: bool):
    layout = pack(ids, mask, labels) if packed else mask
    with all_float64() if policy.dtype == torch.float64 else contextlib.nullcontext():
        ours = head_inputs(policy, ids, layout)
        with torch.no_grad():
            ref = head_inputs(reference, ids, layout)
    labels, bounds = (layout.labels, layout.cu_seqlens) if packed else (labels, None)
    out = linear_epsilon_dpo(
        ours.hidden, ours.weight, labels, ref.hidden, ref.weight, bias=ours.bias, ref_bias=ref.bias,
        logit_scale=ours.logit_scale, softcap=ours.softcap, cu_seqlens=bounds,
    )  # fmt: skip
    policy.zero_grad()
    out.loss.backward()
    return out, [p.grad for p in policy.parameters() if p.requires_grad]


def assert_same(got, expected, rtol):
    (out, gradients), (theirs, expected_gradients) = got, expected
    for name in (
        "chosen_logps",
        "rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "chosen_kl",
        "rejected_kl",
    ):
        a, b = getattr(out, name), getattr(theirs, name)
        # A KL is a difference of log-sum-exps near log(97), each known to a unit in its last place a token.
        atol = 9 * 4.6 * torch.finfo(a.dtype).eps if name.endswith("kl") else 0
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(out.loss, theirs.loss, rtol=rtol, atol=0)
    assert torch.equal(out.step, theirs.step) and torch.equal(out.beta, theirs.beta)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


def models(name, dtype):
    policy, reference = build(name, dtype), shifted(build(name, dtype))
    for model in (policy, reference):
        take_segments(model)
        if dtype == torch.float64 and hasattr(model.config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")  # torch's grouped products have no float64
    return policy, reference


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CARRIES_STATE])
def test_packed_is_padded_in_float64(name):
    policy, reference = models(name, torch.float64)
    for pairs in range(1, len(LENGTHS) + 1):
        batch = padded(LENGTHS[:pairs] if pairs < 5 else LENGTHS[::-1], padding=pairs % 3)
        both = [loss_and_gradients(policy, reference, *batch, packed) for packed in (True, False)]
        assert_same(*both, 1e-10)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CARRIES_STATE])
def test_packed_is_padded_in_fp32(name):
    policy, reference = models(name, torch.float32)
    both = [loss_and_gradients(policy, reference, *padded(LENGTHS), packed) for packed in (True, False)]
    assert_same(*both, 1e-5)


def test_a_packed_row_by_hand():
    ids = torch.tensor([[5, 6, 7, 8, 0], [4, 3, 0, 0, 0], [5, 6, 9, 0, 0], [4, 3, 2, 1, 0]])
    mask = (ids != 0).long()
    labels = torch.full_like(ids, -100)
    for row, first in enumerate((2, 1, 2, 1)):
        end = int(mask[row].sum())
        labels[row, first - 1 : end - 1] = ids[row, first:end]
    layout = pack(ids, mask, labels)
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 3, 2, 1]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3]]
    assert layout.segments.lengths == ((2, 2, 1), (1, 1, 3))
    assert layout.segments.cu_queries.tolist() == [0, 4, 5, 7, 10]
    assert layout.segments.cu_keys.tolist() == [0, 4, 7, 9, 13]
    assert layout.segments.keys.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 5, 7, 8, 9]
    assert (layout.segments.max_queries, layout.segments.max_keys) == (4, 4)
    # The prompts' last states, 1 and 5, are read for both answers.
    assert layout.scored.tolist() == [1, 2, 5, 1, 5, 7, 8]
    assert layout.labels.tolist() == [7, 8, 3, 9, 3, 2, 1]
    assert layout.cu_seqlens.tolist() == [0, 2, 3, 4, 7]
    assert [row.tolist() for row in layout.rows()] == [[5, 6, 7, 8], [4, 3], [5, 6, 9], [4, 3, 2, 1]]


def test_prompts_that_differ_share_what_they_share():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8]])
    labels = torch.tensor([[-100, -100, 8, -100], [-100, -100, 8, -100]])
    layout = pack(ids, torch.ones_like(ids), labels)
    assert layout.segments.lengths == ((2, 2, 2),)
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 2, 3]]
    assert layout.scored.tolist() == [2, 4]
    nothing = pack(torch.tensor([[5, 6], [7, 6]]), torch.ones(2, 2), torch.tensor([[6, -100], [6, -100]]))
    assert nothing.segments.lengths == ((0, 2, 2),)
    assert nothing.scored.tolist() == [0, 2]


def test_padding_on_either_side_is_dropped():
    ids, mask, labels = padded([(3, 2, 4), (2, 5, 1)], padding=2)
    left = [torch.nn.functional.pad(t, (3, 0), value=v) for t, v in ((ids, 96), (mask, 0), (labels, -100))]
    for name in ("input_ids", "position_ids", "scored", "labels"):
        assert torch.equal(getattr(pack(*left), name), getattr(pack(ids, mask, labels), name))


def test_a_pair_of_which_nothing_is_scored():
    token = torch.zeros(2, 1, dtype=torch.int64)
    layout = pack(token, token + 1, token - 100)
    assert layout.input_ids.shape == (1, 1)
    assert layout.cu_seqlens.tolist() == [0, 0, 0]
    model = build("Llama")
    take_segments(model)
    ours = head_inputs(model, token, layout)
    out = linear_epsilon_dpo(
        ours.hidden, ours.weight, layout.labels, ours.hidden, ours.weight, cu_seqlens=layout.cu_seqlens
    )  # fmt: skip
    assert out.loss == 0
    # In the graph, so that no rank of a distributed run misses a gradient.
    gradients = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)
    assert all(g is not None and not g.any() for g in gradients)


@pytest.mark.parametrize("kind, more, said", [
    ("DeepseekV32", {"index_topk": 64}, "DeepseekV32ForCausalLM has index_topk: "),
    ("Doge", {"keep_window_size": 64}, "DogeForCausalLM has keep_window_size: "),
    ("Llama4Text", {"attn_temperature_tuning": True}, "Llama4ForCausalLM has attn_temperature_tuning: "),
])  # fmt: skip
def test_attention_that_short_rows_do_not_show_is_not_packed(kind, more, said):
    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=2, vocab_size=64, **more)
    with torch.device("meta"):
        model = getattr(transformers, said.split()[0])(config)
    before = model.config._attn_implementation
    assert pack_rows([model]).startswith(said) and model.config._attn_implementation == before


def test_rows_that_cannot_be_packed():
    ids, mask, labels = padded([(3, 2, 4)])
    with pytest.raises(ValueError, match=r"got shapes \(2, 10\), \(2, 9\), \(2, 10\), takes one shape \(2B, T\)"):
        pack(ids, mask[:, 1:], labels)
    with pytest.raises(ValueError, match="got shapes"):
        pack(ids[:1], mask[:1], labels[:1])
    labels[0, -1] = 5
    with pytest.raises(ValueError, match="labels: got a scored token where attention_mask is 0"):
        pack(ids, mask, labels)


def test_part_of_a_batch():
    ids, mask, labels = padded(LENGTHS)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "row": torch.arange(5)}
    part = packing.part(batch, 1, 3)
    assert part["row"].tolist() == [1, 2]
    assert torch.equal(part["input_ids"], ids[[1, 2, 6, 7]])


def dense(query, key, value, lengths, window=None, softcap=None, sinks=None):
    """Attention of a packed row with a mask over all of it, (1, N, heads, D): what segments stand for."""
    pair, side, position = [], [], []
    for i, (p, c, r) in enumerate(lengths):
        pair += [i] * (p + c + r)
        side += [0] * p + [1] * c + [2] * r
        position += [*range(p + c), *range(p, p + r)]
    pair, side, position = map(torch.tensor, (pair, side, position))
    seen = (pair[:, None] == pair) & ((side == 0) | (side[:, None] == side)) & (position[:, None] >= position)
    if window is not None:
        seen &= position[:, None] - position < window
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)), 3)
    return (scores.softmax(3)[..., : key.shape[2]] @ value).transpose(1, 2)


def varlen(query, key, value, cu_queries, cu_keys, max_queries, max_keys, *, scale, window_size, enable_gqa=False):
    """A plain twin of variable-length flash attention: causal to the lower right, (N, heads, D)."""
    out = []
    for i in range(len(cu_queries) - 1):
        q, k, v = (
            t[bounds[i] : bounds[i + 1]].transpose(0, 1)
            for t, bounds in ((query, cu_queries), (key, cu_keys), (value, cu_keys))
        )
        assert 0 < q.shape[1] <= max_queries and 0 < k.shape[1] <= max_keys
        assert len(q) == len(k) or enable_gqa
        k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        seen = distance >= 0 if window_size[0] < 0 else (distance >= 0) & (distance <= window_size[0])
        out.append(((q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(2) @ v).transpose(0, 1))
    return torch.cat(out)


def row(lengths, heads=6, kv_heads=2, width=8, value_width=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    n = sum(map(sum, lengths))
    shapes = (heads, width), (kv_heads, width), (kv_heads, value_width)
    return [torch.randn(1, h, n, d, generator=g, dtype=dtype).requires_grad_() for h, d in shapes]


ROWS = [LENGTHS, [(0, 3, 2), (4, 0, 1), (3, 0, 0), (2, 2, 0)], [(130, 70, 50), (3, 5, 140)]]
OPTIONS = {
    "causal": {}, "window": {"window": 4}, "wide window": {"window": 40}, "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 2, 6, dtype=torch.float64)},
    "all": {"window": 5, "softcap": 1.5, "sinks": torch.linspace(-2, 1, 6, dtype=torch.float64)},
}  # fmt: skip


def segments(lengths):
    """Of a row, by way of padded rows of one scored token more where an answer is empty."""
    queries = [n for p, c, r in lengths for n in (p + c, r) if n]
    keys, attended, start = [], [], 0
    for p, c, r in lengths:
        keys += [*range(start, start + p + c)]
        attended += [p + c]
        if r:
            keys += [*range(start, start + p), *range(start + p + c, start + p + c + r)]
            attended += [p + r]
        start += p + c + r
    bounds = [torch.tensor([0, *n]).cumsum(0).int() for n in (queries, attended)]
    return packing.Segments(tuple(lengths), *bounds, torch.tensor(keys), max(queries), max(attended))


def arguments(window=None, softcap=None, sinks=None):
    return {"scaling": 0.3, "sliding_window": window, "softcap": softcap, "s_aux": sinks, "dropout": 0.0}


@pytest.mark.parametrize("lengths", ROWS)
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_by_segment_is_attention_with_a_mask(lengths, name):
    tensors = row(lengths, value_width=5)
    got = attention.by_segment(None, *tensors, segments(lengths), **arguments(**OPTIONS[name]))
    expected = dense(*tensors, lengths, **OPTIONS[name])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(4), dtype=got.dtype)
    for a, b in zip(*(torch.autograd.grad((out * weights).sum(), tensors) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", ROWS)
@pytest.mark.parametrize("name", ["causal", "window", "wide window"])
@pytest.mark.parametrize("grouped", [True, False], ids=["", "torch 2.11"])
def test_the_flash_calls_arithmetic_by_a_plain_twin(lengths, name, grouped, monkeypatch):
    tensors = row(lengths)
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(attention, "GROUPED", grouped)

    def wrapper(q, k, v, mask, length, *, softmax_scale, sliding_window, cu_seq_lens_q, cu_seq_lens_k, **kwargs):
        window = (-1 if sliding_window is None else sliding_window - 1, 0)  # as transformers hands it on
        maxima = kwargs["max_length_q"], kwargs["max_length_k"]
        assert mask is None and kwargs["is_causal"] and length == q.shape[1]
        return varlen(
            q[0], k[0], v[0], cu_seq_lens_q, cu_seq_lens_k, *maxima, scale=softmax_scale, window_size=window,
            enable_gqa=True,
        )[None]  # fmt: skip

    monkeypatch.setattr(attention, "_flash_attention_forward", wrapper)
    expected = dense(*tensors, lengths, **OPTIONS[name])
    for function in (attention.torch_varlen, attention.flash_varlen):
        got = function(None, *tensors, segments(lengths), **arguments(**OPTIONS[name]))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        for a, b in zip(
            *(torch.autograd.grad(out.sin().sum(), tensors, retain_graph=True) for out in (got, expected)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_torchs_variable_length_attention_takes_the_call():
    """Shapes of forward and backward, on the meta device: its kernels need a GPU."""
    tensors = [t.detach().to("meta", torch.bfloat16).requires_grad_() for t in row(LENGTHS)]
    own = packing.to(segments(LENGTHS), torch.device("meta"))
    out = attention.torch_varlen(None, *tensors, own, **arguments(window=4))
    assert out.shape == (1, sum(map(sum, LENGTHS)), 6, 8)
    assert [g.shape for g in torch.autograd.grad(out.sum(), tensors)] == [t.shape for t in tensors]


@pytest.mark.parametrize("lengths", ROWS)
@pytest.mark.parametrize("name", ["causal", "window", "wide window", "softcap"])
def test_flex_attention_with_our_block_mask(lengths, name, monkeypatch):
    """Not compiled, and forward only: it has no backward on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as theirs

    monkeypatch.setattr(
        theirs, "compile_friendly_flex_attention", lambda q, k, v, training, **kwargs: flex_attention(q, k, v, **kwargs)
    )
    tensors = [t.detach().float() for t in row(lengths)]
    got = attention.flex(torch.nn.Identity(), *tensors, segments(lengths), **arguments(**OPTIONS[name]))
    expected = dense(*tensors, lengths, **OPTIONS[name])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 40])
def test_block_masks_leave_out_what_no_query_sees(window):
    """Blocks are listed if and only if something in them is seen."""
    lengths = ROWS[2]
    mask = attention.block_mask(tuple(lengths), window, torch.device("cpu"))
    n = sum(map(sum, lengths))
    q, kv = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    seen = mask.mask_mod(0, 0, q, kv)
    side = -(-n // 128)
    padded_out = torch.zeros(side * 128, side * 128, dtype=torch.bool)
    padded_out[:n, :n] = seen
    assert torch.equal(mask.to_dense()[0, 0].bool(), padded_out.view(side, 128, side, 128).any(3).any(1))


def test_masks_are_views_of_a_line():
    mask = attention._reversed_mask(300, 4000, None, torch.zeros(1))
    assert mask.shape == (300, 4000)
    assert mask.untyped_storage().nbytes() == 4 * (300 + 4000 - 1)
    seen = torch.ones(300, 4000, dtype=torch.bool).tril(4000 - 300)
    assert torch.equal(mask.flip(0) == 0, seen)


def test_which_function_runs(monkeypatch):
    class OnGPU:  # what `backend` reads of a tensor
        device = torch.device("cuda")

        def __init__(self, dtype, width=64):
            self.dtype, self.shape = dtype, (1, 8, 100, width)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    half, single = OnGPU(torch.bfloat16), OnGPU(torch.float32)
    assert attention.backend(half, half, 0.0, None, None) == "torch_varlen"
    assert attention.backend(single, single, 0.0, None, None) == "flex"
    assert attention.backend(single, single, 0.1, None, None) == "by_segment"
    assert attention.backend(half, half, 0.0, 50.0, None) == "flex"
    assert attention.backend(half, half, 0.0, None, torch.zeros(8)) == "flex"
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert attention.backend(half, half, 0.0, 50.0, None) == "flash_varlen"
    assert attention.backend(half, half, 0.1, None, None) == "flash_varlen"
    assert attention.backend(half, OnGPU(torch.bfloat16, 32), 0.0, None, None) == "flash_varlen"
    assert attention.backend(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0.0, None, None) == "by_segment"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in CARRIES_STATE])
def test_the_check_passes(name, dtype):
    model = build(name, dtype)
    ids, mask, _ = padded(LENGTHS)
    before = head_inputs(model, ids, mask).hidden
    assert pack_rows([model]) is None
    assert model.config._attn_implementation.startswith("packed-")
    # Padded rows, and so generation, are what they were.
    assert torch.equal(head_inputs(model, ids, mask).hidden, before)


MORE = {
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "Phi3": ("Phi3Config", {"sliding_window": 6}),
    "DeepSeek-V3": ("DeepseekV3Config", {
        "num_key_value_heads": 4, "head_dim": 4, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1}),
    "OPT": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    **{kind: ("LlamaConfig", {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0} | more})
       for kind, more in (
           ("linear", {}), ("dynamic", {}), ("yarn", {}),
           ("llama3", {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}),
           ("longrope", {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
                         "original_max_position_embeddings": 8}))},
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_more_attention_and_rotary_positions_of_every_scaling(name):
    config_class, more = MORE[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(SMALL | {"max_position_embeddings": 32} | more))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert pack_rows([model]) is None
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    ids, mask, labels = padded(LENGTHS, padding=0)
    got = head_inputs(model, ids, pack(ids, mask, labels)).hidden
    torch.testing.assert_close(got, head_inputs(model, ids, mask).hidden[labels != -100], rtol=1e-4, atol=1e-5)


OTHERS = {
    "FalconH1": (*MODELS["FalconH1"], "carry something along a row"),
    "Jamba": ("JambaConfig", {"num_experts": 2, "mamba_d_state": 8}, "carry something along a row"),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "carry something along a row"),
    "Bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, "do not call transformers' attention interface"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_the_check_refuses(name, dtype):
    config_class, more, reason = OTHERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(SMALL | more))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    before = model.config._attn_implementation
    assert reason in pack_rows([model])
    assert model.config._attn_implementation == before
    # Policy and reference both or neither.
    other = build("Llama")
    assert reason in pack_rows([other, model])
    assert other.config._attn_implementation == "sdpa"


def test_the_check_sees_attention_that_is_not_the_masks(monkeypatch):
    """A window that the layers do not pass on, wrong positions, and a crash: padded rows, and the reason."""
    model = build("Mistral")
    assert model.config.sliding_window == 4
    exact = attention.by_segment
    monkeypatch.setattr(attention, "by_segment", lambda *a, **kw: exact(*a, **(kw | {"sliding_window": None})))
    assert "are off by" in pack_rows([model])
    assert model.config.sliding_window == 4
    monkeypatch.setattr(attention, "by_segment", exact)
    whole = attention.pack

    def without_restarts(*rows):
        layout = whole(*rows)
        return dataclasses.replace(layout, position_ids=torch.arange(layout.input_ids.numel())[None])

    monkeypatch.setattr(attention, "pack", without_restarts)
    assert "are off by" in pack_rows([model])
    monkeypatch.setattr(attention, "pack", whole)
    monkeypatch.setattr(attention, "by_segment", lambda *a, **kw: 1 / 0)
    assert pack_rows([model]) == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(attention, "by_segment", exact)
    assert pack_rows([model]) is None


def test_segments_that_do_not_arrive_are_an_error():
    model = build("Llama")
    take_segments(model)
    layout = pack(*padded(LENGTHS))
    with pytest.raises(ValueError, match="LlamaAttention was given a packed row without its segments"):
        model.model(input_ids=layout.input_ids, attention_mask=packing.no_mask(layout.input_ids))


@pytest.mark.parametrize("how", ["checkpointing", "reentrant", "compiled layers", "lora", "autocast"])
def test_ways_to_train(how):
    """Each gives on packed rows what it gives on padded ones."""
    policy, reference = models("Qwen2", torch.float32)
    trained, rtol = policy, 1e-5
    if how in ("checkpointing", "reentrant"):
        policy.train()
        policy.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        policy.enable_input_require_grads()
    elif how == "compiled layers":
        torch._dynamo.reset()
        for layer in policy.model.layers:
            layer.compile(backend="aot_eager")
    elif how == "lora":
        peft = pytest.importorskip("peft")
        trained = peft.get_peft_model(policy, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, p in trained.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    else:
        rtol = 2e-2
    batches = [padded(LENGTHS[:3]), padded(LENGTHS)] if how == "compiled layers" else [padded(LENGTHS)]
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            got, expected = (loss_and_gradients(trained, reference, *batch, packed) for packed in (True, False))
        if how != "autocast":
            assert_same(got, expected, rtol)
            continue
        assert got[0].chosen_logps.dtype == torch.float32
        torch.testing.assert_close(got[0].loss, expected[0].loss, rtol=rtol, atol=0)
        for a, b in zip(got[1], expected[1], strict=True):
            if b is not None:
                assert (a - b).norm() <= 5 * rtol * b.norm() + 1e-6
