"""Bad input gets an error that names the argument, what came and what is taken."""

import numpy as np
import pytest
import torch

from cases import make_case, pack
from epsdpo_kernels import EpsilonDPOLoss, call, engines, epsilon_dpo_reference, linear_epsilon_dpo, linear_pair_stats

BAD_SCALARS = [
    ({"beta": 0.0}, "beta: got 0.0, takes a positive finite number"),
    ({"beta": float("nan")}, "beta: got nan"),
    ({"beta": torch.tensor(-1.0)}, "beta: got -1.0"),
    ({"beta": torch.ones(2)}, r"beta: got a torch.float32 tensor of shape \(2,\), takes one float"),
    ({"beta": "0.1"}, "beta: got '0.1', takes a positive finite number"),
    ({"beta": 1e39}, r"beta: got 1e\+39, takes"),
    ({"epsilon": None}, "epsilon: got None, takes a number in"),
    ({"epsilon": torch.ones(2)}, "epsilon: got tensor"),
    ({"label_smoothing": "0"}, "label_smoothing: got '0', takes"),
    ({"max_kl": [1.0]}, r"max_kl: got \[1.0\], takes nats"),
    ({"softcap": 10**400}, "softcap: got 1000"),
    ({"softcap": 1e-46}, "softcap: got 1e-46, takes a positive"),  # 0 in fp32
    ({"logit_scale": 1e-300}, "logit_scale: got 1e-300, takes a finite number other than 0"),
    ({"max_tile_bytes": 1e6}, "max_tile_bytes: got 1000000.0, takes a positive integer"),
    ({"epsilon": 1.0}, "epsilon: got 1.0, takes a number in"),
    ({"epsilon": 1 - 1e-9}, r"epsilon: got 0.999999999, takes a number in \(0, 1\), in fp32 too"),  # a β of 1/0 there
    ({"epsilon": -0.1}, "epsilon: got -0.1"),
    ({"label_smoothing": 0.5}, "label_smoothing: got 0.5, takes a number in"),
    ({"max_entropy": -1.0}, "max_entropy: got -1.0, takes nats from 0, or None"),
    ({"max_kl": float("nan")}, "max_kl: got nan"),
    ({"softcap": 0.0}, "softcap: got 0.0, takes a positive"),
    ({"ref_softcap": -1.0}, "ref_softcap: got -1.0"),
    ({"ref_softcap": "none"}, "ref_softcap: got 'none', takes a positive finite number, None for none, or 'policy'"),
    ({"logit_scale": 0.0}, "logit_scale: got 0.0"),
    ({"ref_logit_scale": None}, "ref_logit_scale: got None, takes a finite number other than 0, or 'policy'"),
    ({"engine": "cuda"}, "engine: got 'cuda', takes one of"),
    ({"max_tile_bytes": 0}, "max_tile_bytes: got 0, takes a positive"),
]


@pytest.mark.parametrize("options, message", BAD_SCALARS, ids=str)
def test_scalars(options, message):
    args, _ = make_case().arguments()
    with pytest.raises(ValueError, match=message):
        linear_epsilon_dpo(*args, **options)


def test_numbers_of_numpy_and_of_tensors_are_numbers():
    args, _ = make_case().arguments()
    expected = linear_epsilon_dpo(*args, logit_scale=0.5, softcap=3.0, epsilon=0.25)
    got = linear_epsilon_dpo(*args, logit_scale=np.float32(0.5), softcap=torch.tensor(3.0), epsilon=np.float32(0.25))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


BAD_TENSORS = [
    (0, lambda t: None, TypeError, "^hidden: got NoneType, takes a dense tensor"),
    (1, lambda t: t.tolist(), TypeError, "^weight: got list, takes a dense tensor"),
    (2, lambda t: t.to_sparse(), TypeError, "labels: got a torch.sparse_coo tensor, takes a dense"),
    (0, lambda t: t.to("meta"), ValueError, "^hidden: got a tensor on meta, which holds no numbers"),
    (4, lambda t: "w", TypeError, "ref_weight: got str, takes a dense"),
    (0, lambda t: t[:3], ValueError, "hidden: got 3 rows, takes an even number|labels: got shape"),
    (0, lambda t: t[0], ValueError, r"hidden: got shape \(7, 6\), takes \(2B, T, H\)"),
    (0, lambda t: t.int(), TypeError, "^hidden: got torch.int32, takes float32"),
    (1, lambda t: t[:, :5], ValueError, r"weight: got shape \(103, 5\), takes \(V, 6\)"),
    (1, lambda t: t.float(), TypeError, "weight: got torch.float32, takes hidden's dtype, torch.float64"),
    (1, lambda t: t[:0], ValueError, r"weight: got shape \(0, 6\)"),
    (2, lambda t: t[:, :5], ValueError, r"labels: got shape \(4, 5\), takes \(4, 7\)"),
    (2, lambda t: t.int(), TypeError, "labels: got torch.int32, takes int64"),
    (2, lambda t: t.masked_fill(t != -100, 103), ValueError, r"labels: got 103, takes \[0, 103\) or -100"),
    (2, lambda t: t.masked_fill(t != -100, -1), ValueError, r"labels: got -1, takes"),
    (3, lambda t: t[:, :5], ValueError, r"ref_hidden: got shape \(4, 5, 6\)"),
    (3, lambda t: t.float(), TypeError, "ref_hidden: got torch.float32 with hidden torch.float64"),
    (4, lambda t: t[:99], ValueError, "ref_weight: got a vocabulary of 99, takes the policy's, 103"),
    (4, lambda t: t[:, :5], ValueError, r"ref_weight: got shape \(103, 5\), takes \(V, 6\)"),
]


