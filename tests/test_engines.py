"""Both engines on whatever the generator of cases comes up with, against the reference in float64."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from cases import DISCRETE, field_error, problems, relative_error
from epsdpo_kernels import engines, epsilon_dpo_reference, linear_epsilon_dpo
from test_decisions import fp32_bound, lengths
from test_parity import GRADS, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes what masks then drop


def examples(number: int):
    """The same examples every time. They are small as they are: shrinking a failure would cost more than it tells."""
    return settings(
        max_examples=number, deadline=None, derandomize=True, database=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def compare(case, dtype, tolerance: float, options: dict, engine: str, grad=GRADS) -> None:
    """Every field and gradient at most ``tolerance`` worse than the reference's in the same dtype."""
    materialised = {k: v for k, v in options.items() if k != "max_tile_bytes"}
    truth, expected = run(epsilon_dpo_reference, case, **materialised)
    naive, naive_expected = run(epsilon_dpo_reference, case, dtype, **materialised)
    if grad:
        got, gradients = run(linear_epsilon_dpo, case, dtype, engine=engine, **options)
    else:
        args, biases = case.arguments(dtype)
        got, gradients = linear_epsilon_dpo(*args, **biases, engine=engine, **options), ()
    if not torch.isfinite(truth.losses).all():
        assert torch.equal(torch.isfinite(got.losses), torch.isfinite(truth.losses))
        return
    wrong = got.step != truth.step
    if dtype != torch.float64:
        # Nearer to the boundary than fp32 can tell, a step is a matter of rounding.
        bound = fp32_bound(got, lengths(case), options.get("epsilon", 0.01))
        near = torch.minimum(truth.relaxed_shift.abs(), truth.tightened_shift.abs()) < bound
        assert not (wrong & ~near).any()
    else:
        assert not wrong.any()
    for name in got._fields:
        follows_from_step = name in ("loss", "losses", "beta") or name.endswith("rewards")
        if name not in DISCRETE and not (wrong.any() and follows_from_step):
            ours, theirs = (field_error(o, truth, name) for o in (got, naive))
            # Where a softcap saturates, which word comes first is a matter of rounding.
            if not (name.endswith("token_accuracy") and options.get("softcap")):
                assert ours <= theirs + tolerance, name
    for g, n, e in zip(gradients, naive_expected, expected, strict=False) if not wrong.any() else ():
        assert relative_error(g, e) <= relative_error(n, e) + tolerance


@examples(100)
@given(problems())
def test_torch_engine(problem):
    case, options = problem
    compare(case, torch.float64, 1e-10, options, "torch")


@pytest.mark.parametrize("logit_free", [False, True], ids=["products", "logit-free"])
def test_triton_engine(logit_free, monkeypatch):
    monkeypatch.setattr(engines, "LOGIT_FREE", logit_free)

    @examples(25)
    @given(problems())
    def check(problem):
        case, options = problem
        compare(case, torch.float32, 1e-5, options, "triton")

    check()
