"""Whatever judges and rewards return, and whatever stands in prompts: a result, or an error of one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from xpo import XPOConfig, XPOTrainer
from xpo.config.errors import ConfigError, JudgeStopped
from xpo.models.loading import tiny_model


def fuzz(examples: int) -> Any:
    """The same examples each time; those of all tests together take a minute on two cores."""
    unlimited = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=examples, derandomize=True, database=None, **unlimited)


TOO_LARGE = 10**400
NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.just(TOO_LARGE))
ODD = st.one_of(
    NUMBERS,
    st.text(max_size=3),
    st.binary(max_size=2),
    st.complex_numbers(),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(torch.tensor, st.lists(st.floats(), max_size=2)),
)
ANYTHING = st.recursive(ODD, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner))
RETURNED = st.one_of(
    st.lists(NUMBERS, min_size=2, max_size=2),
    st.lists(ODD, min_size=2, max_size=2),
    st.builds(torch.tensor, st.lists(st.floats(), min_size=2, max_size=2)),
    st.builds(lambda rows: torch.tensor([rows]), st.lists(st.floats(), min_size=2, max_size=2)),
    st.builds(np.array, st.lists(st.floats(), min_size=1, max_size=3)),
    ANYTHING,
)


def trained(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, **given: Any) -> bool:
    """Whether a run of one step came to an end with a loss, and not to an error of one line. Anything else fails."""
    args = {"output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 2, "max_new_tokens": 3}
    quiet: dict[str, Any] = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    data = given.pop("train_dataset", [{"prompt": "a"}, {"prompt": "b c"}])
    reason = None
    try:
        config = XPOConfig(**args, **quiet)
        trainer = XPOTrainer(tiny_model(), args=config, processing_class=tokenizer, train_dataset=data, **given)
        trainer.train()
    except (ConfigError, JudgeStopped) as error:
        reason = str(error)
    if reason is not None:
        assert len(reason.splitlines()) == 1
        return False
    (loss,) = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert np.isfinite(loss)
    return True


@fuzz(25)
@given(RETURNED)
def test_what_judges_return(tmp_path_factory: Any, tokenizer: PreTrainedTokenizerFast, value: Any) -> None:
    trained(tmp_path_factory.getbasetemp(), tokenizer, judge=lambda prompts, first, second: value)


@fuzz(25)
@given(RETURNED)
def test_what_rewards_return(tmp_path_factory: Any, tokenizer: PreTrainedTokenizerFast, value: Any) -> None:
    trained(tmp_path_factory.getbasetemp(), tokenizer, reward_model=lambda completions, **_: value)


TEXTS = st.one_of(
    st.text(max_size=12),
    st.lists(
        st.sampled_from(
            ["<|im_end|>", "<|im_start|>", "system\n", "\x1b]52;c;aGk=\x07", "\x00", "\ue0000\ue001", " ", "a"]
        ),
        max_size=5,
    ).map("".join),
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "", "USER", "<|im_end|>"])
MESSAGES = st.fixed_dictionaries({"role": ROLES, "content": TEXTS}) | st.fixed_dictionaries(
    {"role": ROLES | ODD, "content": TEXTS | ODD}, optional={"tool_calls": ANYTHING, "name": TEXTS}
)
PROMPTS = st.one_of(TEXTS, st.lists(MESSAGES, max_size=3), ANYTHING)


@fuzz(75)
@given(st.lists(PROMPTS, min_size=1, max_size=2))
def test_what_stands_in_prompts(tmp_path_factory: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[Any]) -> None:
    data = [{"prompt": prompt} for prompt in prompts]
    trained(tmp_path_factory.getbasetemp(), tokenizer, train_dataset=data, judge=lambda p, a, b: [1.0] * len(p))


@pytest.mark.parametrize("value", [[1.0, -1.0], [None, 2]])
def test_good_values_come_to_a_result(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, value: Any) -> None:
    assert trained(tmp_path, tokenizer, judge=lambda prompts, first, second: value)
    assert not trained(tmp_path, tokenizer, judge=lambda prompts, first, second: [value])
