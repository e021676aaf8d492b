"""Defects of earlier XPO implementations, one test each: none of them can happen here.

Numbers with a # are issues of huggingface/trl. Row 24, another algorithm's sign, has no counterpart and is tested all
the same.
"""

import math
from pathlib import Path

import mlflow
import pytest
import torch
from conftest import gpt2, prompts, share_of_e, step_logs
from pair_rm_checkpoint import build_tiny_pair_rm
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from xpo import ClassifierReward, ConfigError, PairRMJudge, XPOConfig
from xpo.models.loading import tiny_model, tiny_tokenizer
from xpo.sampling.noise import POLICY, REFERENCE, sampling_noise

# Where the rest of the rows are tested.
ELSEWHERE = {
    10: ("training/test_distributed.py", "test_two_processes_equal_one"),
    12: ("training/test_replay.py", "test_the_iterates_of_algorithm_1_minimise_its_objective"),
    14: ("training/test_distributed.py", "test_two_processes_equal_one"),
    15: ("training/test_distributed.py", "test_two_processes_equal_one"),
    19: ("sampling/test_vllm.py", "test_options_mean_the_same_and_are_checked_as_well"),
    25: ("training/test_resume.py", "test_a_killed_run_resumes_to_the_same_end"),
}
TESTS = Path(__file__).parents[1]


def test_every_row_has_a_test():
    here = {int(name[5:7]) for name in globals() if name[:5] == "test_" and name[5:7].isdigit()}
    for file, name in ELSEWHERE.values():
        assert f"def {name}(" in (TESTS / file).read_text()
    assert here | set(ELSEWHERE) == set(range(1, 28))


def one_step(trainer):
    """The labelled micro-batches of the first optimizer step, and the number of pairs."""
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))


def logps_by_hand(model, batch, side: int, row: int) -> float:
    """log pi(completion) of one row: no padding, one forward pass, only the completion's tokens."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row]]
    completion = batch["completion_ids"][side, row][batch["completion_mask"][side, row]]
    ids = torch.cat([prompt, completion])[None]
    with torch.no_grad():
        logps = model.eval()(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return logps.gather(1, completion[:, None]).sum().item()


def eos_lover(model):
    """The model with an EOS token that is likely enough to end completions early."""
    bias = torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor([0]), 4.0)
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def test_01_a_list_of_alphas_is_read_by_epoch(make_trainer):
    """#6801: indexed with a float epoch, it crashed at step 2."""
    trainer = make_trainer(max_steps=5, train_dataset=prompts(8), alpha=[0.1, 0.2], beta=[0.5, 0.25, 0.125])
    trainer.train()
    assert [entry["alpha"] for entry in step_logs(trainer)] == [0.1, 0.1, 0.2, 0.2, 0.2]
    assert [entry["beta"] for entry in step_logs(trainer)] == [0.5, 0.5, 0.25, 0.25, 0.125]


def test_02_the_eos_penalty_looks_at_the_completion_only(make_trainer, tokenizer):
    """#6802: the chat template puts EOS into every prompt, which hid that no completion has one."""
    trainer = make_trainer(
        train_dataset=prompts(4, chat=True),
        generation_kwargs={"suppress_tokens": [0]},
        reward_model=lambda prompts, completions: [1.0] * len(prompts),
        missing_eos_penalty=5.0,
        max_steps=1,
    )
    assert tokenizer.eos_token_id in trainer.train_dataset[0]["prompt_ids"]
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["val/model_contain_eos_token"] == entry["val/ref_contain_eos_token"] == 0
    assert entry["objective/model_scores"] == entry["objective/ref_scores"] == -4.0


def test_03_left_padding_does_not_shift_absolute_positions(make_trainer):
    """#6800: GPT-2 in a batch of prompts of different lengths equals GPT-2 on each row alone."""
    (batch,), _ = one_step(make_trainer(model=gpt2(), max_length=64))
    assert not batch["prompt_mask"][:, 0].all()
    for side in (0, 1):
        for row in range(4):
            alone = logps_by_hand(gpt2(), batch, side, row)
            assert batch["reference_logps"][side, row].item() == pytest.approx(alone, abs=1e-4)


def test_04_padding_is_no_part_of_kl_and_entropy(make_trainer):
    """#6803: completions of different lengths; entropy is the mean over rows of -log pi of their own tokens."""
    trainer = make_trainer(model=eos_lover(tiny_model()), max_new_tokens=12, max_steps=1, learning_rate=0.0)
    (batch,), _ = one_step(trainer)
    lengths = batch["completion_mask"].sum(-1)
    assert lengths.min() < lengths.max()
    by_hand = [logps_by_hand(trainer.model, batch, side, row) for side in (0, 1) for row in range(4)]
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["objective/entropy"] == pytest.approx(-sum(by_hand) / 8, abs=1e-4)
    assert entry["objective/kl"] == pytest.approx(0, abs=1e-6)


