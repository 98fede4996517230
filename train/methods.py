"""The methods that a comparison needs, as loss modules with one call, and the reference that follows the policy.

``dpo`` and ``tr-dpo`` are ε-DPO with ε = 0, and ``lsc-dpo`` is that with a β that the step's margins move; ``eps-dpo``
is the package's own; ``beta-dpo`` needs a whole batch's margins before any coefficient is known, so it goes through
:func:`epsdpo_kernels.linear_pair_stats`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epsdpo_kernels import EpsilonDPOLoss, EpsilonDPOOutput, linear_pair_stats
from epsdpo_kernels.integrations.transformers import causal_lm
from epsdpo_kernels.linear import output
from epsdpo_kernels.pair import BETA_DPO_MOMENTUM, beta_dpo, lsc_dpo, preference_losses
from epsdpo_kernels.plan import PairResults

METHODS = ("eps-dpo", "dpo", "beta-dpo", "tr-dpo", "lsc-dpo")


class BetaDPOLoss(nn.Module):
    """β-DPO (Wu et al., 2024, arXiv 2407.08639): one β for a batch, from its margins, and outlying pairs left out.

    β = β₀·(1 + α·(mean margin of the kept pairs − M₀)), at least 1e-3. Margins are without β; their mean M₀ and spread
    σ are moving averages over the batches of all ranks. A share of the pairs is kept, drawn without replacement with
    weight exp(−½((m − M₀)/σ)²); the others have loss 0 and β 0 (their rewards are by the batch's β). In evaluation
    nothing moves, all pairs are kept, and β is the last batch's.

    Args:
        beta: β₀.
        alpha: how strongly β follows the margin.
        keep: share of pairs kept, ρ, in (0, 1].
    """

    by_batch = True  # no pair's loss is its own: batches may be neither dealt nor cut
    beta: Tensor  # () fp32, of the last training batch
    margin_mean: Tensor  # () float64, M₀
    margin_std: Tensor  # () float64, σ

    def __init__(self, beta: float = 0.1, alpha: float = 0.6, keep: float = 0.8):
        super().__init__()
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"beta: got {beta}, takes a positive finite number")
        if not math.isfinite(alpha):
            raise ValueError(f"beta_dpo_alpha: got {alpha}, takes a finite number")
        if not 0 < keep <= 1:
            raise ValueError(f"beta_dpo_keep: got {keep}, takes a number in (0, 1]")
        self.base_beta, self.alpha, self.keep = beta, alpha, keep
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float32))
        # Averages of a whole run: in float32 they gather roundings, which β shows where margin − M₀ is near −1/α.
        for name in ("margin_mean", "margin_std"):
            self.register_buffer(name, torch.tensor(0.0, dtype=torch.float64))

    def forward(self, hidden, weight, labels, ref_hidden, ref_weight, **kwargs) -> EpsilonDPOOutput:
        stats = linear_pair_stats(hidden, weight, labels, ref_hidden, ref_weight, **kwargs)
        logps = stats[:4]
        margins = ((logps[0] - logps[1]) - (logps[2] - logps[3])).detach()
        # In a batch of a rank that has no pairs left, nothing is scored.
        scored = (labels != -100).any().expand(margins.shape)
        kept, share = scored, 1.0
        if self.training:
            kept, share = self._decide(margins, scored)
        beta = self.beta.expand_as(margins).clone()
        losses = torch.where(kept, preference_losses(*logps, beta=beta), 0)
        nothing = torch.zeros_like(margins)
        rows = [losses.detach(), nothing, beta, *(t.detach() for t in stats), nothing]
        out = output(losses.sum() * share / len(margins), PairResults._make(rows))
        return out._replace(beta=torch.where(kept, beta, 0))

    @torch.compiler.disable  # a compiler loses what is added to a 0-dimensional float64 buffer in place
    def _decide(self, margins: Tensor, scored: Tensor) -> tuple[Tensor, float]:
        """Moves the averages and β; which of this rank's pairs are kept, and how many pairs each of them stands for."""
        parts, rank = [margins[scored].cpu()], 0
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed:
            rank = torch.distributed.get_rank()
            parts *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, margins[scored].cpu())
        everyone = torch.cat(parts).double()
        for average, value in ((self.margin_mean, everyone.mean()), (self.margin_std, everyone.std(correction=0))):
            average.mul_(BETA_DPO_MOMENTUM).add_((1 - BETA_DPO_MOMENTUM) * value.to(average.device))
        mean, std = self.margin_mean.item(), self.margin_std.item()
        weights = torch.exp(-0.5 * ((everyone - mean) / std) ** 2) if std > 0 else torch.ones_like(everyone)
        # All weights may underflow; no pair is then likelier than another.
        weights = weights.nan_to_num(0).clamp_min(torch.finfo(torch.float32).tiny)
        drawn = [torch.multinomial(weights, max(1, int(self.keep * len(everyone))), replacement=False)]
        if distributed:
            torch.distributed.broadcast_object_list(drawn, src=0)
        kept = torch.zeros(len(everyone), dtype=torch.bool)
        kept[drawn[0]] = True
        self.beta.fill_(beta_dpo(self.base_beta, self.alpha, everyone[kept].mean().item(), mean))
        start = sum(len(part) for part in parts[:rank])
        own = torch.zeros_like(scored)
        own[scored] = kept[start : start + len(parts[rank])].to(own.device)
        return own, len(everyone) / int(kept.sum())

    def update_beta(self) -> None:
        """β has moved with the batch already."""


