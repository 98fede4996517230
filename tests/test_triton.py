"""The Triton kernels in the interpreter: values at the edges, and what they promise about order, memory and indices."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import flat_call, forbid_words, make_case, plant_first, plant_peaks, relative_error, rms_ratios, worst_error
from epsdpo_kernels import EpsilonDPOLoss, engines, epsilon_dpo_reference, linear_epsilon_dpo, linear_pair_stats, ops
from epsdpo_kernels.head import Head
from epsdpo_kernels.statistics import SWEPT, TOKEN, Tokens
from test_engines import compare
from test_parity import GRADS, run

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from epsdpo_kernels.engines import torch_engine, triton_blocks, triton_engine, triton_project, triton_sums  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not triton_blocks.INTERPRETED, reason="runs in Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # which computes what masks then drop
]


@pytest.fixture(params=[False, True], ids=["products", "logit-free"])
def route(request, monkeypatch):
    """Both routes, of scoring and of training."""
    monkeypatch.setattr(engines, "LOGIT_FREE", request.param)


def one_token():
    return make_case(1, length=1, width=5, vocabulary=3), {}


def empty_slices():
    """One block of words for three splits: two have none."""
    return make_case(2, length=3, width=16, vocabulary=64, bias=True), {}


def pair_longer_than_a_tile():
    return make_case(2, length=6, width=16, vocabulary=130, bias=True), {"max_tile_bytes": 5 * 130 * 8}


def peaked():
    case = make_case(2, length=3, width=16, vocabulary=203, spread=2.0)
    plant_peaks(case)
    return case, {}


def large_u():
    """|ε·d| up to about 4, both sides of the polynomials' end within a block."""
    return make_case(2, length=3, width=16, vocabulary=203, spread=1.0, drift=1.0), {"epsilon": 0.9}


def forbidden_words():
    case = make_case(2, length=3, width=16, vocabulary=203, bias=True)
    forbid_words(case)
    case.bias[:64][[v not in case.labels for v in range(64)]] = -torch.inf  # all of a block, but for labels
    return case, {}


def transforms():
    options = {"logit_scale": 1.5, "softcap": 4.0, "ref_logit_scale": 0.5, "ref_softcap": 2.0}
    return make_case(2, length=3, width=16, vocabulary=203, bias=True), options


def shared_head():
    case = make_case(2, length=4, width=40, vocabulary=203, drift=0.3)
    return case._replace(ref_weight=case.weight), {}


def different_widths():
    return make_case(2, length=3, width=16, ref_width=33, vocabulary=203, spread=2.0), {"label_smoothing": 0.1}


EDGES = [
    one_token, empty_slices, pair_longer_than_a_tile, peaked, large_u, forbidden_words, transforms, shared_head,
    different_widths,
]  # fmt: skip


@pytest.mark.parametrize("edge", EDGES, ids=lambda e: e.__name__)
def test_fp32(edge, route):
    case, options = edge()
    compare(case, torch.float32, 1e-5, options, "triton")


@pytest.mark.parametrize("edge", EDGES, ids=lambda e: e.__name__)
def test_scoring(edge, route):
    case, options = edge()
    compare(case, torch.float32, 1e-5, options, "triton", grad=())


def test_token_accuracy(route):
    case = plant_first(make_case(2, length=9, width=16, vocabulary=203, bias=True, drift=0.2))
    truth = epsilon_dpo_reference(*(args := case.arguments())[0], **args[1], softcap=3.0)
    got, _ = run(linear_epsilon_dpo, case, torch.float32, softcap=3.0, engine="triton")
    for name in ("chosen_token_accuracy", "rejected_token_accuracy"):
        assert torch.equal(getattr(got, name), getattr(truth, name).float()), name
    assert 0.3 < truth.chosen_token_accuracy.mean() < 0.8


