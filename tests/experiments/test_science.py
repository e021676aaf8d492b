"""The tabular experiments: their solver, their resumption, that they repeat to the bit."""

from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from experiments.science import common, leaderboard
from experiments.science.bandit import run as bandit
from experiments.science.common import CONTROL, Method, Outcome, Results, Row
from experiments.science.contextual_bandit import run as contextual
from experiments.science.token_tree import run as token_tree
from experiments.science.tree import BOUND, RIDGE, Objective, Pairs, Tree, draw, minimise
from xpo.objectives.labels import Labels
from xpo.objectives.losses import xpo_loss

SMALL = Tree([0.6, 0.4], 2)
METHODS = [
    Method("none", "reference"),
    Method("xpo", "reference", 0.02),
    Method("xpo", "reference", -0.02),
    Method("selm", "policy", 0.1),
    Method("popo", "policy", 0.1),
    Method("geb_p", "policy", 0.1),
    Method("geb_inverse", "policy", 1e-3),
    Method("geb_arctanh", "policy", 0.05),
]


def raw_pairs(count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of the four sequences of SMALL: first, second, whether the first wins; two in three by the higher index."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(4, (2, count), generator=generator)
    return first, second, (first > second) ^ (torch.rand(count, generator=generator) < 1 / 3)


def counted(method: Method) -> Pairs:
    first, second, wins = raw_pairs()
    pairs = Pairs(torch.zeros(1, 4, 4).double(), torch.zeros(1, 4).double())
    for one, two, won in zip(first, second, wins, strict=True):
        winner, loser = (one, two) if won else (two, one)
        pairs.wins[0, winner, loser] += 1
        pairs.bonus[0, {"first": one, "second": two, "rejected": loser}[method.on]] += 1
    return pairs


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_counts_have_the_loss_of_the_pairs(method: Method) -> None:
    """Less what pairs of equal completions cost, log 2 each, whatever the policy."""
    values = torch.tensor([[0.5, -0.3, 0.2, 0.1, -0.7, 0.4]]).double()
    objective = Objective(SMALL, 0.2, method.alpha, method.options())
    first, second, wins = raw_pairs()
    logps, reference = SMALL.logps(values, 0.2)[0], SMALL.reference_logps[0]
    labels = Labels(2.0 * wins.double() - 1, wins.double())
    both = [torch.stack([of[first], of[second]]) for of in (logps, reference)]
    each = xpo_loss(both[0], both[1], labels, method.alpha, 0.2, method.options())
    equal = int((first == second).sum()) * torch.tensor(2.0).double().log()
    expected = (each.dpo + each.xpo).sum() - equal + 0.5 * RIDGE * values.square().sum()
    assert objective(values, counted(method)).item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_solver_finds_what_scipy_finds(method: Method) -> None:
    """L-BFGS-B, with the gradient of autograd, from the same start."""
    objective, pairs = Objective(SMALL, 0.2, method.alpha, method.options()), counted(method)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        values = torch.tensor(x)[None].requires_grad_()
        value = objective(values, pairs)
        return value.item(), torch.autograd.grad(value.sum(), values)[0][0].numpy()

    settings = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-16, "gtol": 1e-10}
    other = minimize(loss, np.zeros(6), jac=True, method="L-BFGS-B", bounds=[(-BOUND, BOUND)] * 6, options=settings)
    found = minimise(objective, pairs, torch.zeros(1, 6).double(), steps=60)
    np.testing.assert_allclose(found[0].numpy(), other.x, atol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradient_and_hessian_are_autograds(method: Method) -> None:
    objective, pairs = Objective(SMALL, 0.2, method.alpha, method.options()), counted(method)
    values = torch.tensor([[0.5, -0.3, 0.2, 0.1, -0.7, 0.4]]).double()
    gradient, hessian, _ = objective.expansion(values, pairs)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return objective(x[None], pairs)[0]

    torch.testing.assert_close(gradient[0], torch.autograd.functional.jacobian(loss, values[0]))
    torch.testing.assert_close(hessian[0], torch.autograd.functional.hessian(loss, values[0]))


def test_a_tree_multiplies_the_probabilities_of_its_tokens() -> None:
    torch.testing.assert_close(SMALL.reference_logps.exp(), torch.tensor([[0.36, 0.24, 0.24, 0.16]]).double())


def test_the_hidden_sequence_has_the_probability_of_the_readme() -> None:
    tree = Tree(token_tree.REFERENCE, token_tree.DEPTH)
    assert tree.reference_logps[0, token_tree.HIDDEN].exp().item() == pytest.approx(1.25e-4)


def test_draws_invert_the_distribution() -> None:
    weights = torch.tensor([[1.0, 2.0, 0.0, 1.0]])
    drawn = draw(weights, torch.tensor([[0.0, 0.2, 0.25, 0.7, 0.75, 0.99]]))
    assert drawn.tolist() == [[0, 0, 1, 1, 3, 3]]


def test_the_bandits_gap_is_three_eighths() -> None:
    """But for e^(-10): pi* is worth 1 - 1/8, pi_ref 1/2."""
    np.testing.assert_allclose(bandit.gaps(0.0125, (0.5, 1.0)), [3 / 8, 0], atol=1e-4)


def test_advantages_by_hand() -> None:
    """Pair (a, b): pi* has the logit r(a) - r(b) = 1/2; the bonus adds alpha (log pi_ref(b) - log pi*(b))."""
    beta, alpha = 0.03, 0.003
    table = bandit.advantage(beta, Method("xpo", "reference", alpha))
    rare, star = bandit.policies(beta)
    bonus = alpha * (np.log(1 - rare) - np.log(1 - star))
    assert table[1, 0, 1] == pytest.approx(np.log(2) - np.log1p(np.exp(-0.5)) + bonus)
    assert table[1, 0, 0] == pytest.approx(np.log(2) - np.log1p(np.exp(0.5)) + bonus)
    assert table[0, 0, 1] == pytest.approx(bonus)


def test_a_strong_bonus_solves_the_bandit_in_a_few_queries() -> None:
    """The first pair has b from the reference in 98 of 100 cases, and the bonus then chooses pi* at once."""
    outcomes = bandit.run("beta=0.03", Method("xpo", "reference", 0.1), range(5))
    assert [outcome.queries for outcome in outcomes.values()] == [1] * 5


@pytest.mark.parametrize("run", [contextual.run, token_tree.run, bandit.run], ids=["contextual", "tree", "bandit"])
def test_a_seed_has_the_same_outcome_alone_and_again(run: common.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contextual, "ROUNDS", 4)
    monkeypatch.setattr(token_tree, "ROUNDS", 4)
    task, method = ("beta=0.03" if run is bandit.run else "hidden"), Method("xpo", "reference", 3e-3)
    together = run(task, method, [3, 4, 5])
    assert run(task, method, [3, 4, 5]) == together
    alone = run(task, method, [4])
    assert alone.keys() <= together.keys()
    for problem, outcome in alone.items():
        assert outcome.queries == together[problem].queries
        assert outcome.final_gap == pytest.approx(together[problem].final_gap, abs=1e-9)


def fake(calls: list[tuple[str, Method]]) -> common.Run:
    def run(task: str, method: Method, seeds: list[int]) -> dict[str, Outcome]:
        calls.append((task, method))
        return {str(seed): Outcome(None if task.startswith(CONTROL) else 10 + seed, 0.25, 1 / 3) for seed in seeds}

    return run


def test_a_killed_run_goes_on_and_leaves_the_same_file(tmp_path: Path) -> None:
    """Whatever byte the file was cut at."""
    grid = {"xpo": (0.1, 0.2)}
    whole = Results(tmp_path / "whole.csv", range(100, 103))
    every: list[tuple[str, Method]] = []
    common.run_all(whole, fake(every), "hidden", grid, 0.1)
    text = (tmp_path / "whole.csv").read_text()
    for size in (0, 30, len(text) // 2, len(text) - 1, len(text)):
        path = tmp_path / f"{size}.csv"
        path.write_text(text[:size])
        calls: list[tuple[str, Method]] = []
        common.run_all(Results(path, range(100, 103)), fake(calls), "hidden", grid, 0.1)
        assert path.read_text().splitlines() == text.splitlines()
        assert len(calls) < len(every) or size < 100
    assert calls == []


def test_who_reads_a_file_leaves_it_and_other_seeds_do_not_mix(tmp_path: Path) -> None:
    """Somebody may be writing; and a table of 20 seeds is not one of 10."""
    results, method = Results(tmp_path / "results.csv", range(100, 110)), Method("xpo", "reference", 0.1)
    results.cell(fake([]), "hidden", method, range(100, 110))
    text = results.path.read_text()[:-5]
    results.path.write_text(text)
    assert Results(results.path).rows == []
    assert results.path.read_text() == text
    with pytest.raises(ValueError, match=r"has 10 of 20 seeds of hidden, .*; move it away"):
        results.cell(fake([]), "hidden", method, range(100, 120))


def test_the_weight_is_chosen_on_the_tuning_seeds(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.csv", [100])

    def run(task: str, method: Method, seeds: list[int]) -> dict[str, Outcome]:
        fast = (method.alpha == 0.2) == (seeds[0] in common.TUNING)
        return {str(seed): Outcome(10 if fast else 20, 0.0, 0.0) for seed in seeds}

    for alpha in (0.1, 0.2):
        for seeds in (common.TUNING, [100]):
            results.cell(run, "hidden", Method("xpo", "reference", alpha), seeds)
    assert results.tuned("hidden", "xpo", "reference").alpha == 0.2


def rows(*queries: int | None) -> list[Row]:
    return [Row("hidden", METHODS[0], str(i), Outcome(time, 0.0, 0.0)) for i, time in enumerate(queries)]


def test_the_median_counts_unsolved_problems_as_never() -> None:
    assert common.lower_median(np.array(common.times(rows(3, None, 1, None, None))), 0) == inf
    assert common.lower_median(np.array(common.times(rows(3, None, 1, 2, None))), 0) == 3


def test_the_sign_test_leaves_ties_out() -> None:
    """Four faster, none slower, one tie: p = 2 / 2^4."""
    assert common.sign_test(rows(1, 1, 1, 1, None), rows(2, 2, 3, None, None)) == pytest.approx(1 / 8)


def test_holms_correction_by_hand() -> None:
    """Sorted .01, .03, .04: times 3, 2, 1; never less than an earlier one."""
    assert common.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def test_the_leaderboard_reads_a_folder_that_it_does_not_know(tmp_path: Path) -> None:
    """Everyone solves; the smaller weight is tuned, as both are equally good."""
    path = tmp_path / "lock" / "results.csv"
    path.parent.mkdir()
    common.run_all(Results(path, range(500, 502)), fake([]), "length 3", {"xpo": (0.1, 0.2)}, 0.1)
    text = leaderboard.board(path)
    assert text.startswith("## [lock](lock/README.md), length 3\n")
    assert "| xpo | policy | 0.1 | 1.00 (0.34 to 1.00) | 510 (510 to 511) |" in text
    assert "| 0.2 |" not in text


def test_a_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    common.write_block(readme, "new")
    assert readme.read_text() == "before\n<!-- results -->\nnew\n<!-- end of results -->\nafter\n"


@pytest.mark.parametrize("folder", ["bandit", "contextual_bandit", "token_tree"])
def test_scripts_stay_short(folder: str) -> None:
    assert len((Path(common.__file__).parent / folder / "run.py").read_text().splitlines()) <= 150
