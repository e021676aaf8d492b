"""`python -m xpo.reference fill [--epochs N] [--batch N] key=value ...`: the reference's answers, computed ahead.

Takes the same overrides as `python -m xpo.train`, and fills the store that those runs will read: every training
prompt once per epoch, every held-out prompt once, in large batches of similar length.
"""

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tqdm.auto import tqdm

from xpo.config.compose import check_keys, choose_preset, compose
from xpo.config.errors import ConfigError
from xpo.config.options import TrainSchema
from xpo.data.prompt_sets import collate_prompts
from xpo.launch.command import exit_status
from xpo.launch.worker import loaded, prompts, training_arguments
from xpo.models.batches import batches_by_length
from xpo.models.loading import load_model, load_tokenizer, policy_directory
from xpo.models.reference import Reference
from xpo.sampling.draws import ReferenceDraws
from xpo.sampling.rollout import EVAL_REFERENCE, REFERENCE, Sampler
from xpo.tracking import terminal as report
from xpo.training.trainer import (
    end_tokens,
    precision,
    prompt_tokenizer,
    reference_dtype,
    reference_store,
    sampling_options,
)


def main() -> None:
    """The command line. Exit status 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m xpo.reference", description=__doc__)
    parser.add_argument("command", choices=["fill"])
    parser.add_argument("--epochs", type=int, default=1, help="draws of each training prompt")
    parser.add_argument("--batch", type=int, default=64, help="prompts in one generate call")
    options, overrides = parser.parse_known_args()
    report.quiet()
    try:
        config, _, _ = compose(choose_preset(overrides))
        check_keys(OmegaConf.to_container(config))  # type: ignore[arg-type]
        fill(OmegaConf.to_object(config), options.epochs, options.batch)  # type: ignore[arg-type]
    except Exception as error:
        sys.exit(exit_status(error))


def fill(config: TrainSchema, epochs: int, batch: int) -> None:
    """Computes what the store lacks, and says how much that was."""
    args = training_arguments(config, Path("outputs"))
    store = reference_store(args)
    if store is None:
        raise ConfigError("reference.store='off' leaves nothing to fill; name a file with reference.store=...")
    name, key = (config.model.reference, "model.reference") if config.model.reference else (config.model.name, "")
    code = config.model.trust_remote_code
    directory = policy_directory(name, None if key else config.model.revision, key or "model.name", with_code=code)
    # Prompts are the policy's: its tokenizer and chat template.
    own = policy_directory(config.model.name, config.model.revision, with_code=code)
    tokenizer = loaded("model.name", config.model.name, load_tokenizer, own, config.model)
    tokenize = prompt_tokenizer(args, tokenizer)
    parts = {
        part: tokenize(prompts(config, part), key=f"data.{part}")
        for part in ("train", "eval")
        if vars(config.data)[part]
    }

    model = loaded(key or "model.name", name, load_model, directory, config.model).to(args.device)
    # The policy says where completions end.
    policy = loaded("model.name", config.model.name, load_model, own, config.model) if key else model
    sampler = Sampler(tokenizer, sampling_options(args), end_tokens(policy, tokenizer))
    del policy
    reference = Reference(model, model, args.device, reference_dtype(args))
    draws = ReferenceDraws(reference, sampler, store, precision(args))
    half = torch.bfloat16 if args.bf16 else torch.float16
    work = [(REFERENCE, epoch, collate_prompts(parts["train"])) for epoch in range(epochs)]
    if "eval" in parts:
        work.append((EVAL_REFERENCE, 0, collate_prompts(parts["eval"])))
    computed, total = 0, sum(len(rows["prompt_ids"]) for _, _, rows in work)
    with tqdm(total=total, desc="Filling", disable=args.disable_tqdm) as bar:
        for stream, number, rows in work:
            prompt_ids, occurrences = rows["prompt_ids"], rows["occurrence"]
            for part in batches_by_length([len(ids) for ids in prompt_ids], batch, longest_first=True):
                chunk, equal = ([column[i] for i in part] for column in (prompt_ids, occurrences))
                greedy = stream == EVAL_REFERENCE and args.eval_greedy
                with torch.autocast(args.device.type, half, enabled=bool(args.bf16 or args.fp16)):
                    draw = draws.draw(chunk, args.seed, stream, number, args.device, greedy, occurrences=equal)
                computed += int(draw.fresh.sum())
                bar.update(len(chunk))
    print(f"{computed} of {total} draws computed, {total - computed} were there: {store.path}")


if __name__ == "__main__":
    main()