def test_a_factor_that_overflows_at_a_word_without_probability(route):
    """ε·d = 135 where the policy has e^−150: nothing to any sum, and not 0·∞."""
    case = make_case(2, length=2, width=16, vocabulary=130, bias=True)
    free = [v for v in range(130) if v not in case.labels][0]
    case.bias[free], case.ref_bias[free] = -150, -300
    truth = epsilon_dpo_reference(*(args := case.arguments())[0], **args[1], epsilon=0.9)
    args, biases = case.arguments(torch.float32)
    assert torch.isfinite(truth.loss)
    assert worst_error(linear_epsilon_dpo(*args, **biases, epsilon=0.9, engine="triton"), truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["flat", "peaked"])
def test_16_bit_inputs_err_no_more_than_the_naive_code(dtype, spread, route):
    case = make_case(2, length=5, width=32, vocabulary=203, bias=True, spread=spread, seed=6)
    truth, expected = run(epsilon_dpo_reference, case)
    naive, naive_gradients = run(epsilon_dpo_reference, case, dtype)
    got, gradients = run(linear_epsilon_dpo, case, dtype, engine="triton")
    assert torch.equal(got.step, truth.step)
    assert worst_error(got, truth) < 1e-4  # of fp32 accumulators of the very same inputs
    for field in ("loss", "chosen_logps", "rejected_rewards", "chosen_kl", "relaxed_shift"):
        ours, theirs = (relative_error(getattr(o, field), getattr(truth, field)) for o in (got, naive))
        assert ours <= theirs + 1e-6, field
    for g, n, e in zip(gradients, naive_gradients, expected, strict=True):
        assert g.dtype == dtype
        assert relative_error(g, e) <= relative_error(n, e) + 1e-6


@pytest.mark.parametrize("transforms", [{}, {"softcap": 5.0, "logit_scale": 0.7}], ids=["", "softcap"])
def test_fp32_loses_no_digits_to_the_naive_code(transforms, route):
    """Of a hundred single tokens, whose rewards and KL are small differences, not half a bit more."""
    case = make_case(50, length=1, width=64, vocabulary=131, bias=True)
    truth = epsilon_dpo_reference(*(args := case.arguments())[0], **args[1], **transforms)
    args, biases = case.arguments(torch.float32)
    naive = epsilon_dpo_reference(*args, **biases, **transforms)
    ratios = rms_ratios(linear_epsilon_dpo(*args, **biases, engine="triton", **transforms), naive, truth)
    assert max(ratios.values()) < 2**0.5, ratios


def test_models_of_different_dtype(route):
    case = make_case(2, length=3, width=16, vocabulary=203, drift=1.0)
    truth, _ = run(epsilon_dpo_reference, case)
    for policy, reference in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        args, _ = case.arguments(policy, ("hidden",))
        args = (*args[:3], *(t.to(reference) for t in args[3:]))
        assert worst_error(linear_epsilon_dpo(*args, engine="triton"), truth) < 1e-5


def test_strides_of_heads_and_biases(route):
    """A transposed head and every other element of a bias; the reference's head is the policy's."""
    case = make_case(2, length=3, width=16, vocabulary=203, bias=True)
    case = case._replace(ref_weight=case.weight)
    truth, expected = run(epsilon_dpo_reference, case)
    args, biases = case.arguments(torch.float32)
    weight = args[1].t().contiguous().t().requires_grad_()
    bias = biases["bias"].repeat_interleave(2)[::2]
    ref_bias = biases["ref_bias"].repeat_interleave(2)[::2]
    got = linear_epsilon_dpo(args[0], weight, args[2], args[3], weight, bias=bias, ref_bias=ref_bias, engine="triton")
    assert worst_error(got, truth) < 1e-5
    assert relative_error(torch.autograd.grad(got.loss * 3, weight)[0], expected[1]) < 1e-5


@pytest.mark.parametrize("side", [0, 3], ids=["policy", "reference"])
def test_an_infinity_that_is_capped_is_no_decision(side, route):
    case = make_case(3, width=16, masked=False)
    args, _ = case.arguments(torch.float32, ("hidden",))
    with torch.no_grad():
        args[side][1, 2, 0] = torch.inf
    out = linear_epsilon_dpo(*args, softcap=5.0, engine="triton")
    assert out.losses.isnan().tolist() == [False, True, False] and out.step[1] == 0
    assert torch.autograd.grad(out.loss, args[0])[0].isnan().any()


