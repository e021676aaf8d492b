"""Judges: who wins a pair of completions, one file per kind; and labels, what training makes of their verdicts.

Nothing here draws completions or trains. `python -m xpo.judges` inspects judges, and says without torch what is wrong
with its command line: names are imported at first use.
"""

from typing import TYPE_CHECKING

from xpo.config.lazy import at_first_use

if TYPE_CHECKING:
    from xpo.judges.base import Judge, Verdicts
    from xpo.judges.cached import CachedJudge
    from xpo.judges.function import FunctionJudge
    from xpo.judges.llm import LLMJudge
    from xpo.judges.local_llm import LocalLLMJudge
    from xpo.judges.pair_rm import PairRMJudge
    from xpo.judges.pairwise import PairwiseJudge
    from xpo.judges.reward import RewardJudge
    from xpo.judges.rules import AllOfJudge, LengthControlledJudge, RandomJudge
    from xpo.judges.trl import TRLJudge

_HOMES = {
    "xpo.judges.base": ("Judge", "Verdicts"),
    "xpo.judges.cached": ("CachedJudge",),
    "xpo.judges.function": ("FunctionJudge",),
    "xpo.judges.llm": ("LLMJudge",),
    "xpo.judges.local_llm": ("LocalLLMJudge",),
    "xpo.judges.pair_rm": ("PairRMJudge",),
    "xpo.judges.pairwise": ("PairwiseJudge",),
    "xpo.judges.reward": ("RewardJudge",),
    "xpo.judges.rules": ("AllOfJudge", "LengthControlledJudge", "RandomJudge"),
    "xpo.judges.trl": ("TRLJudge",),
}
__all__ = [name for names in _HOMES.values() for name in names]
__getattr__ = at_first_use(__name__, _HOMES)
