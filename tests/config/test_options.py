"""Every key is declared once: its default and its range stand in xpo/config/options.py and nowhere else."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from xpo import XPOConfig
from xpo.config.compose import checked, compose
from xpo.config.errors import ConfigError
from xpo.config.options import Key, Role, keys
from xpo.config.schema import GROUPS, identity, may_change, to_dict, trainer_arguments
from xpo.launch.build import build_arguments
from xpo.tracking.runs import job_key

ROOT = Path(__file__).parents[2]
KEYS = [key for group in GROUPS for key in keys(group)]
ARGUMENTS = {key.argument: key for key in KEYS if key.argument is not None}
# Arguments of XPOConfig whose defaults are transformers': the command line's are for short runs that are watched.
TRANSFORMERS = {key.argument for key in KEYS if key.group == "training"} - {"learning_rate", "logging_steps"}
ROOMS = ("objectives", "models", "data", "sampling", "tracking", "evaluation", "training", "launch")
FILES = sorted(path for room in ROOMS for path in (ROOT / "xpo" / room).rglob("*.py"))


def dotted(key: Key) -> str:
    return f"{key.group}.{key.name}"


# ---- one default -------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.group())
def test_no_preset_repeats_a_default(group: Any):
    """A file of conf/ says what departs from the default, and explains the keys."""
    defaults = {key.name: key.default for key in keys(group)}
    for path in (ROOT / "conf" / group.group()).glob("*.yaml"):
        for name, value in (OmegaConf.to_container(OmegaConf.load(path), resolve=False) or {}).items():
            assert name == "defaults" or value != defaults[name], f"{path}: {name}"


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.group())
def test_every_key_is_explained_beside_the_presets(group: Any):
    """But for those of `training` that are transformers' own."""
    comments = "".join(path.read_text() for path in (ROOT / "conf" / group.group()).glob("*.yaml"))
    for key in keys(group):
        if key.group == "training" and key.argument in TRANSFORMERS:
            continue
        assert re.search(rf"^# {key.name}\s|^{key.name}:", comments, re.MULTILINE), dotted(key)


def parameters(path: Path) -> list[tuple[str, ast.expr]]:
    """Names with their defaults: of parameters of functions, and of fields of classes."""
    found: list[tuple[str, ast.expr]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            of_positional = zip(
                positional[len(positional) - len(node.args.defaults) :], node.args.defaults, strict=True
            )
            of_keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            found += [(one.arg, default) for one, default in [*of_positional, *of_keywords] if default is not None]
        elif isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
            found.append((node.target.id, node.value))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "xpo")))
def test_no_other_code_has_a_default_for_a_key(path: Path):
    """XPOConfig and others quote it: LossOptions.beta."""
    own = {"prompt_overflow", "bf16", "use_cpu", "seed", "load_best_model_at_end"}
    own |= {"metric_for_best_model", "greater_is_better"}
    for name, default in parameters(path):
        if name in ARGUMENTS and name not in own and isinstance(default, ast.Constant):
            assert default.value is None, f"{path}: {name}"
            assert ARGUMENTS[name].default is not None, f"{path}: {name}"


def test_the_library_has_the_same_defaults(tmp_path: Path):
    args = XPOConfig(output_dir=str(tmp_path), use_cpu=True)
    for name, key in ARGUMENTS.items():
        if name in TRANSFORMERS - {"pair_forward", "tokens_per_micro_batch"}:
            continue
        expected = [key.default] if name in ("alpha", "beta") else key.default
        if isinstance(key.default, str | int | float | bool | None):
            assert vars(args)[name] == expected, name


# ---- one range ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "xpo")))
def test_no_other_code_checks_a_range(path: Path):
    assert "xpo.config import checks" not in path.read_text()
    assert "xpo.config.checks" not in path.read_text()


