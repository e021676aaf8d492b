"""Pairs that are trained on again, iterations, and who else draws: Algorithm 1 and its relatives."""

import math
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import TrainerFactory, prompts, share_of_e, step_logs
from peft import LoraConfig
from scipy.optimize import minimize_scalar
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from xpo import XPOConfig
from xpo.config.errors import ConfigError
from xpo.data.pair_file import read_pairs
from xpo.data.prompt_sets import RepeatedSteps
from xpo.models.loading import tiny_model
from xpo.models.logprobs import completion_logps
from xpo.models.reference import base_model
from xpo.sampling.noise import ITERATE, sampling_noise

EVERYTHING: dict[str, Any] = {
    "replay": "all",
    "replay_ratio": 1.5,
    "replay_updates": 2,
    "iterations": 3,
    "max_steps": 12,
    "learning_rate": 0.5,
    "optim": "sgd",
    "alpha": 1e-3,
}
MOVING = EVERYTHING | {"reference_update": "iteration"}
PAST = EVERYTHING | {"sampler": "past", "replay": "window"}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


class Batches(TrainerCallback):
    """What each optimizer step of a trainer trained on."""

    def __init__(self, trainer: Any):
        self.seen: list[dict[str, torch.Tensor]] = []
        original = trainer.get_batch_samples

        def get_batch_samples(*args: Any) -> Any:
            batches, count = original(*args)
            self.seen += batches
            return batches, count

        trainer.get_batch_samples = get_batch_samples


def completions(batch: dict[str, torch.Tensor]) -> set[tuple[Any, ...]]:
    """Both completions of each pair of a batch, as tokens, and its label."""
    first, second = (
        [
            tuple(ids[mask].tolist())
            for ids, mask in zip(batch["completion_ids"][k], batch["completion_mask"][k], strict=True)
        ]
        for k in range(2)
    )
    return set(zip(first, second, batch["label"].tolist(), strict=True))


# ---- Algorithm 1 ---------------------------------------------------------------------------------


def test_the_iterates_of_algorithm_1_minimise_its_objective(make_trainer: TrainerFactory, tokenizer: Any) -> None:
    """Two actions, soft labels, all pairs so far, 60 updates for each of five rollouts.

    alpha * sum log pi(second) - sum of p log sigmoid(z) + (1 - p) log sigmoid(-z), z = beta * difference of log-ratios,
    over the one number that the policy depends on, the difference of two logits. The bonus counts for ties, too.
    """
    alpha, beta, updates = 0.05, 1.0, 60
    a, b = (tokenizer.encode(word, add_special_tokens=False)[0] for word in "ab")
    model = tiny_model().requires_grad_(False)
    (prompt,) = tokenizer("x", return_tensors="pt")["input_ids"][None]
    norm = model.model.norm
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight), requires_grad=False)
    hidden = model.model(input_ids=prompt).last_hidden_state[0, -1]  # logits are linear in the norm's weight
    with torch.no_grad():
        common, apart = 40 * hidden / hidden.square().sum(), torch.zeros_like(hidden)
        apart[0] = 0.2 / hidden[0]
        model.lm_head.weight[a], model.lm_head.weight[b] = common + apart, common - apart
    norm.weight.requires_grad_(True)

    def judge(prompts: Any, first: Any, second: Any) -> list[float]:
        return [1.5 * ((one == "a") - (two == "a")) for one, two in zip(first, second, strict=True)]

    trainer = make_trainer(
        model=model,
        judge=judge,
        train_dataset=[{"prompt": "x"}] * 8,
        per_device_train_batch_size=8,
        max_new_tokens=1,
        temperature=1.0,
        labels="soft",
        replay="all",
        replay_ratio=1e9,
        replay_updates=updates,
        max_steps=5 * updates,
        alpha=alpha,
        beta=beta,
        optim="sgd",
        learning_rate=80.0,
        max_grad_norm=0.0,
        logging_steps=1000,
    )
    iterates: list[float] = []

    def gap(of: Any) -> float:
        logits = of(input_ids=prompt).logits[0, -1].detach().double()
        assert logits.softmax(-1)[[a, b]].sum() > 1 - 1e-6
        return float(logits[a] - logits[b])

    class Iterate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % updates == 0:
                iterates.append(gap(trainer.model))

    trainer.add_callback(Iterate())
    start = gap(model)
    trainer.train()
    pairs = list(read_pairs(Path(trainer.args.pairs_file)))
    assert len(iterates) == 5
    assert {pair["first"] + pair["second"] for pair in pairs} == {"aa", "ab", "ba", "bb"}

    for number, iterate in enumerate(iterates, 1):
        known = pairs[: 8 * number]

        def objective(delta: float, known: Any = known) -> float:
            logp = {"a": -math.log1p(math.exp(-delta)), "b": -math.log1p(math.exp(delta))}
            total = 0.0
            for pair in known:
                total += alpha * logp[pair["second"]]
                if pair["first"] != pair["second"]:
                    z = beta * (delta - start) * (1 if pair["first"] == "a" else -1)
                    p = 1 / (1 + math.exp(-1.5 if pair["first"] == "a" else 1.5))
                    total += p * math.log1p(math.exp(-z)) + (1 - p) * math.log1p(math.exp(z))
            return total

        best = minimize_scalar(objective, bounds=(-20, 20), method="bounded", options={"xatol": 1e-9}).x
        assert iterate == pytest.approx(best, abs=1e-4)


