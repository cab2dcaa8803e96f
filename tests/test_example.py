"""The example does what it says, as its readers run it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from datasets import Dataset
from transformers import pipeline

from mlmadapt import (
    TrainingConfig,
    WholeWordMaskingCollator,
    evaluate_mlm,
    group_texts,
    insert_random_mask,
    pack_texts,
    tokenize_with_word_ids,
)
from mlmadapt.testing import tiny_corpus, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from types import ModuleType

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SCRIPT = FOLDER / "imdb_distilbert.py"
SENTENCE = "This is a great [MASK]."
LOOPS = ["accelerate", "trainer"]
MASKINGS = ["whole-word", "token"]
# Several runs, a fork each, at the price of one import of everything; after each, what is in the
# cache, and when it was written.
FORKS = """
import json, os, runpy, sys, tempfile
from pathlib import Path

script, plans = sys.argv[1], json.loads(sys.argv[2])
runpy.run_path(script, run_name="imported")
parts = []
for plan in plans:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            sys.argv = [script, *plan]
            runpy.run_path(script, run_name="__main__")
            sys.exit()
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{plan} ended with status {status}")
        output.seek(0)
        cache = Path(os.environ["HF_DATASETS_CACHE"])
        files = {str(file): file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}
        parts.append((output.read(), files))
print(json.dumps(parts))
"""
# The demo with fewer gaps, and with what it read and what it made of each gap in a file.
DEMO = """
import functools, json, runpy, sys
from pathlib import Path

_, notes, script, *options = sys.argv
sys.path.insert(0, str(Path(script).parent))
import demo_corpus

read_general, show_gaps = demo_corpus.read_general, demo_corpus.show_gaps
noted = {}

def read(domain):
    noted["general"] = read_general(domain)
    return noted["general"]

def show(gaps, before, after):
    noted["before"], noted["after"] = ([guess.chance for guess in part] for part in (before, after))
    show_gaps(gaps, before, after)

