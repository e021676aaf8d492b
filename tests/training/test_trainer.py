"""XPOTrainer: equalities, a pinned trajectory, learning, checkpoints."""

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import TRL_METRICS, gpt2, prompts, share_of_e, step_logs
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from xpo import ConfigError, XPOConfig, XPOTrainer
from xpo.config.compose import checked, compose
from xpo.launch.build import build_arguments
from xpo.models.loading import tiny_model
from xpo.training.config import value_at

OWN_METRICS = {
    "objective/kl_policy",
    "exploration/ref_ratio",
    "preference/win_rate",
    "preference/tie_rate",
    "preference/invalid_rate",
    "preference/queries",
    "loss/dpo_labelled",
    "completions/length",
    "completions/distinct_2",
    "perf/rollout_s",
    "perf/preference_s",
    "perf/reference_s",
    "perf/update_s",
    "perf/tokens_per_s",
}


def assert_same_run(first: XPOTrainer, second: XPOTrainer, tolerance: float = 1e-5) -> None:
    """Equal step logs and final weights, without regard to order of summation."""
    assert len(step_logs(first)) == len(step_logs(second)) > 0
    for a, b in zip(step_logs(first), step_logs(second), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=10 * tolerance, rel=tolerance), name
    for (name, p), q in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=10 * tolerance, rtol=tolerance, msg=name)


def with_rope(parameters: dict[str, object]) -> PreTrainedModel:
    """A model that says so of its positions, of which it knows 100."""
    model = tiny_model()
    model.config.rope_parameters = parameters
    model.config.max_position_embeddings = 100
    return model


def first_wins(prompts, first, second) -> list[float]:
    """A judge who leaves no ties."""
    return [1.0] * len(prompts)


def test_every_metric_is_logged_at_every_step(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert entry.keys() >= TRL_METRICS | OWN_METRICS
        assert all(math.isfinite(value) for value in entry.values())


def test_preference_queries_are_the_pairs_labelled_so_far(make_trainer, tmp_path: Path):
    """5 prompts in steps of 2: 2, 4, 5, and the next epoch; verdicts that failed and ties are pairs like the others."""

    def judge(prompts, first, second):
        return [None, 0.0][: len(prompts)]

    options = {"judge": judge, "train_dataset": prompts(5), "per_device_train_batch_size": 2, "max_steps": 5}
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**options)
    whole.train()
    assert [log["preference/queries"] for log in step_logs(whole)] == [2, 4, 5, 7, 9]
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert [log["preference/queries"] for log in step_logs(resumed)] == [2, 4, 5, 7, 9]


def test_the_first_step_starts_from_log_2(make_trainer):
    """Policy and reference are equal: every pair's loss is log 2, and every ratio is 0."""
    trainer = make_trainer(max_steps=1, judge=first_wins)
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert entry["objective/kl"] == entry["exploration/ref_ratio"] == pytest.approx(0, abs=1e-5)


def test_one_batch_of_eight_equals_eight_of_one(make_trainer, tmp_path: Path):
    runs = []
    for size, steps in ((8, 1), (1, 8), (3, 3)):
        trainer = make_trainer(
            max_steps=4,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            train_dataset=prompts(8 if size != 3 else 9),
            optim="sgd",
            learning_rate=0.5,
        )
        trainer.train()
        runs.append(trainer)
    assert_same_run(runs[0], runs[1])
    assert len(step_logs(runs[2])) == 4


def test_a_short_last_batch_counts_by_its_pairs(make_trainer):
    """Seven prompts in micro-batches of 4 and 3 give the same step as one batch of seven."""
    whole, parts = (
        make_trainer(
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            train_dataset=prompts(7),
            optim="sgd",
            learning_rate=0.5,
        )
        for size, steps in ((7, 1), (4, 2))
    )
    whole.train()
    parts.train()
    assert_same_run(whole, parts)


