"""What is checked of the project, a session each; ``nox --list`` tells them.

Sessions install under ``constraints.txt``, the versions everything was tested with. The pin that
matters most is torch's: left open, it resolves to the newest CUDA build, several GB of it.
"""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = [
    "lint",
    "typing",
    "tests",
    "minimums",
    "build",
    "downstream",
    "extras",
    "demo",
    "docs",
]

PYPROJECT = nox.project.load_toml("pyproject.toml")
INSTALLED = "from mlmadapt import __file__ as file; assert 'site-packages' in file, file"
EXTRAS = sorted(PYPROJECT["project"]["optional-dependencies"])
TEST = nox.project.dependency_groups(PYPROJECT, "test")
# A worker per core. A file stays on one worker, which makes what its tests share once, and files
# keep their order, in which those that take longest are not the last.
PYTEST = ["pytest", "--numprocesses=logical", "--maxprocesses=4", "--dist=loadfile"]
PYTEST += ["--no-loadscope-reorder"]

# In the order in which their page tells of them: what pays, then what did not.
STUDIES = ["whole_word_or_token", "short_documents", "perplexity_by_step", "forgetting"]
STUDIES += ["vocabulary", "mask_rate", "sentiment"]


def install(session: nox.Session, *packages: str, constraint: str = "constraints.txt") -> None:
    """Install in tested versions, and cut the session off from the hub and from older caches."""
    session.env["HF_HOME"] = str(Path(session.virtualenv.location, "huggingface").resolve())
    session.env["HF_HUB_OFFLINE"] = "1"
    session.env["PIP_BUILD_CONSTRAINT"] = "constraints.txt"
    # Seconds a test, on a busy machine. Not in pyproject.toml: there, pytest would fail without
    # pytest-timeout.
    session.env["PYTEST_TIMEOUT"] = "900"
    session.install("--constraint", constraint, *packages)


