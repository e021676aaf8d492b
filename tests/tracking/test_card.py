"""The model card says what was trained and what the run itself measured."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TrainerFactory, prompts
from peft import LoraConfig

from xpo import XPOConfig
from xpo.tracking.card import model_card, model_name
from xpo.tracking.metrics_log import evaluations, measures

HISTORY: list[dict[str, Any]] = [
    {"eval_win_rate": 0.5, "eval_kl": 0.0, "eval_score": 1.0, "eval_ref_score": 1.0, "eval_runtime": 1.0, "step": 0},
    {"loss": 0.6931, "learning_rate": 1e-6, "step": 10},
    {
        "eval_win_rate": 0.6251,
        "eval_kl": 1.2345,
        "eval_score": 2.0,
        "eval_ref_score": 1.0,
        "eval_runtime": 1,
        "step": 10,
    },
    {"loss": 0.4, "learning_rate": 1e-6, "step": 20},
    {
        **{"eval_win_rate": 0.8126, "eval_kl": 9.8767, "eval_score": 3.5, "eval_ref_score": 1.0, "eval_runtime": 1.0},
        **{"eval_vader": 0.25, "eval_ref_vader": 0.125, "step": 20},
    },
    {"train_runtime": 100.0, "train_loss": 0.5, "step": 20},
]


@pytest.fixture
def args(tmp_path: Path) -> XPOConfig:
    return XPOConfig(str(tmp_path), alpha=[2e-5, 1e-5], beta=0.07, missing_eos_penalty=1.5, use_cpu=True, seed=7)


def front_matter(card: str) -> dict[str, Any]:
    _, matter, text = card.split("---\n", 2)
    assert text.startswith("\n# ")
    return yaml.safe_load(matter)


def rows(card: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]


def test_the_numbers_of_the_first_and_last_evaluation_are_in_the_card(args: XPOConfig) -> None:
    card = model_card(vars(args), "owner/name", HISTORY, adapter=False)
    assert ["metric", "step 0", "step 20"] in rows(card)
    assert ["win_rate", "0.500", "0.813"] in rows(card)
    assert ["kl", "0.000", "9.877"] in rows(card)
    assert ["score", "1.000", "3.500"] in rows(card)
    assert "0.625" not in card  # an evaluation in between
    assert "20 optimizer steps" in card


def test_the_settings_of_the_run_are_in_the_card(args: XPOConfig) -> None:
    card = model_card(vars(args), "owner/name", HISTORY, adapter=False)
    expected = {"alpha": "[2e-05, 1e-05]", "beta": "0.07", "missing_eos_penalty": "1.5", "seed": "7"}
    assert dict(row for row in rows(card) if len(row) == 2).items() >= expected.items()


def test_without_an_evaluation_the_card_shows_and_explains_none(args: XPOConfig) -> None:
    card = model_card(vars(args), "owner/name", HISTORY[1:2], adapter=False)
    assert "Held-out prompts" not in card
    assert "win_rate" not in card
    assert "10 optimizer steps" in card
    assert "0 optimizer steps" in model_card(vars(args), "owner/name", [], adapter=False)


@pytest.mark.parametrize(("adapter", "library"), [(True, "peft"), (False, "transformers")])
def test_the_front_matter_names_library_and_base_model(args: XPOConfig, adapter: bool, library: str) -> None:
    assert front_matter(model_card(vars(args), "owner/name", HISTORY, adapter)) == {
        "library_name": library,
        "base_model": "owner/name",
        "tags": ["xpo", "preference-optimization"],
        "pipeline_tag": "text-generation",
    }


@pytest.mark.parametrize("name", ["owner/name: a #1", "'owner'/name", "owner/[name", "null/1.0", "LlamaForCausalLM"])
def test_the_front_matter_is_yaml_whatever_the_model_is_called(args: XPOConfig, name: str) -> None:
    matter = front_matter(model_card(vars(args), name, HISTORY, adapter=False))
    assert matter.get("base_model", "LlamaForCausalLM") == name


def test_directories_of_this_machine_stay_out_of_the_card(args: XPOConfig, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--Qwen--Qwen2-0.5B" / "snapshots" / "0a1b2c"
    local = tmp_path / "smollm2-135m-instruct"
    local.mkdir()
    assert model_name(str(cached)) == "Qwen/Qwen2-0.5B"
    assert model_name(str(local)) == "smollm2-135m-instruct"
    assert model_name("Qwen/Qwen2-0.5B") == "Qwen/Qwen2-0.5B"
    for directory, base in ((cached, "Qwen/Qwen2-0.5B"), (local, None)):
        card = model_card(vars(args), str(directory), HISTORY, adapter=False)
        assert front_matter(card).get("base_model") == base
        assert str(tmp_path) not in card
        assert f"# {model_name(str(directory))}, trained with XPO" in card


def test_evaluations_are_told_from_training_steps() -> None:
    assert [entry["step"] for entry in evaluations(HISTORY)] == [0, 10, 20]


def test_several_sets_of_prompts_have_a_table_each(args: XPOConfig) -> None:
    history = [
        {"eval_easy_win_rate": 0.25, "eval_easy_runtime": 1.0, "step": 0},
        {"eval_hard_win_rate": 0.125, "eval_hard_runtime": 1.0, "step": 0},
        {"eval_easy_win_rate": 0.75, "eval_easy_runtime": 1.0, "step": 5},
        {"eval_hard_win_rate": 0.5, "eval_hard_runtime": 1.0, "step": 5},
    ]
    card = model_card(vars(args), "owner/name", history, adapter=False)
    _, easy, hard = card.split("## Held-out prompts ")
    assert easy.startswith("easy, against")
    assert rows(easy)[2] == ["win_rate", "0.250", "0.750"]
    assert hard.startswith("hard, against")
    assert rows(hard)[2] == ["win_rate", "0.125", "0.500"]


def test_measures_come_in_a_fixed_order_and_the_scorers_last() -> None:
    assert measures(HISTORY[4]) == ["win_rate", "score", "kl", "vader"]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_trainer_writes_the_card_of_its_own_run(make_trainer: TrainerFactory, adapter: bool) -> None:
    peft_config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    trainer = make_trainer(peft_config=peft_config, eval_dataset=prompts(3), eval_on_start=True)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert front_matter(card)["library_name"] == ("peft" if adapter else "transformers")
    assert ["metric", "step 0", "step 2"] in rows(card)
    shown = {row[0]: row[2] for row in rows(card) if len(row) == 3}
    for name in ("win_rate", "score", "kl", "length"):
        assert shown[name] == f"{metrics[f'eval_{name}']:.3f}"
