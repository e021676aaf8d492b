"""What the name of a policy stands for, and what it is loaded with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import made_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from trained_run import adapted_model, finish, finished_run
from transformers import PreTrainedModel

from xpo.config.errors import ConfigError
from xpo.config.options import ModelOptions
from xpo.evaluation.conversation import POLICY, REFERENCE, Conversation
from xpo.judges import RewardJudge
from xpo.launch.conversation import build_conversation
from xpo.launch.trained import find_trained
from xpo.models.loading import load_model, tiny_model, tiny_tokenizer
from xpo.rewards import VaderReward

PROMPT = [{"role": "user", "content": "How are you?"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with lora=default; their own record knows no base model."""
    return finished_run(tmp_path_factory.mktemp("runs") / "lora", "lora=default", policy=adapted_model())


def first_logits(model: PreTrainedModel, conversation: Conversation) -> list[float]:
    """Of the first token of an answer."""
    return model.eval()(input_ids=torch.tensor([conversation.encode(PROMPT)])).logits[0, -1].tolist()


def logits(conversation: Conversation, name: str) -> list[float]:
    with conversation.models[name]() as model:
        return first_logits(model, conversation)


# ---- which model, which configuration ----------------------------------------------------------


def test_a_run_stands_for_its_final_model_and_its_configuration(run: Path) -> None:
    trained = find_trained(str(run))
    assert (trained.policy, trained.run_dir, trained.judge) == (str(run / "model"), run, "lexicon")
    assert (trained.config.generation.max_new_tokens, trained.config.model.name) == (8, "embedded:tiny")


