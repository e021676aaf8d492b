"""What a judge is: something that compares two completions of the same prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from xpo.prompts import Prompt


class Judge(ABC):
    """Compares pairs of completions.

    Texts are decoded completions without special tokens; prompts are strings or message lists. A
    judge renders them with its own chat template and tokenizer, if it has any.
    """

    @abstractmethod
    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """Log-odds that `first` beats `second`.

        Args:
            prompts: B prompts.
            first: B completions of them.
            second: B other completions of them.

        Returns:
            Float tensor (B,) on the CPU: positive where `first` is better, 0 for a tie, NaN where
            the judge could not tell. Swapping `first` and `second` flips the sign.
        """
