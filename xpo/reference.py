"""`python -m xpo.reference fill [--epochs N] [--batch N] key=value ...`: the reference's answers, computed ahead.

Takes the same overrides as `python -m xpo.train`, and fills the store that those runs will read: every training
prompt once per epoch, every held-out prompt once and what the probe of evaluations needs, in large batches of similar
length.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tqdm.auto import tqdm

from xpo.config.compose import check_keys, check_words, choose_preset, compose
from xpo.config.errors import ConfigError
from xpo.config.schema import TrainSchema
from xpo.data.prompt_sets import collate_prompts
from xpo.data.store import OFF
from xpo.evaluation.probe import Probe
from xpo.launch.build import build_arguments, build_inputs
from xpo.launch.command import exit_status, speak_to_any_console
from xpo.models.batches import batches_by_length
from xpo.models.loading import end_tokens, load_model, loaded, with_pad_token
from xpo.models.reference import base_model
from xpo.sampling.noise import EVAL_REFERENCE, PROBE_REFERENCE, REFERENCE
from xpo.tracking import terminal as report
from xpo.training.setup import build_reference, build_reference_draws, build_samplers


def main() -> None:
    """The command line. Exit status 2 for bad input."""
    speak_to_any_console()
    parser = argparse.ArgumentParser(prog="python -m xpo.reference", description=__doc__)
    parser.add_argument("command", choices=["fill"])
    parser.add_argument("--epochs", type=int, default=1, help="draws of each training prompt")
    parser.add_argument("--batch", type=int, default=64, help="prompts in one generate call")
    options, overrides = parser.parse_known_args()
    report.quiet()
    try:
        check_words(overrides)
        config, _, _ = compose(choose_preset(overrides))
        check_keys(OmegaConf.to_container(config))  # type: ignore[arg-type]
        fill(OmegaConf.to_object(config), options.epochs, options.batch)  # type: ignore[arg-type]
    except Exception as error:
        sys.exit(exit_status(error))


def fill(config: TrainSchema, epochs: int, batch: int) -> None:
    """Computes what the store lacks, and says how much that was."""
    config.training.push_to_hub = config.training.push_pairs = False  # it makes nothing to push
    args = build_arguments(config, Path("outputs"))
    if args.reference_store in OFF:
        raise ConfigError("reference.store='off' leaves nothing to fill; name a file with reference.store=...")
    inputs = build_inputs(config, args)
    model = loaded("model.name", config.model.name, load_model, inputs.policy, config.model)
    # The policy says what ends a completion.
    tokenizer = with_pad_token(inputs.tokenizer, end_tokens(base_model(model), inputs.tokenizer))
    samplers = build_samplers(args, model, tokenizer)
    if inputs.reference is not None:
        model = loaded("model.reference", str(config.model.reference), load_model, inputs.reference, config.model)
    draws = build_reference_draws(args, build_reference(args, model, model), samplers)
    half = torch.bfloat16 if args.bf16 else torch.float16
    rounds = epochs if args.sampler == "reference" else 0
    work = [(REFERENCE, epoch, collate_prompts(inputs.datasets["train"])) for epoch in range(rounds)]
    if "eval" in inputs.datasets:
        work.append((EVAL_REFERENCE, 0, collate_prompts(inputs.datasets["eval"])))
        if args.probe_prompts:
            probe = Probe(draws.sampler, draws, args.probe_prompts, args.probe_samples)
            wanted = probe.wanted(inputs.datasets["eval"])
            drawn: list[dict[str, Any]] = [{"prompt_ids": draw.ids, "occurrence": draw.number} for draw in wanted]
            work.append((PROBE_REFERENCE, 0, collate_prompts(drawn)))
    computed, total = 0, sum(len(rows["prompt_ids"]) for _, _, rows in work)
    with tqdm(total=total, desc="Filling", disable=args.disable_tqdm) as bar:
        for stream, number, rows in work:
            for part in batches_by_length([len(ids) for ids in rows["prompt_ids"]], batch, longest_first=True):
                chunk, equal = ([rows[column][i] for i in part] for column in ("prompt_ids", "occurrence"))
                greedy = stream == EVAL_REFERENCE and args.eval_greedy
                with torch.autocast(args.device.type, half, enabled=bool(args.bf16 or args.fp16)):
                    draw = draws.draw(chunk, args.seed, stream, number, args.device, greedy, occurrences=equal)
                computed += int(draw.fresh.sum())
                bar.update(len(chunk))
    print(f"{computed} of {total} draws computed, {total - computed} were there: {args.reference_store}")


if __name__ == "__main__":
    main()
