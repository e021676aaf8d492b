"""Bad input: one line on stderr that names key, value and remedy, a non-zero exit, before any model loads."""

import errno
import json
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from xpo import train
from xpo.config.compose import CONF
from xpo.config.explain import explain
from xpo.data.prompts import Prompt
from xpo.launch import build, worker
from xpo.launch import processes as launch
from xpo.models.loading import load_model, tiny_model, tiny_tokenizer
from xpo.rewards import RewardModel

# How far a command may get before it is refused.
COMMAND_LINE, WORKER, MODEL = "command line", "worker", "model"
SECONDS = 5.0  # an answer takes no longer, imports aside

REWARD = f"reward_model._target_={__name__}.ShareOfE"
# A run of seconds, with prompts from a file, no held-out prompts and no MLflow.
RUN = f"experiment=smoke tracking=none evaluation=plain data=local data.train=INPUTS/good.jsonl {REWARD}"


class ShareOfE(RewardModel):
    """A reward model that costs nothing: the share of the letter e."""

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        return torch.tensor([text.count("e") / max(len(text), 1) for text in completions])


class OneScore(RewardModel):
    """A reward model that gives one score, whatever the number of completions."""

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        return torch.zeros(1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the commands below name INPUTS/..."""
    directory = tmp_path_factory.mktemp("inputs")
    files = {
        "good.jsonl": [{"prompt": f"Tell me about number {i}"} for i in range(16)],
        "empty.jsonl": [],
        "questions.jsonl": [{"prompts": "Why?"}],
        "numbers.jsonl": [{"prompt": 3}],
        "blank.jsonl": [{"prompt": ""}],
        "chat.jsonl": [{"prompt": [{"role": "user", "content": "Why?"}]}],
        "long.jsonl": [{"prompt": "much " * 400}],
    }
    for name, rows in files.items():
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "malformed.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": oh\n')
    (directory / "a_file").write_text("neither a directory nor a model")
    (directory / "not_a_model").mkdir()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory / "no_template")
    tiny_model().save_pretrained(directory / "no_template")
    return directory


@dataclass
class Command:
    """What a command did."""

    status: int
    seconds: float
    stderr: list[str]
    reached: list[str] = field(default_factory=list)


Run = Callable[[str], Command]


@pytest.fixture
def run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """run("key=value ...") does what `python -m xpo.train key=value ...` does, in this process, without a hub."""
    reached: list[str] = []

    def start_worker(run_dir: Path) -> int:
        reached.append(WORKER)
        # As in a process of its own: without the handlers of pytest and Hydra.
        logging.getLogger().handlers[:] = [logging.StreamHandler()]
        monkeypatch.setattr(sys, "argv", ["xpo.launch.worker", str(run_dir)])
        with pytest.raises(SystemExit) as exit_of_worker:
            worker.main()
        return exit_of_worker.value.code  # type: ignore[return-value]

    def loads(*args, **kwargs):
        reached.append(MODEL)
        return load_model(*args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "start_worker", start_worker)
    launch.exit_statuses.clear()
    monkeypatch.setattr(build, "load_model", loads)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # `main` sets it too: this one is taken back
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")  # a name that never resolves

    def run(command: str) -> Command:
        arguments = command.replace("INPUTS", str(inputs)).split()
        monkeypatch.setattr(sys, "argv", ["xpo.train", *arguments])
        capfd.readouterr()
        started = time.monotonic()
        with pytest.raises(SystemExit) as end:
            train.main()
        seconds = time.monotonic() - started
        return Command(end.value.code, seconds, capfd.readouterr().err.splitlines(), reached)  # type: ignore[arg-type]

    return run


def case(name: str, command: str, words: Sequence[str], reaches: str = COMMAND_LINE, status: int = 2):
    """A row of the table: `words` are the key, the value and the remedy that the message must hold."""
    return pytest.param(command, words, reaches, status, id=name)


CASES = [
    # names
    case("unknown key", "loss.alhpa=1", ["'loss.alhpa'", "did you mean 'loss.alpha'", "--cfg job"]),
    case("unknown key behind +", "+loss.alhpa=1", ["'loss.alhpa'", "did you mean 'loss.alpha'", "--cfg job"]),
    case("unknown key, top level", "+alpha=1", ["'alpha'", "--cfg job"]),
    case("unknown key of a judge", "judge=pair_rm judge.batchsize=2", ["'judge.batchsize'", "'judge.batch_size'"]),
    case(
        "a key of another option",
        "judge=lexicon judge.model=x",
        ["'judge.model'", "judge=llm, judge=local_llm, judge=pair_rm, and not"],
    ),
    case("the last word of a key", "seed=1", ["'seed'", "did you mean 'training.seed' or"]),
    case("a short name", "lr=1e-5", ["'lr'", "did you mean 'training.learning_rate'"]),
    case("no key of its own", "training.neftune_noise_alpha=1", ["+training.kwargs.neftune_noise_alpha="]),
    case(
        "another group's key",
        "training.report_to=wandb",
        ["'training.report_to'", "did you mean 'tracking.report_to'?"],
    ),
    case(
        "a model as a group", "model=Qwen/Qwen2-0.5B", ["model=Qwen/Qwen2-0.5B", "or give model.name=Qwen/Qwen2-0.5B"]
    ),
    case("data as a group", "data=mine.jsonl", ["data=mine.jsonl", "or give data.train=mine.jsonl"]),
    case("no plugin", "hydra/launcher=submitit_slum", ["hydra/launcher=submitit_slum", "pip install 'xpo[slurm]'"]),
    case("new key without +", "generation.kwargs.penalty=1", ["'penalty'", "add it with +generation.kwargs.penalty="]),
    case("unknown group", "modle=tiny", ["'modle'", "did you mean 'model'"]),
    case("unknown option", "model=tinny", ["model=tinny", "did you mean 'tiny'", "choose one of llama_3_2_1b, "]),
    case("no option of a group", "loss=null", ["loss=null", "no_exploration, online_dpo, popo"]),
    case("group twice", "+model=tiny", ["model has a value already", "model=tiny, without the +"]),
    case("unreadable override", "data.train=a=b", ["'data.train=a=b'", "'key=\"a=b\"'"]),
    case("sweep without -m", "loss.alpha=1,2", ["loss.alpha=1,2", "-m"]),
    case("interpolation", "loss.alpha=${loss.nope}", ["'loss.nope'", "correct what stands in ${...}"]),
    case("group removed", "~tracking", ["~tracking would leave it on", "give tracking=none"]),
    case("no name", "data.train=''", ["data.train=''", "give a name"]),
    case("no name of a model", "model.name=''", ["model.name=''", "give a name"]),
    case("key removed", "~data.eval", ["data.eval cannot be removed", "data.eval=null"]),
    # types
    case("text for an integer", "training.max_steps=many", ["training.max_steps=many", "give a value of type int"]),
    case("float for an integer", "training.max_steps=1.5", ["training.max_steps=1.5", "give a value of type int"]),
    case("text for a bool", "training.bf16=maybe", ["training.bf16=maybe", "give a value of type bool | null"]),
    case("text for a float", "generation.top_p=all", ["generation.top_p=all", "give a value of type float"]),
    case("number for a dict", "generation.kwargs=3", ["generation.kwargs=3", "give a value of type dict"]),
    case("null for a number", "training.max_steps=null", ["training.max_steps=null", "give a value of type int"]),
    case("alpha is text", "loss.alpha=abc", ["loss.alpha='abc'", "is not a number; give one"]),
    case("alpha holds text", "loss.alpha=[1e-5,abc]", ["loss.alpha='abc'", "is not a number; give one"]),
    case("alpha is empty", "loss.alpha=[]", ["loss.alpha=[]", "give a number, or one per epoch"]),
    # ranges
    case("negative beta", "loss.beta=-0.1", ["loss.beta=-0.1", "give a value greater than 0"]),
    case("no EOS penalty", "loss.missing_eos_penalty=0", ["loss.missing_eos_penalty=0", "greater than 0"]),
    case(
        "no room for a prompt",
        "experiment=none generation.max_new_tokens=512",
        ["generation.max_new_tokens=512", "generation.max_length=512", "lower generation.max_new_tokens"],
    ),
    case("negative temperature", "generation.temperature=-1", ["generation.temperature=-1", "at least 0"]),
    case(
        "what vLLM rounds",
        "generation=vllm generation.temperature=.001",
        ["generation.engine=vllm", "takes generation.temperature=0, or from 0.01 to 2.0, not 0.001"],
    ),
    case(
        "what vLLM orders otherwise",
        "generation=vllm generation.top_p=.9 generation.min_p=.1",
        ["generation.engine=vllm", "generation.top_p=0.9 and generation.min_p=0.1", "set one of them"],
    ),
    case(
        "vLLM and a divided policy",
        "generation=vllm deepspeed.gather_for_generation=false",
        ["generation.engine=vllm needs the whole policy", "set deepspeed.gather_for_generation=True"],
    ),
    case("top_p above 1", "generation.top_p=1.5", ["generation.top_p=1.5", "give a value in (0, 1]"]),
    case("reference batch of none", "reference.batch_size=0", ["reference.batch_size=0", "at least 1"]),
    case("seeds without a sweep", "experiment=smoke sweep.seeds=3", ["sweep.seeds=3", "add -m"]),
    case("no steps", "training.max_steps=0", ["training.max_steps=0", "at least 1"]),
    case(
        "seed", "training.seed=99999999999999999999", ["training.seed=99999999999999999999", "a value below 4294967296"]
    ),
    case(
        "a tracker that is not installed",
        "experiment=smoke +training.kwargs.report_to=[clearml]",
        ["training.kwargs.report_to='clearml'", "is not installed; install it or leave it out"],
        WORKER,
    ),
    case("an unknown logger", "tracking.report_to=[wandb,tensorbord]", ["report_to='tensorbord'", "'tensorboard'"]),
    case(
        "a hub that is out of reach",
        "experiment=smoke training.push_to_hub=true training.hub_model_id=me/none",
        ["training.push_to_hub=True", "see to the network and to `hf auth login`, or set it to false"],
        WORKER,
    ),
    case("pairs for no hub", "training.push_pairs=true", ["push_pairs=True has no effect", "python -m xpo.push RUN"]),
    case("checkpoints for the hub", "training.hub_strategy=checkpoint", ["'checkpoint' is not one of end, every_save"]),
    case("seed of data", "training.data_seed=-1", ["training.data_seed=-1", "at least 0"]),
    case("unknown loss", "loss.loss_type=ippo", ["loss.loss_type='ippo'", "sigmoid, ipo", "did you mean 'ipo'"]),
    case("no LoRA modules", "lora=default lora.target_modules=[]", ["lora.target_modules=[]", "give all-linear"]),
    # what does not go together
    case("no judge at all", "judge=reward reward_model=none", ["reward_model=none", "choose a reward_model"]),
    case("no data", "data=local", ["data.train", "give one with data.train="]),
    case(
        "evaluation of nothing",
        "data.eval=null training.eval_strategy=steps",
        ["training.eval_strategy='steps'", "data.eval=None", "set data.eval"],
    ),
    case(
        "a key's double",
        "+training.kwargs.max_steps=3",
        ["training.kwargs.max_steps=3", "set training.max_steps"],
    ),
    case(
        "weights for no iteration",
        "experiment=algorithm_1 training.iterations=2",
        ["has 3 values for training.iterations=2", "give one for each at most"],
    ),
    case(
        "an option of no bonus",
        "loss=online_dpo loss.bonus_clip=5",
        ["loss.bonus_clip=5.0 has no effect with loss.bonus=none", "leave it out"],
    ),
    case("unknown labels", "preference.labels=softt", ["preference.labels='softt'", "did you mean 'soft'"]),
    case("label temperature", "preference.label_temperature=0", ["label_temperature=0", "greater than 0"]),
    case("tie threshold", "preference.tie_threshold=-1", ["preference.tie_threshold=-1", "at least 0"]),
    case("clip to nothing", "preference.clip_scores=0", ["preference.clip_scores=0", "greater than 0"]),
    case(
        "scores that nobody compares",
        "judge=random preference.normalize_scores=true",
        ["preference.normalize_scores=True", "choose that judge"],
    ),
    case(
        "an inner judge without scores",
        "judge=length_controlled reward_model=none",
        ["reward_model=none", "choose a reward_model"],
    ),
    case("no model to ask", "judge=llm", ["judge.model has no value", "give one with judge.model="]),
    case("unknown preference", "preference=sooft", ["preference=sooft", "did you mean 'soft'"]),
    case("scorer without target", "evaluation.scorers.vader=null", ["evaluation.scorers.vader=None", "~evaluation"]),
    case(
        "scorer by another's name",
        "+evaluation.scorers.kl._target_=xpo.rewards.VaderReward",
        ["evaluation.scorers: 'kl'", "another name"],
    ),
    # directories
    case("unwritable", "hydra.run.dir=INPUTS/a_file/run", ["hydra.run.dir='", "a_file/run'", "choose another"]),
    case("nothing to resume", "training.resume=nowhere", ["training.resume='nowhere'", "give a run directory"]),
    case(
        "unwritable sweep",
        "-m hydra.sweep.dir=INPUTS/a_file/x",
        ["hydra.sweep.dir='", "choose another"],
    ),
    case("a sweep in a file", "-m hydra.sweep.dir=INPUTS/a_file", ["hydra.sweep.dir='", "choose another"]),
    # only the worker knows
    case(
        "unknown name in kwargs",
        f"{RUN} +training.kwargs.weight_decai=1",
        ["training.kwargs.weight_decai=1", "did you mean 'weight_decay'", "correct or remove it"],
        WORKER,
    ),
    case("unknown optimizer", f"{RUN} training.optim=adman", ["adman", "correct the values under training"], WORKER),
    case(
        "unknown target",
        f"{RUN} reward_model._target_=xpo.rewards.Embeded",
        ["reward_model._target_='xpo.rewards.Embeded'", "cannot be imported", "correct the name"],
        WORKER,
    ),
    case(
        "unknown option of a reward model",
        f"{RUN} +reward_model.device=cpu",
        ["reward_model.device='cpu'", "is not an option of", "ShareOfE"],
        WORKER,
    ),
    case(
        "unknown option of a judge",
        f"{RUN} judge=pair_rm +judge.batchsize=2",
        ["judge.batchsize=2", "is not an option of", "did you mean 'batch_size'"],
        WORKER,
    ),
    case(
        "unknown option of an inner judge",
        f"{RUN} judge=length_controlled +judge.judge.weight=2",
        ["judge.judge.weight=2", "is not an option of"],
        WORKER,
    ),
    case(
        "a judge without what it needs",
        f"{RUN} judge._target_=xpo.judges.FunctionJudge",
        ["judge.function has no value", "give it with +judge.function="],
        WORKER,
    ),
    case(
        "no such function",
        f"{RUN} judge=function judge.function=nowhere:judge",
        ["judge.function='nowhere:judge'", "package.module:function"],
        WORKER,
    ),
    case(
        "no key",
        f"{RUN} judge=llm judge.model=m judge.api_key_env=XPO_NO_SUCH_KEY",
        ["judge.api_key_env='XPO_NO_SUCH_KEY'", "export XPO_NO_SUCH_KEY="],
        WORKER,
    ),
    case(
        "no address",
        f"{RUN} judge=llm judge.model=m judge.base_url=localhost",
        ["judge.base_url='localhost'", "give one such as http://localhost:8000/v1"],
        WORKER,
    ),
    case(
        "nothing to cache",
        f"{RUN} judge=random judge.cache=verdicts.sqlite",
        ["judge.cache='verdicts.sqlite'", "judge.cache=off"],
        WORKER,
    ),
    case(
        "unwritable cache",
        f"{RUN} judge=lexicon judge.cache=INPUTS/a_file/verdicts.sqlite",
        ["judge.cache='", "a_file/verdicts.sqlite'", "choose another file"],
        WORKER,
    ),
    case(
        "a mix without weights",
        "experiment=smoke tracking=none reward_model=mix ~reward_model.weights.two",
        ["reward_model.weights={'one': 1.0}", "give each model one weight"],
        WORKER,
    ),
    case(
        "unknown embedded model",
        f"{RUN} model.name=embedded:xyz",
        ["model.name='embedded:xyz'", "the embedded models are", "embedded:tiny"],
        WORKER,
    ),
    case("missing file", f"{RUN} data.train=gone.jsonl", ["data.train='gone.jsonl'", "point it at"], WORKER),
    case("empty file", f"{RUN} data.train=INPUTS/empty.jsonl", ["data.train='", "empty.jsonl'", "give a"], WORKER),
    case(
        "no column of prompts",
        f"{RUN} data.train=INPUTS/questions.jsonl",
        ["data.train='", "no column 'prompt'", "did you mean 'prompts'", "set data.prompt_column"],
        WORKER,
    ),
    case(
        "malformed JSON",
        f"{RUN} data.train=INPUTS/malformed.jsonl",
        ["data.train='", "malformed.jsonl'", "cannot be read as jsonl", "mend the file"],
        WORKER,
    ),
    case("no prompt", f"{RUN} data.train=INPUTS/numbers.jsonl", ["prompt=3", 'write {"prompt": "..."}'], WORKER),
    case("blank prompt", f"{RUN} data.train=INPUTS/blank.jsonl", ["prompt=''", 'write {"prompt": "..."}'], WORKER),
    case(
        "all prompts too long",
        f"{RUN} data.train=INPUTS/long.jsonl",
        ["all 1 prompts exceed", "= 248 tokens", "raise max_length"],
        WORKER,
    ),
    case(
        "no chat template",
        f"{RUN} data.train=INPUTS/chat.jsonl model.name=INPUTS/no_template",
        ["no_template'", "no chat template", "set tokenizer.chat_template"],
        WORKER,
    ),
    case("no model in it", f"{RUN} model.name=INPUTS/not_a_model", ["model.name='", "not_a_model'", ";"], WORKER),
    case(
        "refused option of generate",
        f"{RUN} +generation.kwargs.num_beams=2",
        ["num_beams=2", "not supported", "remove it"],
        WORKER,
    ),
    case(
        "more tokens at least than at most",
        f"{RUN} +generation.kwargs.min_new_tokens=100 generation.max_new_tokens=99",
        ["min_new_tokens=100", "max_new_tokens=99", "change one of them"],
        WORKER,
    ),
    case(
        "unknown option of generate",
        f"{RUN} +generation.kwargs.repetition_penality=2",
        ["repetition_penality=2", "did you mean 'repetition_penalty'"],
        WORKER,
    ),
    # out of reach
    case("model out of reach", f"{RUN} model.name=a/b", ["model.name='a/b'", "out of reach", "point model."], WORKER),
    case("data out of reach", f"{RUN} data.train=a/b", ["data.train='a/b'", "out of reach", "point data."], WORKER),
    case(
        "reference out of reach",
        f"{RUN} model.reference=a/b",
        ["model.reference='a/b'", "out of reach", "point model.reference"],
        WORKER,
    ),
    case(
        "judge out of reach",
        f"{RUN} judge=pair_rm judge.model=a/b",
        ["judge.model='a/b'", "out of reach", "point judge.model"],
        WORKER,
    ),
    case(
        "reward model out of reach",
        "experiment=smoke tracking=none reward_model=classifier reward_model.model=a/b",
        ["reward_model.model='a/b'", "out of reach", "point reward_model.model"],
        WORKER,
    ),
    case(
        "tracking server out of reach",
        f"{RUN} tracking=mlflow tracking.uri=http://127.0.0.1:9",
        ["tracking.uri='http://127.0.0.1:9'", "does not answer", "set tracking=none"],
        WORKER,
    ),
    case(
        "tracking driver missing",
        f"{RUN} tracking=mlflow tracking.uri=nosuch://server",
        ["tracking.uri='nosuch://server'", "set tracking=none"],
        WORKER,
    ),
    case(
        "tracking database unwritable",
        f"{RUN} tracking=mlflow tracking.uri=sqlite:///INPUTS/a_file/mlflow.db",
        ["tracking.uri='sqlite:///", "a_file/mlflow.db'", "set tracking=none"],
        WORKER,
    ),
    # only the model itself, its completions or its gradients show it
    case(
        "unknown LoRA modules",
        f"{RUN} lora=default lora.target_modules=[q_prog]",
        ["q_prog", "not found in the base model", "lora.target_modules"],
        MODEL,
    ),
    case(
        "scores of the wrong shape",
        f"{RUN} reward_model._target_={__name__}.OneScore training.disable_tqdm=true",
        ["reward_model", "shape (1,)", "return one number per pair, shape (8,)"],
        MODEL,
    ),
    case(
        "loss that is not finite",
        f"{RUN} loss.alpha=1e39 training.disable_tqdm=true",
        ["the loss is -inf at step 1", "lower learning_rate or alpha", "model are sound"],
        MODEL,
        status=1,
    ),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("command", "words", "reaches", "status"), CASES)
def test_bad_input(run: Run, command: str, words: Sequence[str], reaches: str, status: int):
    """One line, exit status 2 (1 if training failed), within seconds, and as early as it can be known."""
    result = run(command)
    assert len(result.stderr) == 1, "\n".join(result.stderr)
    assert result.stderr[0].startswith("xpo: error: ")
    for word in words:
        assert word in result.stderr[0]
    assert result.status == status
    assert result.seconds < 4 * SECONDS  # the machine may be busy; what was reached says the rest
    assert MODEL not in result.reached or reaches == MODEL
    assert WORKER not in result.reached or reaches in (WORKER, MODEL)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {max_steps: 3}", ["puts its keys under experiment", "begin it with # @package _global_"]),
        ("# @package _global_\ndefaults: [override /jugde: random]", ["mine.yaml", "jugde", "did you mean 'judge'"]),
        ("# @package _global_\ndefaults: [/judge: random]", ["judge has a value already", "- override /judge: random"]),
        ("# @package _global_\ndefaults: [override judge: random]", ["mine.yaml", "- override /judge: random"]),
        ("# @package _global_\ndefaults: {judge: random}", ["mine", "must be a list", "- override /judge: random"]),
        ("# @package _global_\ndefaults: [override /model: tiny, smoke]", ["mine.yaml", "is defined before", "then"]),
    ],
)
def test_a_file_of_the_user_with_a_mistake(run: Run, tmp_path: Path, text: str, words: Sequence[str]):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    result = run("--config-dir=conf experiment=mine")
    (line,) = result.stderr
    for word in words:
        assert word in line
    assert result.status == 2


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("tracking.uri=http://me:s3cret@host", "MLFLOW_TRACKING_PASSWORD"),
        ("tracking.uri=postgresql://me:s3cret@host/db", "PGPASSWORD"),
        ("tracking.uri=http://me:s3=cret@host", "MLFLOW_TRACKING_PASSWORD"),  # which Hydra cannot read, and would quote
        ("++tracking.uri=http://host?access_token=s3cret", "MLFLOW_TRACKING_PASSWORD"),
        ("-m loss.alpha=1,2 tracking.uri=http://me:s3cret@host", "MLFLOW_TRACKING_PASSWORD"),
        ("judge=llm judge.model=m judge.base_url=http://me:s3cret@host/v1", "judge.api_key_env"),
        ("+judge.api_key=s3cret", "judge.api_key_env"),
        ("+training.kwargs.hub_token=s3cret", "HF_TOKEN"),
        ("launch.command='env HF_TOKEN=s3cret torchrun'", "environment variable"),
        ("+hydra.job.env_set.HF_TOKEN=s3cret", "environment variable"),
        ("--config-dir=INPUTS experiment=secret", "MLFLOW_TRACKING_PASSWORD"),  # a file
        ("-m --config-dir=INPUTS experiment=secret loss.alpha=1,2", "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_a_secret_stands_nowhere(run: Run, inputs: Path, tmp_path: Path, words: str, remedy: str):
    """Neither in a file nor on the terminal."""
    (inputs / "experiment").mkdir(exist_ok=True)
    text = "# @package _global_\ntracking: {uri: 'http://me:s3cret@host'}\n"
    (inputs / "experiment" / "secret.yaml").write_text(text)
    result = run(words)
    (line,) = result.stderr
    assert "holds a secret" in line
    assert remedy in line
    assert "s3" not in line
    assert result.status == 2
    assert not any("s3" in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_a_secret_of_the_environment_is_refused_too(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@host")
    for words in ("experiment=smoke", "-m experiment=smoke loss.alpha=1,2"):
        (line,) = run(words).stderr
        assert "MLFLOW_TRACKING_URI holds a secret" in line
        assert "s3cret" not in line


@pytest.mark.parametrize("words", ["", "experiment=smoke model=smollm2_135m tracking=none"])
def test_nothing_can_be_kept(run: Run, inputs: Path, monkeypatch: pytest.MonkeyPatch, words: str):
    """A home directory that cannot be written, for data and for models: one line with what to set instead."""
    if words:
        monkeypatch.setenv("XPO_CACHE", str(inputs / "a_file" / "cache"))
    else:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(inputs / "a_file" / "cache"))
    (line,) = run(words or RUN).stderr
    assert "a_file/cache cannot be written (Not a directory)" in line
    assert "set HF_HOME, XPO_CACHE and XPO_STORES" in line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left", "out/run.json"), "out/run.json has no room left; make room, and"),
        (OSError(errno.EACCES, "Permission denied", "out"), "hydra.run.dir='out' cannot be written (Permission denied"),
        (OSError(errno.ENOENT, "No such file", "out/checkpoint-3"), "out/checkpoint-3: No such file"),
        (ConnectionError("nobody there"), None),
    ],
)
def test_trouble_with_files_is_told_as_what_it_is(error: OSError, message: str | None):
    said = explain(error, CONF)
    assert (said is None) if message is None else str(said).startswith(message)


def test_a_reader_that_goes_ends_a_command_quietly():
    """As `python -m xpo.chat RUN --prompt ... | head -1`. What is left to be flushed goes nowhere."""
    code = (
        "import sys; from xpo.launch.command import exit_status; "
        "status = exit_status(BrokenPipeError(32, 'Broken pipe')); print('lost'); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_hub_that_accepts_and_never_answers(run: Run, monkeypatch: pytest.MonkeyPatch):
    """A firewall may let a connection open and say nothing: that, too, is out of reach within seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        result = run(f"{RUN} model.name=a/b")
    assert len(result.stderr) == 1
    assert "model.name='a/b'" in result.stderr[0]
    assert "out of reach" in result.stderr[0]
    assert result.status == 2
    assert result.seconds < 2 * SECONDS  # twice two of them are the client's; without our own limit it would be 24


def test_a_run_directory_in_which_a_run_is_at_work(run: Run, tmp_path: Path):
    """Two commands that resume the same run: the second one must not write over the first one's checkpoints.

    Nor may it take the first one's place in the file that says where signals go.
    """
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "worker.pid").write_text("12345")
    with FileLock(tmp_path / "run" / "run.lock"):
        result = run(f"{RUN} hydra.run.dir=run")
    assert len(result.stderr) == 1
    assert re.match(r"xpo: error: hydra.run.dir='.*run' is in use by a run; wait for its end or", result.stderr[0])
    assert result.status == 2
    assert MODEL not in result.reached
    assert (tmp_path / "run" / "worker.pid").read_text() == "12345"