class LSCDPOLoss(EpsilonDPOLoss):
    """LSC-DPO (Qu et al., 2026, arXiv 2610.07592): DPO whose β holds the scaled margin β·m near z*.

    β moves once per optimizer step, after its loss, by the mean margin of all its pairs, over micro-batches and ranks
    (their equations 9 to 11); see :func:`epsdpo_kernels.pair.lsc_dpo`. Their code moves it with every micro-batch,
    gathered over ranks, before that micro-batch's loss: with one micro-batch a step it has the same β one step earlier;
    with n it moves n times as often. It also takes σ(−βm) pair by pair and averages that, where their text, and this,
    take σ of the mean. Their algorithm 1 can be read so that β moves for good once it has begun to; their code asks
    anew every time, and so does this.

    Args:
        beta: β₀.
        z_star: z*, positive.
        eta: η, positive.
        tau_start: β moves only while σ(−β·mean margin) is below it; in (0, 1).
        label_smoothing: s in [0, 0.5).
    """

    def __init__(
        self,
        beta: float = 0.01,
        z_star: float = 0.4,
        eta: float = 0.1,
        tau_start: float = 0.45,
        label_smoothing: float = 0.0,
    ):
        super().__init__(beta, 0.0, "none", label_smoothing)
        for name, value in (("lsc_z_star", z_star), ("lsc_eta", eta)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: got {value}, takes a positive finite number")
        if not 0 < tau_start < 1:
            raise ValueError(f"lsc_tau_start: got {tau_start}, takes a number in (0, 1)")
        self.z_star, self.eta, self.tau_start = z_star, eta, tau_start
        # No part of a checkpoint: it is empty after every optimizer step.
        self._margins: list[Tensor] = []

    def forward(self, *args, **kwargs) -> EpsilonDPOOutput:
        out = super().forward(*args, **kwargs)
        if self.training:
            margins = (out.chosen_logps - out.rejected_logps) - (out.ref_chosen_logps - out.ref_rejected_logps)
            # In a batch of a rank that has no pairs left, nothing is scored.
            self._margins.append(margins[out.beta > 0])
        return out

    @torch.no_grad()
    def update_beta(self) -> None:
        """Moves β by all pairs since the last call, over all ranks of the default process group.

        Raises:
            ValueError: β would underflow.
        """
        super().update_beta()
        margins = torch.cat([self.beta.new_zeros(0), *self._margins]).double()
        self._margins.clear()
        total = torch.stack((margins.sum(), margins.new_tensor(len(margins))))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        margin, pairs = total.tolist()
        if not pairs:
            return
        margin /= pairs
        beta = lsc_dpo(self.beta.item(), margin, self.z_star, self.eta, self.tau_start)
        if beta < torch.finfo(self.beta.dtype).tiny:
            raise ValueError(f"lsc_eta: {self.eta} takes β from {self.beta} to 0 at a mean margin of {margin} nats")
        self.beta.fill_(beta)


class MovingReference:
    """TR-DPO (Gorbatovski et al., 2024, arXiv 2404.09656): the reference follows the policy.

    Soft: π_ref ← α·π + (1 − α)·π_ref every ``steps`` optimizer steps; hard is α = 1. Weights are mixed as weights also
    where the policy has LoRA adapters: the adapters' product is added to its base, so the reference is a full model.

    Args:
        policy: the model that trains, within PEFT or not; no tensor of it may be sharded.
        reference: a model of the same class, without adapters.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module, alpha: float, steps: int):
        if not 0 < alpha <= 1:
            raise ValueError(f"sync_alpha: got {alpha}, takes a number in (0, 1]")
        if steps < 1:
            raise ValueError(f"sync_steps: got {steps}, takes at least 1")
        self.policy, self.reference, self.alpha, self.steps = policy, reference, alpha, steps

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """To be called after each optimizer step, counted from 1."""
        if step % self.steps:
            return
        own = dict(self.reference.named_parameters())
        for name, value in self._weights():
            own[name].lerp_(value.to(own[name].dtype), self.alpha)

    def _weights(self):
        """(name in the reference, the policy's value) of every parameter that training changes."""
        policy: Any = causal_lm(self.policy)
        modules = dict(policy.named_modules())
        for name, parameter in policy.named_parameters():
            if ".lora_" in name:
                continue
            if name.endswith(".base_layer.weight"):
                layer = modules[name.removesuffix(".base_layer.weight")]
                delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
                yield name.replace(".base_layer.", "."), parameter + delta
            elif parameter.requires_grad:
                yield name, parameter

    def save(self, path: Path) -> None:
        tied = set(getattr(self.reference, "all_tied_weights_keys", None) or ())
        save_file({k: v.contiguous() for k, v in self.reference.state_dict().items() if k not in tied}, path)

    def load(self, path: Path) -> None:
        self.reference.load_state_dict(load_file(path), strict=False)


def make_loss(
    method: str, *, beta: float, epsilon: float, beta_update: str, label_smoothing: float, veto: dict[str, float],
    beta_dpo: dict[str, float], lsc_dpo: dict[str, float],
) -> Any:  # fmt: skip
    """The loss module of a method.

    ``veto`` are ``max_entropy`` and ``max_kl`` of ε-DPO, where there are any; ``beta_dpo`` and ``lsc_dpo`` what
    :class:`BetaDPOLoss` and :class:`LSCDPOLoss` take beside β and smoothing.

    Raises:
        ValueError: an unknown method, or a number out of range.
    """
    if method == "eps-dpo":
        return EpsilonDPOLoss(beta, epsilon, beta_update, label_smoothing, **veto)
    if veto:
        raise ValueError(f"veto: got {veto} with method {method}, which relaxes nothing; takes method eps-dpo")
    if method in ("dpo", "tr-dpo"):
        return EpsilonDPOLoss(beta, 0.0, "none", label_smoothing)
    if method == "beta-dpo":
        if label_smoothing:
            raise ValueError(f"label_smoothing: got {label_smoothing}, beta-dpo takes 0")
        return BetaDPOLoss(beta, **beta_dpo)
    if method == "lsc-dpo":
        return LSCDPOLoss(beta, label_smoothing=label_smoothing, **lsc_dpo)
    raise ValueError(f"method: got {method!r}, takes one of {METHODS}")