def test_an_unfinished_run_stands_for_its_last_checkpoint(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    finish(run, finished=False)
    with pytest.raises(ConfigError, match="has no model yet; wait for its first checkpoint"):
        find_trained(str(run))
    checkpoint = made_checkpoint(run)
    assert find_trained(str(run)).policy == str(checkpoint)


def test_a_checkpoint_is_of_its_run(run: Path) -> None:
    checkpoint = run / "model" / "checkpoint-2"
    checkpoint.mkdir(exist_ok=True)
    trained = find_trained(str(checkpoint))
    assert (trained.policy, trained.run_dir, trained.judge) == (str(checkpoint), run, "lexicon")


def test_a_model_has_no_judge_unless_one_is_chosen() -> None:
    assert find_trained("embedded:tiny").judge is None
    chosen = find_trained("embedded:tiny", ["reward_model=vader"], "reward")
    assert chosen.judge == "reward (vader)"
    assert chosen.config.generation.max_new_tokens == 256


def test_words_change_a_value_and_choose_a_judge(run: Path) -> None:
    trained = find_trained(str(run), ["generation.temperature=0.25", "judge.seed=7"], "random")
    assert trained.judge == "random"
    assert trained.config.judge == {"_target_": "xpo.judges.RandomJudge", "seed": 7, "cache": "off"}
    assert trained.config.generation.temperature == 0.25
    assert trained.config.reward_model == find_trained(str(run)).config.reward_model


def test_answers_may_be_longer_than_the_run_had_room_for(run: Path) -> None:
    """Its generation.max_length is 256."""
    assert find_trained(str(run), ["generation.max_new_tokens=300"]).config.generation.max_new_tokens == 300


def test_a_word_changes_the_judge_of_the_run(run: Path) -> None:
    assert find_trained(str(run), ["judge.cache=verdicts.sqlite"]).config.judge["cache"] == "verdicts.sqlite"


@pytest.mark.parametrize(
    ("words", "judge", "message"),
    [
        (["lora=default"], None, "'lora=default' is no key with a value"),
        (["Hello"], None, "'Hello' is no key with a value"),
        (["generation.temperature=-1"], None, "generation.temperature=-1"),
        ([], "llm", "judge.model has no value"),
    ],
)
def test_wrong_words_are_refused(run: Path, words: list[str], judge: str | None, message: str) -> None:
    with pytest.raises(Exception, match=message):
        find_trained(str(run), words, judge)


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        find_trained(str(run))


# ---- who speaks --------------------------------------------------------------------------------


def test_policy_and_reference_of_a_run(run: Path) -> None:
    conversation, said = build_conversation(find_trained(str(run)))
    assert said == {"policy": str(run / "model"), "reference": "embedded:tiny", "judge": "lexicon"}
    assert logits(conversation, POLICY) == first_logits(tiny_model(seed=1), conversation)
    assert logits(conversation, REFERENCE) == first_logits(tiny_model(), conversation)
    assert conversation.labeller is not None
    assert isinstance(conversation.labeller.judge, RewardJudge)
    assert isinstance(conversation.labeller.judge.reward_model, VaderReward)


def test_a_reward_model_that_the_judge_does_not_need_is_not_loaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's is the embedded one, which would only add scores."""
    asked = []

    def build(judge: dict[str, Any], reward_model: dict[str, Any]) -> tuple[None, RewardJudge]:
        asked.append(reward_model)
        return None, RewardJudge(VaderReward())

    monkeypatch.setattr("xpo.launch.conversation.build_preference", build)
    build_conversation(find_trained(str(run)))
    build_conversation(find_trained(str(run), judge="reward"))
    assert asked == [{}, {"_target_": "xpo.rewards.EmbeddedReward"}]


def test_the_policy_alone_loads_nothing_else(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xpo.launch.conversation.build_preference", None)
    conversation, said = build_conversation(find_trained(str(run)), with_reference=False)
    assert said == {"policy": str(run / "model")}
    assert list(conversation.models) == [POLICY]


def test_adapters_of_a_run_are_off_while_the_reference_speaks(adapters: Path) -> None:
    conversation, said = build_conversation(find_trained(str(adapters)))
    assert said["reference"] == "embedded:tiny, without adapters"
    assert logits(conversation, REFERENCE) == first_logits(tiny_model(), conversation)
    loaded = PeftModel.from_pretrained(tiny_model(), adapters / "model").get_base_model()
    assert logits(conversation, POLICY) == first_logits(loaded, conversation)
    assert logits(conversation, POLICY) != logits(conversation, REFERENCE)


def test_the_code_of_a_base_model_is_fetched_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is trusted: without it, a model of the hub that brings its own cannot be loaded below adapters."""
    tiny_model().save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"), ModelOptions())
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapters")
    asked = []

    def fetch(key: str, name: str, with_code: bool = False) -> str:
        asked.append(with_code)
        return name

    monkeypatch.setattr("xpo.models.loading.local_directory", fetch)
    for trusted in (False, True):
        load_model(str(tmp_path / "adapters"), ModelOptions(trust_remote_code=trusted))
    assert asked == [False, True]


def test_adapters_that_are_no_run_bring_their_reference_along(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    policy = adapted_model()
    policy.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    policy.save_pretrained(tmp_path / "adapters")
    tiny_tokenizer().save_pretrained(tmp_path / "adapters")
    conversation, said = build_conversation(find_trained(str(tmp_path / "adapters")))
    assert said["reference"] == f"{tmp_path / 'base'}, without adapters"
    assert logits(conversation, REFERENCE) == first_logits(tiny_model(), conversation)
    assert conversation.labeller is None


def test_a_model_speaks_alone_unless_a_reference_is_named() -> None:
    assert list(build_conversation(find_trained("embedded:tiny"))[0].models) == [POLICY]
    conversation, said = build_conversation(find_trained("embedded:tiny", ["model.reference=embedded:tiny"]))
    assert said["reference"] == "embedded:tiny"
    assert logits(conversation, POLICY) == logits(conversation, REFERENCE)


def test_a_judge_needs_a_reference() -> None:
    with pytest.raises(ConfigError, match="--judge=lexicon has nothing to compare"):
        build_conversation(find_trained("embedded:tiny", judge="lexicon"))


def test_a_name_that_is_no_model() -> None:
    with pytest.raises(ConfigError, match="RUN_OR_MODEL='no/such' is not on this machine and the hub is out of reach"):
        build_conversation(find_trained("no/such"))


def test_a_run_that_trained_on_plain_text_is_spoken_to_in_plain_text(run: Path, tmp_path: Path) -> None:
    assert not build_conversation(find_trained(str(run)))[0].plain
    other = finished_run(tmp_path / "run")
    (other / "pairs.jsonl").write_text(json.dumps({"step": 1, "prompt": "The sea"}) + "\n")
    assert build_conversation(find_trained(str(other)))[0].plain