def test_scoring_without_logits_keeps_to_its_budget(monkeypatch):
    """A row there is its hidden states and its sums over parts of the head."""
    monkeypatch.setattr(engines, "LOGIT_FREE", True)
    case = make_case(3, length=40, width=16, vocabulary=203, masked=False)
    args, _ = case.arguments(torch.bfloat16)
    expected = linear_epsilon_dpo(*args, engine="triton")
    rows, whole = [], triton_engine.project_and_sweep
    monkeypatch.setattr(triton_engine, "project_and_sweep", lambda x, *rest: rows.append(len(x)) or whole(x, *rest))
    budget = 50 * (2 * 2 * 16 + 4 * SWEPT * triton_blocks.splits(triton_blocks.architecture(args[0].device)))
    got = linear_epsilon_dpo(*args, engine="triton", max_tile_bytes=budget)
    assert sum(rows) == 240 and max(rows) <= 50
    assert worst_error(got, expected) < 1e-6


def test_steps_of_many_pairs():
    case = make_case(30, length=2, width=16, vocabulary=130, drift=0.1, seed=7)
    truth = epsilon_dpo_reference(*case.arguments()[0])
    for dtype in (torch.float32, torch.bfloat16):
        got = linear_epsilon_dpo(*case.arguments(dtype)[0], engine="triton")
        assert torch.equal(got.step, truth.step)
    assert (truth.step == 1).sum() > 5 and (truth.step == -1).sum() > 5


def test_pair_stats_carry_any_loss(route):
    case = make_case(2, length=4, width=16, vocabulary=130, bias=True, drift=0.2)
    outputs = []
    for engine, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        args, biases = case.arguments(dtype, GRADS)
        stats = linear_pair_stats(*args, **biases, softcap=3.0, engine=engine, max_tile_bytes=5 * 130 * 8)
        loss = (stats.chosen_logps.square() + 3 * stats.rejected_logps).sum()
        outputs.append((*stats, *torch.autograd.grad(loss, (args[0], args[1], biases["bias"]))))
    for truth, got in zip(*outputs, strict=True):
        assert relative_error(got, truth) < 1e-5


def test_a_neighbour_beyond_the_polynomials_changes_nothing(route):
    """Bitwise, where one pair's |ε·d| passes 1 in most of its rows and the others' never does."""
    case = make_case(3, length=9, width=16, vocabulary=203, spread=0.5, drift=0.05, masked=False)
    together = run(linear_epsilon_dpo, case, torch.float32, epsilon=0.5, engine="triton")
    rows = torch.tensor([0, 3])
    case.hidden[rows] *= 40
    beside, gradients = run(linear_epsilon_dpo, case, torch.float32, epsilon=0.5, engine="triton")
    d = case.hidden[rows] @ case.weight.T - case.ref_hidden[rows] @ case.ref_weight.T
    assert (0.5 * d.abs().amax(-1) > 1).double().mean() > 0.9
    for name in ("losses", "chosen_logps", "rejected_kl", "relaxed_shift", "tightened_shift"):
        assert torch.equal(getattr(beside, name)[1:], getattr(together[0], name)[1:]), name
        assert not torch.equal(getattr(beside, name)[0], getattr(together[0], name)[0]), name
    others = torch.tensor([1, 2, 4, 5])
    assert torch.equal(gradients[0][others], together[1][0][others])


def test_pair_stats_project_again_in_tiles(route, monkeypatch):
    """Also where their forward had no logits to find room for."""
    rows, project = [], Head.project
    monkeypatch.setattr(Head, "project", lambda self, x, out: rows.append(len(out)) or project(self, x, out))
    args, _ = make_case(2, length=12, width=16, vocabulary=130, masked=False).arguments(torch.float32, GRADS)
    linear_pair_stats(*args, engine="triton", max_tile_bytes=5 * 130 * 8).chosen_logps.sum().backward()
    assert max(rows) <= 5 and sum(rows) >= 48


