"""Algorithm 1 of XPO (arXiv 2405.21046) on small trees of tokens, where everything is exact; a bandit has depth 1.

Policies are those of bounded token values f: at each prefix pi(a) is proportional to pi_ref(a) exp(f(a) / beta), with
|f| <= BOUND. The optimal policies of all rewards between 0 and 2 BOUND have this form. Each round minimises xpo's own
objective over all pairs so far, which are kept as counts, by Newton steps from the last policy. The bonus is not
convex: this is the minimum that the last policy leads to, as for a trainer, and not always the lowest.

Notation for shapes: P independent problems (the seeds, and the contexts of each), N prefixes with A actions each,
D = N A values, Y sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from experiments.science.common import Method, Outcome
from xpo.config.options import LossOptions
from xpo.objectives.bonuses import exploration_loss
from xpo.objectives.labels import Labels
from xpo.objectives.losses import xpo_loss

BOUND = 2.0  # of token values, in units of the reward
RIDGE = 1e-3  # times |f|^2 / 2, added to the sum over pairs: what no pair tells apart stays as the reference has it
TOLERANCE = 1e-4  # of the values; Newton's next step would be of about its square
STEPS = 5  # of Newton in a round, at most; the next round goes on from there
NO_BONUS = LossOptions(bonus="none")


class Tree:
    """All sequences of `depth` actions.

    Attributes:
        path: which of the D values each step of each sequence has, (Y, depth).
        onto, past: whether a sequence takes an action; whether it comes by the action's prefix, (Y, D).
        first, second: all pairs of different sequences.
    """

    def __init__(self, reference: list[float], depth: int):
        """`reference`: weights of the actions under the reference, the same at every prefix."""
        actions, count = len(reference), len(reference) ** depth
        node, path = torch.zeros(count, dtype=torch.long), []
        for level in reversed(range(depth)):
            action = torch.arange(count) // actions**level % actions
            path.append(node * actions + action)
            node = path[-1] + 1
        self.path = torch.stack(path, 1)
        self.shape = (sum(actions**level for level in range(depth)), actions)
        self.onto = torch.zeros(count, self.shape[0] * actions).double().scatter_(1, self.path, 1.0)
        self.past = self.onto.view(count, *self.shape).sum(-1).repeat_interleave(actions, 1)
        self.first, self.second = torch.triu_indices(count, count, 1)
        self.reference = torch.tensor(reference).double().log().log_softmax(-1)
        self.reference_logps = self.tokens(torch.zeros(1, self.onto.shape[1]).double(), 1.0)[:, self.path].sum(-1)

    def tokens(self, values: Tensor, beta: float) -> Tensor:
        """log pi of each action at its prefix, (P, D)."""
        return (self.reference + values.view(-1, *self.shape) / beta).log_softmax(-1).flatten(1)

    def logps(self, values: Tensor, beta: float) -> Tensor:
        """log pi of each sequence, (P, Y)."""
        return self.tokens(values, beta)[:, self.path].sum(-1)


class Pairs(NamedTuple):
    """All pairs so far: how often each sequence beat each other, (P, Y, Y); was the bonus's completion, (P, Y)."""

    wins: Tensor
    bonus: Tensor

    def of(self, which: Tensor) -> "Pairs":
        return Pairs(self.wins[which], self.bonus[which])


