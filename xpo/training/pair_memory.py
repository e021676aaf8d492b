"""The labelled pairs of a run: kept in a file, and recalled from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xpo.config.errors import ConfigError
from xpo.config.files import without_nan
from xpo.data.pair_file import PairFile
from xpo.judges.labelling import Labelled
from xpo.models.batches import padded
from xpo.sampling.completions import PairBatch, joined
from xpo.sampling.noise import REPLAY
from xpo.sampling.pairs import StepPrompts
from xpo.sampling.reference_logps import ReferenceLogps
from xpo.tracking.metrics import Meter, mean_of
from xpo.training.config import XPOConfig
from xpo.training.iterations import Iterations

_WINNERS = {1: "first", -1: "second", 0: "tie"}
_LABELS = {winner: label for label, winner in _WINNERS.items()}


class PairMemory(TrainerCallback):
    """Keeps the pairs of all processes on the main one, if `pairs_file` names a file; a resumed run goes on with it."""

    def __init__(
        self, args: XPOConfig, pad_token_id: int, iterations: Iterations, reference_logps: ReferenceLogps, meter: Meter
    ):
        self.file = PairFile(Path(args.pairs_file)) if args.pairs_file and args.process_index == 0 else None
        self.args, self.pad_token_id = args, pad_token_id
        self._iterations, self._reference_logps, self._meter = iterations, reference_logps, meter
        self.expected: int | None = None  # pairs by the checkpoint that the run goes on from, if it says so

    def count(self, step: int) -> int:
        """Pairs that were kept up to this optimizer step; 0 where this process keeps none."""
        return 0 if self.file is None else self.file.since(step + 1)

    def keep(
        self, step: StepPrompts, pairs: PairBatch, labelled: Labelled, reference_logps: Tensor, state: TrainerState
    ) -> None:
        """The pairs of the step that `state` comes before. All processes together."""
        if not self.args.pairs_file:
            return
        rows = []
        both = (pairs.first, pairs.second)
        by = ["policy", "policy" if self.args.sampler == "best_of_n" else self.args.sampler]
        for i, prompt in enumerate(step.prompts):
            scores = [None, None] if labelled.scores is None else labelled.scores[:, i].tolist()
            row = {
                "step": state.global_step + 1,
                "epoch": int(state.epoch or 0),
                "row": step.rows[i],
                "prompt": prompt,
                "first": pairs.first.texts[i],
                "second": pairs.second.texts[i],
                "winner": _WINNERS[int(labelled.labels.label[i])],
                "prompt_tokens": step.ids[i],
                "tokens": [one.ids[i][one.mask[i]].tolist() for one in both],
                "by": by,
                "margin": labelled.margin[i].item(),
                "win_probability": labelled.labels.win_probability[i].item(),
                "score": scores,
                "reference_logps": reference_logps[:, i].tolist(),
            }
            rows.append(without_nan(row))
        gathered = sorted(gather_object(rows), key=lambda row: row["row"])
        if self.file is not None:
            self.file.append(gathered)

    def recall(
        self, step: StepPrompts, drawn: dict[str, Tensor] | None, state: TrainerState
    ) -> tuple[dict[str, Tensor], int]:
        """What this process trains on in an optimizer step, and how many earlier pairs all do. All processes together.

        Earlier pairs are drawn without repetition: which, depends on seed and step only.

        Args:
            drawn: the pairs of this step; None if those of the last rollout are trained on again.
        """
        if not self.args.replays:
            assert drawn is not None
            return drawn, 0
        read: list[Any] = [None, None, 0] if self.file is None else [*self._read(self.file, state), len(self.file)]
        if self.args.world_size > 1:
            broadcast_object_list(read)
        rollout, older, self._meter.last["replay/pairs"] = read
        if drawn is None and len(rollout) != self.args.pairs_of_a_step:
            raise ConfigError(
                f"resume: the last rollout has {len(rollout)} pairs and a step {self.args.pairs_of_a_step}; go on with "
                f"the run's own batch, number of processes and replay_updates, which is {self.args.replay_updates} now"
            )
        own = {row["row"]: row for row in rollout}
        rows = [] if drawn is not None else [own[i] for i in step.rows]
        rows += older[self.args.process_index :: self.args.world_size]
        parts = [] if drawn is None else [drawn]
        if rows:
            parts.append(as_batch(rows, state.global_step, self.pad_token_id, self.args.device))
        batch = joined(parts, self.pad_token_id)
        fresh = len(batch["label"]) - len(rows)
        since = self._iterations.reference_since
        if since and older:  # the reference has moved
            stale = [fresh + i for i, row in enumerate(rows) if row["step"] <= since]
            with self._meter.timed("reference"):
                batch["reference_logps"][:, stale] = self._reference_logps(batch, stale)
        self._meter.add({"replay/age": mean_of(batch["age"]), "replay/share": mean_of((batch["age"] > 0).float())})
        return batch, len(older)

    def _read(self, file: PairFile, state: TrainerState) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The pairs of the last rollout, and those drawn from what was kept before it."""
        now, args = state.global_step, self.args
        begin = 0 if args.replay == "all" else self._iterations.begin(state)
        if args.replay_window is not None:
            begin = now - args.replay_window
        end = file.since(now - now % args.replay_updates + 1)
        first = min(file.since(begin + 1), end)
        count = 0 if args.replay == "fresh" else min(round(args.replay_ratio * (len(file) - end)), end - first)
        chosen = np.random.default_rng((args.seed, now, REPLAY)).choice(end - first, count, replace=False)
        return file.read(range(end, len(file))), file.read(sorted((chosen + first).tolist()))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.file is not None:
            self.file.restore(state.global_step)
            found = len(self.file)
            if self.args.replays and state.global_step and (not found or self.expected not in (None, found)):
                raise ConfigError(
                    f"resume: {str(self.file.path)!r} has {found} pairs up to step {state.global_step}, not the "
                    f"{self.expected or 'ones'} that the run drew, which replay needs; put the run's own file there, "
                    "or go on with replay=fresh and replay_updates=1"
                )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.file is not None:
            self.file.sync()


def as_batch(rows: Sequence[dict[str, Any]], steps: int, pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """Kept pairs as they are trained on after so many steps: what `PairBatch.tensors` returns, and what is known."""
    prompt_ids, prompt_mask = padded([row["prompt_tokens"] for row in rows], pad_token_id, side="left")
    ids, mask = padded([row["tokens"][which] for which in range(2) for row in rows], pad_token_id)
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids.view(2, len(rows), -1),
        "completion_mask": mask.view(2, len(rows), -1),
        "reference_logps": torch.tensor([row["reference_logps"] for row in rows]).T.contiguous(),
        "label": torch.tensor([_LABELS[row["winner"]] for row in rows], dtype=torch.float32),
        "win_probability": torch.tensor([row["win_probability"] for row in rows], dtype=torch.float32),
        "age": torch.tensor([steps + 1 - row["step"] for row in rows], dtype=torch.float32),
    }
    return {name: values.to(device) for name, values in batch.items()}