def test_the_last_pairs_are_trained_on_again(make_trainer: TrainerFactory) -> None:
    """With a learning rate of 0, an update after the first has the same loss; prompts come once for all updates."""
    trainer = make_trainer(replay_updates=3, max_steps=6, learning_rate=0.0, alpha=1e-2)
    batches = Batches(trainer).seen
    trainer.train()
    logs = step_logs(trainer)
    for first in (0, 3):
        assert [completions(batch) for batch in batches[first + 1 : first + 3]] == [completions(batches[first])] * 2
        for log in logs[first + 1 : first + 3]:
            assert log["loss/xpo"] == pytest.approx(logs[first]["loss/xpo"], abs=1e-6)
            assert log["logps/chosen"] == pytest.approx(logs[first]["logps/chosen"], rel=1e-6)
            assert "objective/kl" not in log  # of completions that an earlier policy has drawn
    assert completions(batches[0]) != completions(batches[3])
    assert [log["replay/age"] for log in logs] == [0, 1, 2, 0, 1, 2]
    assert [log["replay/pairs"] for log in logs] == [4, 4, 4, 8, 8, 8]
    assert trainer.state.epoch == pytest.approx(6 / 12)  # 16 prompts are four steps, each three times


def test_what_is_recalled(make_trainer: TrainerFactory) -> None:
    """Earlier pairs, each at most once in a step, as many for each fresh one as the ratio says."""
    trainer = make_trainer(replay="all", replay_ratio=1.5, max_steps=5)
    batches = Batches(trainer).seen
    trainer.train()
    logs = step_logs(trainer)
    kept = list(read_pairs(Path(trainer.args.pairs_file)))
    of_step = [[(*map(tuple, p["tokens"]), p["winner"]) for p in kept[4 * i : 4 * i + 4]] for i in range(5)]
    sign = {1.0: "first", -1.0: "second", 0.0: "tie"}
    for number, batch in enumerate(batches):
        trained = [(*pair[:2], sign[pair[2]]) for pair in completions(batch)]
        older = [pair for earlier in of_step[:number] for pair in earlier]
        count = min(6, 4 * number)
        assert len(batch["label"]) == 4 + count
        assert len(trained) == len(batch["label"])  # of a set
        assert set(of_step[number]) <= set(trained) <= set(of_step[number]) | set(older)
        assert logs[number]["replay/share"] == pytest.approx(count / (4 + count))


def test_a_window_ends_where_it_says(make_trainer: TrainerFactory) -> None:
    """In steps; or at the beginning of the iteration, whose first step has no earlier pairs."""
    by_steps = make_trainer(replay="window", replay_window=1, replay_ratio=100.0, max_steps=4)
    by_steps.train()
    assert [log["replay/share"] for log in step_logs(by_steps)] == [0, 0.5, 0.5, 0.5]
    shorter_than_a_rollout = make_trainer(replay="window", replay_window=1, replay_updates=3, max_steps=6)
    shorter_than_a_rollout.train()
    assert [log["replay/age"] for log in step_logs(shorter_than_a_rollout)] == [0, 1, 2] * 2
    by_iterations = make_trainer(replay="window", replay_ratio=100.0, max_steps=5, iterations=2)
    by_iterations.train()
    shares = [0, 1 / 2, 2 / 3, 0, 1 / 2]  # the second iteration begins with the fourth step
    assert [log["replay/share"] for log in step_logs(by_iterations)] == pytest.approx(shares)


