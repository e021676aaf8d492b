"""What is logged of a step, against numbers derived by hand, and the pooling over steps and ranks."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xpo.tracking.metrics import (
    Mean,
    Meter,
    distinct_bigrams,
    mean_of,
    ngrams,
    novel_ngrams,
    pair_metrics,
    preference_metrics,
)


def one_rank(sums: Tensor) -> Tensor:
    return sums


def means(metrics: dict[str, Mean]) -> dict[str, float]:
    meter = Meter()
    meter.add(metrics)
    return meter.pop(one_rank)


# Three pairs: y won, y~ won, a tie. Row 0 is y, row 1 is y~.
POLICY = torch.tensor([[-10.0, -20.0, -30.0], [-12.0, -15.0, -40.0]])
REFERENCE = torch.tensor([[-11.0, -18.0, -33.0], [-10.0, -19.0, -35.0]])
LABEL = torch.tensor([1.0, -1.0, 0.0])
DPO = torch.tensor([0.3, 0.6, 0.0])
XPO = torch.tensor([-0.12, -0.15, -0.40])
FRESH = torch.tensor([True, True, True])


def test_the_metrics_of_three_pairs_are_those_derived_by_hand() -> None:
    """beta = 0.5.

    ratio(y)  = -10+11, -20+18, -30+33 = 1, -2, 3     mean 2/3
    ratio(y~) = -12+10, -15+19, -40+35 = -2, 4, -5    mean -1
    kl        = mean of both = (2/3 - 1) / 2 = -1/6
    entropy   = (10 + 20 + 30 + 12 + 15 + 40) / 6 = 127/6
    chosen    = y of pair 1 (ratio 1), y~ of pair 2 (ratio 4)
    rejected  = y~ of pair 1 (ratio -2), y of pair 2 (ratio -2)
    rewards   = beta * ratio: chosen (0.5 + 2)/2 = 1.25, rejected (-1 - 1)/2 = -1, margins 1.5 and 3
    logps     = chosen (-10 - 15)/2, rejected (-12 - 20)/2: the policy's alone (defect 5)
    dpo       = (0.3 + 0.6 + 0)/3, over all pairs; xpo = (-0.12 - 0.15 - 0.40)/3
    """
    metrics = means(pair_metrics(POLICY, REFERENCE, LABEL, 0.5, DPO, XPO, FRESH))
    assert metrics == pytest.approx(
        {
            "loss": 0.3 - 0.67 / 3,
            "loss/dpo": 0.3,
            "loss/dpo_labelled": 0.45,
            "loss/xpo": -0.67 / 3,
            "objective/kl": -1 / 6,
            "objective/kl_policy": 2 / 3,
            "objective/entropy": 127 / 6,
            "exploration/ref_ratio": -1.0,
            "rewards/chosen": 1.25,
            "rewards/rejected": -1.0,
            "rewards/margins": 2.25,
            "rewards/accuracies": 1.0,
            "logps/chosen": -12.5,
            "logps/rejected": -16.0,
        },
        abs=1e-6,
    )


def test_the_policys_own_completions_are_those_of_fresh_pairs() -> None:
    """The first and the third: a pair of an earlier policy says nothing of this one's KL. kl = (1 - 2)/2, (3 - 5)/2."""
    fresh = torch.tensor([True, False, True])
    metrics = means(pair_metrics(POLICY, REFERENCE, LABEL, 0.5, DPO, XPO, fresh))
    assert metrics["objective/kl"] == pytest.approx(-0.75)
    assert metrics["objective/kl_policy"] == pytest.approx(2.0)
    assert metrics["objective/entropy"] == pytest.approx((10 + 30 + 12 + 40) / 4)
    assert metrics["logps/chosen"] == pytest.approx(-12.5)
    assert "objective/kl" not in means(pair_metrics(POLICY, REFERENCE, LABEL, 0.5, DPO, XPO, ~FRESH))