def test_pinned_trajectory(make_trainer):
    """Losses of six steps, measured once: a refactor leaves them as they are."""
    trainer = make_trainer(max_steps=6, per_device_train_batch_size=8, alpha=1e-3, missing_eos_penalty=0.1)
    trainer.train()
    pinned = json.loads((Path(__file__).parents[1] / "pinned_trajectory.json").read_text())
    for name, values in pinned.items():
        measured = [entry[name] for entry in step_logs(trainer)]
        assert measured == pytest.approx(values, rel=2e-4, abs=2e-4), name


def test_the_policy_learns(make_trainer):
    """Reward: the share of e. In 24 steps the held-out score clearly exceeds the reference's."""
    trainer = make_trainer(
        max_steps=24,
        per_device_train_batch_size=16,
        max_new_tokens=12,
        learning_rate=5e-3,
        train_dataset=prompts(64),
        eval_dataset=prompts(16, chat=True),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_score"] > metrics["eval_ref_score"] + 0.1
    assert metrics["eval_win_rate"] > 0.8
    assert metrics["eval_kl"] > 1


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_log_is_one_short_line(make_trainer, capsys: pytest.CaptureFixture[str], disable_tqdm: bool):
    """As on the command line, in place of transformers' dictionary; with a progress bar or without."""
    trainer = make_trainer(
        disable_tqdm=disable_tqdm,
        eval_dataset=prompts(4),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == [["step", "1", "loss"], ["step", "2", "loss"], ["eval", "2", "wins"]]


def test_value_at():
    assert [value_at([1.0, 2.0], epoch) for epoch in (None, 0.0, 0.99, 1.0, 7.5)] == [1, 1, 1, 2, 2]
    assert value_at(3, 5.0) == 3.0


def test_logs_are_means_over_the_steps_since_the_last_log(make_trainer):
    def first_letter(prompts, completions):
        return [float(ord(text[0])) if text else 0.0 for text in completions]

    every, third = (make_trainer(max_steps=3, logging_steps=n, reward_model=first_letter) for n in (1, 3))
    every.train()
    third.train()
    (pooled,) = step_logs(third)
    assert all(entry["preference/tie_rate"] == 0 for entry in step_logs(every))
    for name in ("loss", "loss/dpo", "logps/chosen", "completions/length", "objective/model_scores"):
        assert pooled[name] == pytest.approx(sum(entry[name] for entry in step_logs(every)) / 3, rel=1e-5), name


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_resume_reproduces_the_uninterrupted_run(make_trainer, tmp_path: Path, logging_steps: int):
    """From a checkpoint in the middle of an epoch and between two logs: the same logs, the same weights."""
    options = {
        "max_steps": 6,
        "train_dataset": prompts(20),
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": logging_steps,
        "alpha": [1e-3, 1e-2],
        "lr_scheduler_type": "linear",
    }
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_run(whole, resumed, tolerance=1e-7)


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_log(self, args, state, control, **kwargs):
        self.events.append("log")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append("evaluate")

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")


def test_callbacks_evaluation_and_checkpoints_during_training(make_trainer):
    recorder = Recorder()
    trainer = make_trainer(
        max_steps=4,
        eval_dataset=prompts(4),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        callbacks=[recorder],
    )
    trainer.train()
    assert recorder.events.count("evaluate") == recorder.events.count("save") == 2
    assert trainer.args.metric_for_best_model == "win_rate"
    assert trainer.state.best_metric is not None


def test_lora_trains_adapters_only_and_its_reference_is_the_base(make_trainer):
    base = tiny_model()
    trainer = make_trainer(
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        max_steps=3,
        learning_rate=5e-2,
        eval_dataset=prompts(4),
    )
    trainer.train()
    trained = dict(trainer.model.get_base_model().named_parameters())
    frozen = {name: p for name, p in trained.items() if "lora_" not in name}
    assert all(not p.requires_grad for p in frozen.values())
    originals = dict(base.named_parameters())
    for name, p in frozen.items():
        torch.testing.assert_close(p, originals[name.replace(".base_layer", "")], atol=0, rtol=0)
    ids = torch.arange(10, 20)[None]
    with trainer.reference.model() as reference, torch.no_grad():
        torch.testing.assert_close(reference(ids).logits, base(ids).logits)
    with torch.no_grad():
        assert not torch.allclose(trainer.model(ids).logits, base(ids).logits, atol=1e-3)
    assert step_logs(trainer)[-1]["exploration/ref_ratio"] != 0


def test_lora_equals_lora_with_a_second_model_as_reference(make_trainer):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    runs = []
    for ref_model in (None, tiny_model()):
        trainer = make_trainer(peft_config=config, ref_model=ref_model, max_steps=3, learning_rate=1e-2)
        trainer.train()
        runs.append(trainer)
    assert_same_run(*runs)


def test_gradient_checkpointing_changes_no_number(make_trainer):
    plain, checkpointed = make_trainer(), make_trainer(gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert_same_run(plain, checkpointed)


def test_bf16_trains(make_trainer):
    trainer = make_trainer(bf16=True, max_steps=2, judge=first_wins)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in step_logs(trainer))
    assert step_logs(trainer)[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)


def test_dropout_is_off_unless_wanted(make_trainer):
    def with_dropout():
        model = tiny_model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return model

    losses = {}
    for off in (True, False):
        trainer = make_trainer(model=with_dropout(), disable_dropout=off, max_steps=1, judge=first_wins)
        trainer.train()
        losses[off] = step_logs(trainer)[0]["loss/dpo"]
    assert losses[True] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[False] != pytest.approx(math.log(2), abs=1e-6)


def test_dropout_given_as_a_number_is_off_too(make_trainer):
    """OPT calls F.dropout(p=self.dropout), and skips whole layers at layerdrop."""
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    }
    rates = {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}
    model = OPTForCausalLM(
        OPTConfig(vocab_size=tiny_model().config.vocab_size, max_position_embeddings=256, **sizes, **rates)
    )
    trainer = make_trainer(model=model, max_steps=1, judge=first_wins)
    trainer.train()
    assert step_logs(trainer)[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_round_small_steps_away_are_told(make_trainer, caplog, dtype):
    make_trainer(model=tiny_model().to(dtype))
    assert ("the trained weights are bfloat16" in caplog.text) == (dtype == torch.bfloat16)


def test_a_model_by_name_is_trained_in_float32(make_trainer, tmp_path: Path):
    tiny_model().bfloat16().save_pretrained(tmp_path / "half")
    trainer = make_trainer(model=str(tmp_path / "half"))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer = make_trainer(model=str(tmp_path / "half"), model_init_kwargs={"dtype": "bfloat16"})
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


def test_virtual_tokens_are_refused(make_trainer):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="peft_config=PromptTuningConfig puts virtual tokens before the prompt"):
        make_trainer(peft_config=config)
    with pytest.raises(ConfigError, match="peft_config=PromptTuningConfig"):
        make_trainer(model=get_peft_model(tiny_model(), config))


def test_more_processes_share_the_history_of_scores(make_trainer, tmp_path: Path):
    """A checkpoint of one process, read by the second of two."""
    trainer = make_trainer(normalize_scores=True, max_steps=2, save_steps=1, save_strategy="steps", logging_steps=2)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    rank_0 = json.loads((checkpoint / "xpo_state_0.json").read_text())
    other = make_trainer(normalize_scores=True)
    with mock.patch.object(XPOConfig, "process_index", 1):
        other.create_optimizer_and_scheduler(2)
        other._load_optimizer_and_scheduler(str(checkpoint))
    assert other.labeller.scale.moments == rank_0["scale"]
    assert rank_0["scale"][0] > 0
    assert rank_0["meter"]["sums"]  # as nothing was logged yet
    # The same names, or the ranks could not add them up; and nothing counted twice.
    assert set(other.meter.sums) == set(rank_0["meter"]["sums"])
    assert {*other.meter.sums.values()} <= {(0.0, 0.0)}
    assert other.meter.steps == rank_0["meter"]["steps"]


def test_a_non_finite_loss_stops_the_run_and_leaves_the_checkpoints_sound(make_trainer, tmp_path: Path):
    """Step 4 has no finite loss: the error names it, and checkpoint-3 loads."""

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                control.should_save = True

        def on_save(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.lm_head.weight.fill_(float("nan"))

    trainer = make_trainer(max_steps=6, callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match="at step 4; lower learning_rate"):
        trainer.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3")
    assert all(p.isfinite().all() for p in saved.parameters())


def test_an_infinite_gradient_stops_the_run_before_the_weights_change(make_trainer):
    trainer = make_trainer(max_steps=2)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match="gradient norm"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_trl_script_runs_with_its_import_changed(tokenizer, tmp_path: Path):
    """TRL's documented XPO script with a reward model; the first import line is what changed."""
    model = tiny_model()
    reward_model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,
            pad_token_id=0,
        )
    )
    train_dataset = prompts(8, chat=True)

    training_args = XPOConfig(output_dir=str(tmp_path / "Qwen2-0.5B-XPO"), max_steps=2, logging_steps=1, use_cpu=True)
    trainer = XPOTrainer(
        model=model,
        reward_funcs=reward_model,
        args=training_args,
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        train_dataset=train_dataset,
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert step_logs(trainer)[0].keys() >= TRL_METRICS
    assert (tmp_path / "Qwen2-0.5B-XPO" / "model.safetensors").is_file()


def test_command_lines_can_be_parsed_into_a_config(tmp_path: Path):
    """TRL's example scripts read XPOConfig with HfArgumentParser."""
    arguments = ["--output_dir", str(tmp_path), "--alpha", "1e-5", "1e-6", "--beta", "0.2", "--max_new_tokens", "32"]
    (config,) = HfArgumentParser(XPOConfig).parse_args_into_dataclasses(arguments)  # type: ignore[arg-type]
    assert config.alpha == [1e-5, 1e-6]
    assert value_at(config.beta, 0) == 0.2
    assert config.max_new_tokens == 32


def test_generation_kwargs_win_over_the_options_they_repeat(make_trainer):
    trainer = make_trainer(generation_kwargs={"top_k": 1, "no_repeat_ngram_size": 2})
    assert trainer.args.top_k == 1
    assert trainer.draws.sampler.config.no_repeat_ngram_size == 2


def test_judge_functions_label_and_reward_models_only_score(make_trainer):
    """The judge prefers y always; the reward model sees zeros."""
    trainer = make_trainer(
        judge=first_wins,
        reward_model=lambda prompts, completions: [0.0] * len(prompts),
        max_steps=1,
    )
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["preference/win_rate"] == 1.0
    assert entry["objective/model_scores"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_model": None}, "neither judge nor reward_model"),
        ({"train_dataset": prompts(0)}, "is empty"),
        ({"train_dataset": prompts(2).rename_column("prompt", "text")}, "no column 'prompt'"),
        ({"judge": 3}, "judge=3 is no judge"),
        ({"reward_model": 3}, "reward_model=3 is no reward model"),
        ({"max_new_tokens": 128}, "leaves no room"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams=2"),
        ({"generation_kwargs": "top_k"}, "generation_kwargs='top_k' is no dictionary"),
        ({"chat_template_kwargs": "enable_thinking"}, "chat_template_kwargs='enable_thinking' is no dictionary"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize is set for each prompt"),
        ({"generation_kwargs": {"max_time": 2.0}}, "max_time=2.0"),
        ({"generation_kwargs": {"temperature": -1}}, "temperature=-1 is too small"),
        ({"generation_kwargs": {"max_new_tokens": "8"}}, "max_new_tokens='8' is not a whole number"),
        ({"generation_kwargs": {"max_new_tokens": 128}}, "leaves no room"),
        ({"model": gpt2()}, "max_length=128: the model has learned positions up to 64 tokens; lower max_length"),
        ({"model": with_rope({"rope_type": "dynamic", "factor": 2.0})}, "dynamic positions change beyond 100 tokens"),
    ],
)
def test_bad_arguments_are_named(make_trainer, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(**options)


def test_models_that_cannot_be_trained_are_named(make_trainer, tokenizer):
    model = tiny_model()
    with pytest.raises(ConfigError, match="ref_model is the model itself"):
        make_trainer(model=model, ref_model=model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="ref_model is the model itself"):
        make_trainer(model=adapted, ref_model=model)
    with pytest.raises(ConfigError, match=r"model has adapters, which new ones .* would replace"):
        make_trainer(model=adapted, peft_config=LoraConfig(task_type="CAUSAL_LM"))
    t5 = T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="is an encoder-decoder; use a causal language model"):
        make_trainer(model=T5ForConditionalGeneration(t5))
    assert make_trainer(model=gpt2(), max_length=64).args.max_length == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, "bias='all' trains the reference too; set bias='none', or pass ref_model"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' takes from the weights .* pass ref_model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' takes from the weights"),
    ],
)
def test_adapters_without_which_the_model_is_another_one(make_trainer, options, message):
    """Such a reference is not the model that training began with: pass that."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **options)
    with pytest.raises(ConfigError, match=message):
        make_trainer(peft_config=config)
    trainer = make_trainer(peft_config=config, ref_model=tiny_model(), max_steps=1, judge=first_wins)
    trainer.train()
    assert step_logs(trainer)[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_reference_by_name(make_trainer, tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "model")
    trainer = make_trainer(ref_model=str(tmp_path / "model"))
    assert torch.equal(trainer.reference.frozen.lm_head.weight, tiny_model().lm_head.weight)


def test_a_reference_that_does_not_move_is_not_copied(make_trainer, monkeypatch: pytest.MonkeyPatch):
    """Two of them may be more than the device holds."""
    monkeypatch.setattr("xpo.training.setup.frozen_copy", lambda model: pytest.fail("a copy"))
    given = tiny_model()
    trainer = make_trainer(ref_model=given)
    assert trainer.reference.frozen is given
    assert trainer.evaluator.draws.reference is trainer.reference


def test_a_stream_that_ends_takes_no_part_of_a_step(make_trainer):
    """Three batches, two to a step: the Trainer would keep the third one's gradient for the next pass."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2}
    trainer = make_trainer(train_dataset=prompts(6).to_iterable_dataset(), **options)
    seen = []
    original = trainer.compute_loss

    def compute_loss(model, inputs, *arguments, **more):
        seen.append(trainer.state.global_step)
        return original(model, inputs, *arguments, **more)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert seen == [0, 0, 1, 1]