demo_corpus.read_general, demo_corpus.show_gaps = read, show
demo_corpus.choose_gaps = functools.partial(demo_corpus.choose_gaps, count=100)
sys.argv = [script, *options]
runpy.run_path(script, run_name="__main__")
Path(notes).write_text(json.dumps(noted), encoding="utf-8")
"""


class Run(NamedTuple):
    """What a run printed, where its model lies, and what it left in the cache, with the times."""

    output: str
    model: Path
    cache: dict[Path, int]

    @property
    def perplexities(self) -> list[float]:
        """On the held-out rows, before and after each epoch."""
        return [float(match) for match in re.findall(r"epochs +([\d.]+)", self.output)]

    @property
    def ledger(self) -> list[dict[str, int]]:
        """What became of the tokens, of the training part and of the held-out part."""
        lines = re.findall(
            r"([\d,]+) documents, ([\d,]+) tokens in, ([\d,]+) kept, ([\d,]+) dropped;"
            r"\s+([\d,]+) rows of ([\d,]+), ([\d,]+) of them used",
            self.output,
        )
        names = ("documents", "tokens", "kept", "dropped", "rows", "chunk_size", "used")
        counts = [[int(number.replace(",", "")) for number in line] for line in lines]
        return [dict(zip(names, line, strict=True)) for line in counts]


def start(*options: object, command: tuple[str, ...] = (sys.executable,), **env: str) -> Any:
    """Run the script in a process of its own."""
    return subprocess.run(
        [*command, str(SCRIPT), *map(str, options)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def options_of(folder: Path) -> list[str]:
    """The options of every run to its end."""
    return ["--output_dir", str(folder / "adapted"), "--disable_tqdm", "True"]


def adapt(folder: Path, *options: object, cache: Path | None = None, **kwargs: Any) -> Run:
    """Run the script to its end."""
    model, cache = folder / "adapted", cache or folder / "cache"
    environment = {"HF_DATASETS_CACHE": str(cache), **kwargs}
    process = start(*options_of(folder), *options, **environment)
    assert process.returncode == 0, process.stderr
    files = {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}
    return Run(process.stdout, model, files)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options that name a tiny model, a text file with a document twice, and how to learn."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    tiny_model(tokenizer).save_pretrained(folder / "model")
    lines = [*tiny_corpus(120), "", tiny_corpus(1)[0]]
    (folder / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    options = {
        "model": folder / "model",
        "dataset": folder / "texts.txt",
        "chunk_size": 32,
        "train_size": 80,
        "test_size": 20,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
    }
    return tuple(part for name, value in options.items() for part in (f"--{name}", value))


@pytest.fixture(scope="module")
def all_runs(
    inputs: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, Run]:
    """One run of each loop with each masking, and one of packed rows, with one cache.

    The first is started as readers start it; the others are forks of one process.
    """
    cache = tmp_path_factory.mktemp("cache")
    first, *others = [(loop, masking) for masking in MASKINGS for loop in LOOPS]
    options = {key: [*inputs, "--loop", key[0], "--masking", key[1]] for key in (first, *others)}
    options["packed"] = [*inputs, "--rows=packed", "--train_size=1000"]
    others.append("packed")
    made = {first: adapt(tmp_path_factory.mktemp("run"), *options[first], cache=cache)}
    folders = {key: tmp_path_factory.mktemp("run") for key in others}
    plans = [[*options_of(folders[key]), *map(str, options[key])] for key in others]
    process = subprocess.run(
        [sys.executable, "-c", FORKS, str(SCRIPT), json.dumps(plans)],
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    parts = json.loads(process.stdout)
    for key, (output, files) in zip(others, parts, strict=True):
        made[key] = Run(output, folders[key] / "adapted", {Path(f): at for f, at in files.items()})
    return made


@pytest.fixture(scope="module")
def runs(all_runs: dict[Any, Run]) -> dict[Any, Run]:
    """Those of the recipe's rows."""
    return {key: run for key, run in all_runs.items() if key != "packed"}


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("loop", LOOPS)
def test_the_recipe(runs: dict[Any, Run], loop: str, masking: str) -> None:
    """Each loop with each masking learns, says so, and leaves a model that loads."""
    run = runs[loop, masking]
    assert re.search(r"BertForMaskedLM, [\d,]{5,} parameters\n +\d+% of them", run.output)
    assert run.output.count(SENTENCE) == 2
    assert re.search(r"\n  0: \[CLS\] .*\{\S+ -> \[MASK\]", run.output)
    before, first, second = run.perplexities
    assert second < first < 0.9 * before
    assert f'pipeline("fill-mask", model="{run.model}")' in run.output
    fill = pipeline("fill-mask", model=str(run.model))
    if loop == "accelerate":
        card = (run.model / "README.md").read_text(encoding="utf-8")
        assert "adapted to texts.txt" in card
        assert f"| after | {second:.2f} |" in card
        assert "| This is a great \\[MASK\\]. |" in card
    for guess in fill(SENTENCE, top_k=5):
        assert f" {guess['token_str'].strip()} {guess['score']:.1%}" in run.output


def test_packed_rows_keep_every_token(all_runs: dict[Any, Run]) -> None:
    """Whole documents side by side, where joined and cut ones lose what is left at the end."""
    run = all_runs["packed"]
    for part in run.ledger:
        assert part["tokens"] == part["kept"]
        assert part["dropped"] == 0
    before, *_, last = run.perplexities
    assert last < 0.9 * before


