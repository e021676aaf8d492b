"""Keeps the labelled pairs of a run in a file, which a resumed run goes on with."""

import math
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xpo.data.pair_file import PairFile
from xpo.judges.labelling import Labelled
from xpo.sampling.completions import PairBatch
from xpo.sampling.pairs import StepPrompts
from xpo.training.config import XPOConfig

_WINNERS = {1: "first", -1: "second", 0: "tie"}


class KeepPairs(TrainerCallback):
    """Writes the pairs of all processes, if `pairs_file` names a file, on the main process."""

    def __init__(self, args: XPOConfig):
        self.file = PairFile(Path(args.pairs_file)) if args.pairs_file and args.process_index == 0 else None
        self.args = args

    def __call__(
        self, step: StepPrompts, pairs: PairBatch, labelled: Labelled, reference_logps: Tensor, state: TrainerState
    ) -> None:
        """The pairs of the step that `state` comes before. All processes together."""
        if not self.args.pairs_file:
            return
        rows = []
        both = (pairs.first, pairs.second)
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
                "tokens": [one.ids[i][one.mask[i]].tolist() for one in both],
                "by": ["policy", self.args.sampler],
                "margin": labelled.margin[i].item(),
                "win_probability": labelled.labels.win_probability[i].item(),
                "score": scores,
                "reference_logps": reference_logps[:, i].tolist(),
            }
            rows.append({name: _finite(value) for name, value in row.items()})
        gathered = sorted(gather_object(rows), key=lambda row: row["row"])
        if self.file is not None:
            self.file.append(gathered)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.file is not None:
            self.file.restore(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.file is not None:
            self.file.sync()


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