def process(arguments: str, inputs: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """`python -m xpo.train` as a process of its own."""
    command = [sys.executable, "-m", "xpo.train", *arguments.replace("INPUTS", str(inputs)).split()]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_a_refused_command_says_nothing_else(inputs: Path, tmp_path: Path):
    """A process of its own: its output is the line on stderr, which its exit status goes with."""
    refused = process("loss.alhpa=1", inputs, tmp_path)
    assert refused.stdout == ""
    assert (
        refused.stderr == "xpo: error: unknown config key 'loss.alhpa'; did you mean 'loss.alpha'? "
        "(--cfg job lists the keys)\n"
    )
    assert refused.returncode == 2


def test_the_line_stands_apart_from_progress_bars(inputs: Path, tmp_path: Path):
    """A run that fails in the middle of a progress bar does not end the bar's line with its message."""
    failed = process(f"{RUN.replace(REWARD, '')} loss.alpha=1e39", inputs, tmp_path)
    lines = re.split(r"[\r\n]+", failed.stderr)
    assert "3/3" not in failed.stderr
    assert any("0/3" in line for line in lines)
    assert [line for line in lines if "error" in line] == [line for line in lines if line.startswith("xpo: error: ")]
    assert sum(line.startswith("xpo: error: the loss is -inf at step 1; lower learning_rate") for line in lines) == 1
    assert "Traceback" not in failed.stderr
    assert failed.returncode == 1
