"""What only a GPU can show. Needs torch, triton, numpy and pytest."""

import pytest
import torch

from cases import field_error, make_case, relative_error, rms_ratios
from epsdpo_kernels import EpsilonDPOLoss, checks, engines, epsilon_dpo_reference, linear_epsilon_dpo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=[False, True], ids=["products", "logit-free"])
def route(request, monkeypatch):
    """Both routes, of scoring and of training."""
    monkeypatch.setattr(engines, "LOGIT_FREE", request.param)
    return request.param


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture
def world_of_one():
    """A process group of this process alone."""
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("allow", [True, False], ids=["tf32", "ieee"])
def test_decisions_of_fp32_heads_do_not_follow_tf32(allow, route, monkeypatch):
    """By either route the same logits to fp32, where torch may multiply with fewer digits."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allow)
    case = make_case(60, length=12, width=256, vocabulary=1031, drift=0.01)
    truth = epsilon_dpo_reference(*on_gpu(case, torch.float64, ())[0])
    got = linear_epsilon_dpo(*on_gpu(case, torch.float32, ())[0], engine="triton")
    assert relative_error(got.relaxed_shift, truth.relaxed_shift) < 1e-3
    assert (got.step != truth.step).sum() <= 1


def on_gpu(case, dtype, grad=("hidden", "weight", "bias")):
    """Arguments, keyword arguments, and the tensors that require a gradient."""
    case = case._replace(**{n: None if t is None else t.cuda() for n, t in case._asdict().items()})
    args, biases = case.arguments(dtype, grad)
    return args, biases, [t for t in (args[0], args[1], biases["bias"]) if t is not None and t.requires_grad]


def run(function, case, dtype, **options):
    args, biases, inputs = on_gpu(case, dtype)
    out = function(*args, **biases, **options)
    return out, torch.autograd.grad(out.loss * 3, inputs)


def shapes():
    yield "ragged", make_case(5, length=70, width=256, vocabulary=5003, bias=True), {}
    yield "softcap", make_case(3, length=50, width=128, vocabulary=4096, spread=4.0), {"softcap": 5.0}
    yield "long pair", make_case(2, length=150, width=64, vocabulary=3000), {"max_tile_bytes": 100 * 3000 * 8}
    yield "odd width", make_case(2, length=40, width=100, ref_width=36, vocabulary=1001), {"logit_scale": 0.7}
    case = make_case(3, length=40, width=192, vocabulary=2048, drift=0.3)
    yield "shared head", case._replace(ref_weight=case.weight), {}
    yield "one token", make_case(1, length=1, width=64, vocabulary=130), {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, case, options", list(shapes()), ids=[name for name, *_ in shapes()])
def test_parity(name, case, options, dtype, route):
    """Errors at most the naive code's in the same dtype, of float64; decisions float64's."""
    materialised = {k: v for k, v in options.items() if k != "max_tile_bytes"}
    truth, expected = run(epsilon_dpo_reference, case, torch.float64, **materialised)
    naive, naive_gradients = run(epsilon_dpo_reference, case, dtype, **materialised)
    got, gradients = run(linear_epsilon_dpo, case, dtype, engine="triton", **options)
    assert torch.equal(got.step, truth.step)
    for field in got._fields:
        if field != "step":
            ours, theirs = (field_error(o, truth, field) for o in (got, naive))
            # Of a difference of log-probs, four roundings of them; a single one may be right by luck.
            tolerance = 4 * 2**-23 if field.endswith(("rewards", "kl")) else 1e-5
            assert ours <= theirs + tolerance, field
    for g, n, e in zip(gradients, naive_gradients, expected, strict=True):
        assert g.dtype == dtype
        assert relative_error(g, e) <= relative_error(n, e) + (1e-5 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("transforms", [{}, {"softcap": 5.0, "logit_scale": 0.7}], ids=["", "softcap"])
def test_fp32_loses_no_digits_to_the_naive_code(transforms, route):
    """Of a thousand single tokens, whose rewards and KL are small differences, not half a bit more."""
    case = make_case(500, length=1, width=64, vocabulary=3000, bias=True)
    truth = epsilon_dpo_reference(
        *on_gpu(case, torch.float64, ())[0], **on_gpu(case, torch.float64, ())[1], **transforms
    )
    args, biases, _ = on_gpu(case, torch.float32, ())
    naive = epsilon_dpo_reference(*args, **biases, **transforms)
    got = linear_epsilon_dpo(*args, **biases, engine="triton", **transforms)
    ratios = rms_ratios(got, naive, truth)
    assert max(ratios.values()) < 2**0.5, ratios


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_scaled_and_rounded_once(dtype):
    from epsdpo_kernels.engines import triton_engine

    g, factor = torch.randn(501, 2003, device="cuda"), torch.tensor(0.0173, device="cuda")
    assert torch.equal(triton_engine.scaled(g, factor, dtype), (g * factor).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scoring_parity(dtype, route):
    for _, case, options in shapes():
        truth = epsilon_dpo_reference(
            *on_gpu(case, torch.float64, ())[0], **on_gpu(case, torch.float64, ())[1],
            **{k: v for k, v in options.items() if k != "max_tile_bytes"},
        )  # fmt: skip
        args, biases, _ = on_gpu(case, dtype, ())
        got = linear_epsilon_dpo(*args, **biases, engine="triton", **options)
        assert torch.equal(got.step, truth.step)
        assert relative_error(got.chosen_logps, truth.chosen_logps) < 1e-5
        assert relative_error(got.rejected_kl, truth.rejected_kl) < 1e-3


def test_fifty_repetitions_are_bitwise_equal(route):
    """A race between the programs that write sums and the one that reduces them would show."""
    case = make_case(8, length=200, width=256, vocabulary=8192, bias=True)
    args, biases, inputs = on_gpu(case, torch.bfloat16)
    first = None
    for _ in range(50):
        out = linear_epsilon_dpo(*args, **biases, engine="triton")
        results = (*out, *torch.autograd.grad(out.loss, inputs))
        if first is None:
            first = results
        for a, b in zip(first, results, strict=True):
            assert torch.equal(a, b)


def long_pair(vocabulary=131072, length=16384, width=2048):
    def normal(*shape, std=1.0):
        return (torch.randn(*shape, device="cuda", dtype=torch.float32) * std).bfloat16()

    torch.manual_seed(0)
    hidden = normal(2, length, width)
    weight = normal(vocabulary, width, std=width**-0.5)
    labels = torch.randint(0, vocabulary, (2, length), device="cuda")
    return hidden, weight, labels, hidden + 0.05 * normal(2, length, width), weight.clone()


def test_memory_of_a_long_pair(route):
    """2 × 16k tokens, V 131072: beyond dX, dW and the inputs, the tiles and no logits (2 × 16 GiB each in fp32)."""
    args = long_pair()
    budget = 1 << 30
    for grad in (True, False):
        args[0].requires_grad_(grad)
        args[1].requires_grad_(grad)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = linear_epsilon_dpo(*args, engine="triton", max_tile_bytes=budget)
        peak = torch.cuda.max_memory_allocated() - before
        assert torch.isfinite(out.loss)
        accumulators = 4 * (args[0].numel() + args[1].numel()) if grad else 0
        assert peak < accumulators + budget + (128 << 20)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_compiled_is_eager(bias, route):
    case = make_case(4, length=40, width=128, vocabulary=2048, bias=bias)
    loss_fn = EpsilonDPOLoss().cuda()

    def step(args, biases):
        return loss_fn(*args, **biases, engine="triton")

    outputs = []
    for function in (step, torch.compile(step, fullgraph=True)):
        args, biases, inputs = on_gpu(case, torch.bfloat16)
        out = function(args, biases)
        outputs.append((*out, *torch.autograd.grad(2 * out.loss, inputs)))
    for name, eager, compiled in zip((*out._fields, "dx", "dw", "db"), *outputs, strict=False):
        # The compiler fuses what follows the pass (the mean, the factor of the gradients) in its own order.
        tolerance = 1e-6 if eager.dtype == torch.float32 else torch.finfo(torch.bfloat16).eps
        assert relative_error(compiled, eager) <= tolerance, name


@pytest.mark.parametrize("keep", [True, False], ids=["training", "scoring"])
@pytest.mark.parametrize("budget", [None, 100 * 2048 * 8], ids=["pairs", "long pair"])
@pytest.mark.parametrize("sliced", [False, True], ids=["", "vocab_group"])
def test_one_host_read_and_no_other(keep, budget, sliced, route, monkeypatch, world_of_one):
    """The lengths are read before any work; forward and backward wait for nothing."""
    case = make_case(4, length=80, width=128, vocabulary=2048, bias=True)
    args, biases, inputs = on_gpu(case, torch.bfloat16, ("hidden", "weight", "bias") if keep else ())
    options = {"engine": "triton", "max_tile_bytes": budget, "vocab_group": world_of_one if sliced else None}

    def call():
        out = linear_epsilon_dpo(*args, **biases, **options)
        if keep:
            torch.autograd.grad(out.loss, inputs)

    call()  # compiles
    read, reads = checks.scored_lengths, []

    def counted(*arguments):
        reads.append(arguments)
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(checks, "scored_lengths", counted)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            args[0].sum().item()  # the mode does what it says
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 1