@pytest.mark.parametrize("option", ["--masking=token"])
def test_packed_rows_need_our_collator(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    """Another would drop the column that keeps documents apart."""
    monkeypatch.setattr(sys, "argv", ["imdb_distilbert.py", "--rows=packed", option])
    with pytest.raises(SystemExit, match="2"):
        script.parse_arguments()
    assert "rows packed takes masking whole-word" in capsys.readouterr().err


def test_both_loops_measure_the_same(runs: dict[Any, Run]) -> None:
    """The figure before the first step depends on the frozen rows, not on who trains afterwards."""
    for masking in MASKINGS:
        ours, theirs = runs["accelerate", masking], runs["trainer", masking]
        assert ours.perplexities[0] == theirs.perplexities[0]


def test_no_token_is_lost_silently(runs: dict[Any, Run]) -> None:
    """The ledger adds up, and a document that comes twice counts once."""
    for run in runs.values():
        for part, size in zip(run.ledger, (80, 20), strict=True):
            assert part["tokens"] == part["kept"] + part["dropped"]
            assert part["kept"] == part["rows"] * part["chunk_size"]
            assert part["used"] == min(part["rows"], size)
        assert sum(part["documents"] for part in run.ledger) == len({*tiny_corpus(120)})


def test_a_second_run_finds_every_row_in_the_cache(runs: dict[Any, Run]) -> None:
    """No `map` writes anything new; with other masks one does, the freezing."""
    first, second, third, fourth = (run.cache for run in runs.values())
    assert len(first) >= 6  # the text, two parts tokenized, cut into rows, and one frozen
    assert second == first
    assert third.keys() > first.keys()
    assert len(third) == len(first) + 1
    assert fourth == third


@pytest.mark.distributed
def test_two_processes_tell_the_story_once(
    inputs: tuple[object, ...], runs: dict[Any, Run], tmp_path: Path
) -> None:
    """Under torchrun the first process prints, and the figures are those of one process."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    one = runs["accelerate", "whole-word"]
    two = adapt(
        tmp_path / "two",
        *(4 if option == 8 else option for option in inputs),
        command=command,
        **environment,
    )
    assert two.output.count("parameters") == 1
    assert two.ledger == one.ledger
    assert two.perplexities == pytest.approx(one.perplexities, rel=1e-2)


WITHOUT_THE_HUB = (
    r"model 'distilbert/distilbert-base-uncased' is neither [^\n]+ hub cannot be reached: "
    r"[^\n]+--model FOLDER --dataset FILE[^\n]+ --demo, [^\n]+"
)


def test_without_a_network(tmp_path: Path) -> None:
    """One sentence names the two ways on; nothing is tried again and again."""
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    process = start(**environment, HF_ENDPOINT="http://127.0.0.1:9")
    assert process.returncode == 1
    assert process.stdout == ""
    assert re.fullmatch(WITHOUT_THE_HUB + "\n", process.stderr)


def test_without_the_hub(script: ModuleType) -> None:
    """The same where a setting switches it off, as in all tests."""
    with pytest.raises(SystemExit, match=WITHOUT_THE_HUB + r"\Z"):
        script.load_model("distilbert/distilbert-base-uncased")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("imdb_distilbert", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, r"dataset '.+none.csv' is neither a local path nor in the cache, "),
        ("none", None, r"dataset '.+none' is neither a local path nor in the cache, "),
        (
            "a.csv",
            "review,label\ngood,1\n",
            r"text_column is 'text', but .+a.csv' has the columns \['review', 'label'\]: name",
        ),
        ("b.csv", "text\n1\n2\n", r"row 0 of 'text' in .+b.csv' is 1, which is not a text"),
        ("c.txt", "same\n\nsame\n", r"has 1 distinct document\(s\); a split takes 2 or more"),
        ("d.json", "not json", r"dataset '.+d.json' cannot be loaded: "),
    ],
)
def test_a_dataset_that_does_not_fit(
    script: ModuleType, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    """One line says what is wrong."""
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=message) as raised:
        script.load_documents(str(tmp_path / name), "text")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["none", "empty"])
def test_a_model_that_does_not_fit(script: ModuleType, tmp_path: Path, name: str) -> None:
    """One line says what is wrong."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=rf"model '.+{name}' [^\n]+\Z"):
        script.load_model(str(tmp_path / name))


def test_a_folder_of_files(script: ModuleType, tmp_path: Path) -> None:
    """All files of a folder are read."""
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(f"first of {name}\nsecond of {name}\n", encoding="utf-8")
    assert len(script.load_documents(str(tmp_path), "text")) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"learning_rate": 5e-5, "weight_decay": 0.0, "num_train_epochs": 3.0}),
        (["--loop", "trainer"], {"learning_rate": 2e-5, "weight_decay": 0.01}),
        (["--loop=trainer", "--learning_rate=1e-4"], {"learning_rate": 1e-4}),
        (["--demo", "--max_steps", "7"], {"max_steps": 7, "overwrite": True}),
    ],
)
def test_defaults_are_those_of_the_loop(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    expected: dict[str, Any],
) -> None:
    """The recipe has other settings for `Trainer`; what is said on the command line wins."""
    monkeypatch.setattr(sys, "argv", ["imdb_distilbert.py", *options])
    _, config = script.parse_arguments()
    assert {name: getattr(config, name) for name in expected} == expected


