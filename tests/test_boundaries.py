"""Who may import whom, and who may read the environment: the rules that keep the two planes apart."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.assets import code_root, recipes_folder
from launch.plan import python_environment

LAUNCH = code_root() / "launch"
ENTRY_NAMES = ("beginning", "finishing", "follow", "prepare", "probe", "rebuild", "tokenized", "train")
ENTRIES = [LAUNCH / f"{name}.py" for name in ENTRY_NAMES]
CONTROL = sorted(path for path in (*LAUNCH.glob("*.py"), *LAUNCH.glob("report/*.py")) if path not in ENTRIES)
ENGINE = sorted((LAUNCH / "engine").rglob("*.py"))
RECIPES = sorted(recipes_folder().rglob("*.py"))
ALL = [*CONTROL, *ENTRIES, *ENGINE, *RECIPES]

WORKERS = ("launch.engine", *(f"launch.{name}" for name in ENTRY_NAMES))
HEAVY = {"torch", "accelerate", "transformers", "datasets"}


def named(path: Path) -> str:
    return str(path.relative_to(code_root()))


def statements(path: Path, *, inside_functions: bool) -> Iterator[ast.stmt]:
    """The statements that run; `if TYPE_CHECKING:` blocks do not."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.stmt):
            yield node
        if inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += ast.iter_child_nodes(node)


def imports(path: Path, *, inside_functions: bool = True) -> set[str]:
    """Modules that a file imports; `from launch import local` counts as `launch.local`."""
    found = set()
    for node in statements(path, inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if is_package(module) else {module}
    return found


def is_package(module: str) -> bool:
    return (code_root() / module.replace(".", "/")).is_dir()


def top_level(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def ours(modules: set[str]) -> set[str]:
    return {module for module in modules if module.partition(".")[0] == "launch"}


def test_there_is_something_to_look_at() -> None:
    assert len(CONTROL) >= 14
    assert LAUNCH / "report/page.py" in CONTROL
    assert len(ENGINE) >= 12
    assert len(RECIPES) >= 3
    assert "launch.local" in imports(LAUNCH / "cli.py"), "`from launch import local` is seen"
    assert "transformers" in top_level(imports(LAUNCH / "prepare.py")), "an import inside a function is seen"
    assert "transformers" not in top_level(imports(LAUNCH / "prepare.py", inside_functions=False))
    assert "torch" in top_level(imports(LAUNCH / "engine/loop.py", inside_functions=False))


@pytest.mark.parametrize("path", CONTROL, ids=named)
def test_the_control_plane_is_free_of_the_worker_plane(path: Path) -> None:
    modules = imports(path)
    assert top_level(modules) & HEAVY == set()
    assert [module for module in modules if module in WORKERS or module.startswith("launch.engine.")] == []


@pytest.mark.parametrize("path", ENTRIES, ids=named)
def test_a_worker_entry_imports_the_worker_plane_inside_functions_only(path: Path) -> None:
    modules = imports(path, inside_functions=False)
    assert top_level(modules) & HEAVY == set()
    assert [module for module in modules if module.startswith("launch.engine")] == []


ENGINE_MAY = {
    *("launch.errors", "launch.sections", "launch.recipe", "launch.plan"),
    *("launch.schedule", "launch.stop", "launch.strategy", "launch.trackers", "launch.follower", "launch.history"),
    *("launch.checkpoints", "launch.disk", "launch.dotted", "launch.imports", "launch.resume"),
    *("launch.out_of_memory", "launch.utilisation", "launch.versions"),
}


@pytest.mark.parametrize("path", ENGINE, ids=named)
def test_the_engine_imports_leaves_of_the_control_plane_only(path: Path) -> None:
    modules = {module for module in ours(imports(path)) if not module.startswith("launch.engine.")}
    assert modules - ENGINE_MAY == set()


def test_the_loop_sees_no_configuration() -> None:
    assert ours(imports(LAUNCH / "engine/loop.py")) & {"launch.config", "launch.plan", "launch.record"} == set()


RECIPES_MAY = {"launch.recipe", "launch.errors", "launch.cache", "launch.hub", "launch.nearest", "launch.topology"}


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipes_know_their_contract_only(path: Path) -> None:
    assert ours(imports(path)) - RECIPES_MAY == set()
    assert top_level(imports(path, inside_functions=False)) & HEAVY == set()


@pytest.mark.parametrize("path", [path for path in ALL if path not in RECIPES], ids=named)
def test_nothing_here_imports_a_recipe_but_by_name(path: Path) -> None:
    assert "recipes" not in top_level(imports(path))


def test_recipes_are_imported_by_name_in_the_registry_alone() -> None:
    assert [named(path) for path in ALL if "import_module(" in path.read_text(encoding="utf-8")] == [
        "launch/registry.py"
    ]


def readers_of_the_environment(path: Path) -> list[int]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {"environ", "environb", "getenv", "putenv"}
    found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in names]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found += [node.lineno for alias in node.names if alias.name in names]
    return found


def test_the_environment_is_read_in_one_module() -> None:
    assert [named(path) for path in ALL if readers_of_the_environment(path)] == ["launch/topology.py"]


def dependencies() -> set[str]:
    """Names of the packages we depend on and of what they are imported as."""
    project = tomllib.loads((code_root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    names = {match[0].lower().replace("-", "_") for item in stated if (match := re.match(r"[\w-]+", item))}
    return names | {"yaml", "evaluate", "deepspeed", "peft", "trl", "torchvision"}


def test_no_module_takes_a_name_that_says_nothing_or_belongs_to_another() -> None:
    names = {path.stem for path in ALL if not path.stem.startswith("__")}
    assert len(names) >= 30
    assert names & {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc", "core", "tools"} == set()
    assert names & sys.stdlib_module_names == set()
    taken = dependencies()
    assert {"torch", "typer", "pyyaml", "huggingface_hub"} <= taken
    assert names & taken == set()


def in_a_process(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **python_environment(), "SHOAL_CACHE": str(folder / "cache")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_planning_a_run_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import json, sys, launch.cli; "
        "launch.cli.app(['plan', 'causal_lm', '--json'], standalone_mode=False); "
        "print(json.dumps(list(sys.modules)), file=sys.stderr)"
    )
    done = in_a_process(program, tmp_path)
    assert json.loads(done.stdout)["config"]["recipe"] == "causal_lm"
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert "launch.plan" in loaded
    assert loaded & HEAVY == set()
    assert list(tmp_path.iterdir()) == [], "a plan writes nothing"


QUICK = [
    *(["--help"], ["run", "--help"], ["doctor", "--help"], ["explain", "causal_lm"], ["recipes", "list"]),
    ["submit", "causal_lm", "--dry-run", "--gpus-per-node", "2"],
    *(["status", "."], ["runs", "."]),
]


def test_no_command_that_starts_nothing_imports_torch(tmp_path: Path) -> None:
    program = (
        "import json, sys, contextlib, launch.cli, launch.errors\n"
        f"for arguments in {QUICK!r}:\n"
        "    with contextlib.suppress(launch.errors.LaunchError):  # status: there is no run\n"
        "        launch.cli.app(arguments, standalone_mode=False)\n"
        "print(json.dumps(list(sys.modules)), file=sys.stderr)"
    )
    done = in_a_process(program, tmp_path)
    assert done.stdout.count("Usage:") == 3
    assert "#SBATCH" in done.stdout
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert {"launch.submit", "launch.status", "launch.report.page"} <= loaded
    assert loaded & (HEAVY | {"wandb", "plotly", "sklearn", "pandas", "huggingface_hub.hf_api"}) == set()