@pytest.mark.parametrize("options", [MOVING, PAST], ids=["moving", "past"])
def test_one_batch_of_eight_equals_eight_of_one(
    make_trainer: TrainerFactory, tmp_path: Path, options: dict[str, Any]
) -> None:
    def logs(pairs: int, accumulation: int) -> list[dict[str, float]]:
        sizes = {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(**options | sizes | {"output_dir": str(tmp_path / str(pairs)), "max_steps": 6})
        trainer.train()
        return step_logs(trainer)

    for one, other in zip(logs(8, 1), logs(1, 8), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("options", [MOVING, PAST], ids=["moving", "past"])
def test_a_resumed_run_goes_on_exactly(
    make_trainer: TrainerFactory, tmp_path: Path, options: dict[str, Any], adapters: bool
) -> None:
    """Between two updates of a rollout, in the second epoch, in the third iteration."""
    options = options | {"save_strategy": "steps", "save_steps": 3, "eval_dataset": prompts(3)}
    options |= {"peft_config": LORA} if adapters else {}
    whole = make_trainer(**options)
    whole.train()
    resumed_in = tmp_path / "resumed"
    shutil.copytree(tmp_path / "out", resumed_in)
    resumed = make_trainer(output_dir=str(resumed_in), **options)
    resumed.train(resume_from_checkpoint=str(resumed_in / "checkpoint-9"))
    assert step_logs(resumed)[-3:] == step_logs(whole)[-3:]
    assert (resumed_in / "pairs.jsonl").read_bytes() == (tmp_path / "out" / "pairs.jsonl").read_bytes()
    ours, theirs = whole.evaluate(), resumed.evaluate()
    assert {name: theirs[name] for name in ours if "runtime" not in name} == {
        name: value for name, value in ours.items() if "runtime" not in name
    }


def test_a_run_that_goes_on_without_its_pairs_or_policies(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    trainer = make_trainer(**MOVING | {"save_strategy": "steps", "save_steps": 5, "max_steps": 6})
    trainer.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-5")
    elsewhere = make_trainer(**MOVING | {"output_dir": str(tmp_path / "elsewhere"), "max_steps": 6})
    with pytest.raises(ConfigError, match=r"resume: .*pairs\.jsonl' has 0 pairs up to step 5, not the 12 that the run"):
        elsewhere.train(resume_from_checkpoint=checkpoint)
    pairs = tmp_path / "out" / "pairs.jsonl"
    whole = pairs.read_text()
    pairs.write_text("".join(whole.splitlines(keepends=True)[1:]))
    with pytest.raises(ConfigError, match=r"has 11 pairs up to step 5, not the 12 that the run drew"):
        make_trainer(**MOVING | {"max_steps": 6}).train(resume_from_checkpoint=checkpoint)
    pairs.write_text(whole)
    shutil.rmtree(tmp_path / "out" / "_iterates")
    with pytest.raises(ConfigError, match=r"resume: .*step_4\.safetensors' is missing"):
        make_trainer(**MOVING | {"max_steps": 6}).train(resume_from_checkpoint=checkpoint)


def test_the_policies_of_another_run_are_not_used(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    """A run from its start clears the directory, one that goes on drops what is later; other iterations are refused."""
    options = MOVING | {"replay_updates": 1, "save_strategy": "steps", "save_steps": 3}
    iterates, checkpoint = tmp_path / "out" / "_iterates", str(tmp_path / "out" / "checkpoint-3")

    def kept() -> list[int]:
        return sorted(int(path.stem.removeprefix("step_")) for path in iterates.iterdir())

    make_trainer(**options).train()
    assert kept() == [0, 4, 8]
    make_trainer(**options | {"max_steps": 6}).train()
    assert kept() == [0, 2, 4]
    at = r"which would be \[0\] at iterations=3, max_steps=12 and replay_updates=1; go on with the run's own"
    with pytest.raises(ConfigError, match=rf"resume: iterations in '.*_iterates' began after the steps \[0, 2\], {at}"):
        make_trainer(**options).train(resume_from_checkpoint=checkpoint)
    make_trainer(**options | {"max_steps": 6}).train(resume_from_checkpoint=checkpoint)
    assert kept() == [0, 2, 4]
    make_trainer().train()
    assert kept() == []


# ---- a reference that moves ----------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_the_reference_becomes_the_policy_of_the_iteration(make_trainer: TrainerFactory, adapters: bool) -> None:
    """Evaluations keep the opponent they began with; log pi_ref of earlier pairs is computed anew."""
    options = {"peft_config": LORA} if adapters else {}
    trainer = make_trainer(
        reference_update="iteration",
        iterations=2,
        max_steps=4,
        replay="all",
        replay_ratio=100.0,
        optim="sgd",
        learning_rate=5.0,
        eval_dataset=prompts(4),
        eval_strategy="steps",
        eval_steps=2,
        **options,
    )
    batches = Batches(trainer).seen
    start = {name: part.clone() for name, part in base_model(trainer.model).state_dict().items()}
    trainer.train()
    kl = [log["objective/kl_policy"] for log in step_logs(trainer)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert abs(kl[1]) > 1e-3
    assert kl[2] == pytest.approx(0, abs=1e-6)
    batch = batches[2]
    texts = [batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
    with trainer.reference.model() as reference, torch.no_grad():
        torch.testing.assert_close(batch["reference_logps"], completion_logps(reference, *texts), atol=1e-4, rtol=1e-4)
    (evaluated,) = (log for log in trainer.state.log_history if "eval_kl" in log and log["step"] == 2)
    assert abs(evaluated["eval_kl"]) > 1e-3
    with trainer.evaluator.draws.reference.model() as opponent:
        now = opponent.state_dict()
        frozen = [name for name in start if "lora" not in name]
        assert len(frozen) > 10
        assert all(torch.equal(now[name], start[name]) for name in frozen)
    assert [path.name for path in sorted((Path(trainer.args.output_dir) / "_iterates").iterdir())] == [
        "step_0.safetensors",
        "step_2.safetensors",
    ]


def test_the_policy_equals_the_reference_that_it_has_just_become(make_trainer: TrainerFactory) -> None:
    """The first step of an iteration has fresh pairs with a log-ratio of exactly 0."""
    trainer = make_trainer(reference_update="iteration", iterations=2, max_steps=4, optim="sgd", learning_rate=5.0)
    trainer.train()
    logs = step_logs(trainer)
    assert [logs[step]["exploration/ref_ratio"] for step in (0, 2)] == [0, 0]
    assert abs(logs[1]["exploration/ref_ratio"]) > 1e-3
    assert abs(logs[3]["exploration/ref_ratio"]) > 1e-3


def test_a_trainer_that_begins_again(make_trainer: TrainerFactory) -> None:
    """Counts from 0; where its reference has moved, it cannot."""
    trainer = make_trainer(normalize_scores=True)
    for _ in range(2):
        trainer.train()
        assert [log["preference/queries"] for log in step_logs(trainer)] == [4, 8]
        assert trainer.labeller.scale.moments[0] == 16
    moved = make_trainer(reference_update="iteration", iterations=2)
    moved.train()
    with pytest.raises(ConfigError, match=r"the reference has moved in an earlier train\(\); make a new trainer"):
        moved.train()


def test_a_weight_for_each_iteration(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(alpha=[1e-2, 1e-3, 0.0], iterations=3, max_steps=6)
    trainer.train()
    assert [log["alpha"] for log in step_logs(trainer)] == [1e-2, 1e-2, 1e-3, 1e-3, 0, 0]


# ---- who draws -----------------------------------------------------------------------------------


def test_a_policy_of_the_past_draws_the_second_completion(make_trainer: TrainerFactory) -> None:
    """With the noise of sampler=policy: equal to its draws where the policy of the start was chosen."""
    frozen = make_trainer(sampler="policy", max_steps=4, learning_rate=0.0, per_device_train_batch_size=8)
    expected = Batches(frozen).seen
    frozen.train()
    sizes = {"per_device_train_batch_size": 8, "train_dataset": prompts(16)}
    trainer = make_trainer(sampler="past", iterations=2, max_steps=4, optim="sgd", learning_rate=50.0, **sizes)
    batches = Batches(trainer).seen
    trainer.train()
    for step in range(4):
        chosen = sampling_noise((trainer.args.seed, step, ITERATE), range(8), 1)[:, 0] * (1 + step // 2)
        ours, theirs = ({pair[1] for pair in completions(seen[step])} for seen in (batches, expected))
        of_the_start = int((chosen < 1).sum())
        assert len(ours & theirs) == of_the_start
        assert of_the_start == 8 if step < 2 else 0 < of_the_start < 8


def test_the_policy_that_the_iteration_began_with_draws(make_trainer: TrainerFactory) -> None:
    """In its first step that is the policy itself, with the noise of sampler=policy."""
    options: dict[str, Any] = {"iterations": 2, "max_steps": 4, "optim": "sgd", "learning_rate": 50.0}
    trainer = make_trainer(sampler="iterate", **options)
    batches = Batches(trainer).seen
    trainer.train()
    of_the_policy = make_trainer(sampler="policy", **options)
    expected = Batches(of_the_policy).seen
    of_the_policy.train()
    assert completions(batches[0]) == completions(expected[0])
    assert {pair[1] for pair in completions(batches[1])} != {pair[1] for pair in completions(expected[1])}
    assert [policy.args for policy in trainer.sample_pairs.past.policies] == [(2,)]


def test_the_best_and_the_worst_of_n(make_trainer: TrainerFactory) -> None:
    """By the score; the best comes first, and no other of the prompt's candidates is better or worse."""
    asked: list[tuple[str, ...]] = []

    def reward(prompts: Any, completions: Any) -> list[float]:
        asked.append(tuple(completions))
        return share_of_e(prompts, completions)

    trainer = make_trainer(sampler="best_of_n", sampler_candidates=4, reward_model=reward, max_steps=1)
    trainer.train()
    candidates = list(zip(*asked[:4], strict=True))
    first, second = asked[4], asked[5]
    for row, texts in enumerate(candidates):
        scores = share_of_e([], texts)
        assert share_of_e([], [first[row]])[0] == max(scores)
        assert share_of_e([], [second[row]])[0] == min(scores)
        assert {first[row], second[row]} <= set(texts)


def test_a_judge_chooses_by_its_mean_margin(make_trainer: TrainerFactory) -> None:
    """A judge that prefers longer texts, and cannot tell where a text has the letter q."""

    def judge(prompts: Any, first: Any, second: Any) -> list[float | None]:
        pairs = zip(first, second, strict=True)
        return [None if "q" in one + two else float(len(one) - len(two)) for one, two in pairs]

    trainer = make_trainer(sampler="best_of_n", sampler_candidates=3, judge=judge, max_steps=1)
    labeller = trainer.labeller

    def candidates(*texts: str) -> Any:
        ids = [trainer.processing_class(text)["input_ids"] for text in texts]
        width = max(map(len, ids))
        return trainer.sampler.completions(torch.tensor([row + [0] * (width - len(row)) for row in ids]))

    same_width = ["aaa", "bb ", "c  "], ["qqq", "dd ", "ddd"]
    both = [candidates(*texts) for texts in zip(*same_width, strict=True)]
    widest = max(one.ids.shape[1] for one in both)
    assert all(one.ids.shape[1] == widest for one in both)
    best, worst = labeller.best_and_worst(["x", "y"], both)
    assert (best.texts[0], best.texts[1]) == ("aaa", "dd ")
    assert worst.texts[1] in ("dd ", "ddd")


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replay_ratio": 2.0}, "replay_ratio=2.0 has no effect with replay=fresh"),
        ({"replay": "all", "replay_window": 2}, "replay_window=2 has no effect with replay=all"),
        ({"sampler": "iterate"}, "sampler=iterate has no effect with iterations=1"),
        ({"sampler": "past"}, "sampler=past has no effect with iterations=1; set iterations=3"),
        ({"reference_update": "iteration"}, "reference_update=iteration has no effect with iterations=1"),
        ({"iterations": 3, "max_steps": 2}, "iterations=3 is more than max_steps=2 holds at replay_updates=1"),
        ({"iterations": 2, "max_steps": 3, "replay_updates": 2}, "give max_steps=4 or more"),
        ({"alpha": [1e-2, 1e-3, 0.0], "iterations": 2}, r"alpha=\[0.01, 0.001, 0.0\] has 3 values for iterations=2;"),
        ({"beta": [0.1, 0.2, 0.3], "iterations": 2}, r"beta=\[0.1, 0.2, 0.3\] has 3 values for iterations=2; give one"),
        ({"sampler_candidates": 4}, "sampler_candidates=4 has no effect with sampler=reference; choose best_of_n"),
        ({"replay_updates": 2, "per_device_train_batch_size": 20}, "needs whole steps, of 20 prompts, and .* has 16"),
    ],
)
def test_what_cannot_be_right(make_trainer: TrainerFactory, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_trainer(**options)


@pytest.mark.parametrize(
    "changed", [{"replay_updates": 3}, {"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2}]
)
def test_between_two_updates_of_a_rollout_it_stays_as_it_is(
    make_trainer: TrainerFactory, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """A run that goes on needs the whole rollout, and no more."""
    options = {"replay_updates": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    make_trainer(**options).train()
    step = 4 if "replay_updates" in changed else 3
    with pytest.raises(
        ConfigError, match=r"resume: the last rollout has [04] pairs and a step [248]; go on with the run"
    ):
        make_trainer(**options | changed).train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))


def test_weights_of_epochs_that_do_not_come(make_trainer: TrainerFactory) -> None:
    """16 prompts are four steps; how many epochs that makes of max_steps, training knows."""
    trainer = make_trainer(alpha=[1e-2, 1e-3, 0.0], max_steps=8)
    with pytest.raises(ConfigError, match=r"alpha=\[0.01, 0.001, 0.0\] has 3 values for num_train_epochs=2; give one"):
        trainer.train()


def test_a_stream_cannot_be_repeated(make_trainer: TrainerFactory) -> None:
    with pytest.raises(ConfigError, match="replay_updates=2 needs a train_dataset of known length"):
        make_trainer(replay_updates=2, train_dataset=prompts(16).to_iterable_dataset())


def test_more_iterations_than_an_epoch_has_steps(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(iterations=5, max_steps=-1, num_train_epochs=1)
    with pytest.raises(ConfigError, match="iterations=5 is more than the 4 steps of the run hold"):
        trainer.train()


def test_a_reference_that_cannot_become_the_policy(make_trainer: TrainerFactory) -> None:
    with pytest.raises(ConfigError, match=r"ref_model has no .*lora_A.* of the policy's shape"):
        make_trainer(ref_model=tiny_model(), peft_config=LORA, iterations=2, reference_update="iteration")


def half_trained(seed: int, tied: bool = False, kept_of: int | None = None) -> Any:
    """A model whose embedding, and whose head if it is tied to that, are frozen; these may be of another seed."""
    model = tiny_model(seed)
    if kept_of is not None:
        model.model.embed_tokens = tiny_model(kept_of).model.embed_tokens
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.embed_tokens.requires_grad_(False)
    return model


def test_a_given_reference_becomes_the_whole_policy(make_trainer: TrainerFactory) -> None:
    """Where it keeps what the policy does not train, that is the policy's."""
    options: dict[str, Any] = {"iterations": 2, "max_steps": 3, "optim": "sgd", "learning_rate": 5.0}
    trainer = make_trainer(half_trained(0), half_trained(1, kept_of=0), reference_update="iteration", **options)
    begun: list[dict[str, torch.Tensor]] = []

    class Begun(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                begun.append({name: part.clone() for name, part in trainer.model.state_dict().items()})

    trainer.add_callback(Begun())
    trainer.train()
    moved = trainer.reference.frozen.state_dict()
    assert all(torch.equal(moved[name], part) for name, part in begun[0].items())


@pytest.mark.parametrize(
    ("policy", "reference", "name"),
    [
        (lambda: half_trained(0), lambda: half_trained(1), "model.embed_tokens.weight"),
        (lambda: half_trained(0, tied=True), lambda: half_trained(1, kept_of=0), "lm_head.weight"),
        (lambda: half_trained(0), lambda: half_trained(1, tied=True, kept_of=0), "model.embed_tokens.weight"),
        (lambda: half_trained(0, tied=True).requires_grad_(True), lambda: tiny_model(1), "lm_head.weight"),
        (lambda: tiny_model(0), lambda: half_trained(1, tied=True), "model.embed_tokens.weight"),
    ],
    ids=["frozen", "frozen and tied", "tied to what moves", "tied in the policy", "tied in the reference"],
)
def test_a_reference_that_would_be_two_models(
    make_trainer: TrainerFactory, policy: Any, reference: Any, name: str
) -> None:
    words = f"reference_update='iteration': ref_model would not have the policy's {name}, .*; leave ref_model"
    with pytest.raises(ConfigError, match=words):
        make_trainer(policy(), reference(), iterations=2, reference_update="iteration")


def test_steps_are_repeated_whole() -> None:
    """Three a step, twice; the last one of an epoch is not whole."""
    sampler = RepeatedSteps(range(7), 3, 2)
    assert list(sampler) == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert len(sampler) == 12


def test_steps_are_repeated_where_two_processes_share_the_batches(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(replay_updates=2, train_sampling_strategy="sequential", train_dataset=prompts(16))
    with (
        mock.patch.dict(AcceleratorState._shared_state, {"num_processes": 2}),
        mock.patch.object(XPOConfig, "world_size", 2),
    ):
        batches = list(trainer.get_train_dataloader().batch_sampler)
    assert batches == [[0, 1, 2, 3]] * 2 + [[8, 9, 10, 11]] * 2


@pytest.mark.parametrize("order", ["sequential", "unseeded", "of its own"])
def test_steps_of_any_order_are_repeated(make_trainer: TrainerFactory, order: str) -> None:
    """Over two epochs of two steps. Who has a set_epoch is told of each; who has none, no one asks."""

    class Turned(SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            return iter([(i + 3 * self.epoch) % 8 for i in range(8)])

    options: dict[str, Any] = {
        "sequential": {"train_sampling_strategy": "sequential"},
        "unseeded": {"accelerator_config": {"use_seedable_sampler": False}},
    }.get(order, {})
    trainer = make_trainer(replay_updates=2, max_steps=8, train_dataset=prompts(8), **options)
    if order == "of its own":
        trainer._get_train_sampler = Turned
    trainer.train()
    drawn = [row["prompt"] for row in read_pairs(Path(trainer.args.pairs_file))]
    texts = prompts(8)["prompt"]
    first, second = ([texts.index(prompt) for prompt in drawn[begin : begin + 8]] for begin in (0, 8))
    assert sorted(first) == sorted(second) == list(range(8))
    if order == "unseeded":
        assert first != second
    else:
        start = 3 if order == "of its own" else 0
        assert (first, second) == (list(range(8)), [(i + start) % 8 for i in range(8)])


def test_a_store_tells_the_references_apart(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    """What one reference has drawn is not taken for another's; the next run finds the draws of both."""
    options = {"reference_update": "iteration", "iterations": 2, "max_steps": 4, "optim": "sgd", "learning_rate": 50.0}
    stored = options | {"reference_store": str(tmp_path / "reference.sqlite"), "reference_batch_size": 1}

    def run(name: str, given: dict[str, Any]) -> list[dict[str, float]]:
        trainer = make_trainer(**given, output_dir=str(tmp_path / name))
        trainer.train()
        return [log for log in trainer.state.log_history if "loss" in log]

    without, first, again = (run(name, given) for name, given in (("a", options), ("b", stored), ("c", stored)))
    assert [log["loss"] for log in first] == [log["loss"] for log in without]
    assert [log["loss"] for log in again] == [log["loss"] for log in without]
    assert [log["perf/reference_hit_rate"] for log in first] == [0] * 4
    assert [log["perf/reference_hit_rate"] for log in again] == [1] * 4
