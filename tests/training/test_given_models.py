"""Policies, references and data as people bring them: what is trained, what is kept, what is refused at the start."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TrainerFactory, prompts, share_of_e, step_logs
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RwkvConfig,
    RwkvForCausalLM,
)

from xpo import ClassifierReward, LogCompletionsCallback, XPOConfig, XPOTrainer
from xpo.config.errors import ConfigError
from xpo.models.forward import padding_counts
from xpo.models.loading import tiny_model, tiny_tokenizer
from xpo.models.reference import Reference
from xpo.rewards import FunctionReward, MixReward


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")  # PEFT writes the model's name into it


def learned(base: Any = None) -> PeftModel:
    """A model with adapters that have been trained before: the second factor of new ones is zero."""
    torch.manual_seed(1)
    model = get_peft_model(base or tiny_model(), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def adapter(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """A directory with a learned adapter, whose base model is a directory too."""
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = learned(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def weights(model: torch.nn.Module, part: str) -> list[torch.Tensor]:
    return [value.detach().clone() for name, value in model.named_parameters() if part in name]


# ---- what is trained -----------------------------------------------------------------------------------


def frozen(kind: str, adapter: str) -> Any:
    if kind == "whole":
        return tiny_model().requires_grad_(False)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(Path(adapter).parent / "base"), adapter)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_policy_of_which_nothing_is_trained_is_refused(make_trainer: TrainerFactory, adapter: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"model has no parameter that is trained; load its adapters with is_trainab"):
        make_trainer(model=frozen(kind, adapter))


def test_a_directory_of_an_adapter_goes_on_with_it(make_trainer: TrainerFactory, adapter: str) -> None:
    """Its weights are where training begins, and the only ones that are trained."""
    trainer = make_trainer(model=adapter)
    model = trainer.model
    assert isinstance(model, PeftModel)
    before, base = weights(model, "lora_B"), weights(model, "base_layer")
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(Path(adapter).parent / "base"), adapter)
    assert all(map(torch.equal, before, weights(saved, "lora_B")))
    trainer.train()
    assert not any(map(torch.equal, before, weights(model, "lora_B")))
    assert all(map(torch.equal, base, weights(model, "base_layer")))


def test_an_adapter_is_not_replaced_by_a_new_one(make_trainer: TrainerFactory, adapter: str) -> None:
    injected = tiny_model()
    injected.add_adapter(lora())
    for model in (adapter, injected, get_peft_model(tiny_model(), lora())):
        with pytest.raises(ConfigError, match=r"has adapters, which new ones \(peft_config, lora.r\) would replace"):
            make_trainer(model=model, peft_config=lora())


def test_the_base_model_of_an_adapter_must_be_there(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path / "nameless")
    with pytest.raises(ConfigError, match=r"base_model_name_or_path in .*adapter_config.json='' is neither a director"):
        make_trainer(model=str(tmp_path / "nameless"))


# ---- the reference of a policy with adapters -------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True])
def test_the_reference_of_learned_adapters_is_the_policy_at_the_start(
    make_trainer: TrainerFactory, adapter: str, caplog: pytest.LogCaptureFixture, by_name: bool
) -> None:
    """As that of any other policy: the KL of the first step is 0. It is the same as with a second model."""
    model = adapter if by_name else learned()
    trainer = make_trainer(model=model, max_steps=3, learning_rate=0.05)
    assert "the reference is the policy as it is now, with its adapters; ref_model is another one" in caplog.text
    start = weights(trainer.model, "lora_B")
    trainer.train()
    logs = step_logs(trainer)
    assert logs[0]["objective/kl"] == 0
    assert abs(logs[-1]["objective/kl"]) > 1e-3
    with trainer.reference.model():
        assert all(map(torch.equal, start, weights(trainer.model, "lora_B")))
    assert not any(map(torch.equal, start, weights(trainer.model, "lora_B")))

    second = make_trainer(
        model=model if by_name else learned(),
        ref_model=(adapter if by_name else learned()),
        max_steps=3,
        learning_rate=0.05,
    )
    second.train()
    for one, other in zip(logs, step_logs(second), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("config", [lora(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])])
def test_the_reference_of_new_adapters_is_the_model_without_them(
    make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture, config: Any
) -> None:
    for given in ({"peft_config": config}, {"model": get_peft_model(tiny_model(), config)}):
        trainer = make_trainer(**given)
        assert "the reference is the policy" not in caplog.text
        with trainer.reference.model() as reference:
            tokens = torch.arange(8)[None]
            torch.testing.assert_close(reference(tokens).logits, tiny_model()(tokens).logits)


def test_a_store_tells_learned_adapters_apart() -> None:
    one, other, new = learned(), learned(), get_peft_model(tiny_model(), lora())
    with torch.no_grad():
        weights_of = next(part for name, part in other.named_parameters() if "lora_B" in name)
        weights_of[0, 0] += 1
    names = {Reference(model, None, torch.device("cpu")).fingerprint for model in (one, other, new)}
    assert len(names) == 3
    plain = Reference(tiny_model(), None, torch.device("cpu")).fingerprint
    assert Reference(new, None, torch.device("cpu")).fingerprint == plain


def test_learned_adapters_under_autocast(make_trainer: TrainerFactory) -> None:
    """Which keeps weights in half precision: the reference's must not be the policy's."""
    trainer = make_trainer(model=learned(), bf16=True, max_steps=3, learning_rate=0.5)
    trainer.train()
    logs = step_logs(trainer)
    assert logs[0]["objective/kl"] == 0
    assert abs(logs[-1]["objective/kl"]) > 5e-3


def test_policy_and_reference_in_one_autocast_block_have_their_own_adapters() -> None:
    """As when a step is drawn: autocast keeps casts of weights, by parameter, for as long as the block lasts."""
    model, tokens = learned(), torch.arange(8)[None]
    reference = Reference(model, None, torch.device("cpu"))

    def half() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    with torch.no_grad(), half():
        at_the_start = model(tokens).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.neg_()
    with torch.no_grad(), half():
        trained = model(tokens).logits
        with reference.model() as frozen:
            assert torch.equal(frozen(tokens).logits, at_the_start)
        assert torch.equal(model(tokens).logits, trained)
    assert not torch.equal(trained, at_the_start)


# ---- adapters in checkpoints --------------------------------------------------------------------------------


def with_adapter(kind: str) -> Any:
    model = tiny_model()
    torch.manual_seed(0)
    if kind == "injected":
        model.add_adapter(lora(), "mine")
        return model
    return get_peft_model(model, lora(), adapter_name=kind)


@pytest.mark.parametrize("kind", ["default", "policy", "injected"])
def test_the_best_adapter_is_loaded_at_the_end(make_trainer: TrainerFactory, kind: str) -> None:
    """Whatever it is called: the last one is not the best by the smallest KL."""
    trainer = make_trainer(
        model=with_adapter(kind),
        eval_dataset=prompts(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
        learning_rate=0.5,
        load_best_model_at_end=True,
        metric_for_best_model="kl",
    )
    assert trainer.args.greater_is_better is False
    trainer.train()
    kls = [log["eval_kl"] for log in trainer.state.log_history if "eval_kl" in log]
    assert min(kls) < kls[-1]
    assert trainer.evaluate()["eval_kl"] == pytest.approx(min(kls), abs=1e-6)


@pytest.mark.parametrize("kind", ["default", "policy", "injected"])
def test_a_run_with_adapters_resumes_exactly(make_trainer: TrainerFactory, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.1}
    whole = make_trainer(model=with_adapter(kind), **options)
    whole.train()
    resumed = make_trainer(model=with_adapter(kind), output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert step_logs(resumed)[-2:] == step_logs(whole)[-2:]
    assert all(map(torch.equal, weights(whole.model, "lora_"), weights(resumed.model, "lora_")))


# ---- what would be wrong ------------------------------------------------------------------------------------


def mixtral(**options: Any) -> MixtralForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=288,
        num_key_value_heads=2,
        num_local_experts=4,
        sliding_window=None,
        eos_token_id=0,
        pad_token_id=0,
        **sizes,
        **options,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config)


def test_the_loss_of_a_router_that_nobody_trains_is_refused(make_trainer: TrainerFactory) -> None:
    with pytest.raises(ConfigError, match=r"model.config.output_router_logits=True asks for .*; set it to False"):
        make_trainer(model=mixtral(output_router_logits=True))
    trainer = make_trainer(model=mixtral())
    trainer.train()
    assert step_logs(trainer)[0]["objective/kl"] == 0


def test_a_model_that_reads_padding_is_refused(make_trainer: TrainerFactory) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 256}
    model = RwkvForCausalLM(RwkvConfig(**sizes, eos_token_id=0, pad_token_id=0))
    with pytest.raises(ConfigError, match=r"model=RwkvForCausalLM ignores the attention mask: prompts that are padded"):
        make_trainer(model=model)
    assert not padding_counts(tiny_model())
    assert not padding_counts(mixtral())


def test_tokens_without_an_embedding_are_refused(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    """A token that was added, to a model that was not resized; the policy may draw what the reference cannot read."""

    def trained(tokenizer: Any, prompt: str = "a", model: Any = None, **options: Any) -> XPOTrainer:
        args = XPOConfig(output_dir=str(tmp_path), use_cpu=True)
        data = [{"prompt": prompt}]
        model = model or tiny_model()
        judge = lambda prompts, first, second: [1.0] * len(prompts)  # noqa: E731
        return XPOTrainer(model, judge=judge, args=args, processing_class=tokenizer, train_dataset=data, **options)

    padded, worded, larger = tiny_tokenizer(), tiny_tokenizer(), tiny_model()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    worded.add_tokens(["<x>"])
    larger.resize_token_embeddings(400, mean_resizing=False)
    with pytest.raises(ConfigError, match=r"pad_token='\[PAD\]' has the id 288, and model 288 tokens; call"):
        trained(padded)
    with pytest.raises(ConfigError, match=r"train_dataset has a prompt with token 288, and model 288 tokens; call"):
        trained(worded, "a <x>")
    assert trained(worded, "a")  # nobody uses it
    with pytest.raises(ConfigError, match=r"model has 400 tokens, and ref_model 288; call resize_token_embeddings"):
        trained(worded, model=larger, ref_model=tiny_model())
    assert trained(worded, "a <x>", model=larger)


def test_a_tokenizer_without_pad_and_eos(tmp_path: Path) -> None:
    """The model's end of text pads; with none at all, the remedy is named."""
    bare = tiny_tokenizer()
    bare.pad_token = bare.eos_token = None
    judge = lambda prompts, first, second: [1.0] * len(prompts)  # noqa: E731
    given = {"judge": judge, "processing_class": bare, "train_dataset": [{"prompt": "a"}]}
    args = XPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert XPOTrainer(tiny_model(), args=args, **given).processing_class.pad_token_id == 0
    model = tiny_model()
    bare.pad_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match=r"the tokenizer of '' has no EOS token; set tokenizer.eos_token"):
        XPOTrainer(model, args=args, **given)