@pytest.mark.parametrize("function", [linear_epsilon_dpo, linear_pair_stats])
@pytest.mark.parametrize("name, value, came", [
    ("weight", torch.ones(103, 6, dtype=torch.int8), "torch.int8, takes float32"), ("weight", None, "NoneType"),
    ("ref_weight", np.ones((103, 6)), "ndarray"), ("bias", [0.0] * 103, "list"),
    ("ref_bias", torch.zeros(103, dtype=torch.int64), "torch.int64, takes float32"),
], ids=["int8", "None", "numpy", "list", "int64"])  # fmt: skip
def test_autocast_casts_no_tensor_that_is_not_taken(function, name, value, came):
    """A quantised head would be taken for the weights that its whole numbers stand for."""
    args, _ = make_case().arguments(torch.float32)
    names = dict(zip(("hidden", "weight", "labels", "ref_hidden", "ref_weight"), args, strict=True))
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with pytest.raises(TypeError, match=f"^{name}: got {came if autocast else ''}"):
                function(**names | {name: value})


@pytest.mark.parametrize("position, change, error, message", BAD_TENSORS, ids=[b[3] for b in BAD_TENSORS])
@pytest.mark.parametrize("function", [linear_epsilon_dpo, linear_pair_stats], ids=["loss", "stats"])
def test_tensors(function, position, change, error, message):
    args = list(make_case().arguments()[0])
    args[position] = change(args[position])
    with pytest.raises(error, match=message):
        function(*args)


@pytest.mark.parametrize("name", ["vocab_group", "sequence_group"])
def test_groups(name):
    with pytest.raises(TypeError, match=f"{name}: got 'tp', takes a process group"):
        linear_epsilon_dpo(*make_case().arguments()[0], **{name: "tp"})


def test_odd_rows_are_named():
    args = [t[:3] if t.dim() == 3 or t.dtype == torch.int64 else t for t in make_case().arguments()[0]]
    with pytest.raises(ValueError, match="hidden: got 3 rows, takes an even number"):
        linear_epsilon_dpo(*args)


def test_bias_of_another_vocabulary():
    args, biases = make_case(bias=True).arguments()
    with pytest.raises(ValueError, match=r"bias: got shape \(99,\), takes \(103,\)"):
        linear_epsilon_dpo(*args, bias=biases["bias"][:99])
    with pytest.raises(ValueError, match=r"ref_bias: got shape \(99,\), takes \(103,\)"):
        linear_epsilon_dpo(*args, ref_bias=biases["bias"][:99])


@pytest.mark.parametrize("row, message", [(1, "chosen completion of pair 1"), (2, "rejected completion of pair 0")])
def test_an_empty_completion_is_named(row, message):
    case = make_case()
    case.labels[row] = -100
    with pytest.raises(ValueError, match=f"labels: the {message} has no scored token"):
        linear_epsilon_dpo(*case.arguments()[0])


@pytest.mark.parametrize(
    "change", [lambda c: c + 1, lambda c: c.flip(0), lambda c: c[:-1], lambda c: c.float(), lambda c: c[None]]
)
def test_cu_seqlens(change):
    case, cu_seqlens = pack(make_case())
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        linear_epsilon_dpo(*case.arguments()[0], cu_seqlens=change(cu_seqlens))


def test_reference_and_module_check_too():
    args, _ = make_case().arguments()
    with pytest.raises(ValueError, match="epsilon: got 2"):
        epsilon_dpo_reference(*args, epsilon=2)
    with pytest.raises(ValueError, match="beta: got -1"):
        epsilon_dpo_reference(*args, beta=torch.tensor(-1.0))
    for row, label, said in ((0, -5, "labels: got -5"), (0, 10**6, "labels: got 1000000"), (1, -100, "has no scored")):
        case = make_case()
        case.labels[row] = label
        with pytest.raises(ValueError, match=said):
            epsilon_dpo_reference(*case.arguments()[0])
    with pytest.raises(ValueError, match="beta_update: got 'mean'"):
        EpsilonDPOLoss(beta_update="mean")
    with pytest.raises(ValueError, match="beta: got -1"):
        EpsilonDPOLoss(beta=-1)


@pytest.mark.parametrize("capability, usable", [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 1), True)])
def test_gpus_that_triton_has_no_kernels_for(capability, usable, monkeypatch):
    """ "auto" leaves them to torch, "triton" is refused; float64 is torch's everywhere."""
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode():
        hidden, wide = (torch.empty(2, 3, 4, dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float64))
    names = [engines.tile_operations("auto", x).__name__.rpartition(".")[2] for x in (hidden, wide, hidden.cpu())]
    assert names == ["triton_engine" if usable else "torch_engine", "torch_engine", "torch_engine"]
    if usable:
        assert engines.tile_operations("triton", hidden).__name__.endswith("triton_engine")
    else:
        message = (
            f"engine: got 'triton' on a GPU of compute capability {capability[0]}.{capability[1]}, below 8.0, takes"
        )
        with pytest.raises(ValueError, match=message):
            engines.tile_operations("triton", hidden)


def test_integers_are_bound_as_floats():
    """Which they are to a kernel, too: an integer would be one that is compiled once more."""
    args, _ = make_case().arguments()
    policy, reference = call.heads((args[1], None), (args[4], None), (2, 3), (30, "policy"))
    settings = call.bind_settings(1, 0, 0, None, None, args[0])
    numbers = (policy.scale, policy.softcap, reference.scale, reference.softcap, settings.epsilon)
    assert numbers == (2, 30, 3, 30, 0) and {type(n) for n in numbers} == {float}