def test_05_logps_are_the_policys_alone(make_trainer):
    """#6809: policy plus reference. At step 1 they are equal, so the sum would be twice -entropy."""
    trainer = make_trainer(max_steps=1, judge=lambda prompts, first, second: [1.0] * len(prompts))
    trainer.train()
    (entry,) = step_logs(trainer)
    mean = (entry["logps/chosen"] + entry["logps/rejected"]) / 2
    assert mean == pytest.approx(-entry["objective/entropy"], abs=1e-5)


def other_tokenizer() -> PreTrainedTokenizerFast:
    """Another vocabulary: the same letters have other ids."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["e", "th"])
    tokenizer.chat_template = None
    return tokenizer


def test_06_the_reward_model_reads_text_with_its_own_tokenizer(make_trainer):
    """#6951: it was fed the policy's token ids."""
    tokenizer = other_tokenizer()
    torch.manual_seed(0)
    classifier = BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=16, num_labels=1, pad_token_id=0)
    ).eval()  # fmt: skip
    seen: list[list[int]] = []
    classifier.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    trainer = make_trainer(reward_model=ClassifierReward(classifier, tokenizer, batch_size=1), max_steps=1)
    trainer.train()
    texts = {tokenizer.decode(ids) for ids in seen}
    assert all(text.startswith("Tell me") for text in texts)
    assert [tokenizer(text).input_ids for text in sorted(texts)] == sorted(seen, key=tokenizer.decode)


def test_07_evaluate_works_on_its_own(make_trainer):
    """#2228: it crashed."""
    metrics = make_trainer(eval_dataset=prompts(4)).evaluate()
    assert metrics["eval_kl"] == 0
    assert 0 <= metrics["eval_win_rate"] <= 1


def test_08_with_lora_the_reference_samples_from_the_base(make_trainer):
    """#2781: adapters stayed active. The reference's completions are those of the untrained model."""
    trainer = make_trainer(
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), learning_rate=0.1, max_steps=4
    )
    trainer.train()
    noise = sampling_noise((0, 0, REFERENCE), range(16), trainer.draws.sampler.max_new_tokens)
    draw = [trainer.train_dataset["prompt_ids"], noise, torch.device("cpu")]
    base = trainer.draws.sampler.sample(tiny_model(), *draw)
    with trainer.reference.model() as reference:
        assert trainer.draws.sampler.sample(reference, *draw).texts == base.texts
    assert trainer.draws.sampler.sample(trainer.model.get_base_model(), *draw).texts != base.texts


def test_09_completions_must_leave_room_for_a_prompt(make_trainer):
    """#3042: max_new_tokens >= max_length emptied the prompt."""
    with pytest.raises(ConfigError, match="max_new_tokens=128 leaves no room for a prompt in max_length=128"):
        make_trainer(max_new_tokens=128, max_length=128)


def test_11_pair_rm_judges_on_this_transformers(make_trainer, tmp_path):
    """#4918: it did not run on transformers 5."""
    judge = PairRMJudge(str(build_tiny_pair_rm(tmp_path)[0]), device="cpu")
    trainer = make_trainer(judge=judge, train_dataset=prompts(4, chat=True), max_steps=1)
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["preference/invalid_rate"] == 0
    assert "objective/model_scores" not in entry


def test_13_the_eos_penalty_is_subtracted(make_trainer):
    """#2012: subtracted from the score, not put in its place."""
    trainer = make_trainer(
        reward_model=lambda prompts, completions: [3.0] * len(prompts),
        generation_kwargs={"suppress_tokens": [0]},
        missing_eos_penalty=1.0,
        max_steps=1,
    )
    trainer.train()
    assert step_logs(trainer)[0]["objective/model_scores"] == 2.0


