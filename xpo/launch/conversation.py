"""From a trained policy to a conversation with it: its models, its reference's, and its judge."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xpo.config.errors import ConfigError
from xpo.config.schema import TrainSchema, needs_reward_model
from xpo.data.pair_file import NAME as PAIRS
from xpo.data.pair_file import read_pairs
from xpo.data.prompts import PromptEncoder
from xpo.evaluation.conversation import POLICY, REFERENCE, Conversation
from xpo.judges.labelling import Labeller, of_evaluations
from xpo.launch.groups import build_preference, check_target
from xpo.launch.trained import NAME, Trained
from xpo.models.checks import check_tokens
from xpo.models.devices import chosen_device
from xpo.models.loading import (
    end_tokens,
    is_adapter,
    load_model,
    load_tokenizer,
    loaded,
    policy_directory,
    with_pad_token,
)
from xpo.models.reference import base_model
from xpo.sampling.sampler import check_generation_kwargs

Entered = Callable[[], AbstractContextManager[PreTrainedModel]]


def build_conversation(trained: Trained, with_reference: bool = True) -> tuple[Conversation, dict[str, str]]:
    """Loads what speaks and what judges; returns it, and who is who, for the terminal.

    The reference is `model.reference`; else what a run began with; else, of adapters, the model below them.

    ConfigError for what is wrong or out of reach; for a judge without a reference.
    """
    config, directory = trained.config, _directory(NAME, trained.policy, trained.config)
    off = config.model.reference is None and is_adapter(directory) and (trained.run_dir is None or config.lora.r > 0)
    begun = config.model.name if trained.run_dir is not None else None
    other = config.model.reference or (None if off else begun)
    with_reference = with_reference and (off or other is not None)
    judge = trained.judge if with_reference or trained.run_dir is None else None
    if judge is not None and not with_reference:
        raise ConfigError(f"--judge={judge} has nothing to compare; give a reference, model.reference=...")
    check_generation_kwargs(config.generation.kwargs, config.generation.max_new_tokens)
    if judge is not None:
        check_target("judge", config.judge)
        check_target("reward_model", config.reward_model)
    where = _directory("model.reference", other, config) if with_reference and other is not None else None
    tokenizer = loaded(NAME, trained.policy, load_tokenizer, directory, config.model)

    labeller = None if judge is None else _labeller(config)
    device = chosen_device("training.use_cpu", "cpu" if config.training.use_cpu else None)
    policy = loaded(NAME, trained.policy, _load_policy, trained, directory).to(device)
    models: dict[str, Entered] = {POLICY: partial(nullcontext, base_model(policy))}
    said = {POLICY: trained.policy}
    reference = None
    if where is not None:
        reference = loaded("model.reference", str(other), load_model, where, config.model).to(device)
        models[REFERENCE] = partial(nullcontext, base_model(reference))
        said[REFERENCE] = str(other)
    elif with_reference:
        models[REFERENCE] = partial(_without_adapters, policy)
        said[REFERENCE] = f"{begun or base_model(policy).config.name_or_path}, without adapters"
    check_tokens(policy, reference, tokenizer)
    ends = end_tokens(base_model(policy), tokenizer)
    tokenizer = with_pad_token(tokenizer, ends)
    conversation = Conversation(
        models=models,
        tokenizer=tokenizer,
        encode=PromptEncoder(tokenizer, config.data.special_tokens, **config.data.chat_template_kwargs),
        options=config.generation,
        ends=ends,
        extra=config.generation.kwargs,
        labeller=labeller,
        device=device,
        plain=_reads_plain_text(trained, tokenizer),
        seed=config.training.seed,
    )
    return conversation, said | ({} if judge is None else {"judge": judge})


def _directory(key: str, name: str, config: TrainSchema) -> str:
    revision = config.model.revision if name == config.model.name else None
    return policy_directory(name, revision, key, config.model.trust_remote_code)


def _load_policy(trained: Trained, directory: str) -> PreTrainedModel | PeftModel:
    """The policy; adapters of a run in the model that it names, as their own record of it may be another machine's."""
    model = trained.config.model
    if trained.run_dir is None or not is_adapter(directory) or trained.config.lora.r == 0:
        return load_model(directory, model)
    return PeftModel.from_pretrained(load_model(_directory("model.name", model.name, trained.config), model), directory)


@contextmanager
def _without_adapters(policy: PeftModel) -> Iterator[PreTrainedModel]:
    with policy.disable_adapter():
        yield base_model(policy)


def _labeller(config: TrainSchema) -> Labeller:
    """The judge as evaluations ask it; a reward model only where the judge compares its scores."""
    scorer = config.reward_model if needs_reward_model(config.judge) else {}
    _, judge = build_preference(config.judge, scorer)
    return of_evaluations(judge, None, config.preference)


def _reads_plain_text(trained: Trained, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts are text without a chat template: as in training, else for want of one."""
    pairs = trained.run_dir and trained.run_dir / PAIRS
    if pairs is not None and pairs.is_file():
        for pair in islice(read_pairs(pairs), 1):
            return isinstance(pair["prompt"], str)
    return tokenizer.chat_template is None