def test_an_accuracy_is_a_positive_margin_of_the_chosen_completion() -> None:
    """With the labels turned around the margins are -1.5 and -3; a margin of 0 is no success either."""
    turned = means(pair_metrics(POLICY, REFERENCE, -LABEL, 0.5, DPO, XPO, FRESH))
    assert turned["rewards/accuracies"] == 0
    assert turned["rewards/margins"] == pytest.approx(-2.25)
    at_the_start = means(pair_metrics(POLICY, POLICY, LABEL, 0.5, DPO, XPO, FRESH))
    assert at_the_start["rewards/accuracies"] == 0
    one_of_two = means(pair_metrics(POLICY, REFERENCE, LABEL.abs(), 0.5, DPO, XPO, FRESH))
    assert one_of_two["rewards/accuracies"] == 0.5


def test_pairs_without_a_preference_do_not_count_for_rewards() -> None:
    everywhere = pair_metrics(POLICY, REFERENCE, LABEL, 0.5, DPO, XPO, FRESH)
    labelled = pair_metrics(POLICY[:, :2], REFERENCE[:, :2], LABEL[:2], 0.5, DPO[:2], XPO[:2], FRESH[:2])
    of_labelled = [name for name in everywhere if name.startswith(("rewards/", "logps/", "loss/dpo_"))]
    assert len(of_labelled) == 7
    for name in of_labelled:
        assert everywhere[name] == labelled[name]
        assert everywhere[name].count == 2
    assert all(mean.count == 3 for name, mean in everywhere.items() if name not in of_labelled)


def test_without_any_preference_rewards_are_left_out_and_the_rest_stays() -> None:
    metrics = means(pair_metrics(POLICY, REFERENCE, torch.zeros(3), 0.5, DPO, XPO, FRESH))
    assert not [name for name in metrics if name.startswith(("rewards/", "logps/"))]
    assert metrics["objective/entropy"] == pytest.approx(127 / 6)


