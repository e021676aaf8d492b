"""Judges: who wins a pair of completions. One file per kind."""

from xpo.judges.base import Judge
from xpo.judges.function import FunctionJudge
from xpo.judges.pair_rm import PairRMJudge
from xpo.judges.reward import RewardJudge

__all__ = ["FunctionJudge", "Judge", "PairRMJudge", "RewardJudge"]