@nox.session
def lint(session: nox.Session) -> None:
    """Check all files as .pre-commit-config.yaml says: style, formatting, spelling, size."""
    install(session, *nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("pre-commit", "run", "--all-files", "--show-diff-on-failure")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the library, and of its use in ``tests/typing/api.py``."""
    install(session, ".", *nox.project.dependency_groups(PYPROJECT, "typing"))
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests and doctests; arguments go to pytest."""
    install(session, "-e.", *TEST)
    session.run("python", "-m", *PYTEST, *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Attack for 5 minutes with cases that nobody thought of; ``-- --minutes 30 --seed 1``."""
    install(session, "-e.", *TEST)
    session.run("python", "-m", "tests.fuzz", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the tests and report what they cover, which takes half as long again."""
    install(session, "-e.", *TEST)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", *PYTEST, *session.posargs)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the tests with the lowest versions that pyproject.toml allows.

    All but torch's: 2.13.0 is the CPU build at hand, and an older one would come with CUDA.
    """
    dependencies = PYPROJECT["project"]["dependencies"]
    lowest = [d.replace(">=", "==") for d in dependencies if not d.startswith("torch")]
    install(session, "-e.", *lowest, *TEST, constraint="tests/minimums.txt")
    session.run("python", "-m", "pip", "check")
    session.run("python", "-m", *PYTEST, *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build sdist and wheel, and run the sdist's tests against the wheel, its source removed."""
    shutil.rmtree("dist", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        # Beside the environment, not in it: the wheel has to bring all it needs.
        install(session, "build", "--target", folder)
        tools = {"PYTHONPATH": folder, "PIP_CONSTRAINT": "constraints.txt"}
        session.run("python", "-m", "build", env=tools)
    (wheel,) = Path("dist").glob("*.whl")
    (sdist,) = Path("dist").glob("*.tar.gz")

    files = {p.relative_to("src") for p in Path("src").rglob("*") if p.is_file()}
    source = {p.as_posix() for p in files if p.parent.name != "__pycache__"}
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    if source != packed:
        session.error(f"The wheel and src/ differ: {sorted(source ^ packed)}.")

    install(session, str(wheel))
    session.run("python", "-m", "pip", "check")
    session.run("python", "-W", "error", "-c", "import mlmadapt")
    install(session, *TEST)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
        (tree,) = Path(folder).iterdir()
        shutil.rmtree(tree / "src")
        with session.chdir(tree):
            session.run("python", "-c", INSTALLED)
            session.run("python", "-m", *PYTEST, *session.posargs)


@nox.session
def downstream(session: nox.Session) -> None:
    """Run the tests of a project that has nothing but the wheel and pytest.

    They pass; with a collator that masks half a word they fail, and name the word.
    """
    with tempfile.TemporaryDirectory() as folder:
        install(session, "pytest")
        session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ".")
        (wheel,) = Path(folder).glob("*.whl")
        install(session, str(wheel))
        project = shutil.copytree("tests/downstream", Path(folder, "project"))
        with session.chdir(project):
            session.run("python", "-c", INSTALLED)
            session.run("python", "-m", "pytest", *session.posargs)
            broken = ["-k", "whole_words", "--collator", "HalfWords"]
            said = session.run("python", "-m", "pytest", *broken, success_codes=[1], silent=True)
    found = re.search(r"AssertionError: (row \d+: the word '\w+' .* masked in part.*)", str(said))
    if not found:
        session.error(f"The broken collator was found in other words:\n{said}")
    session.log(found[1])


@nox.session
@nox.parametrize("extra", EXTRAS, ids=EXTRAS)
def extras(session: nox.Session, extra: str) -> None:
    """Install each extra in an environment of its own, and do what its page says of it."""
    install(session, f".[{extra}]")
    session.run("python", "-m", "pip", "check")
    script = Path("tests/scripts/extras.py").resolve()
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        session.run("python", str(script), extra)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the example on its small offline corpus; it must learn the domain, and show it."""
    install(session, ".")
    command = ["python", "examples/imdb_distilbert.py", "--demo", *session.posargs]
    said = str(session.run(*command, silent=True))
    session.log(said)
    chances = re.findall(r"\n  (?:before|after)  +[\d.]+% +[\d.]+% +([\d.]+)%(?=\n)", said)
    if len(chances) != 2 or float(chances[1]) < 10 * float(chances[0]):
        session.error(f"The true words of the gaps are hardly likelier than before: {chances}")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure, write docs/benchmarks.md and draw docs/pictures; arguments go to every script."""
    install(session, ".", *nox.project.dependency_groups(PYPROJECT, "bench"))
    folder, pictures = Path("tests/benchmarks"), Path("docs/pictures")
    figures = Path(session.virtualenv.location, "figures.jsonl")
    figures.unlink(missing_ok=True)
    outputs = [f"--pictures={pictures}", f"--output={figures}"]
    with Path("docs/benchmarks.md").open("w", encoding="utf-8") as page:
        page.write((folder / "README.md").read_text(encoding="utf-8"))
        page.flush()
        for script in sorted(folder.glob("[a-z]*.py")):
            command = ["python", str(script), *session.posargs, *outputs]
            session.run(*command, stdout=page, stderr=sys.stderr)
    speed = pictures / "speed.svg"
    session.run("python", str(folder / "_pictures.py"), str(figures), str(speed))


@nox.session
def evidence(session: nox.Session) -> None:
    """Adapt and measure for hours, and write docs/evidence.md; arguments go to every script."""
    install(session, ".", *nox.project.dependency_groups(PYPROJECT, "evidence"))
    with Path("docs/evidence.md").open("w", encoding="utf-8") as page:
        page.write(Path("examples/evidence/README.md").read_text(encoding="utf-8"))
        page.flush()
        for study in STUDIES:
            print(file=page, flush=True)
            script = f"examples/evidence/{study}.py"
            session.run("python", script, *session.posargs, stdout=page, stderr=sys.stderr)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a broken reference is an error."""
    install(session, ".", *nox.project.dependency_groups(PYPROJECT, "docs"))
    session.run("sphinx-build", "-n", "-W", "--keep-going", "docs", "docs/_build", *session.posargs)


@nox.session
def ray(session: nox.Session) -> None:
    """Test the example that prepares a corpus on Ray, which is too large for the other sessions."""
    install(session, "-e.", *nox.project.dependency_groups(PYPROJECT, "ray"))
    session.run("python", "-m", "pytest", "tests/test_shards.py", *session.posargs)