@triton.jit
def _helpers_kernel(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    grown, shrunk = triton_sums._growth(tl.exp(x * 0), x * 0, x)
    tl.store(out_ptr + i, grown, mask=i < n)
    tl.store(out_ptr + n + i, shrunk, mask=i < n)
    tl.store(out_ptr + 2 * n + i, triton_sums._tanh(x), mask=i < n)
    tl.store(out_ptr + 3 * n + i, triton_sums._log1p(tl.where(x > -0.99, x, 0)), mask=i < n)


def test_helpers_over_their_range():
    """e^u − 1, e^−u − 1, tanh and log1p from 1e-30 to 80 and around every switch, to 4e-7 relative.

    Where e^u is 2^(u·log₂e), the exponent is rounded twice, log₂e itself and the product, each to 2⁻²⁵ … 2⁻²⁴ of it:
    an absolute error of up to 2⁻²³·|u| in u, hence a relative one in e^u.
    """
    x = torch.cat((torch.logspace(-30, 1.9, 400), torch.linspace(0.2, 1.2, 100)))
    x = torch.cat((x, -x)).float()
    out = torch.empty(4, len(x))
    _helpers_kernel[(1,)](x, out, len(x), SIZE=1024)
    x = x.double()
    inside = torch.where(x > -0.99, x, 0)
    exponent = torch.where(x.abs() > 1, 2**-23 * x.abs(), 0)
    truths = (x.expm1(), (-x).expm1(), x.tanh(), inside.log1p())
    for got, truth, rounding in zip(out, truths, (exponent, exponent, 0, 0), strict=True):
        assert ((got.double() - truth).abs() <= 4e-7 * truth.abs() + rounding * (truth + 1) + 1e-37).all()


@pytest.fixture
def shuffled(monkeypatch):
    """A function that makes every launch run its programs in a random order, and the dtypes of the atomics so far."""
    from triton.runtime.interpreter import interpreter_builder as builder

    atomics: set[str] = set()
    grid, index, rmw = builder.set_grid_dim, builder.set_grid_idx, builder.create_atomic_rmw
    order: list[int] = []

    def set_grid(x, y, z):
        order[:] = torch.randperm(x).tolist()
        grid(x, y, z)

    def record(op, ptr, value, *rest):
        atomics.add(str(value.dtype))
        return rmw(op, ptr, value, *rest)

    def start(seed: int) -> set[str]:
        torch.manual_seed(seed)
        monkeypatch.setattr(builder, "set_grid_dim", set_grid)
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: index(order[x], y, z))
        monkeypatch.setattr(builder, "create_atomic_rmw", record)
        return atomics

    return start


def test_the_order_of_programs_does_not_matter(route, shuffled):
    """Bitwise, in every field and gradient; and what is atomic is a count, never a float."""
    case = make_case(3, length=6, width=16, vocabulary=203, bias=True, seed=1)
    outputs = []
    for seed in range(4):
        if seed:
            atomics = shuffled(seed)
        out, gradients = run(linear_epsilon_dpo, case, torch.float32, engine="triton")
        outputs.append((*out, *gradients))
    for other in outputs[1:]:
        for t, o in zip(outputs[0], other, strict=True):
            assert torch.equal(t, o)
    assert atomics == {"int32"}


def test_descriptors_load_what_pointers_load(monkeypatch):
    monkeypatch.setattr(engines, "LOGIT_FREE", True)
    case = make_case(2, length=4, width=40, ref_width=24, vocabulary=203, bias=True)
    args, biases = case.arguments(torch.float32)
    by_pointers = linear_epsilon_dpo(*args, **biases, engine="triton")
    monkeypatch.setattr(triton_blocks, "DESCRIPTORS", ("interpreter",))
    made = []
    make = triton_project.TensorDescriptor.from_tensor
    monkeypatch.setattr(
        triton_project.TensorDescriptor, "from_tensor", lambda *a: made.append(1) or make(*a), raising=True
    )
    for p, d in zip(by_pointers, linear_epsilon_dpo(*args, **biases, engine="triton"), strict=True):
        assert torch.equal(p, d)
    assert len(made) == 4


