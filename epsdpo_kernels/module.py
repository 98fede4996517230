"""The module that owns the running β and the counts of an optimizer step's decisions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import checks
from .linear import EpsilonDPOOutput, linear_epsilon_dpo
from .pair import BETA_UPDATES, next_beta


class EpsilonDPOLoss(nn.Module):
    """ε-DPO with its running β.

    Call it with the tensors of :func:`linear_epsilon_dpo`, and :meth:`update_beta` once per optimizer step. Decisions
    are counted in training mode only. β and the counts are in the state dict, so a resumed run goes on with them.

    Args:
        beta: β at the start.
        epsilon: size of the perturbation.
        beta_update: "mean-step", β ← β/(1 + ε·mean step), the authors' code; "mean-beta", β ← mean of the pairs' β, the
            paper's text; "none" keeps it.
        label_smoothing: s in [0, 0.5).
        max_entropy, max_kl: nats above which a relaxation is withheld; see :func:`linear_epsilon_dpo`.
    """

    beta: Tensor  # () fp32
    counts: Tensor  # (3,) int64: relaxed, kept, tightened pairs since the last update

    def __init__(
        self,
        beta: float = 0.1,
        epsilon: float = 0.01,
        beta_update: str = "mean-step",
        label_smoothing: float = 0.0,
        max_entropy: float | None = None,
        max_kl: float | None = None,
    ):
        super().__init__()
        if isinstance(beta, Tensor) and beta.numel() == 1:  # whose value a call would read with the first labels
            beta = beta.item()
        checks.check_scalars(beta, epsilon, label_smoothing)
        if beta_update not in BETA_UPDATES:
            raise ValueError(f"beta_update: got {beta_update!r}, takes one of {BETA_UPDATES}")
        # Python's own numbers, which a record can hold, whatever kind they came as.
        self.epsilon, self.beta_update, self.label_smoothing = float(epsilon), beta_update, float(label_smoothing)
        self.max_entropy, self.max_kl = checks.check_veto(max_entropy, max_kl)
        self.register_buffer("beta", torch.tensor(float(beta), dtype=torch.float32))
        # No buffer: within a module that DDP wraps, all ranks' buffers are set to the first's before each forward.
        self.counts = torch.zeros(3, dtype=torch.int64)

    def get_extra_state(self) -> Tensor:
        return self.counts

    def set_extra_state(self, state: Tensor) -> None:
        # Not into them: they may be on meta, where load_state_dict(assign=True) has put β in its place.
        self.counts = state.to(self.beta.device, torch.int64, copy=True)

    def _apply(self, fn, recurse=True):
        # β is a running product of factors near 1: a module cast to bf16 must not round it away.
        beta = self.beta
        super()._apply(fn, recurse)
        self.beta = self.beta.to(beta.dtype) if beta.is_meta else beta.to(self.beta.device)
        self.counts = fn(self.counts)
        return self

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor, ref_weight: Tensor, **kwargs
    ) -> EpsilonDPOOutput:
        out = linear_epsilon_dpo(
            hidden, weight, labels, ref_hidden, ref_weight, beta=self.beta.clone(), epsilon=self.epsilon,
            label_smoothing=self.label_smoothing, max_entropy=self.max_entropy, max_kl=self.max_kl, **kwargs,
        )  # fmt: skip
        if self.training:
            # A micro-batch in which nothing is scored used no β, and decided nothing.
            self.counts += torch.stack([((out.step == s) & (out.beta > 0)).sum() for s in (1, 0, -1)])
        return out

    @torch.no_grad()
    def update_beta(self) -> None:
        """Moves β by all pairs since the last call, over all ranks of the default process group.

        To be called after a step that a loss scaler skipped, too: the record counts it. Nothing is read back to the
        host.
        """
        counts = self.counts.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        relaxed, kept, tightened = counts.double()
        kept += counts.sum() == 0  # without any pair β stays
        self.beta.copy_(next_beta(self.beta, relaxed, kept, tightened, self.epsilon, self.beta_update))
        self.counts.zero_()
