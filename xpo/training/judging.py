"""Who judges: what the trainer's `judge` and `reward_model` stand for, among them TRL's kind, names and functions."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from xpo.config.errors import ConfigError, first_line
from xpo.config.schema import as_argument, check_scaling
from xpo.judges import FunctionJudge, Judge, PairRMJudge, RewardJudge, TRLJudge
from xpo.judges.trl import HasJudge
from xpo.models.hub import has_tokenizer, local_directory
from xpo.models.loading import tokenizer_of
from xpo.models.zero import loading_whole
from xpo.rewards import ClassifierReward, FunctionReward, MixReward, RewardModel
from xpo.training.config import XPOConfig

logger = logging.getLogger(__name__)


def who_judges(
    judge: Any, reward_model: Any, tokenizer: Any, args: XPOConfig, policy: Any = None, policy_tokenizer: Any = None
) -> tuple[Judge, RewardModel | None]:
    """The judge, and a reward model beside it, if that is another one than the judge's own.

    A classifier without a tokenizer reads with the policy's.

    ConfigError if there is neither, or if scores are to be scaled that nobody compares.
    """
    with loading_whole():
        if reward_model is not None and args.reward_weights is not None and not isinstance(reward_model, list | tuple):
            reward_model = [reward_model]
        scorer = as_reward_model(reward_model, tokenizer, args, partial(tokenizer_of, policy, policy_tokenizer))
        judge = as_judge(judge or args.judge)
    if judge is None:
        if scorer is None:
            raise ConfigError("neither judge nor reward_model is given; pass one of them to say who wins a pair")
        judge = RewardJudge(scorer)
    if scorer is None and isinstance(judge, RewardJudge):
        scorer = judge.reward_model
    compares_scores = type(judge) is RewardJudge and judge.reward_model is scorer
    check_scaling(args, compares_scores, as_argument)
    return judge, None if compares_scores else scorer


def as_judge(judge: Any) -> Judge | None:
    """The judge that `judge` stands for: a Judge, its class, one of TRL's kind, a function, or the name "pair_rm"."""
    if judge is None or isinstance(judge, Judge):
        return judge
    if judge == "pair_rm":
        return PairRMJudge()
    if isinstance(judge, type):
        try:
            return as_judge(judge())
        except TypeError as error:
            raise ConfigError(f"judge={judge.__name__} is a class ({first_line(error)}); pass an object") from error
    if isinstance(judge, HasJudge):
        return TRLJudge(judge)
    if callable(judge):
        return FunctionJudge(judge)
    raise ConfigError(
        f"judge={judge!r} is no judge; pass an xpo.judges.Judge, a function (prompts, first, second), or 'pair_rm'"
    )


def as_reward_model(
    reward_model: Any, tokenizer: Any, args: XPOConfig, fallback: Callable[[], PreTrainedTokenizerBase]
) -> RewardModel | None:
    """The reward model that `reward_model` stands for: a RewardModel, a classifier or its name, a function.

    Several in a list are their sum, weighted by `reward_weights`, each with its tokenizer.
    """
    if isinstance(reward_model, list | tuple):
        tokenizers = tokenizer if isinstance(tokenizer, list | tuple) else [tokenizer] * len(reward_model)
        weights = args.reward_weights or [1.0] * len(reward_model)
        if not len(reward_model) == len(tokenizers) == len(weights):
            raise ConfigError(
                f"reward_funcs holds {len(reward_model)}, reward_processing_classes {len(tokenizers)} and "
                f"reward_weights {len(weights)}; give one of each for each reward"
            )
        pairs = zip(reward_model, tokenizers, strict=True)
        models: list[Any] = [as_reward_model(one, its_tokenizer, args, fallback) for one, its_tokenizer in pairs]
        if len(models) == 1 and args.reward_weights is None:
            return models[0]
        names = [f"{number}_{type(model).__name__}" for number, model in enumerate(models)]
        return MixReward(dict(zip(names, models, strict=True)), dict(zip(names, weights, strict=True)))
    if reward_model is None or isinstance(reward_model, RewardModel):
        return reward_model
    if isinstance(reward_model, str | PreTrainedModel) and tokenizer is None:
        name = reward_model if isinstance(reward_model, str) else reward_model.config.name_or_path
        if not name or not has_tokenizer(local_directory("reward_model", name)):
            logger.warning("xpo: reward_model=%r has no tokenizer; it reads with the policy's", name)
            tokenizer = fallback()
    if isinstance(reward_model, str):
        device, special = str(args.device), args.special_tokens
        return ClassifierReward.from_pretrained(
            reward_model, device=device, tokenizer=tokenizer, special_tokens=special
        )
    if isinstance(reward_model, PreTrainedModel):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(reward_model.config.name_or_path)
        return ClassifierReward(reward_model.to(args.device), tokenizer, special_tokens=args.special_tokens)
    if callable(reward_model):
        return FunctionReward(reward_model)
    raise ConfigError(
        f"reward_model={reward_model!r} is no reward model; pass an xpo.rewards.RewardModel, a sequence "
        "classifier, or a function (prompts, completions)"
    )
