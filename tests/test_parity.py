"""linear_epsilon_dpo against the materialised reference: values and gradients, in every regime and transform."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from cases import make_case, pack, plant_first, relative_error, worst_error
from epsdpo_kernels import epsilon_dpo_reference, head, linear_epsilon_dpo, linear_pair_stats
from epsdpo_kernels.engines import torch_engine

GRADS = ("hidden", "weight", "bias")
TRANSFORMS = [
    {},
    {"logit_scale": 0.7},
    {"softcap": 3.0},
    {"logit_scale": 1.5, "softcap": 4.0},
    {"logit_scale": 2.0, "softcap": 4.0, "ref_logit_scale": 0.5, "ref_softcap": 2.0},
    {"softcap": 2, "ref_softcap": None},
    {"label_smoothing": 0.2},
    {"beta": 1.3, "epsilon": 0.3},
    {"epsilon": 0.0},
    {"epsilon": 0.2, "max_entropy": 4.4, "max_kl": 0.1},
]
# Bytes of two float64 tiles at V 103: everything in one tile, some pairs to a tile, less than a pair, one token.
BUDGETS = {"one tile": None, "few pairs": 20 * 103 * 16, "long pair": 3 * 103 * 16, "one token": 1}


def run(function, case, dtype=None, grad=GRADS, **options):
    args, biases = case.arguments(dtype, grad)
    out = function(*args, **biases, **options)
    wanted = [t for t in (args[0], args[1], biases["bias"]) if t is not None and t.requires_grad]
    return out, torch.autograd.grad(out.loss * 3, wanted)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("pairs", [1, 2, 3, 5])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_float64_values_and_gradients(options, bias, pairs, budget):
    case = make_case(pairs, bias=bias, seed=pairs, drift=0.2)
    truth, expected = run(epsilon_dpo_reference, case, **options)
    got, gradients = run(linear_epsilon_dpo, case, max_tile_bytes=budget, **options)
    assert worst_error(got, truth) < 1e-10
    assert torch.equal(got.step, truth.step)
    for g, e in zip(gradients, expected, strict=True):
        assert relative_error(g, e) < 1e-10


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (1, 1, 3, 17), (4, 2, 5, 1009), (2, 31, 8, 77)], ids=str)
def test_float64_sizes(sizes, budget):
    pairs, length, width, vocabulary = sizes
    case = make_case(pairs, length, width, vocabulary, seed=3)
    truth, expected = run(epsilon_dpo_reference, case)
    got, gradients = run(linear_epsilon_dpo, case, max_tile_bytes=budget)
    assert worst_error(got, truth) < 1e-10
    for g, e in zip(gradients, expected, strict=True):
        assert relative_error(g, e) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7}, {"softcap": 3.0}, {"logit_scale": -1.0}], ids=str)
def test_token_accuracy(options, dtype):
    """Labels that the policy ranks first, counted here by argmax."""
    case = plant_first(make_case(3, length=9, width=32, bias=True, drift=0.2))
    logits = options.get("logit_scale", 1.0) * (case.hidden @ case.weight.T + case.bias)
    first, scored = logits.argmax(-1) == case.labels, case.labels != -100
    share = (first & scored).sum(1).double() / scored.sum(1)
    args, biases = case.arguments(dtype)
    out = linear_epsilon_dpo(*args, **biases, **options)
    assert torch.equal(torch.cat((out.chosen_token_accuracy, out.rejected_token_accuracy)), share.to(out.loss.dtype))
    assert torch.equal(torch.cat((out.chosen_tokens, out.rejected_tokens)), scored.sum(1))
    if options.get("logit_scale", 1.0) > 0:
        assert share.min() < share.max() and 0.3 < share.mean() < 0.8


@pytest.mark.parametrize("budget", [None, 1])
def test_heads_of_different_width(budget):
    case = make_case(3, width=6, ref_width=11, bias=True, spread=2.0)
    truth, expected = run(epsilon_dpo_reference, case)
    got, gradients = run(linear_epsilon_dpo, case, max_tile_bytes=budget)
    assert worst_error(got, truth) < 1e-10
    for g, e in zip(gradients, expected, strict=True):
        assert relative_error(g, e) < 1e-10


@pytest.mark.parametrize("grad", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()], ids=str)
@pytest.mark.parametrize("budget", [None, 1])
def test_only_what_is_asked_gets_a_gradient(grad, budget):
    case = make_case(2, bias=True)
    args, biases = case.arguments(grad=grad)
    out = linear_epsilon_dpo(*args, **biases, max_tile_bytes=budget)
    assert out.loss.requires_grad == bool(grad)
    truth, expected = run(epsilon_dpo_reference, case)
    assert relative_error(out.loss, truth.loss) < 1e-10
    if grad:
        out.loss.backward(torch.tensor(3.0, dtype=torch.float64))
    for name, tensor, e in zip(GRADS, (args[0], args[1], biases["bias"]), expected, strict=True):
        assert (tensor.grad is None) if name not in grad else (relative_error(tensor.grad, e) < 1e-10)


@pytest.mark.parametrize("pairs", [1, 3])
def test_float32(pairs):
    case = make_case(pairs, length=40, width=32, vocabulary=2003, bias=True, seed=5)
    truth, expected = run(epsilon_dpo_reference, case)
    for budget in (None, 20 * 2003 * 8, 1):
        got, gradients = run(linear_epsilon_dpo, case, torch.float32, max_tile_bytes=budget)
        assert worst_error(got, truth) < 1e-5
        assert got.chosen_logps.dtype == torch.float32
        for g, e in zip(gradients, expected, strict=True):
            assert relative_error(g, e) < 1e-5


@pytest.mark.parametrize("epsilon", [1e-4, 0.02, 0.06, 0.3, 0.9])
def test_float32_shifts_where_the_perturbation_is_small_and_large(epsilon):
    """From |u| of 1e-3 to some 10, with tokens on both sides of the polynomials' limit."""
    case = make_case(4, length=20, width=32, vocabulary=2003, drift=1.0, spread=1.0, seed=7)
    case.ref_hidden.copy_(case.hidden)
    case.ref_hidden[:, ::2] *= 0.125
    args, _ = case.arguments()
    truth = epsilon_dpo_reference(*args, epsilon=epsilon)
    got = linear_epsilon_dpo(*case.arguments(torch.float32)[0], epsilon=epsilon)
    assert relative_error(got.relaxed_shift, truth.relaxed_shift) < 1e-6
    assert relative_error(got.tightened_shift, truth.tightened_shift) < 1e-6
    assert torch.equal(got.step, truth.step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["flat", "peaked"])