BAD = {
    "loss.alpha": -1.0,
    "loss.beta": 0,
    "loss.loss_type": "hinge",
    "loss.bonus": "curiosity",
    "loss.bonus_on": "third",
    "loss.bonus_clip": 0.0,
    "generation.engine": "tgi",
    "generation.vllm_memory": 1.5,
    "generation.vllm_check_steps": 0,
    "loss.missing_eos_penalty": 0.0,
    "sampler.second": "oracle",
    "sampler.candidates": 2,
    "replay.pairs": "some",
    "replay.ratio": 0.0,
    "replay.window": 0,
    "replay.updates": 0,
    "reference.update": "always",
    "preference.labels": "firm",
    "preference.label_temperature": 0.0,
    "preference.tie_threshold": -0.5,
    "preference.clip_scores": -1.0,
    "generation.max_new_tokens": 0,
    "generation.temperature": -0.1,
    "generation.top_p": 1.5,
    "generation.top_k": -1,
    "generation.min_p": 2.0,
    "generation.repetition_penalty": 0.0,
    "generation.batch_size": 0,
    "data.prompt_overflow": "cut",
    "data.special_tokens": "both",
    "evaluation.probe_prompts": -1,
    "evaluation.probe_samples": 1,
    "reference.batch_size": 0,
    "training.pair_forward": "both",
    "training.tokens_per_micro_batch": 0,
    "training.learning_rate": -1e-3,
    "training.max_steps": 0,
    "training.iterations": 0,
}


@pytest.mark.parametrize("key", BAD)
def test_command_line_and_library_refuse_in_the_same_words(key: str, tmp_path: Path):
    """But for the name of the key."""
    (declared,) = (one for one in KEYS if dotted(one) == key)
    argument = str(declared.argument)
    group = next(group for group in GROUPS if declared.group == group.group())
    with pytest.raises(ConfigError) as on_the_command_line:
        group(**{declared.name: BAD[key]})
    with pytest.raises(ConfigError) as in_the_library:
        XPOConfig(output_dir=str(tmp_path), use_cpu=True, **{argument: BAD[key]})
    assert str(in_the_library.value) == str(on_the_command_line.value).replace(key, argument)


def test_every_range_of_an_argument_is_tried():
    """A check that is added to a key of the library has a value here that it refuses."""
    trained = {dotted(key) for key in KEYS if key.argument and key.check and key.group != "training"}
    assert trained - {"generation.max_length"} <= set(BAD)


# ---- what names a run --------------------------------------------------------------------------


def test_the_name_of_a_run_is_that_of_earlier_versions():
    """Finished and interrupted runs of xpo 0.1 are found again by what they compute."""
    config, _, _ = compose(["experiment=smoke"])
    assert job_key(to_dict(checked(config))) == "7510e2fe7f965870"


@pytest.mark.parametrize("key", KEYS, ids=dotted)
def test_a_key_names_the_run_unless_it_says_otherwise(key: Key):
    config, _, _ = compose(["experiment=smoke"])
    plain = to_dict(checked(config))
    before = identity(plain)
    plain[key.group][key.name] = "another value"
    assert (identity(plain) != before) == (key.role is not Role.OPERATION)
    assert may_change(dotted(key)) == (key.role in (Role.LENGTH, Role.OPERATION))
    assert may_change(f"{dotted(key)}.inner") == may_change(dotted(key))


def test_how_a_judge_is_asked_names_no_run():
    judge = {"_target_": "a", "model": "b", "judge": {"_target_": "c", "cache": "off"}}
    config, _, _ = compose(["experiment=smoke"])
    plain = to_dict(checked(config)) | {"judge": judge}
    before = identity(plain)
    plain["judge"] = judge | {"cache": "file", "concurrency": 3, "judge": {"_target_": "c", "cache": "file"}}
    assert identity(plain) == before
    assert may_change("judge.judge.cache")
    assert not may_change("judge.judge.model")


# ---- from groups to arguments ------------------------------------------------------------------


def test_every_key_of_the_library_reaches_it(tmp_path: Path):
    """Every value that differs from XPOConfig's own default arrives under its argument's name."""
    given = ["experiment=smoke", "generation.batch_size=3", "evaluation.greedy=true", "reference.batch_size=5"]
    config, _, _ = compose([*given, "loss.alpha=[1e-3,1e-4]", "+generation.kwargs.no_repeat_ngram_size=2"])
    config = checked(config)
    args = build_arguments(config, tmp_path)
    assert (args.generation_batch_size, args.eval_greedy, args.reference_batch_size) == (3, True, 5)
    assert (args.alpha, args.generation_kwargs) == ([1e-3, 1e-4], {"no_repeat_ngram_size": 2})
    assert dict(trainer_arguments(config)).keys() <= set(ARGUMENTS)