def test_an_epoch_without_a_batch_is_refused(make_trainer: TrainerFactory) -> None:
    with pytest.raises(ConfigError, match=r"dataloader_drop_last=True leaves no batch of 4 in the 3 prompts of"):
        make_trainer(train_dataset=prompts(3), dataloader_drop_last=True)
    trainer = make_trainer(train_dataset=prompts(4), dataloader_drop_last=True)
    trainer.train()
    assert len(step_logs(trainer)) == 2


def test_where_every_prompt_is_too_long_the_remedy_is_named(make_trainer: TrainerFactory) -> None:
    with pytest.raises(
        ConfigError, match=r"all 2 prompts exceed .*; raise max_length, or set prompt_overflow=truncate"
    ):
        make_trainer(train_dataset=Dataset.from_dict({"prompt": ["a" * 300] * 2}))


def test_roberta_counts_its_positions_from_behind_the_padding() -> None:
    """34 of them hold 32 tokens; a tokenizer that names no limit has 1e30."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=288, num_labels=1, max_position_embeddings=34, type_vocab_size=1, **sizes)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    reward = ClassifierReward(RobertaForSequenceClassification(config), tokenizer)
    assert reward.max_length == 32
    assert reward.scores(["ab " * 40], ["c"]).isfinite().all()


# ---- metrics by which something is decided ---------------------------------------------------------------------

WATCHED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("several", [False, True])
def test_a_metric_that_no_evaluation_has_is_refused(make_trainer: TrainerFactory, several: bool) -> None:
    sets: Any = {"a": prompts(2), "b": prompts(2)} if several else prompts(2)
    wrong = "eval_loss", "los", "score_margins", "score_missing", "win_rate" if several else "a_win_rate"
    for metric in wrong:
        with pytest.raises(ConfigError, match=rf"metric_for_best_model='{metric}' is not measured; choose one of"):
            make_trainer(eval_dataset=sets, metric_for_best_model=metric, load_best_model_at_end=True, **WATCHED)
    for metric in ("win_rate", "eval_score", "score_margin", "kl", "ref_score"):
        name = metric.replace("eval_", "eval_b_") if "eval_" in metric and several else "b_" * several + metric
        trainer = make_trainer(eval_dataset=sets, metric_for_best_model=name, load_best_model_at_end=True, **WATCHED)
    trainer.train()
    assert trainer.state.best_metric is not None


def test_a_part_of_a_mix_is_a_metric(make_trainer: TrainerFactory) -> None:
    mix = MixReward({"letters": FunctionReward(share_of_e)}, {"letters": 1.0})
    by = {"metric_for_best_model": "score_letters", "load_best_model_at_end": True, "eval_dataset": prompts(2)}
    trainer = make_trainer(reward_model=mix, **by, **WATCHED)
    trainer.train()
    assert trainer.state.best_metric is not None
    with pytest.raises(ConfigError, match="'score_letter' is not measured"):
        make_trainer(reward_model=mix, **by | {"metric_for_best_model": "score_letter"}, **WATCHED)


def test_the_learning_rate_falls_when_the_win_rate_no_longer_rises(make_trainer: TrainerFactory) -> None:
    """ReduceLROnPlateau waits for smaller values by default; a constant win rate is a plateau at once."""
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}
    held_out = {"eval_dataset": prompts(2), **WATCHED, **options}
    trainer = make_trainer(judge=lambda p, a, b: [1.0] * len(p), max_steps=3, **held_out)
    assert (trainer.args.metric_for_best_model, trainer.args.lr_scheduler_kwargs["mode"]) == ("win_rate", "max")
    trainer.train()
    assert step_logs(trainer)[-1]["learning_rate"] < 1e-3
    by_kl = make_trainer(metric_for_best_model="kl", **held_out)
    assert by_kl.args.lr_scheduler_kwargs == {"mode": "min", "patience": 0}


# ---- what TRL's scripts say ------------------------------------------------------------------------------------


def test_what_stands_for_nothing_in_trls_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = XPOConfig(
        output_dir=str(tmp_path), use_cpu=True, top_k=None, use_vllm=False, reward_weights=None, judge=None
    )
    assert args.top_k == 0
    given = {"judge": lambda prompts, first, second: [1.0] * len(prompts), "processing_class": tiny_tokenizer()}
    given["train_dataset"] = [{"prompt": "a"}]
    XPOTrainer(tiny_model(), args=args, data_collator=None, compute_metrics=None, **given)
    with pytest.raises(ConfigError, match=r"compute_metrics=<.* is not used; leave it out"):
        XPOTrainer(tiny_model(), args=args, compute_metrics=lambda _: {}, **given)
    monkeypatch.setitem(sys.modules, "vllm", None)  # nor is it where it is
    with pytest.raises(ConfigError, match=r"generation_engine='vllm' is not installed; install it"):
        XPOConfig(output_dir=str(tmp_path), use_vllm=True)
    with pytest.raises(ConfigError, match=r"judge='openai' is not 'pair_rm'; pass any other judge to the trainer"):
        XPOConfig(output_dir=str(tmp_path), judge="openai")
    for name in ("auto_find_batch_size", "bf16_full_eval", "fp16_full_eval"):
        with pytest.raises(ConfigError, match=f"{name}=True is not supported; leave it out"):
            XPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: True})


def test_a_weight_counts_for_a_single_reward_as_well(make_trainer: TrainerFactory) -> None:
    whole, half = make_trainer(), make_trainer(reward_weights=[0.5])
    texts = ["e", "ee x", "x"]
    scores = [trainer.evaluator.labeller.judge.reward_model.scores([""] * 3, texts) for trainer in (whole, half)]
    assert scores[1].tolist() == (scores[0] / 2).tolist()
    with pytest.raises(ConfigError, match="reward_weights 2; give one of each"):
        make_trainer(reward_weights=[1.0, 2.0])


def test_remote_code_is_trusted_by_an_argument_that_parsers_do_not_see(tmp_path: Path) -> None:
    """TRL's ModelConfig has a field of this name, and both are parsed together."""
    assert XPOConfig(output_dir=str(tmp_path), use_cpu=True, trust_remote_code=True).trust_remote_code is True
    assert XPOConfig(output_dir=str(tmp_path), use_cpu=True).trust_remote_code is False
    assert "--trust_remote_code" not in HfArgumentParser(XPOConfig).format_help()


