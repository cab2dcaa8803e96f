"""What is public, what importing it costs, and the rules that the source keeps."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import mlmadapt
import mlmadapt.testing

SOURCE = Path(mlmadapt.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
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
    assert dir(mlmadapt) == sorted([*mlmadapt.__all__, "__version__"])
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mlmadapt.")
        for alias in node.names
    }
    assert typed == {name: f"mlmadapt.{home}" for name, home in mlmadapt._HOME.items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str) -> None:
    """Each loads, tells its own name, and has a docstring with an example that is executed."""
    value = PUBLIC[name]
    assert value.__name__ == name
    assert value.__module__.startswith("mlmadapt.")
    docstring = inspect.getdoc(value)
    assert docstring is not None
    assert ">>> " in docstring, f"{name} has no example"
    for argument in inspect.signature(value).parameters:
        assert argument == "_" or argument in docstring, f"{name} does not tell of {argument}"


def test_options_are_keyword_only() -> None:
    """After the first two or three arguments, which are data, all are named by the caller."""
    positional = {
        name: [
            parameter.name
            for parameter in inspect.signature(value).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        for name, value in PUBLIC.items()
        if name != "MaskedLMMetrics"  # a record, in the order in which it is printed
    }
    assert {name: names for name, names in positional.items() if len(names) > 2} == {
        "accelerate_train": ["model", "train_dataset", "eval_dataset"],
        "assert_same_loss": ["compute_loss", "model", "batch"],
        "masked_lm_loss": ["outputs", "labels", "num_items_in_batch"],  # as `Trainer` calls it
        "show_masks": ["batch", "tokenizer", "features"],
    }


def test_unknown_names() -> None:
    """An attribute that is none is an ordinary AttributeError, which `hasattr` understands."""
    with pytest.raises(AttributeError, match="module 'mlmadapt' has no attribute 'mask'"):
        mlmadapt.mask  # noqa: B018
    assert not hasattr(mlmadapt, "__wrapped__")


def test_import_loads_nothing_heavy() -> None:
    """`import mlmadapt` and `dir` load none of the libraries that take seconds."""
    script = (
        "import sys, mlmadapt; dir(mlmadapt); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
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
    documented = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            documented |= set(range(body[0].lineno, body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(
        number not in documented and not line.lstrip().startswith("#") and bool(line.strip())
        for number, line in lines
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_source(path: Path) -> None:
    """Each file tells what it is for, is one noun long, prints nothing and checks nothing away."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert lines_of_code(path) <= 400
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not [node for node in ast.walk(tree) if calls_print(node)]


def test_source_stays_small() -> None:
    """The library can be read in an afternoon, and its help for tests in a coffee break."""
    for_tests = {path for path in FILES if noun_of(path) in {"testing", "_pytest_plugin"}}
    assert sum(map(lines_of_code, set(FILES) - for_tests)) < 3250
    assert sum(map(lines_of_code, for_tests)) < 750


def noun_of(path: Path) -> str:
    """The module or the package that a file is of."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The files of this package that one imports, at the top, in functions or for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "mlmadapt":
            found |= {mlmadapt._HOME.get(alias.name, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlmadapt."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in names if parts[0] == "mlmadapt" and len(parts) > 1}
    return found


def test_imports_run_one_way() -> None:
    """No file imports one that imports it, by whatever way round."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if path.parent != SOURCE or path.stem != "__init__":
            graph.setdefault(noun_of(path), set()).update(imports(path) - {noun_of(path)})
    assert graph["training"] >= {"batches", "config", "evaluation"}
    assert set().union(*graph.values()) <= graph.keys()
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("prediction") < order.index("evaluation") < order.index("training")
