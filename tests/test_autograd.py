"""What a training loop does with the loss: scales, combines, compiles, accumulates, casts."""

import weakref

import pytest
import torch

from cases import flat_call, make_case, relative_error
from epsdpo_kernels import EpsilonDPOLoss, epsilon_dpo_reference, linear_epsilon_dpo, linear_pair_stats, ops
from epsdpo_kernels.pair import preference_losses

GRADS = ("hidden", "weight", "bias")


def leaves(case, dtype=None):
    args, biases = case.arguments(dtype, GRADS)
    return args, biases, [t for t in (args[0], args[1], biases["bias"]) if t is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_backward_twice_and_combined(dtype):
    case = make_case(3, bias=True)
    args, biases, inputs = leaves(case, dtype)
    loss = linear_epsilon_dpo(*args, **biases).loss
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    combined = torch.autograd.grad(2 * loss + sum(t.double().square().sum() for t in inputs), inputs)
    for a, b, c, t in zip(first, second, combined, inputs, strict=True):
        assert torch.equal(a, b)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        assert relative_error(c, 2 * a.double() + 2 * t.detach().double()) < tolerance


@pytest.mark.parametrize("scaled", [False, True], ids=["by one", "by what trains"])
@pytest.mark.parametrize("function", [linear_epsilon_dpo, linear_pair_stats], ids=lambda f: f.__name__)
def test_second_derivative_is_refused(function, scaled):
    """Of a penalty on the gradient nothing would be left; the first derivative itself is as ever."""
    args, _, inputs = leaves(make_case(1))
    scale = torch.ones((), dtype=torch.float64, requires_grad=scaled)
    first = torch.autograd.grad(function(*args)[0].sum(), inputs)
    loss = function(*args)[0].sum() * scale
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    assert all(torch.equal(g, f) for g, f in zip(gradients, first, strict=True))
    for g in gradients:
        with pytest.raises(NotImplementedError, match="^loss: got a second derivative to take, takes first ones"):
            (loss + g.square().sum()).backward(retain_graph=True)


@pytest.mark.parametrize("function", [linear_epsilon_dpo, linear_pair_stats], ids=lambda f: f.__name__)
def test_transforms_are_refused(function):
    args, _ = make_case(1).arguments()
    with pytest.raises(NotImplementedError, match="^loss: got a call within a transform of torch.func"):
        torch.func.grad(lambda weight: function(args[0], weight, *args[2:])[0].sum())(args[1])


@pytest.mark.parametrize("function", [linear_epsilon_dpo, linear_pair_stats], ids=lambda f: f.__name__)
def test_forward_mode_is_refused(function):
    """By both of its interfaces: its derivatives would be zeros."""
    args, _ = make_case(1).arguments()
    tangent = torch.ones_like(args[1])
    with pytest.raises(NotImplementedError, match="^weight: got a tangent of forward-mode autograd"):
        torch.func.jvp(lambda weight: function(args[0], weight, *args[2:])[0], (args[1],), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        hidden = torch.autograd.forward_ad.make_dual(args[0], torch.ones_like(args[0]))
        with pytest.raises(NotImplementedError, match="^hidden: got a tangent"):
            function(hidden, *args[1:])


def test_a_loss_scaler_comes_in_before_the_cast():
    """β 1e-6 with a scale of 2¹⁶: unscaled fp16 gradients would be zero."""
    case = make_case(2, drift=0.3)
    args, _, inputs = leaves(case, torch.float16)
    truth_args, _, truth_inputs = leaves(case)
    (scaled, _) = torch.autograd.grad(linear_epsilon_dpo(*args, beta=1e-6).loss * 2.0**16, inputs)
    (truth, _) = torch.autograd.grad(epsilon_dpo_reference(*truth_args, beta=1e-6).loss * 2.0**16, truth_inputs)
    assert relative_error(scaled, truth) < 2e-3


@pytest.mark.parametrize("function", [linear_epsilon_dpo, epsilon_dpo_reference])
def test_nothing_scored_stays_in_the_graph(function):
    case = make_case(2, bias=True)
    case = case._replace(labels=torch.full_like(case.labels, -100))
    args, biases, inputs = leaves(case)
    out = function(*args, **biases)
    assert out.loss == 0 and out.loss.requires_grad
    for g in torch.autograd.grad(out.loss, inputs):
        assert g.count_nonzero() == 0
    assert all(v.shape == (2,) and v.count_nonzero() == 0 for v in out[1:])


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("budget", [None, 1])
def test_not_finite_is_no_decision(bad, budget, softcap):
    case = make_case(3, masked=False)
    args, _, inputs = leaves(case)
    good = linear_epsilon_dpo(*args, softcap=softcap)
    with torch.no_grad():
        args[0][1, 2, 0] = bad
    out = linear_epsilon_dpo(*args, max_tile_bytes=budget, softcap=softcap)
    assert epsilon_dpo_reference(*args, softcap=softcap).losses.isnan().tolist() == [False, True, False]
    assert out.losses.isnan().tolist() == [False, True, False] and out.loss.isnan()
    assert out.step[1] == 0 and torch.equal(out.step[[0, 2]], good.step[[0, 2]])
    assert torch.autograd.grad(out.loss, inputs)[1].isnan().any()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiler_leaves_the_two_passes_alone(backend):
    """Whose inside is no graph: it has been compiled, and Inductor found no way to lower it."""
    args, _, inputs = leaves(make_case(2), torch.float32)

    def stats(*args):
        return linear_pair_stats(*args, max_tile_bytes=1)

    outputs = []
    for function in (stats, torch.compile(stats, backend=backend)):
        out = function(*args)
        outputs.append((*out, *torch.autograd.grad((out.chosen_logps.sin() - out.rejected_logps).sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_hidden_states_are_freed_with_the_graph():
    """As those of any other op, and kept wherever saved tensors are kept."""
    args, _, inputs = leaves(make_case(2))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        hidden = args[0] * 1
        out = linear_pair_stats(hidden, *args[1:])
    assert packed.count(hidden.flatten(0, 1).shape) == 1
    freed = weakref.ref(hidden.untyped_storage())
    del hidden
    assert freed() is not None
    first = torch.autograd.grad(out.chosen_logps.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.chosen_logps.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert freed() is None


@pytest.mark.parametrize("function", [linear_epsilon_dpo, linear_pair_stats], ids=lambda f: f.__name__)
def test_the_default_device_is_not_asked(function):
    args, _, inputs = leaves(make_case(2), torch.float32)
    expected = function(*args)
    torch.set_default_device("meta")
    try:
        got = function(*args)
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_compiled_is_eager(bias):
    case = make_case(2, bias=bias)
    loss_fn = EpsilonDPOLoss()

    def step(hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias):
        return loss_fn(hidden, weight, labels, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias)

    outputs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        (x, w, labels, *ref), biases, inputs = leaves(case, torch.float32)
        out = function(x, w, biases["bias"], labels, *ref, biases["ref_bias"])
        outputs.append((*out, *torch.autograd.grad(2 * out.loss, inputs)))
    for eager, compiled in zip(*outputs, strict=True):
        assert torch.equal(eager, compiled)
    assert loss_fn.counts.sum() == 4


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, False, False]], ids=str)
def test_opcheck(needs):
    case = make_case(2, bias=True)
    torch.library.opcheck(ops.single_pass, (*flat_call(case, "torch"), needs))


@pytest.mark.parametrize("budget", [None, 1], ids=["whole", "tiles"])
def test_inference_mode(budget):
    args, biases = make_case(3, bias=True).arguments()
    expected = linear_epsilon_dpo(*args, **biases, max_tile_bytes=budget)
    stats = linear_pair_stats(*args, **biases, max_tile_bytes=budget)
    with torch.inference_mode():
        for got, wanted in (
            (linear_epsilon_dpo(*args, **biases, max_tile_bytes=budget), expected),
            (linear_pair_stats(*args, **biases, max_tile_bytes=budget), stats),
        ):
            assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
            assert not any(t.requires_grad for t in got)


@pytest.mark.parametrize("pairs", [1, 2])
def test_pairs_longer_than_a_tile_scaled_or_left_to_backward(pairs):
    """A call's only pair leaves its coefficient to backward; several long ones are scaled one by one."""
    case = make_case(pairs, bias=True, drift=0.3)
    args, biases, inputs = leaves(case)
    truth_args, truth_biases, truth_inputs = leaves(case)
    for factor in (1.0, 2.0**16):
        loss = linear_epsilon_dpo(*args, **biases, max_tile_bytes=1, label_smoothing=0.2).loss * factor
        truth = epsilon_dpo_reference(*truth_args, **truth_biases, label_smoothing=0.2).loss * factor
        kept = torch.autograd.grad(loss, inputs, retain_graph=True)
        given = torch.autograd.grad(loss, inputs)
        for k, g, t in zip(kept, given, torch.autograd.grad(truth, truth_inputs), strict=True):
            assert torch.equal(k, g) and relative_error(g, t) < 1e-10


def test_only_other_results_are_asked_for():
    """The loss plays no part in what is differentiated."""
    args, _, inputs = leaves(make_case(2))
    out = linear_epsilon_dpo(*args)
    assert not any(t.requires_grad for t in out[1:])
    assert torch.autograd.grad(out.loss * 0 + inputs[0].sum(), inputs[0])[0].eq(1).all()


def test_autocast_takes_the_autocast_dtype():
    case = make_case(2)
    args, _, inputs = leaves(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_epsilon_dpo(*args)
    gradients = torch.autograd.grad(out.loss, inputs)
    bf16_args, _, bf16_inputs = leaves(case, torch.bfloat16)
    expected = linear_epsilon_dpo(*bf16_args)
    assert torch.equal(out.chosen_logps, expected.chosen_logps) and out.chosen_logps.dtype == torch.float32
    for g, e in zip(gradients, torch.autograd.grad(expected.loss, bf16_inputs), strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, e.float())


@pytest.mark.parametrize("budget", [None, 20 * 103 * 16, 1])
@pytest.mark.parametrize("pairs", [1, 4])
def test_pair_stats_carry_any_loss(budget, pairs):
    case = make_case(pairs, bias=True, drift=0.2)
    args, biases, inputs = leaves(case)
    stats = linear_pair_stats(*args, **biases, softcap=3.0, max_tile_bytes=budget)
    truth_args, truth_biases, truth_inputs = leaves(case)
    truth = epsilon_dpo_reference(*truth_args, **truth_biases, softcap=3.0, label_smoothing=0.1)
    for name in stats._fields:
        assert relative_error(getattr(stats, name), getattr(truth, name)) < 1e-10, name
    losses = preference_losses(*stats[:4], truth.beta, 0.1)
    for g, e in zip(
        torch.autograd.grad(losses.mean(), inputs), torch.autograd.grad(truth.loss, truth_inputs), strict=True
    ):
        assert relative_error(g, e) < 1e-10
    # A loss that reads the sides apart, which the single pass could not serve.
    stats = linear_pair_stats(*args, **biases, max_tile_bytes=budget)
    got = torch.autograd.grad((stats.chosen_logps.square() + 3 * stats.rejected_logps).sum(), inputs)
    logits = (truth_args[0] @ truth_args[1].T + truth_biases["bias"]).log_softmax(-1)
    logps = logits.gather(-1, case.labels.clamp_min(0)[..., None])[..., 0].masked_fill(case.labels == -100, 0).sum(1)
    chosen, rejected = logps.chunk(2)
    expected = torch.autograd.grad((chosen.square() + 3 * rejected).sum(), truth_inputs)
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-10


def test_pair_stats_without_tokens():
    case = make_case(2)
    case = case._replace(labels=torch.full_like(case.labels, -100))
    args, _, inputs = leaves(case)
    stats = linear_pair_stats(*args)
    for g in torch.autograd.grad(stats.chosen_logps.sum(), inputs):
        assert g.count_nonzero() == 0


def test_cuda_graphs_leave_the_pass_alone():
    """It reads lengths back to the host: mode="reduce-overhead" would fail while it captures."""
    assert torch.Tag.cudagraph_unsafe in ops.single_pass._opoverload.tags


@pytest.mark.parametrize("budget", [None, 1], ids=["pairs", "long pairs"])
def test_a_shift_that_is_not_finite_stops_the_run(budget):
    """ε·d of 200 overflows in fp32 where the log-probs do not: such a pair has no decision, and no loss."""
    hidden = torch.ones(4, 2, 1, requires_grad=True)
    weight = torch.zeros(3, 1, requires_grad=True)
    ref_hidden = torch.ones(4, 2, 1)
    ref_hidden[1::2] = 0  # pair 1 and its reference agree
    ref_weight = torch.tensor([[-400.0], [0.0], [0.0]])
    labels = torch.tensor([[1, 2]] * 4)
    out = linear_epsilon_dpo(hidden, weight, labels, ref_hidden, ref_weight, epsilon=0.5, max_tile_bytes=budget)
    assert torch.isfinite(torch.stack((out.chosen_logps, out.ref_chosen_logps, out.ref_rejected_logps))).all()
    assert not torch.isfinite(out.relaxed_shift[0]) and out.step[0] == 0
    assert out.losses.isnan().tolist() == [True, False] and out.loss.isnan()
    dx, dw = torch.autograd.grad(out.loss, (hidden, weight))
    assert dx[0::2].isnan().all() and dw.isnan().all()
