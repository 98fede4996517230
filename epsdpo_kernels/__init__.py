"""ε-DPO on long sequences: exact decisions and gradients, without logits in memory."""

from .linear import EpsilonDPOOutput, PairStatistics, linear_epsilon_dpo, linear_pair_stats
from .module import EpsilonDPOLoss
from .reference import epsilon_dpo_reference

__all__ = [
    "EpsilonDPOLoss",
    "EpsilonDPOOutput",
    "PairStatistics",
    "epsilon_dpo_reference",
    "linear_epsilon_dpo",
    "linear_pair_stats",
]
__version__ = "0.1.0"
