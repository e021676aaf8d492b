"""What a reward model is: something that scores one completion of a prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from xpo.prompts import Prompt


class RewardModel(ABC):
    """Scores completions. Renders text with its own chat template and tokenizer, if it has any."""

    @abstractmethod
    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Rewards of completions.

        Args:
            prompts: B prompts, strings or message lists.
            completions: B decoded completions without special tokens.

        Returns:
            Float tensor (B,) on the CPU: higher is better, NaN where there is no score.
        """