def test_trainer_keeps_documents_apart(script: ModuleType, tmp_path: Path) -> None:
    """Packed rows have the evaluation that their documents have alone, before the first step."""
    tokenizer = tiny_tokenizer()
    collator = WholeWordMaskingCollator(tokenizer, seed=0)
    tokens = dict(tokenize_with_word_ids({"text": tiny_corpus(40)}, tokenizer))
    packed = Dataset.from_dict(pack_texts(tokens, chunk_size=200))
    frozen = Dataset.from_dict(insert_random_mask(packed[:], collator))
    alone = Dataset.from_dict(insert_random_mask(tokens, collator))
    model = tiny_model(tokenizer)
    expected = evaluate_mlm(model, alone, tokenizer=tokenizer).loss
    config = TrainingConfig(output_dir=str(tmp_path), max_steps=2, disable_tqdm=True)
    history = script.train_with_trainer(model, packed, frozen, tokenizer, collator, config)
    assert history[0]["eval_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_is_as_exact(script: ModuleType, tmp_path: Path, accumulation: int) -> None:
    """Each epoch has its own masks; the loss is a mean over tokens, however a step is cut up."""
    epochs = []

    class Recording(WholeWordMaskingCollator):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)
            super().set_epoch(epoch)

    tokenizer = tiny_tokenizer()
    collator = Recording(tokenizer, seed=0)
    tokens = tokenize_with_word_ids({"text": tiny_corpus(40)}, tokenizer)
    chunks = group_texts(tokens, chunk_size=16, labels=False)
    rows = Dataset.from_dict(chunks).select(range(32))
    frozen = Dataset.from_dict(insert_random_mask(rows[:], collator))
    config = TrainingConfig(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-4,
        disable_tqdm=True,
    )
    model = tiny_model(tokenizer)
    history = script.train_with_trainer(model, rows, frozen, tokenizer, collator, config)
    assert epochs == [0, 1]
    # Hardly trained, so near the loss of random weights, which twice that would not be.
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses == pytest.approx([math.log(len(tokenizer))] * 2, rel=0.05)