def sparse(elements: int, dtype=torch.float32) -> torch.Tensor:
    """Zeros that take memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, nameless before Python 3.13
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def tokens_of_one_pair(n: int, vocabulary: int) -> Tokens:
    g = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, n // 2, n])
    return Tokens(
        labels=torch.randint(0, vocabulary, (n,), generator=g),
        completion=(torch.arange(n) >= n // 2).long(),
        count=bounds.diff().view(-1, 2).double(),
        bounds=bounds,
        edges=bounds.tolist(),
        swept=torch.zeros(SWEPT, n),
        sums=torch.zeros(TOKEN, 1, 2, dtype=torch.float64),
        step=torch.zeros(1, dtype=torch.int8),
        arrived=torch.zeros(1, dtype=torch.int32),
    )


FAR = 1 << 30  # elements from one row to the next: the third begins at 2³¹, where int32 turns negative


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same rows, FAR elements apart, in the middle of memory that a wrapped offset would not leave."""
    buffer = sparse((len(rows) + 2) * FAR)
    out = buffer.as_strided(rows.shape, (FAR, 1), 2 * FAR)
    for i, row in enumerate(rows):
        out[i] = row
    return out


def test_rows_beyond_2_31_elements():
    """Sweep and gradient of tiles whose rows lie that far apart."""
    rows, vocabulary = 4, 203
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, rows, vocabulary, generator=g)
    head = Head(torch.zeros(vocabulary, 1), None, 1.0, None)
    coefficient = torch.tensor([1.0, -0.5])
    results = []
    for make in (torch.clone, far_apart):
        mine, ref = make(a), make(b)
        tokens = tokens_of_one_pair(rows, vocabulary)
        triton_engine.sweep(mine, ref, slice(0, rows), tokens, head, head, 0.01)
        triton_engine.gradient(mine, slice(0, rows), tokens, coefficient, head, mine)
        results.append((tokens.swept, tokens.sums, tokens.step, mine.clone()))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)
    assert results[0][3].abs().sum(1).min() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)  # bf16 is cut off by the interpreter
def test_gradients_are_scaled_and_rounded_once(dtype):
    g = torch.randn(5, 203, generator=torch.Generator().manual_seed(1))
    factor = torch.tensor(0.0173)
    for engine in (triton_engine, torch_engine):
        out = engine.scaled(g, factor, dtype)
        assert out.dtype == dtype and torch.equal(out, (g * factor).to(dtype))


GROUP = 2  # row blocks side by side, of which a launch that stops early runs one group


def launch_project(rows: int, n: int, a: torch.Tensor, parts: torch.Tensor) -> Tokens:
    """The first group of row blocks of a launch that claims ``rows`` rows, of which there are n."""
    blocks = triton_blocks.product("interpreter", 4, False)
    vocabulary, hidden, splits = 203, 16, triton_blocks.splits("interpreter")
    g = torch.Generator().manual_seed(2)
    x, ref_x = torch.randn(2, n, hidden, generator=g)
    weight, ref_weight = torch.randn(2, vocabulary, hidden, generator=g) / 4
    tokens = tokens_of_one_pair(n, vocabulary)
    programs = min(triton.cdiv(rows, blocks.rows), GROUP) * splits
    triton_project._project_kernel[(programs,)](
        x, weight, ref_x, ref_weight, rows, vocabulary, hidden, hidden, None, None, 1.0, None, 1.0, None, 0.01, a,
        a.stride(0), parts, torch.zeros(GROUP, dtype=torch.int32), 0, tokens.labels, tokens.completion,
        tokens.bounds, tokens.arrived, tokens.swept, tokens.swept.stride(0), tokens.sums, tokens.step, 1,
        PERTURB=True, SHARED=False, DESCRIPTORS=False, SPLITS=splits, GROUP=GROUP, ROWS=blocks.rows,
        WORDS=blocks.words, HIDDEN=blocks.hidden, SHARE=blocks.share, WIDTH=blocks.width, TOKENS=16,
    )  # fmt: skip
    return tokens