def test_16_an_eos_token_that_is_also_the_pad_token_counts(make_trainer, tokenizer):
    """Masks computed from ids dropped every EOS: its log-probability is part of the completion's."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    trainer = make_trainer(model=eos_lover(tiny_model()), max_new_tokens=12)
    (batch,), _ = one_step(trainer)
    last = batch["completion_mask"].sum(-1) - 1
    ends = batch["completion_ids"].gather(2, last[..., None]).squeeze(-1)
    assert (ends == tokenizer.eos_token_id).any()


def test_17_ties_and_identical_pairs_do_not_train(make_trainer):
    """`>=` gave every tie to the policy. A judge that always says "first" cannot win with the same text."""
    tied = make_trainer(judge=lambda prompts, first, second: [0.0] * len(prompts), alpha=0.0, max_steps=1)
    same = make_trainer(
        judge=lambda prompts, first, second: [9.0] * len(prompts), alpha=0.0, temperature=0.0, max_steps=1
    )
    for trainer in (tied, same):
        trainer.train()
        (entry,) = step_logs(trainer)
        assert entry["preference/tie_rate"] == 1.0
        assert entry["loss"] == entry["grad_norm"] == 0.0


def test_18_an_invalid_verdict_is_nobodys_win(make_trainer):
    """-1 counted as a win of the reference."""
    trainer = make_trainer(judge=lambda prompts, first, second: [None] * len(prompts), alpha=0.0, max_steps=1)
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["preference/invalid_rate"] == 1.0
    assert entry["preference/win_rate"] == entry["preference/tie_rate"] == 0.0
    assert entry["loss"] == entry["grad_norm"] == 0.0


def test_20_a_missing_reward_is_not_zero(make_trainer):
    """None became 0, which beats every negative reward."""
    trainer = make_trainer(
        reward_model=lambda prompts, completions: [None, *[-share for share in share_of_e(prompts, completions)[1:]]],
        max_steps=1,
    )
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["preference/invalid_rate"] == 0.25
    assert entry["objective/model_scores"] <= 0


def test_21_a_list_is_no_string(tmp_path):
    """alpha="1e-5" from a command line was split into characters."""
    with pytest.raises(ConfigError, match="alpha='1e-5' is not a number"):
        XPOConfig(output_dir=str(tmp_path), alpha="1e-5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "key", ["max_new_tokens", "max_length", "top_k", "tokens_per_micro_batch", "reference_batch_size"]
)
@pytest.mark.parametrize("value", [2.5, "8", True])
def test_21_a_count_is_a_whole_number(tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"{key}={value!r} is not a whole number; give one such as {key}=8"):
        XPOConfig(output_dir=str(tmp_path), **{key: value})


def test_22_log_probabilities_are_inside_the_gradient(make_trainer):
    trainer = make_trainer()
    (batch,), pairs = one_step(trainer)
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=pairs).backward()
    norms = [p.grad.norm().item() for p in trainer.model.parameters()]
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)


def test_23_prompt_tokens_are_not_scored(make_trainer):
    """log pi of the completion alone, by hand, for both completions of each pair."""
    trainer = make_trainer(train_dataset=prompts(4, chat=True))
    (batch,), _ = one_step(trainer)
    with torch.no_grad():
        scored = trainer.policy_forward(trainer.model, batch)
    for side in (POLICY, REFERENCE):
        for row in range(4):
            expected = logps_by_hand(trainer.model, batch, side, row)
            assert scored[side, row].item() == pytest.approx(expected, abs=1e-4)


def test_24_the_exploration_term_pushes_reference_completions_down(make_trainer):
    """With ties only there is nothing but the bonus: log pi(y~) falls, of completions never seen before too."""
    trainer = make_trainer(
        reward_model=lambda prompts, completions: [0.0] * len(prompts), alpha=1.0, max_steps=16, learning_rate=3e-3
    )
    trainer.train()
    logs = step_logs(trainer)
    assert sum(entry["exploration/ref_ratio"] for entry in logs[-4:]) / 4 < -0.5
    assert logs[0]["preference/tie_rate"] == 1.0
    assert "rewards/chosen" not in logs[0]  # there is no labelled pair to average over


def test_26_a_run_that_somebody_else_started_goes_on(make_trainer, tmp_path, monkeypatch):
    """transformers' MLflowCallback ended it, or logged only the arguments; here it is not even attached."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with mlflow.start_run() as run:
        trainer = make_trainer(max_steps=1)
        trainer.train()
        assert trainer.args.report_to == []
        assert mlflow.active_run().info.run_id == run.info.run_id
        assert mlflow.active_run().info.status == "RUNNING"
    assert not any(name.startswith("MLflow") for name in trainer.callback_handler.callback_list.splitlines())


def test_27_a_loss_that_is_not_a_number_stops_the_run(make_trainer):
    """The loss filter replaced it by the mean of the losses before."""
    trainer = make_trainer()
    assert not trainer.args.logging_nan_inf_filter
    with torch.no_grad():
        trainer.model.lm_head.weight[5] = float("nan")
    with pytest.raises(FloatingPointError, match="at step 1"):
        trainer.train()