def test_a_stream_without_a_whole_step_is_refused(make_trainer):
    """The Trainer would end without a step, as if all were well."""
    trainer = make_trainer(train_dataset=prompts(3).to_iterable_dataset(), gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="train_dataset ends before the first step of 8 prompts; give more"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_strategy": "best"}, "save_strategy=best needs evaluations; set eval_strategy=steps"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect on pairs; .* labels='soft'"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length' is not supported"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy='batch_rebalance' is not supported"),
        ({"optim": "schedule_free_adamw"}, "optim='schedule_free_adamw' is not supported: its weights in training"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type='cosine_with_min_lr' .* is no schedule"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_cycles": 2}}, "'num_cycles': 2.* correct them"),
        ({"max_steps": -1, "num_train_epochs": 1.5, "alpha": [1e-5, 1e-6, 0]}, "alpha=.* 3 values for num_train_ep"),
    ],
)
def test_what_transformers_know_and_this_trainer_does_not_do(make_trainer, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(**options)


def test_what_may_be_given_of_all_that(make_trainer, tmp_path: Path):
    """Values for each epoch that comes; the best by a metric that nobody names; no checks of vLLM."""
    make_trainer(max_steps=-1, num_train_epochs=1.5, alpha=[1e-5, 1e-6])
    best = make_trainer(save_strategy="best", eval_strategy="steps", eval_steps=1, eval_dataset=prompts(3))
    assert best.args.metric_for_best_model == "win_rate"
    assert XPOConfig(output_dir=str(tmp_path), vllm_check_steps=None).vllm_check_steps is None
    config = checked(compose(["experiment=smoke", "generation.vllm_check_steps=null"])[0])
    assert build_arguments(config, tmp_path).vllm_check_steps is None


def test_an_optimizer_that_is_not_there_is_one_line(make_trainer):
    trainer = make_trainer(optim="grokadamw")
    with pytest.raises(ConfigError, match="optim='grokadamw' with optim_args=None cannot be made"):
        trainer.train()


def test_there_is_nothing_to_predict(make_trainer):
    with pytest.raises(ConfigError, match="call evaluate"):
        make_trainer().predict(prompts(2))


def test_half_written_checkpoints_are_passed_over(make_trainer, tmp_path: Path):
    """As kill -9 leaves them."""
    make_trainer(save_strategy="steps", save_steps=1).train()
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").unlink()
    resumed = make_trainer(max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in step_logs(resumed)] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint=True, but '.*' holds no complete checkpoint"):
        make_trainer(output_dir=str(tmp_path / "other")).train(resume_from_checkpoint=True)


def test_another_number_of_processes_is_told(make_trainer, tmp_path: Path, caplog):
    make_trainer(save_strategy="steps", save_steps=1).train()
    state = tmp_path / "out" / "checkpoint-1" / "xpo_state_0.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"processes": 2}))
    make_trainer().train(resume_from_checkpoint=str(state.parent))
    assert "was written by 2 processes, not 1: unless" in caplog.text


def test_apples_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """They know no float64, in which tokens are drawn."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert XPOConfig(output_dir=str(tmp_path)).device.type == "cpu"


def test_evaluation_without_prompts_is_an_error(make_trainer):
    with pytest.raises(ConfigError, match="eval_dataset=None"):
        make_trainer().evaluate()


def test_the_reward_does_not_reach_the_reference(make_trainer):
    """The frozen copy stays what the policy was."""
    trainer = make_trainer(max_steps=3, learning_rate=1e-2, reward_model=share_of_e)
    trainer.train()
    with trainer.reference.model() as reference:
        for p, q in zip(reference.parameters(), tiny_model().parameters(), strict=True):
            assert torch.equal(p, q)
            assert not p.requires_grad


def test_streams_train_and_evaluate_like_tables(make_trainer):
    table = make_trainer(train_dataset=prompts(8), eval_dataset=prompts(4), data_seed=1)
    stream = make_trainer(
        train_dataset=prompts(8).to_iterable_dataset(), eval_dataset=prompts(4).to_iterable_dataset(), data_seed=1
    )
    stream.train()
    assert len(step_logs(stream)) == 2
    first, second = table.evaluate(), make_trainer().evaluate(prompts(4).to_iterable_dataset())
    assert {k: v for k, v in first.items() if k != "eval_runtime"} == {
        k: v for k, v in second.items() if k != "eval_runtime"
    }
    assert stream.evaluate()["eval_length"] > 0


def test_adapters_keep_their_own_dropout(make_trainer):
    config = LoraConfig(r=4, lora_dropout=0.25, target_modules="all-linear", task_type="CAUSAL_LM")
    dropouts = {m.p for m in make_trainer(peft_config=config).model.modules() if isinstance(m, torch.nn.Dropout)}
    assert dropouts == {0.25}
    adapted = make_trainer(model=get_peft_model(tiny_model(), config)).model
    assert {m.p for m in adapted.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_judges_and_rewards_keep_their_precision(make_trainer):
    """bf16 is for policy and reference: scores in training and in evaluation are computed outside of autocast."""
    seen = []

    def reward(prompts, completions):
        seen.append(torch.is_autocast_enabled("cpu"))
        return share_of_e(prompts, completions)

    trainer = make_trainer(reward_model=reward, bf16=True, max_steps=1, eval_dataset=prompts(4))
    trainer.train()
    trainer.evaluate()
    assert seen == [False] * 4