def test_logits_beyond_2_31_elements():
    """The logit-free kernel storing them."""
    near, far = torch.zeros(4, 203), far_apart(torch.zeros(4, 203))
    parts = torch.zeros(3, SWEPT, 4)
    tokens = [launch_project(4, 4, a, parts) for a in (near, far)]
    assert torch.equal(near, far) and near.abs().sum(1).min() > 10
    assert torch.equal(tokens[0].swept, tokens[1].swept)


def test_parts_beyond_2_31_elements():
    """The logit-free kernel's partial sums, of a call of 2²⁷ rows of which one group of row blocks is run."""
    n = 16 * GROUP
    logits = torch.zeros(n, 203)
    near = launch_project(n, n, logits, torch.zeros(3, SWEPT, n))
    rows = 1 << 27
    buffer = sparse(2 * FAR + 3 * SWEPT * rows)
    far = launch_project(rows, n, logits, buffer[2 * FAR :])
    assert torch.equal(near.swept, far.swept) and torch.equal(near.sums, far.sums)
    assert near.swept[1].min() > 1


@triton.jit
def _load_kernel(source, start, k, rows, hidden, out_ptr):
    tile = triton_project._load_tile(source, start, k, rows, hidden, False, 4, 16)
    tl.store(out_ptr + tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :], tile)


def test_heads_beyond_2_31_elements():
    expected = torch.randn(4, 16)
    buffer = sparse(6 * FAR)
    matrix = buffer[2 * FAR :].view(4, FAR)
    matrix[:, FAR - 16 :] = expected
    got = torch.zeros(4, 16)
    _load_kernel[(1,)](matrix, 0, FAR - 16, 4, FAR, got)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_compiled_is_eager(bias, dtype, route):
    case = make_case(2, length=3, width=16, vocabulary=130, bias=bias)
    loss_fn = EpsilonDPOLoss()

    def step(hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias):
        return loss_fn(hidden, weight, labels, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias, engine="triton")

    outputs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        (x, w, labels, *ref), biases = case.arguments(dtype, GRADS)
        out = function(x, w, biases["bias"], labels, *ref, biases["ref_bias"])
        inputs = [t for t in (x, w, biases["bias"]) if t is not None]
        outputs.append((*out, *torch.autograd.grad(2 * out.loss, inputs)))
    for eager, compiled in zip(*outputs, strict=True):
        assert torch.equal(eager, compiled)
    assert loss_fn.counts.sum() == 4


@pytest.mark.parametrize("needs", [[True, True, True], [False, False, False]], ids=str)
def test_opcheck(needs):
    case = make_case(1, length=3, width=16, vocabulary=130, bias=True)
    torch.library.opcheck(ops.single_pass, (*flat_call(case, "triton"), needs))


def test_autocast_takes_the_autocast_dtype(route):
    case = make_case(2, length=3, width=16, vocabulary=130)
    args, _ = case.arguments(torch.float32, GRADS)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_epsilon_dpo(*args, engine="triton")
    bf16_args, _ = case.arguments(torch.bfloat16, GRADS)
    expected = linear_epsilon_dpo(*bf16_args, engine="triton")
    assert torch.equal(out.chosen_logps, expected.chosen_logps) and out.chosen_logps.dtype == torch.float32
    gradients = torch.autograd.grad(out.loss, args[:2])
    for g, e in zip(gradients, torch.autograd.grad(expected.loss, bf16_args[:2]), strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, e.float())


def test_without_a_gpu_and_without_the_interpreter():
    code = """if True:
        from cases import make_case
        from epsdpo_kernels import linear_epsilon_dpo
        import torch
        linear_epsilon_dpo(*make_case(1).arguments(torch.float32)[0], engine="triton")
    """
    root = Path(__file__).resolve().parents[1]
    environment = {"PATH": "", "PYTHONPATH": f"{root}:{root / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "ValueError: engine: got 'triton' for tensors on cpu, takes 'torch' or 'auto' there" in result.stderr
