"""Several reward models as one."""

from collections.abc import Sequence

from torch import Tensor

from xpo.config.checks import number
from xpo.config.errors import ConfigError
from xpo.data.prompt_sets import PromptDataset
from xpo.data.prompts import Prompt
from xpo.models.fingerprints import digest
from xpo.rewards.base import RewardModel, Scores


class MixReward(RewardModel):
    """The weighted sum of several models' scores, each logged by its name; NaN where one of them has no score.

    Args:
        models: reward models by a name of your choice.
        weights: the weight of each, by the same names; a negative one is a cost.

    Raises:
        ConfigError: the names differ.
    """

    def __init__(self, models: dict[str, RewardModel], weights: dict[str, float]):
        if not models or set(models) != set(weights):
            raise ConfigError(
                f"reward_model.weights={dict(weights)!r} and reward_model.models={list(models)!r} differ; "
                "give each model one weight (remove a model with ~reward_model.models.NAME, and its weight likewise)"
            )
        for name, weight in weights.items():
            number(f"reward_model.weights.{name}", weight)
        self.models = dict(models)
        self.weights = dict(weights)

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        return self.scores_with_parts(prompts, completions).total

    def scores_with_parts(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        parts = {name: model.scores_with_parts(prompts, completions).total for name, model in self.models.items()}
        weighted = [self.weights[name] * part for name, part in parts.items()]
        return Scores(sum(weighted[1:], start=weighted[0]), parts)

    def check_data(self, key: str, dataset: PromptDataset) -> None:
        for model in self.models.values():
            model.check_data(key, dataset)

    @property
    def fingerprint(self) -> str | None:
        inner = {name: model.fingerprint for name, model in self.models.items()}
        return None if None in inner.values() else digest("mix", inner, self.weights)
