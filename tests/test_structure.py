"""The architecture, checked: imports go one way, every document tells the truth."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each module imports only from the ones before it.
ORDER = [
    "errors",
    "prompts",
    "checks",
    "runs",
    "schema",
    "overrides",
    "jobs",
    "launch",
    "hub",
    "memory",
    "store",
    "devices",
    "fingerprints",
    "functions",
    "agreement",
    "losses",
    "logprobs",
    "attention",
    "forward",
    "linears",
    "kv_cache",
    "metrics",
    "zero",
    "config",
    "models",
    "rewards.base",
    "rewards.function",
    "rewards.vader",
    "rewards.embedded",
    "rewards.classifier",
    "rewards.mix",
    "rewards.cached",
    "rewards",
    "judges.base",
    "judges.function",
    "judges.reward",
    "judges.rules",
    "judges.pairwise",
    "judges.llm_blender",
    "judges.pair_rm",
    "judges.question",
    "judges.llm",
    "judges.local_llm",
    "judges.cached",
    "judges",
    "build",
    "data",
    "pairs",
    "backlog",
    "tracking",
    "track",
    "sweep",
    "card",
    "rollout",
    "reference.model",
    "reference.draws",
    "reference",
    "model_checks",
    "preference",
    "evaluation",
    "callbacks",
    "trainer",
    "report",
    "worker",
    "train",
    "judges.__main__",
    "reference.__main__",
    "compare",
    "compare.read",
    "compare.statistics",
    "compare.plots",
    "compare.report",
    "compare.log",
    "compare.__main__",
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "xpo").with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in (ROOT / "xpo").rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "xpo":
            base = node.module.removeprefix("xpo").removeprefix(".")
            found |= {base} if base else {alias.name for alias in node.names}
    return found


def test_every_module_has_its_place():
    assert set(MODULES) - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name: str):
    """But for `train`, which becomes the worker under a launcher."""
    assert imports(MODULES[name]) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize(
    "name", ["errors", "prompts", "checks", "runs", "schema", "overrides", "jobs", "launch", "sweep"]
)
def test_what_the_parent_needs_imports_no_torch(name: str):
    text = MODULES[name].read_text()
    assert not re.search(r"^\s*(import|from) (torch|transformers|datasets|mlflow)", text, re.MULTILINE)


def test_the_readme_names_every_file_of_the_package():
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "xpo").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in readme, path


def test_no_file_holds_a_path_of_one_machine():
    for path in ROOT.rglob("*"):
        ours = path.relative_to(ROOT).parts[0] in ("xpo", "conf", "tests", "experiments", "README.md", "Makefile")
        if ours and path.is_file() and path.suffix in (".py", ".yaml", ".md", ".toml", ".jsonl"):
            assert not re.search(r"(?<![\w.])/(root|home|work)/\w", path.read_text()), path