@pytest.mark.parametrize("freq", [None, 1])
def test_completions_are_shown(
    make_trainer: TrainerFactory, capsys: pytest.CaptureFixture[str], freq: int | None
) -> None:
    """At each evaluation, or every so many steps."""
    strategy = {"eval_strategy": "no" if freq else "steps", "eval_steps": None if freq else 1}
    trainer = make_trainer(eval_dataset=prompts(3), **strategy)
    trainer.add_callback(LogCompletionsCallback(trainer, None, num_prompts=2, freq=freq))
    trainer.train()
    shown = capsys.readouterr().out
    assert shown.count("Tell me about number 0") == 2
    assert shown.count("Tell me much about number 1") == 2
    assert "number 2" not in shown


def test_completions_go_to_mlflow_if_it_is_reported_to(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_experiment("completions")
    with mlflow.start_run() as run:
        trainer = make_trainer(eval_dataset=prompts(2), report_to=["mlflow"])
        trainer.add_callback(LogCompletionsCallback(trainer))
        trainer.evaluate()
    table = mlflow.load_table("completions_0.json", run_ids=[run.info.run_id])
    assert list(table["prompt"]) == ["Tell me about number 0", "Tell me much about number 1"]


def test_greedy_training_is_warned_of(make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture) -> None:
    """Policy and reference say the same at first: nearly every pair is a tie."""
    make_trainer(temperature=0.0)
    assert "at temperature=0 policy and reference say the same at first" in caplog.text
