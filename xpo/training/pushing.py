"""What XPOTrainer sends to the hub: the model with its card, and the pairs; see `xpo.tracking.hub`."""

import logging
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from xpo.data.pair_file import export
from xpo.models.reference import base_model
from xpo.tracking.card import model_card
from xpo.tracking.hub import make_repositories, model_files, push_model, push_pairs
from xpo.training.config import XPOConfig

logger = logging.getLogger(__name__)


class PushingTrainer(Trainer):
    """A Trainer that sends no more than a model to the hub, and goes on where the hub does not take it."""

    args: XPOConfig
    push_in_progress: PushInProgress | None = None
    _told = False  # that the hub did not take a checkpoint

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md into the output directory, with the run's own numbers. Arguments are ignored."""
        if self.is_world_process_zero():
            name = base_model(self.model).config.name_or_path or type(base_model(self.model)).__name__
            card = model_card(vars(self.args), name, self.state.log_history, isinstance(self.model, PeftModel))
            (Path(self.args.output_dir) / "README.md").write_text(card)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repositories of the model and of its pairs, unless they are there; ConfigError if that fails."""
        if self.is_world_process_zero():
            args = self.args
            name = args.hub_model_id or Path(args.output_dir).absolute().name
            private = args.hub_private_repo if private is None else private
            self.hub_model_id = make_repositories(name, args.push_pairs, private, token or args.hub_token)
            self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves the model and sends it with tokenizer and card; with `push_pairs`, the pairs so far, too.

        As `transformers.Trainer.push_to_hub`; what that puts into the card, `kwargs`, is ignored.

        Returns:
            The commit, or unless `blocking` a future of it; None on all processes but the first.

        Raises:
            ConfigError: the hub is out of reach, or refuses. The model is saved.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card()
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self._finish_current_push()
        send = partial(self._send, commit_message or "End of training", token, revision, self.args.push_pairs)
        return send() if blocking else HfApi().run_as_future(send)

    def _send(
        self, message: str, token: str | None = None, revision: str | None = None, pairs: bool = False
    ) -> CommitInfo:
        """What lies in the output directory and, if asked, the pairs so far; as `push_to_hub`."""
        args, repository = self.args, str(self.hub_model_id)
        token = token or args.hub_token
        sent = push_model(Path(args.output_dir), repository, message, token, revision or args.hub_revision)
        if pairs:
            source = Path(str(args.pairs_file))
            export([source], source.with_suffix(".parquet"))
            push_pairs(source.with_suffix(".parquet"), repository, message, token)
        return sent

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Sends the model of a checkpoint in the background: a copy, as the checkpoint may be deleted meanwhile."""
        args, before = self.args, self.push_in_progress
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if before is not None and not before.is_done() and not args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        try:
            for file in model_files(Path(checkpoint_folder)):
                copy = Path(args.output_dir) / file.relative_to(checkpoint_folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(file, copy)
            self.create_model_card()
        except OSError as error:  # the checkpoint is there: a full disk must not cost more
            logger.warning("xpo: no room for a copy of %s, which is not sent (%s)", checkpoint_folder, error.strerror)
            return
        job = HfApi().run_as_future(self._send, f"Training in progress, step {self.state.global_step}")
        job.add_done_callback(self._tell)
        self.push_in_progress = PushInProgress([job])

    def _tell(self, job: Future[CommitInfo]) -> None:
        error = job.exception()
        if error is not None and not self._told:
            logger.warning("xpo: %s; training goes on, and its next checkpoints are sent", error)
        self._told = error is not None

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Without the token of the hub, which the Trainer would write into training_args.bin."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args.hub_token = token