def test_16_bit_inputs_err_no_more_than_the_naive_code(dtype, spread):
    case = make_case(3, length=40, width=32, vocabulary=2003, bias=True, spread=spread, seed=6)
    truth, expected = run(epsilon_dpo_reference, case)
    naive, naive_gradients = run(epsilon_dpo_reference, case, dtype)
    got, gradients = run(linear_epsilon_dpo, case, dtype)
    # Statistics come from fp32 accumulators of the very same inputs, so they are as good as fp32's.
    assert worst_error(got, truth) < 1e-4
    for field in ("loss", "chosen_logps", "rejected_rewards", "chosen_kl", "relaxed_shift"):
        ours, theirs = (relative_error(getattr(o, field), getattr(truth, field)) for o in (got, naive))
        assert ours <= theirs + 1e-6, field
    for g, n, e in zip(gradients, naive_gradients, expected, strict=True):
        assert g.dtype == dtype
        assert relative_error(g, e) <= relative_error(n, e) + 1e-6
        assert relative_error(g, e) < torch.finfo(dtype).eps


@pytest.mark.parametrize("budget", [None, 20 * 103 * 16, 1])
def test_packed_form_is_the_padded_one(budget):
    case = make_case(3, bias=True)
    packed, cu_seqlens = pack(case)
    truth, expected = run(linear_epsilon_dpo, case, max_tile_bytes=budget)
    got, gradients = run(linear_epsilon_dpo, packed, max_tile_bytes=budget, cu_seqlens=cu_seqlens)
    for g, t in zip(got, truth, strict=True):
        assert torch.equal(g, t)
    scored = torch.cat(
        [row[: int((label != -100).nonzero().max()) + 1] for row, label in zip(expected[0], case.labels, strict=True)]
    )
    assert torch.equal(gradients[0], scored)
    assert torch.equal(gradients[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("epsilon, far", [(0.01, -1e4), (0.01, -1e9), (0.1, -950.0), (0.5, -185.0)])
def test_a_word_that_the_policy_alone_puts_far_below(dtype, epsilon, far):
    """A finite mask: e^u of its own would overflow at a word whose probability is nothing."""
    case = make_case(2, bias=True, drift=0.3)
    free = next(v for v in range(103) if v not in case.labels.unique().tolist())
    case.bias[free] = far
    truth, expected = run(epsilon_dpo_reference, case, epsilon=epsilon)
    out, gradients = run(linear_epsilon_dpo, case, dtype, epsilon=epsilon)
    assert torch.isfinite(truth.losses).all() and truth.step.any() and torch.equal(out.step, truth.step)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for name in ("losses", "chosen_logps", "rejected_logps", "relaxed_shift", "tightened_shift"):
        assert relative_error(getattr(out, name), getattr(truth, name)) < tolerance, name
    for g, e in zip(gradients, expected, strict=True):
        assert relative_error(g, e) < tolerance


@pytest.mark.parametrize("budget", [None, 1])
def test_a_minus_infinity_in_the_bias(budget):
    """A word that both models forbid changes nothing; one that only the policy forbids is no word of the policy's."""
    case = make_case(2, bias=True)
    free = [v for v in range(103) if v not in case.labels.unique().tolist()][:3]
    case.bias[free] = -torch.inf
    case.ref_bias[free[0]] = -torch.inf
    truth, expected = run(epsilon_dpo_reference, case)
    got, gradients = run(linear_epsilon_dpo, case, max_tile_bytes=budget)
    assert worst_error(got, truth) < 1e-10 and torch.isfinite(got.loss)
    for g, e in zip(gradients, expected, strict=True):
        assert relative_error(g, e) < 1e-10


def test_gradcheck():
    case = make_case(2, length=3, width=3, vocabulary=11, bias=True, drift=0.5)
    args, biases = case.arguments(grad=GRADS)
    for budget in (None, 1):

        def loss(hidden, weight, bias, budget=budget):
            # A decision near its boundary would make the loss jump: ε small enough that β_i does not.
            return linear_epsilon_dpo(
                hidden, weight, *args[2:], bias=bias, ref_bias=biases["ref_bias"], epsilon=0.0, beta=0.7,
                label_smoothing=0.1, softcap=5.0, logit_scale=0.8, max_tile_bytes=budget,
            ).loss  # fmt: skip

        assert torch.autograd.gradcheck(loss, (args[0], args[1], biases["bias"]))


def test_perturbed_sums_of_one_word():
    """e^u − 1 and e^−u − 1 to the last digits of fp32, from u of 1e-9 to 40, by either way of forming them."""
    size = torch.logspace(-6, 1.6, 200)
    d = torch.cat((-size, size))[:, None]
    for epsilon in (0.001, 0.01, 1.0):
        e = torch.ones_like(d)
        moments = torch_engine._Moments(d, epsilon)
        for part in (slice(0, 150), slice(150, 400)):
            moments.add(part, e[part], d[part].clone(), d[part].clone(), 0 * e[part], 0 * e[part])
        for relaxed, tightened in (torch_engine._perturbed(e, d.clone(), e.log(), epsilon), moments.perturbed()):
            for got, u in ((relaxed, epsilon * d[:, 0].double()), (tightened, -epsilon * d[:, 0].double())):
                assert (got.double() / torch.expm1(u) - 1).abs().max() < 1e-6


def test_moments_of_differences_whose_powers_overflow():
    d = torch.tensor([[6e3], [7e5], [3e7], [-2e5]])
    moments = torch_engine._Moments(d, 1e-6)
    moments.add(slice(0, 4), torch.ones_like(d), d.clone(), d.clone(), 0 * d, 0 * d)
    relaxed, tightened = moments.perturbed()
    u = 1e-6 * d[:, 0].double()
    assert (relaxed / torch.expm1(u) - 1).abs().max() < 1e-6
    assert (tightened / torch.expm1(-u) - 1).abs().max() < 1e-6


def test_a_token_alone_has_the_sums_it_has_in_company():
    """Bitwise, with neighbours whose differences are a thousand times larger or smaller than its own."""
    g = torch.Generator().manual_seed(3)
    scale = torch.tensor([1e-3, 1.0, 9.0, 40.0, 70.0, 300.0])[:, None]
    e, d = torch.rand(6, 515, generator=g), scale * torch.rand(6, 515, generator=g)
    together = torch_engine._Moments(d, 0.01)
    together.add(slice(0, 6), e, d.clone(), e * d, e.log(), 0 * e)
    for row in range(6):
        alone = torch_engine._Moments(d[:1], 0.01)
        part = slice(row, row + 1)
        alone.add(slice(0, 1), e[part], d[part].clone(), e[part] * d[part], e[part].log(), 0 * e[part])
        for got, wanted in zip(alone.perturbed(), together.perturbed(), strict=True):
            assert torch.equal(got[0], wanted[row])


def test_a_reference_may_have_no_softcap_where_the_policy_has_one():
    """None is none; only "policy" is the policy's. Against logits worked out here."""
    case = make_case(2, drift=0.3)
    (x, weight, labels, ref_x, ref_weight), _ = case.arguments()
    for function in (linear_epsilon_dpo, epsilon_dpo_reference):
        out = function(x, weight, labels, ref_x, ref_weight, softcap=0.5, ref_softcap=None)
        for logits, logps in (
            (0.5 * torch.tanh(x @ weight.T / 0.5), (out.chosen_logps, out.rejected_logps)),
            (ref_x @ ref_weight.T, (out.ref_chosen_logps, out.ref_rejected_logps)),
        ):
            tokens = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
            expected = tokens.masked_fill(labels == -100, 0).sum(1)
            torch.testing.assert_close(torch.cat(logps), expected, rtol=1e-12, atol=0)
        same = function(x, weight, labels, ref_x, ref_weight, softcap=0.5)
        assert not torch.allclose(same.ref_chosen_logps, out.ref_chosen_logps)


@pytest.mark.parametrize("dtype, wanted", [(torch.float32, "ieee"), (torch.bfloat16, "bf16")], ids=str)
@pytest.mark.parametrize("allowed", ["none", "ieee", "tf32", "bf16"])
def test_the_precision_that_the_process_allows_decides_nothing(allowed, dtype, wanted, monkeypatch):
    """An fp32 head is multiplied in fp32 and a bf16 one exactly, and what was set before is set again."""
    case = make_case(4, width=64, vocabulary=2 * head.BLOCK + 17, length=20, drift=0.05)
    args, _ = case.arguments(dtype, ("hidden", "weight"))
    truth_args = [t.detach().double() if t.is_floating_point() else t for t in args]
    truth_args[0].requires_grad_(), truth_args[1].requires_grad_()
    truth = epsilon_dpo_reference(*truth_args)
    mode, used, linear = torch.backends.mkldnn.matmul, [], head._linear
    monkeypatch.setattr(head, "_linear", lambda *a: used.append(mode.fp32_precision) or linear(*a))
    before = mode.fp32_precision
    mode.fp32_precision = allowed
    try:
        out = linear_epsilon_dpo(*args)
        assert mode.fp32_precision == allowed and set(used) == {wanted}
    finally:
        mode.fp32_precision = before
    assert torch.equal(out.step, truth.step) and truth.step.any()
    assert relative_error(out.chosen_logps, truth.chosen_logps) < 2e-6
    assert relative_error(out.relaxed_shift, truth.relaxed_shift) < 1e-4
    gradients, expected = (torch.autograd.grad(o.loss, a[:2]) for o, a in ((out, args), (truth, truth_args)))
    for g, e in zip(gradients, expected, strict=True):
        assert relative_error(g, e) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_logits_that_differ_by_a_large_constant(engine):
    """Which softmax does not see; the tenth power of it would be summed over the vocabulary."""
    case = make_case(4, width=16, vocabulary=2003, length=9, drift=0.1)
    args, _ = case.arguments(torch.float32)
    options = {"bias": torch.zeros(2003), "ref_bias": torch.full((2003,), -4600.0), "epsilon": 1.5e-4}
    out = linear_epsilon_dpo(*args, **options, engine=engine)
    wide = [t.double() if t.is_floating_point() else t for t in args]
    options |= {name: options[name].double() for name in ("bias", "ref_bias")}
    truth = epsilon_dpo_reference(*wide, **options)
    assert out.loss.item() == pytest.approx(truth.loss.item(), abs=1e-3) and truth.step.any()
    assert torch.equal(out.step, truth.step)


ABOVE = """
import torch
from epsdpo_kernels import head

def follow(call):
    torch.backends.fp32_precision = "ieee"
    call()
    torch.backends.fp32_precision = "tf32"
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision

expected = follow(lambda: None)
with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
    x, w, out = (torch.empty(size, device="cuda") for size in ((3, 4), (7, 4), (3, 7)))
    on_gpu = follow(lambda: head.Head(w, None, 1.0, None).project(x, out))
x, w, out = torch.randn(3, 4), torch.randn(7, 4), torch.empty(3, 7)
on_cpu = follow(lambda: head.Head(w, None, 1.0, None).project(x, out))
assert expected == on_gpu == on_cpu == ("tf32", "tf32"), (expected, on_gpu, on_cpu)
"""


def test_the_precision_follows_the_process_after_a_call():
    """A mode that nobody has set is not set by a call: it goes on following the one above it."""
    subprocess.run([sys.executable, "-c", ABOVE], check=True)


def test_threads_leave_the_precision_as_it_was():
    """A bf16 head in one, an fp32 one in another, at once; each product finds its own."""
    before, found = precisions(), []
    linear = head._linear

    def seen(x, weight):
        found.append((threading.current_thread().name, torch.backends.mkldnn.matmul.fp32_precision))
        time.sleep(0.001)  # another thread's turn
        found.append((threading.current_thread().name, torch.backends.mkldnn.matmul.fp32_precision))
        return linear(x, weight)

    args = {dtype: make_case(2).arguments(dtype)[0] for dtype in (torch.float32, torch.bfloat16)}
    threads = [
        threading.Thread(target=lambda a=a: [linear_epsilon_dpo(*a) for _ in range(5)], name=str(dtype))
        for dtype, a in args.items()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_linear", seen)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(found) == {("torch.float32", "ieee"), ("torch.bfloat16", "bf16")}
    assert precisions() == before


def test_plain_dpo_where_the_reference_alone_forbids_a_word():
    """ε = 0 asks nothing of an infinite difference; KL is infinite, and the loss is not."""
    case = make_case(2, bias=True, drift=0.2)
    free = next(v for v in range(len(case.weight)) if v not in case.labels)
    case.ref_bias[free] = -torch.inf
    args, biases = case.arguments()
    for function in (linear_epsilon_dpo, epsilon_dpo_reference):
        out = function(*args, **biases, epsilon=0.0)
        assert out.losses.isfinite().all() and out.chosen_kl.isinf().all() and not out.step.any()


def as_on_a_gpu_in_fp16(monkeypatch):
    """Gradient tiles are fp16, and are widened for their product; gives the list of the products' rows."""
    backward, products = head.Head.backward, []

    def widened(self, g, x, rows, into, accumulate):
        assert g.dtype == torch.float16
        products.append(len(g))
        backward(self, g.float(), x, rows, into, accumulate)

    monkeypatch.setattr(head.Head, "gradient_dtype", torch.float16)
    monkeypatch.setattr(head.Head, "backward", widened)
    return products


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes what masks then drop
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("tile_bytes", [None, 3 * 103 * 10], ids=["pairs in tiles", "pairs longer than tiles"])
@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_fp16_holds_the_gradients_of_pairs_that_are_learnt_well(engine, tile_bytes, scale, monkeypatch):
    """Pairs of σ(−β·margin) from 1 to 2e-9 in one tile, where fp16 ends at 6e-8; and none of them overflows."""
    case = make_case(4, length=12, vocabulary=103, drift=0.5, spread=1 / scale)
    chosen, rejected, ref_chosen, ref_rejected, *_ = linear_pair_stats(*case.arguments()[0], logit_scale=scale)
    beta = 20 / ((chosen - rejected) - (ref_chosen - ref_rejected)).max().item()

    def gradients(dtype, **options):
        args, _ = case.arguments(dtype, ("hidden",))
        out = linear_epsilon_dpo(*args, beta=beta, epsilon=0.5, logit_scale=scale, **options)
        return torch.autograd.grad(out.loss, args[0])[0]

    truth = gradients(torch.float64, engine="torch")
    as_on_a_gpu_in_fp16(monkeypatch)
    got = gradients(torch.float32, engine=engine, max_tile_bytes=tile_bytes)
    of_pairs = [t.unflatten(0, (2, 4)).transpose(0, 1).flatten(1) for t in (got, truth)]
    size = of_pairs[1].abs().amax(1)
    assert size.min() < 1e-5 * size.max()
    for g, t in zip(*of_pairs, strict=True):
        assert relative_error(g, t) < 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes what masks then drop
@pytest.mark.parametrize("function", [linear_epsilon_dpo, linear_pair_stats], ids=lambda f: f.__name__)
@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_gradients_of_several_tiles_wait_for_one_product(engine, function, monkeypatch):
    """As 16-bit gradients do on a GPU; here they are widened for their product."""
    case = make_case(2, length=40, vocabulary=103, bias=True, masked=False)

    def gradients(dtype, **options):
        args, biases = case.arguments(dtype, GRADS)
        out = function(*args, **biases, **options)
        loss = out.loss if function is linear_epsilon_dpo else out.chosen_logps.sin().sum()
        return torch.autograd.grad(loss, (args[0], args[1], biases["bias"]))

    truth = gradients(torch.float64, engine="torch")
    products = as_on_a_gpu_in_fp16(monkeypatch)
    # Tiles of 3 of a pair's 80 rows, four of which share a product.
    got = gradients(torch.float32, engine=engine, max_tile_bytes=3 * 103 * (2 * 4 + 4 * 2))
    assert sum(products) == 160 and max(products) == 12 and len(products) == 2 * 7
    for g, t in zip(got, truth, strict=True):
        assert relative_error(g, t) < 1e-3


SETTINGS = {
    "nothing": lambda: None,
    "legacy": lambda: torch.set_float32_matmul_precision("high"),
    "legacy, bf16": lambda: torch.set_float32_matmul_precision("medium"),
    "legacy, cuda": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "newer": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


def precisions():
    """What torch says of fp32 products, by both of its interfaces."""
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = "the interfaces disagree"
    return overall, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.parametrize("allow", SETTINGS.values(), ids=SETTINGS.keys())
def test_logits_of_an_fp32_head_are_never_tf32(allow, monkeypatch):
    """On a GPU that need not be there: what the product finds set, and what is set afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **options: seen.append(precisions()) or mm(*args, **options))
    before = precisions()
    try:
        allow()
        allowed = precisions()
        with FakeTensorMode(allow_non_fake_inputs=True):
            x, weight, out = (torch.empty(size, device="cuda") for size in ((3, 4), (7, 4), (3, 7)))
            head.Head(weight, None, 1.0, None).project(x, out)
        assert seen == [("highest", "ieee", "ieee")]
        assert precisions() == allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before[1:]