def test_verdicts_are_shares_of_all_pairs() -> None:
    margin = torch.tensor([2.0, 1.0, -1.0, 0.0, float("nan"), float("inf"), -float("inf"), 3.0])
    label = torch.tensor([1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    flipped = torch.tensor([1.0, 0.0, 0.0, 0.0, float("nan"), float("nan"), float("nan"), float("nan")])
    assert means(preference_metrics(margin, label, flipped)) == {
        "preference/win_rate": 3 / 8,
        "preference/tie_rate": 1 / 8,
        "preference/invalid_rate": 3 / 8,
        "preference/flip_rate": 1 / 4,  # of the pairs where it is known
    }
    assert "preference/flip_rate" not in means(preference_metrics(margin, label, torch.full((8,), torch.nan)))


@pytest.mark.parametrize(
    ("completions", "distinct"),
    [
        ([[1, 2, 1, 2, 1]], Mean(2, 4)),  # 12 21 12 21
        ([[1, 2, 3], [2, 3, 4]], Mean(3, 4)),  # 12 23 23 34
        ([[1, 2], [2, 1]], Mean(2, 2)),  # order matters
        ([[1], [2], []], Mean(0, 0)),  # no bigram across completions
    ],
)
def test_distinct_bigrams_are_counted_over_all_completions(completions: list[list[int]], distinct: Mean) -> None:
    assert distinct_bigrams(completions) == distinct


def test_novel_ngrams_are_counted_once_each() -> None:
    """1234 2345 | 1234 | - : two different ones, of which one is known; none across completions."""
    assert ngrams([[1, 2, 3, 4, 5], [1, 2, 3, 4], [6, 7, 8]]) == [(1, 2, 3, 4), (2, 3, 4, 5), (1, 2, 3, 4)]
    assert novel_ngrams([[1, 2, 3, 4, 5], [1, 2, 3, 4], [6, 7, 8]], {(1, 2, 3, 4), (9, 9, 9, 9)}) == Mean(1, 2)
    assert novel_ngrams([[1, 2, 3]], set()) == Mean(0, 0)


# ---- pooling -----------------------------------------------------------------------------------


def test_a_mean_over_chosen_rows_leaves_the_others_out() -> None:
    values = torch.tensor([1.0, float("nan"), 3.0])
    assert mean_of(values, torch.tensor([True, False, True])) == Mean(4.0, 2)
    assert mean_of(values, torch.tensor([False, False, False])) == Mean(0.0, 0)
    assert mean_of(torch.tensor([True, False, True]).float()) == Mean(2.0, 3)


def test_a_mean_without_values_is_left_out_and_not_zero() -> None:
    assert means({"none": Mean(0.0, 0), "some": Mean(0.0, 2)}) == {"some": 0.0}
    assert Meter().pop(one_rank) == {}


def test_pooling_over_unequal_steps_is_the_mean_over_everything() -> None:
    """The last step of an epoch is shorter: means of means would weigh its pairs more."""
    values = torch.arange(11.0) ** 2
    meter = Meter()
    for part in values.split([4, 4, 3]):
        meter.add({"x": mean_of(part), "even": mean_of(part, part % 2 == 0)})
    pooled = meter.pop(one_rank)
    assert pooled["x"] == pytest.approx(values.mean().item())
    assert pooled["x"] != pytest.approx(torch.stack([p.mean() for p in values.split([4, 4, 3])]).mean().item())
    assert pooled["even"] == pytest.approx(values[values % 2 == 0].mean().item())


def ranks(*meters: Meter) -> list[dict[str, float]]:
    """What each rank pops when the collective adds up over all of them."""
    contributions: list[Tensor] = []

    def record(sums: Tensor) -> Tensor:
        contributions.append(sums.clone())
        return sums

    def collective(total: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda sums: total

    for meter in meters:
        before = dict(meter.sums)
        meter.pop(record)
        meter.sums = before
    total = torch.stack(contributions).sum(dim=0)
    return [meter.pop(collective(total)) for meter in meters]


def test_every_rank_gets_the_mean_over_the_pairs_of_all_ranks() -> None:
    """Rank 1 has fewer pairs and none with a preference; its names come in another order."""
    first, second = Meter(), Meter()
    first.add({"x": mean_of(torch.tensor([1.0, 2.0, 6.0])), "won": mean_of(torch.tensor([4.0]))})
    second.add({"won": Mean(0.0, 0)})
    second.add({"x": mean_of(torch.tensor([11.0]))})
    assert ranks(first, second) == [{"x": 5.0, "won": 4.0}] * 2


def test_a_log_starts_afresh() -> None:
    meter = Meter()
    meter.add({"x": Mean(2.0, 1)})
    meter.pop(one_rank)
    meter.add({"x": Mean(5.0, 1)})
    assert meter.pop(one_rank) == {"x": 5.0}


def test_queries_are_counted_over_all_logs_and_in_a_checkpoint() -> None:
    meter = Meter()
    for _ in range(3):
        meter.step(queries=4)
    assert meter.pop(one_rank)["preference/queries"] == 12
    meter.step(queries=2)
    resumed, older = Meter(), Meter()
    resumed.load_state(json.loads(json.dumps(meter.state())))
    resumed.step(queries=4)
    assert resumed.pop(one_rank)["preference/queries"] == 18
    older.load_state({name: value for name, value in meter.state().items() if name != "queries"})
    older.step(queries=4)
    assert math.isnan(older.pop(one_rank)["preference/queries"])  # nobody knows how many there were


def test_a_meter_goes_on_from_its_state_in_a_checkpoint() -> None:
    """The trainer writes `sums` as JSON; a float must come back bit by bit."""
    whole, before, after = Meter(), Meter(), Meter()
    first, second = {"x": mean_of(torch.tensor([0.1, 0.7]))}, {"x": Mean(1 / 3, 1), "y": Mean(2.0, 0)}
    whole.add(first)
    whole.add(second)
    before.add(first)
    state = json.loads(json.dumps(before.sums))
    after.sums = {name: tuple(pair) for name, pair in state.items()}
    after.add(second)
    assert after.sums == whole.sums
    assert after.pop(one_rank) == whole.pop(one_rank)
