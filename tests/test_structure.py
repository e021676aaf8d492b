"""The architecture, checked: imports go one way, every document tells the truth."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each room imports only from itself and from the ones before it. The commands beside the rooms come last.
ROOMS = [
    "config",
    "objectives",
    "models",
    "data",
    "sampling",
    "rewards",
    "judges",
    "tracking",
    "evaluation",
    "training",
    "launch",
    "commands",
]


def room(path: Path) -> str:
    """Of a file of the package; what `python -m` runs is a command, wherever it lies."""
    parts = path.relative_to(ROOT / "xpo").parts
    return "commands" if len(parts) == 1 or parts[-1] == "__main__.py" else parts[0]


def imports(path: Path) -> set[str]:
    """What a file imports of this project, anywhere in it: "xpo.data.prompts"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "xpo":
            found |= {f"xpo.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("xpo."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("xpo")}
    return found


FILES = sorted(path for path in (ROOT / "xpo").rglob("*.py") if path != ROOT / "xpo" / "__init__.py")


def test_every_folder_is_a_room():
    assert {room(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "xpo")))
def test_imports_go_one_way(path: Path):
    """Nothing imports a command; but `train` becomes the worker under a launcher, which is in a room below it."""
    for name in imports(path):
        other = name.split(".")[1]
        assert other in ROOMS[:-1], f"{path} imports the command {name}"
        assert ROOMS.index(other) <= ROOMS.index(room(path)), f"{path} imports {name}"


def test_what_the_parent_needs_imports_no_torch():
    """`--cfg job` and a wrong word for `xpo.judges` are answered at once; the parent of a sweep holds no memory."""
    code = (
        "import sys, xpo.train, xpo.push, xpo.runs, xpo.launch.sweep, xpo.judges.__main__, hydra_plugins.xpo_launcher;"
        "print(*{'torch', 'transformers', 'datasets', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_library_needs_none_of_what_only_commands_need():
    """As on a GPU machine without a network, to which few packages are carried."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['hydra', 'mlflow', 'deepspeed']);"
        "from xpo import XPOConfig, XPOTrainer; XPOConfig(output_dir='x', report_to=[])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["xpo", "xpo.judges"])
def test_public_names_are_there_at_first_use(package: str):
    module = importlib.import_module(package)
    assert [getattr(module, name).__name__ for name in module.__all__] == module.__all__
    with pytest.raises(AttributeError, match=rf"module '{package}' has no attribute 'Juge'"):
        _ = module.Juge


FOLDERS = ("xpo", "conf", "docs", "experiments", "tests")


def test_no_file_holds_a_path_of_one_machine():
    for path in ROOT.rglob("*"):
        ours = path.relative_to(ROOT).parts[0] in (
            "xpo",
            "conf",
            "tests",
            "experiments",
            "docs",
            "README.md",
            "Makefile",
        )
        if ours and path.is_file() and path.suffix in (".py", ".yaml", ".md", ".toml", ".jsonl"):
            assert not re.search(r"(?<![\w.])/(root|home|work)/\w", path.read_text()), path


def test_the_readme_names_the_rooms_in_their_order():
    tree = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]
    assert re.findall(r"^  (\w+)/ ", tree, re.MULTILINE) == ROOMS[:-1]
    assert len(tree.strip().splitlines()) <= 15


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *map(str, ROOT.glob("experiments/*/README.md"))])
def test_links_of_documents_lead_somewhere(document: str):
    path = ROOT / document
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_the_way_of_a_run_passes_each_file_once():
    way = (ROOT / "CONTRIBUTING.md").read_text().split("**The way of a run**")[1].split("**To add a")[0]
    files = re.findall(r"\]\((xpo/[^)]+)\)", way)
    assert len(files) == len(set(files)) <= 20
    assert len(way.strip().splitlines()) <= 17  # fifteen, and its heading


def test_files_stay_small():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert max(lengths.values()) <= 400
    assert lengths["xpo/training/trainer.py"] <= 280