@pytest.mark.parametrize("option", ["--chunk_size=0", "--train_size=0", "--max_steps=0"])
def test_settings_out_of_range(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    """The usage message names the option, the value and what is required."""
    monkeypatch.setattr(sys, "argv", ["imdb_distilbert.py", option])
    with pytest.raises(SystemExit, match="2"):
        script.parse_arguments()
    name = option[2:].partition("=")[0]
    assert re.search(rf"error: {name} is 0; it must be .*[01]", capsys.readouterr().err)


def test_every_option_is_described(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a sentence, with its default; those of the settings in the words of the reference."""
    monkeypatch.setattr(sys, "argv", ["imdb_distilbert.py", "--help"])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        script.parse_arguments()
    _, *lines = re.split(r"\n  (?=--)", capsys.readouterr().out)
    assert len(lines) == len(fields(script.Arguments)) + len(fields(TrainingConfig))
    for line in lines:
        assert re.search(r"\s\s[A-Z\"].{12,}\. \(default: .+\)$", line), line
    assert "Directory of the final model. (default: adapted-model)" in lines[11]


@pytest.mark.parametrize("way", [[], ["--overwrite"], ["--resume_from_checkpoint", "True"]])
def test_an_occupied_folder_is_found_before_anything_is_done(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    way: list[str],
) -> None:
    """Not after minutes of tokenizing; the error names the ways on, and they are ways on."""
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(sys, "argv", ["imdb_distilbert.py", "--output_dir", str(tmp_path), *way])
    if way:
        script.parse_arguments()
        return
    with pytest.raises(SystemExit, match="2"):
        script.parse_arguments()
    message = (
        r"output_dir '.+' holds files of another run; .* --resume_from_\w+ True, .*--overwrite\n"
    )
    assert re.search(message, capsys.readouterr().err)


def test_documents_without_a_text_are_counted(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty field of a csv file is None; such rows are left out, and so are repeated ones."""
    lines = ["text,label", "good,1", ",0", "good,1", "bad,0", ",1", '" ",1']
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8")
    documents = script.load_documents(str(tmp_path / "a.csv"), "text")
    assert documents["text"][:] == ["good", "bad"]
    message = "of 6 documents, 3 without a text and 1 that repeat another are left out"
    assert message in capsys.readouterr().out


@pytest.mark.slow  # `nox -s demo` runs all of its steps, and looks at what it says
def test_the_demo(script: ModuleType, tmp_path: Path) -> None:
    """A few of the steps are enough to see the domain being learned."""
    import demo_corpus

    notes = tmp_path / "notes.json"
    run = adapt(
        tmp_path,
        *("--demo", "--max_steps", 12),
        command=(sys.executable, "-c", DEMO, str(notes)),
    )
    noted = json.loads(notes.read_text(encoding="utf-8"))
    assert run.perplexities[-1] < 0.85 * run.perplexities[0]
    chances = [*zip(noted["before"], noted["after"], strict=True)]
    assert len(chances) == 100
    before, after = map(sum, zip(*chances, strict=True))
    # In so few steps the guesses hardly move, and the chance by an amount that each version of
    # torch and transformers, whose first weights differ, has of its own.
    assert round(after / len(chances), 3) >= round(before / len(chances), 3)
    shown = re.search(r"(\d+) gaps in held-out sentences", run.output)
    assert int(shown[1]) == len(chances)
    assert len(re.findall(r"____.*\n +before +[\d.]+%.*\n +after +[\d.]+%", run.output)) == 5
    shares = re.findall(r"\n  (?:before|after)  +([\d.]+)% +([\d.]+)% +([\d.]+)%(?=\n)", run.output)
    assert [float(row[2]) for row in shares] == pytest.approx(
        [100 * total / len(chances) for total in (before, after)], abs=0.051
    )
    assert "Next" in run.output
    assert len(run.output.splitlines()) < 75
    assert not (tmp_path / "cache").exists()

    # The tokenizer is the same in every process, so that a seed gives the same figures.
    tokenizer = demo_corpus.train_tokenizer(noted["general"], vocab_size=5_000)
    saved = pipeline("fill-mask", model=str(run.model)).tokenizer
    assert saved.get_vocab() == tokenizer.get_vocab()

    # What is held out stands nowhere else.
    texts = [*demo_corpus.read_domain(), *noted["general"]]
    sentences = [sentence for text in texts for sentence in demo_corpus.split_sentences(text)]
    assert len(sentences) == len({*sentences}) > 10_000


def test_gaps_are_words_of_the_domain_filled_as_the_pipeline_fills_them(script: ModuleType) -> None:
    """By the stated rule, one gap in a sentence at a time, with the pipeline's chances."""
    import demo_corpus

    general = ["the film was a story of the director and the plot was bad"] * 9
    # Often enough and here alone; too short; too rare; as frequent in general text.
    domain = (
        ["the film has an unwatchable story, noir"] * 9 + ["screenplay, noir"] * 4 + ["old"] * 9
    )
    words = demo_corpus.find_domain_words(domain, general)
    assert words == {"unwatchable", "noir"}

    tokenizer, text = tiny_tokenizer("wordpiece"), "The story of the film was the worst plot."
    known = {"story", "film", "unwatchable"}  # the last is several tokens, and takes no gap
    gaps = demo_corpus.choose_gaps([f"{text}\nToo short a film.", text], known, tokenizer)
    assert {(gap.sentence, gap.word) for gap in gaps} == {
        ("The ____ of the film was the worst plot.", "story"),
        ("The story of the ____ was the worst plot.", "film"),
    }
    model = tiny_model(tokenizer)
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    for gap, guess in zip(gaps, demo_corpus.fill_gaps(gaps, model, tokenizer), strict=True):
        expected = fill(gap.sentence.replace("____", "[MASK]"), top_k=len(tokenizer))
        place = [word["token_str"] for word in expected].index(gap.word)
        assert guess.rank == place
        assert guess.chance == pytest.approx(expected[place]["score"], rel=1e-4)
        assert guess.likeliest == [word["token_str"] for word in expected[:5]]


@pytest.mark.data
def test_real_reviews(data_dir: Path, tmp_path: Path) -> None:
    """A real model gains on real reviews within 12 steps, with the recipe's settings."""
    run = adapt(
        tmp_path,
        "--model",
        data_dir / "models" / "bert-tiny-mlm",
        "--dataset",
        data_dir / "imdb" / "small" / "train.parquet",
        "--masking=token",
        "--chunk_size=64",
        "--train_size=768",
        "--test_size=100",
        "--num_train_epochs=1",
    )
    before, after = run.perplexities
    assert 95 < before < 120
    assert after < 0.95 * before
