"""What is public, what importing it costs, and the rules that the source keeps."""

from __future__ import annotations

import ast
import builtins
import graphlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import mlmadapt
import mlmadapt.testing
from mlmadapt import accelerate_train
from mlmadapt._pytest_plugin import mlmadapt_model, mlmadapt_tokenizer
from mlmadapt.masking.show import MaskView
from mlmadapt.model.head import SparsePrediction

SOURCE = Path(mlmadapt.__file__).parent
ROOT = Path(__file__).parents[1]
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PUBLIC = {name: getattr(mlmadapt, name) for name in mlmadapt.__all__} | {
    name: getattr(mlmadapt.testing, name)
    for name in mlmadapt.testing.__all__
    if name != "TOKENIZER_KINDS"  # no function
}
HEAVY = ["accelerate", "datasets", "numpy", "pyarrow", "tokenizers", "torch", "transformers"]


def test_public_names() -> None:
    """The contract's names, each with the module that it is loaded from, in order."""
    assert mlmadapt.__all__ == sorted(set(mlmadapt.__all__))
    assert sorted(mlmadapt._HOME) == mlmadapt.__all__
    # No module of the inside is offered for completion.
    assert dir(mlmadapt) == sorted([*mlmadapt.__all__, "__version__"])
    assert dir(mlmadapt.testing) == mlmadapt.testing.__all__
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mlmadapt.")
        for alias in node.names
    }
    assert typed == {name: f"mlmadapt.{home}" for name, home in mlmadapt._HOME.items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_tell_their_own(name: str) -> None:
    """Each loads, from a file of this package, by the name that it has there."""
    assert PUBLIC[name].__name__ == name
    assert PUBLIC[name].__module__.startswith("mlmadapt.")


def callables() -> dict[str, Any]:
    """All that a user can call: public names, and methods of what they return."""
    names = dict(PUBLIC)
    for owner in (*PUBLIC.values(), SparsePrediction, MaskView):
        for name, method in vars(owner).items() if inspect.isclass(owner) else ():
            method = getattr(method, "__func__", method)  # noqa: PLW2901  # of class methods
            if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_")):
                names[f"{owner.__name__}.{name}"] = method
    return names


def sections(docstring: str) -> dict[str, list[str]]:
    """The sections of a docstring, and the names that begin the entries of each."""
    parts = re.split(r"^([A-Z]\w+):\n", docstring, flags=re.MULTILINE)
    return {
        title: re.findall(r"^ {4}([\w*]+):", text, re.MULTILINE)
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def raised_by(value: Any, seen: set[Any]) -> set[str]:
    """The errors that a function raises by name, itself or in functions of this package.

    Methods of other objects are not followed, nor is an error left out that is caught on the way.
    """
    if inspect.isclass(value):
        makes = ("__post_init__", "__setstate__") if is_dataclass(value) else ("__init__",)
        return set().union(*(raised_by(vars(value).get(name), seen) for name in makes))
    value = inspect.unwrap(value)
    if not inspect.isfunction(value) or value in seen or "mlmadapt." not in value.__module__:
        return set()
    seen.add(value)
    tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    errors = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = node.exc.func.id if isinstance(node.exc.func, ast.Name) else ""
            errors |= {name} & vars(builtins).keys()  # not one that an argument names
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            errors |= raised_by(value.__globals__.get(node.func.id), seen)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            owner = value.__globals__[value.__qualname__.partition(".")[0]]
            errors |= raised_by(getattr(owner, node.attr, None), seen)
    return errors


@pytest.mark.parametrize("name", callables())
def test_docstrings_are_complete(name: str) -> None:
    """One line, then arguments or fields, what is returned, all errors, and an executed example."""
    value = callables()[name]
    docstring = inspect.getdoc(value)
    assert docstring is not None
    first, *others = docstring.splitlines()
    assert first.endswith(".")
    assert not others or others[0] == ""
    assert ">>> " in docstring, "no example"
    parts = sections(docstring)
    parameters = set(inspect.signature(value).parameters) - {"self", "cls", "_"}
    assert {*parts.get("Args", []), *parts.get("Attributes", [])} == parameters
    returned = inspect.signature(value).return_annotation
    assert inspect.isclass(value) or returned in (None, "None") or "Returns" in parts
    known = [getattr(builtins, error) for error in parts.get("Raises", [])]
    errors = raised_by(value, set())
    assert {
        error for error in errors if not issubclass(getattr(builtins, error), (*known,))
    } == set()


@pytest.mark.parametrize("fixture", [mlmadapt_tokenizer, mlmadapt_model])
def test_fixtures_are_documented(fixture: Any) -> None:
    """What they return, what they raise, and an example, which a doctest could not be."""
    docstring = inspect.getdoc(inspect.unwrap(fixture))
    assert {"Returns", "Raises"} <= sections(docstring).keys()
    assert "def test_" in docstring


def test_options_are_keyword_only() -> None:
    """After the first two or three arguments, which are data, all are named by the caller."""
    positional = {
        name: [
            parameter.name
            for parameter in inspect.signature(value).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        for name, value in PUBLIC.items()
        if not name.startswith("Masked")  # records, in the order in which they are printed
    }
    assert {name: names for name, names in positional.items() if len(names) > 2} == {
        "accelerate_train": ["model", "train_dataset", "eval_dataset"],
        "assert_same_loss": ["compute_loss", "model", "batch"],
        "extend_vocabulary": ["tokenizer", "model", "words"],
        "masked_lm_loss": ["outputs", "labels", "num_items_in_batch"],  # as `Trainer` calls it
        "show_masks": ["batch", "tokenizer", "features"],
    }


def test_unknown_names() -> None:
    """An attribute that is none is an ordinary AttributeError, which `hasattr` understands."""
    with pytest.raises(AttributeError, match="module 'mlmadapt' has no attribute 'mask'"):
        mlmadapt.mask  # noqa: B018
    assert not hasattr(mlmadapt, "__wrapped__")


def test_import_loads_nothing_heavy() -> None:
    """`import mlmadapt`, its help for tests and `dir` load no library that takes seconds."""
    script = (
        "import sys, mlmadapt, mlmadapt.testing; dir(mlmadapt); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_version() -> None:
    """The version is the installed distribution's."""
    try:
        installed = importlib.metadata.version("mlmadapt")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed, only on the path")
    assert mlmadapt.__version__ == installed


def calls_print(node: ast.AST) -> bool:
    """Tell whether a node is a call of print."""
    return isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"


def lines_of_code(path: Path) -> int:
    """Count the lines that do something: not blank, not a comment, not a docstring."""
    text = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        # A string that stands alone: of a module, class or function, or of the name before it.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= {*range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(text.splitlines(), start=1)
    return sum(
        number not in docstrings and not line.lstrip().startswith("#") and bool(line.strip())
        for number, line in lines
    )


def test_lines_of_code_are_counted_as_they_are(tmp_path: Path) -> None:
    """Docstrings, comments and blank lines are not code; a call at the top of a function is."""
    path = tmp_path / "counted.py"
    path.write_text('''"""Module,

in lines."""
# a comment

LIMIT = 3
"""Of a name."""

def function():
    """Function."""
    print(
        LIMIT,  # counts
    )
''')
    assert lines_of_code(path) == 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_source(path: Path) -> None:
    """Each file tells what it is for, is one noun long, prints nothing and checks nothing away."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert lines_of_code(path) <= 270
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not [node for node in ast.walk(tree) if calls_print(node)]


def test_source_stays_small() -> None:
    """The library can be read in an afternoon, and its help for tests in a coffee break."""
    for_tests = {path for path in FILES if room_of(path) in {"testing", "_pytest_plugin"}}
    assert sum(map(lines_of_code, set(FILES) - for_tests)) <= 4920
    assert sum(map(lines_of_code, for_tests)) <= 800
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in TESTS) <= 20_200


def test_tests_are_found_by_what_they_test() -> None:
    """Under the name of the file; what starts processes is beside them."""
    rooms = [room for room in ROOMS if not room.startswith("_")]
    expected = {
        f"{path.parent.name}/test_{path.name}"
        for path in FILES
        if path.parent.name in rooms and not path.name.startswith("_")
    }
    mirrored = {f"{path.parent.name}/{path.name}" for path in TESTS if path.parent.name in rooms}
    assert expected - mirrored == set()
    beside = ("reference_", "strategies")
    assert {
        name for name in mirrored - expected if not name.partition("/")[2].startswith(beside)
    } == set()


def test_no_test_imports_another() -> None:
    """What several need is in a script, a reference or a part of the fuzz session."""
    importing = [
        (path.name, node.module)
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and ".test_" in f".{node.module}"
    ]
    assert importing == []


def test_assertions_for_other_projects_stand_where_their_tests_call_them() -> None:
    """A failure shows the line of the test: every function that can raise one hides itself."""
    hidden = []
    for path in (SOURCE / "testing").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "raise AssertionError" in ast.unparse(node):
                assert "__tracebackhide__ = True" in map(ast.unparse, node.body), node.name
                hidden.append(node.name)
    assert len(hidden) >= 5


ROOMS = ["_types", "data", "masking", "model", "training", "testing", "_pytest_plugin"]
"""In the order in which data flows; each may use those before it."""


def module_of(path: Path) -> str:
    """The name of a file's module below this package."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def room_of(path: Path) -> str:
    """The package that a file is in, or its own name at the top."""
    return module_of(path).partition(".")[0]


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, at the top, in functions or for types."""
    modules = {module_of(file) for file in FILES}
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlmadapt":
            inside = str(node.module).removeprefix("mlmadapt").removeprefix(".")
            for alias in node.names:
                full = f"{inside}.{alias.name}".strip(".")
                home = inside or mlmadapt._HOME.get(alias.name, alias.name)
                used.add(full if full in modules else home)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("mlmadapt.")]
            used |= {name.removeprefix("mlmadapt.") for name in names}
    assert used <= modules
    return used


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """How deep the imports of a module go, 1 for one that imports nothing.

    Raises:
        graphlib.CycleError: If some import each other.
    """
    deep: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        deep[name] = 1 + max((deep[other] for other in graph[name]), default=0)
    return deep


# What stands at the top names all the others, and loads them when they are asked for.
GRAPH = {module_of(path): imports(path) for path in FILES if path != SOURCE / "__init__.py"}


def test_imports_run_one_way() -> None:
    """From room to room as data flows, from file to file never round, on few floors."""
    for name, used in GRAPH.items():
        place = ROOMS.index(name.partition(".")[0])
        later = {other for other in used if ROOMS.index(other.partition(".")[0]) > place}
        assert not later, f"{name} imports {later}"
    rooms = {room: set[str]() for room in ROOMS}
    for name, used in GRAPH.items():
        room = name.partition(".")[0]
        rooms[room] |= {other.partition(".")[0] for other in used} - {room}
    assert rooms["training"] >= {"masking", "model"}
    assert "masking" not in rooms["model"]
    assert max(floors(rooms).values()) <= 6
    for room in ROOMS:
        inside = {name: used for name, used in GRAPH.items() if name.partition(".")[0] == room}
        inside = {name: used & inside.keys() for name, used in inside.items()}
        deep = floors(inside)
        assert max(deep.values()) <= 5, deep
    deep = floors(GRAPH)
    assert deep["training.loop"] > deep["model.evaluation"] > deep["data.rows"]


def test_every_package_that_is_imported_is_a_dependency() -> None:
    """One that comes with another today may not come with it tomorrow."""
    top = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                top.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.Import):
                top |= {alias.name.partition(".")[0] for alias in node.names}
    top -= {*sys.stdlib_module_names, "mlmadapt"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = (re.split(r"[<>=\[; ]", line)[0] for line in project["dependencies"])
    declared = {name.replace("-", "_") for name in names}
    # By the plugin, which only pytest loads, and by `plot`, which asks for its extra.
    assert top - declared == {"matplotlib", "pytest"}


def test_extras_are_what_is_asked_for() -> None:
    """Each is the package of its name, but `plot`, and pages and errors say `mlmadapt[NAME]`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert extras == {
        "plot": ["matplotlib"],
        **{name: [name] for name in ("peft", "tensorboard", "trackio")},
    }
    pages = (ROOT / "README.md", *FILES, *(ROOT / "docs").rglob("*.md"))
    named = {
        name for path in pages for name in re.findall(r"mlmadapt\[(\w+)\]", path.read_text("utf-8"))
    }
    assert named == extras.keys()


def test_the_forward_pass_is_two_calls_from_the_function_that_is_called() -> None:
    """The loop stands where a reader looks for it: `accelerate_train`, a step, the model."""
    loop = inspect.getsource(sys.modules[accelerate_train.__module__].take_step)
    assert "take_step(run, batches" in inspect.getsource(accelerate_train)
    assert "run.forward(run.wrapped, batch" in loop