class Objective(NamedTuple):
    """The sum of xpo's loss over all pairs, and the ridge, for each problem."""

    tree: Tree
    beta: float
    alpha: float
    options: LossOptions

    def __call__(self, values: Tensor, pairs: Pairs) -> Tensor:
        """(P,)."""
        logps = self.tree.logps(values, self.beta)
        return self.preference(logps, pairs) + self.bonus(logps, pairs) + 0.5 * RIDGE * values.square().sum(1)

    def preference(self, logps: Tensor, pairs: Pairs) -> Tensor:
        """Of all pairs, (P,). Those that differ in the winner only are one with a soft label: the loss is the same."""
        i, j = self.tree.first, self.tree.second
        won, lost = pairs.wins[:, i, j], pairs.wins[:, j, i]
        labels = Labels(torch.ones_like(won), won / (won + lost).clamp(min=1))
        reference = self.tree.reference_logps.expand_as(logps)
        policy, reference = (torch.stack([of[:, i], of[:, j]]) for of in (logps, reference))
        return ((won + lost) * xpo_loss(policy, reference, labels, 0.0, self.beta, NO_BONUS).dpo).sum(1)

    def bonus(self, logps: Tensor, pairs: Pairs) -> Tensor:
        """Of all pairs, (P,)."""
        twice = torch.stack([logps, logps])  # whichever completion it is on
        reference, label = self.tree.reference_logps.expand_as(twice), torch.ones_like(logps)
        return (pairs.bonus * exploration_loss(twice, reference, label, self.alpha, self.beta, self.options)).sum(1)

    def expansion(self, values: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient, (P, D), the Hessian, and a part of it that is always positive definite, (P, D, D)."""
        tree, (nodes, actions) = self.tree, self.tree.shape
        tokens = tree.tokens(values, self.beta)
        logps = tokens[:, tree.path].sum(-1).requires_grad_()
        (slope,) = torch.autograd.grad(self.preference(logps, pairs).sum(), logps)
        bent = torch.zeros_like(slope)  # the second derivative of the bonus
        if self.options.bonus != "none":
            (more,) = torch.autograd.grad(self.bonus(logps, pairs).sum(), logps, create_graph=True)
            slope = slope + more.detach()
            if more.requires_grad:
                (bent,) = torch.autograd.grad(more.sum(), logps)
        probs = tokens.exp()
        jacobian = (tree.onto - tree.past * probs[:, None]) / self.beta  # (P, Y, D)
        logit = self.beta * (logps.detach() - tree.reference_logps)
        sure = torch.sigmoid(logit[:, :, None] - logit[:, None])
        weight = self.beta**2 * (pairs.wins + pairs.wins.mT) * sure * (1 - sure)
        laplacian = torch.diag_embed(weight.sum(-1)) - weight
        positive = jacobian.mT @ laplacian @ jacobian + RIDGE * torch.eye(values.shape[1]).double()
        probs = probs.view(-1, nodes, actions)
        normaliser = torch.diag_embed(probs) - probs[..., None] * probs[..., None, :]
        normaliser = normaliser * (slope @ tree.past)[:, ::actions, None, None] / self.beta**2
        blocks = torch.zeros(len(values), nodes, actions, nodes, actions).double()
        blocks[:, range(nodes), :, range(nodes)] = normaliser.transpose(0, 1)
        hessian = positive + jacobian.mT @ (bent[..., None] * jacobian) - blocks.flatten(3).flatten(1, 2)
        return (jacobian.mT @ slope[..., None])[..., 0] + RIDGE * values, hessian, positive


def minimise(objective: Objective, pairs: Pairs, start: Tensor, steps: int = STEPS) -> Tensor:
    """The values of least loss near `start` within the bound, (P, D): projected Newton, halved until it helps."""
    values, todo = start.clone(), torch.arange(len(start))
    for _ in range(steps):
        x, here = values[todo], pairs.of(todo)
        loss = objective(x, here)
        gradient, hessian, positive = objective.expansion(x, here)
        held = ((x <= -BOUND) & (gradient > 0)) | ((x >= BOUND) & (gradient < 0))
        gradient = gradient.masked_fill(held, 0.0)
        free, identity = ~held[:, :, None] & ~held[:, None], torch.diag_embed(held.double())
        factor, failed = torch.linalg.cholesky_ex(hessian * free + identity)
        if failed.any():
            other = torch.linalg.cholesky(positive * free + identity)
            factor = torch.where((failed > 0)[:, None, None], other, factor)
        step = torch.cholesky_solve(gradient[..., None], factor)[..., 0]
        moved, waiting = x.clone(), torch.arange(len(x))
        for halvings in range(10):
            trial = (x[waiting] - step[waiting] / 2**halvings).clamp(-BOUND, BOUND)
            drop = (gradient[waiting] * (x[waiting] - trial)).sum(1)
            helps = (
                objective(trial, here.of(waiting)) <= loss[waiting] - 1e-4 * drop + 1e-12 * loss[waiting].abs()
            )  # rounding
            moved[waiting[helps]] = trial[helps]
            waiting = waiting[~helps]
            if len(waiting) == 0:
                break
        values[todo] = moved
        todo = todo[(moved - x).abs().amax(1) > TOLERANCE]
        if len(todo) == 0:
            break
    return values


def simulate(
    tree: Tree, rewards: Tensor, best: int, method: Method, beta: float, uniform: Tensor, queries: int
) -> list[Outcome]:
    """Algorithm 1 from the reference on.

    Args:
        rewards: of each sequence, (P, Y); best: the one to find.
        uniform: the noise in [0, 1) of both draws and the Bradley-Terry label, (P, rounds, 3, pairs a round).
        queries: how many a round has, over all contexts of a seed.
    """
    objective = Objective(tree, beta, method.alpha, method.options())
    pairs = Pairs(torch.zeros(*rewards.shape, rewards.shape[1]).double(), torch.zeros_like(rewards))
    values = torch.zeros(len(rewards), tree.onto.shape[1]).double()
    optimum = beta * torch.logsumexp(tree.reference_logps + rewards / beta, 1)
    fixed = {"reference": tree.reference_logps.exp(), "uniform": torch.full((1, rewards.shape[1]), 1.0).double()}
    gaps, found = [], []
    for t in range(uniform.shape[1] + 1):
        logps = tree.logps(values, beta)
        policy = logps.exp()
        gaps.append(optimum - (policy * (rewards - beta * (logps - tree.reference_logps))).sum(1))
        found.append(policy[:, best] > 0.5)
        if t == uniform.shape[1]:
            break
        first = draw(policy, uniform[:, t, 0])
        second = draw(fixed.get(method.second, policy).expand_as(policy), uniform[:, t, 1])
        first_wins = uniform[:, t, 2] < torch.sigmoid(rewards.gather(1, first) - rewards.gather(1, second))
        winner, loser = torch.where(first_wins, first, second), torch.where(first_wins, second, first)
        one = torch.ones_like(winner, dtype=torch.double)
        pairs.wins.flatten(1).scatter_add_(1, winner * rewards.shape[1] + loser, one)
        pairs.bonus.scatter_add_(1, {"first": first, "second": second, "rejected": loser}[method.on], one)
        values = minimise(objective, pairs, values)
    all_gaps, lost = torch.stack(gaps, 1), ~torch.stack(found, 1)
    last_lost = torch.where(lost, torch.arange(lost.shape[1]), -1).amax(1)
    return [
        Outcome(None if lost[p, -1] else (int(last_lost[p]) + 1) * queries, float(gap[-1]), float(gap[1:].mean()))
        for p, gap in enumerate(all_gaps)
    ]


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """A sequence for each number in [0, 1), of the shape of `uniform`, (P, K). Weights, (P, Y), may have any sum."""
    below = probabilities.cumsum(1)
    return torch.searchsorted(below, uniform * below[:, -1:], right=True).clamp(max=probabilities.shape[1] - 1)
