"""`python -m xpo.judges judge=... pairs=FILE`: what a judge is worth, before a policy learns from it."""

from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from xpo.config.compose import CONF, check_complete
from xpo.config.errors import ConfigError
from xpo.config.schema import InspectSchema, draws_the_order, is_group, needs_reward_model
from xpo.launch.command import exit_status, print_error, run_composed
from xpo.launch.processes import exit_statuses

ConfigStore.instance().store(name="inspect_schema", node=InspectSchema)


def main() -> None:
    """The command line. Exit status 2 for bad input, 1 for a judge that could not go on."""
    run_composed(_composed, InspectSchema)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="inspect")
def _composed(config: DictConfig) -> None:
    try:
        exit_statuses.append(inspect(config))
    except Exception as error:  # Hydra would print a line of its own
        exit_statuses.append(exit_status(error, InspectSchema))


def inspect(config: DictConfig) -> int:
    """Judges the pairs, writes and shows what that tells; the exit status."""
    check_complete(config)
    schema: InspectSchema = OmegaConf.to_object(config)  # type: ignore[assignment]
    if not is_group(schema.judge):
        raise ConfigError("judge has no _target_; choose one with judge=pair_rm, say")
    if not schema.pairs:
        raise ConfigError("pairs='' names no data; give a file, a directory or a hub data set with pairs=...")
    # What needs torch, after what can be known without it.
    from xpo.data.pairs import load_pairs
    from xpo.evaluation.inspection import Judged, ask, report, show, write
    from xpo.launch.groups import build_preference, check_target
    from xpo.tracking.terminal import quiet

    quiet()
    groups = {"judge": schema.judge} | ({"other": schema.other} if is_group(schema.other) else {})
    for key, group in groups.items():
        check_target(key, group)
    check_target("reward_model", schema.reward_model)
    pairs = load_pairs(schema.pairs, schema.pairs_split, schema.limit, schema.seed)
    runtime = HydraConfig.get().runtime
    judged: dict[str, Judged] = {}
    for key, group in groups.items():
        name, reward_model = runtime.choices["judge" if key == "judge" else "judge@other"], {}
        if needs_reward_model(group):
            name, reward_model = f"{name} ({runtime.choices['reward_model']})", schema.reward_model
        # An order that is drawn stays the same for swapped completions, and their verdict could not but turn.
        judged[key] = ask(build_preference(group, reward_model)[1], pairs, name, swap=not draws_the_order(group))
        if judged[key].stopped:
            print_error(f"{judged[key].stopped}; what follows is of the pairs before")
    figures, out = report(pairs, judged), Path(runtime.output_dir)
    write(out, pairs, judged, figures)
    show(judged, figures, out)
    return 1 if any(judge.stopped for judge in judged.values()) else 0


if __name__ == "__main__":
    main()
