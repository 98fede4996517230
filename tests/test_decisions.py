"""The check: the very step of float64, and what it means."""

from itertools import product

import torch

from cases import Case, make_case
from epsdpo_kernels import epsilon_dpo_reference, linear_epsilon_dpo
from epsdpo_kernels.plan import Rows, lay_out, rows_per_tile, tile_budget

EPSILON = 0.01


def fp32_bound(out, tokens: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Below this |shift|, fp32 may decide otherwise than float64: (B,).

    A token's shift is of order ε·d and each of its terms is rounded at 2⁻²⁴ of the logits that d comes from; half a
    dozen such roundings, of random sign, over the tokens of both completions.
    """
    largest_logit = 8.0  # of the cases below: unit-variance logits
    return 6 * epsilon * 2**-24 * largest_logit * tokens.sqrt()


def many_pairs(drift: float, pairs: int = 2000) -> Case:
    return make_case(pairs, length=12, width=32, vocabulary=1031, drift=drift, seed=11)


def lengths(case: Case) -> torch.Tensor:
    return sum((case.labels != -100).sum(1).chunk(2)).double()


def test_two_thousand_pairs_decide_as_float64():
    for drift in (0.01, 0.1):
        case = many_pairs(drift)
        args, _ = case.arguments()
        truth = epsilon_dpo_reference(*args, epsilon=EPSILON)
        assert (truth.step == 1).sum() > 500 and (truth.step == -1).sum() > 500
        for dtype in (torch.float32, torch.bfloat16):
            args, _ = case.arguments(dtype)
            got = linear_epsilon_dpo(*args, epsilon=EPSILON)
            bound = fp32_bound(got, lengths(case), EPSILON)
            near = (truth.relaxed_shift.abs() < bound) | (truth.tightened_shift.abs() < bound)
            wrong = (got.step != truth.step) & ~near
            assert wrong.sum() == 0
            assert near.sum() <= 0.01 * len(near), "the bound excuses too much"
            for field in ("relaxed_shift", "tightened_shift"):
                error = (getattr(got, field).double() - getattr(truth, field)).abs()
                assert (error <= bound).all(), field


def test_bf16_logits_decide_by_rounding():
    """Why the package exists: the same inputs, logits in bf16."""
    case = many_pairs(0.01, 200)
    truth = epsilon_dpo_reference(*case.arguments()[0], epsilon=EPSILON)
    naive = epsilon_dpo_reference(*case.arguments(torch.bfloat16)[0], epsilon=EPSILON)
    assert (naive.step != truth.step).double().mean() > 0.3


def test_at_the_reference_every_step_is_zero():
    case = many_pairs(0.0, 50)
    case = case._replace(hidden=case.ref_hidden, weight=case.ref_weight)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for softcap in (None, 3.0):
            out = linear_epsilon_dpo(*case.arguments(dtype)[0], epsilon=EPSILON, softcap=softcap)
            for field in ("relaxed_shift", "tightened_shift", "step", "chosen_kl", "chosen_rewards"):
                assert getattr(out, field).count_nonzero() == 0, field


def test_first_order_meaning_of_the_check():
    """ε → 0: the step is the sign of margin − (KL_chosen − KL_rejected)."""
    case = many_pairs(0.2, 300)
    out = linear_epsilon_dpo(*case.arguments()[0], epsilon=1e-7)
    margin = (out.chosen_logps - out.rejected_logps) - (out.ref_chosen_logps - out.ref_rejected_logps)
    first_order = margin - (out.chosen_kl - out.rejected_kl)
    assert torch.equal(out.step.double(), first_order.sign())
    torch.testing.assert_close(out.relaxed_shift / 1e-7, first_order, rtol=1e-4, atol=1e-4)


def test_a_pair_decides_alone():
    """Bitwise the same shifts in float64 and fp32 whatever the batch, the order and the tile."""
    case = make_case(6, length=12, width=32, vocabulary=1031, drift=0.05, seed=2)
    for dtype in (torch.float64, torch.float32):
        args, _ = case.arguments(dtype)
        together = linear_epsilon_dpo(*args)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        both = torch.cat((order, order + 6))
        shuffled = linear_epsilon_dpo(args[0][both], args[1], args[2][both], args[3][both], args[4])
        assert torch.equal(shuffled.step, together.step[order])
        tolerance = 1e-12 if dtype == torch.float64 else 2e-7
        torch.testing.assert_close(shuffled.relaxed_shift, together.relaxed_shift[order], rtol=1e-3, atol=tolerance)
        for i in range(6):
            rows = torch.tensor([i, i + 6])
            alone = linear_epsilon_dpo(args[0][rows], args[1], args[2][rows], args[3][rows], args[4])
            assert alone.step == together.step[i]
        for budget in (1, 5 * 1031 * 8, 100 * 1031 * 8):
            tiled = linear_epsilon_dpo(*args, max_tile_bytes=budget)
            assert torch.equal(tiled.step, together.step)
            torch.testing.assert_close(tiled.relaxed_shift, together.relaxed_shift, rtol=1e-3, atol=tolerance)


def test_layout_partitions_the_scored_tokens():
    case = make_case(5, length=9)
    labels = case.labels.flatten()
    counts = (case.labels != -100).sum(1).tolist()
    for alone, rows in product(
        (False, True), (Rows(1, 0), Rows(2, 9), Rows(7, 14), Rows(20, 0), Rows(9, 40), Rows(1000, 0))
    ):
        layout = lay_out(labels, counts, rows, alone)
        tiles = [t for s in layout.series for t in s.tiles]
        assert [i for t in tiles for i in range(t.rows.start, t.rows.stop)] == list(range(sum(counts)))
        assert max(map(len, tiles)) == layout.rows <= rows.tile
        assert [i for s in layout.series for i in s.pairs] == list(range(5))
        assert layout.bounds.tolist() == layout.edges
        completions = [c for c in range(10) for _ in range(layout.edges[c + 1] - layout.edges[c])]
        assert layout.completion.tolist() == completions
        for i in range(5):
            for side, row in ((0, i), (1, 5 + i)):
                start, stop = layout.edges[2 * i + side : 2 * i + side + 2]
                expected = (case.labels[row] != -100).nonzero()[:, 0] + 9 * row
                assert torch.equal(layout.order[start:stop], expected)
        for s in layout.series:
            if s.long:
                assert len(s.pairs) == 1 and not any(t.pairs for t in s.tiles)
            else:
                assert [i for t in s.tiles for i in t.pairs] == list(s.pairs)
                assert not alone or all(len(t.pairs) == 1 for t in s.tiles)
                for t in s.tiles:
                    edges = layout.edges[2 * t.pairs.start], layout.edges[2 * t.pairs.stop]
                    assert edges == (t.rows.start, t.rows.stop)
        groups = [g for s in layout.series for g in s.groups]
        of_groups = [sum(map(len, g)) for g in groups]
        assert max(of_groups) == layout.group_rows
        assert all(len(g) == 1 or n <= rows.group for g, n in zip(groups, of_groups, strict=True))


def test_tiles_and_their_gradients_fit_the_budget():
    """Of the heads in bench, bf16 on a GPU: what fits, and how many rows one product with a gradient has."""
    found = {}
    heads = {"llama3": (128256, 4096), "gemma2": (256000, 3584), "smollm2": (49152, 576)}
    for name, (vocabulary, hidden) in heads.items():
        budget = tile_budget(vocabulary, hidden, on_gpu=True)
        assert budget == 1 << 30 and tile_budget(vocabulary, hidden, True, 77) == 77
        assert tile_budget(vocabulary, hidden, on_gpu=False) == min(max(256 << 20, 4 * vocabulary * hidden), 1 << 30)

        def bytes_of(rows, vocabulary=vocabulary):
            return vocabulary * (8 * rows.tile + 2 * max(rows.group, rows.tile))

        whole = budget // (10 * vocabulary)
        rows = {size: rows_per_tile([size] * 9999, vocabulary, budget, 4, gradient=2, wait=True)
                for size in (4, whole // 2, whole, whole + 1)}  # fmt: skip
        assert all(0.99 * budget < bytes_of(each) <= budget for each in rows.values())
        assert rows[4] == rows[whole // 2] == rows[whole + 1]
        assert rows[whole].tile == whole and rows[whole].group < whole + 5  # room for no second tile
        found[name] = rows[4].group
        alone = rows_per_tile([whole], vocabulary, budget, 4, gradient=2, wait=True)
        assert alone == (whole, 0) and 0.99 * budget < bytes_of(alone) <= budget
        # Logits that gradients overwrite, or no dW: nothing waits.
        assert rows_per_tile([4] * 9999, vocabulary, budget, 4, wait=True) == (budget // (8 * vocabulary), 0)
        assert rows_per_tile([4] * 9999, vocabulary, budget, 4, gradient=2) == (whole, 0)
    assert found == {"llama3": 2093, "gemma2": 1049, "smollm2": 5462}
