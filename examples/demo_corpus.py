"""What the demonstration of `imdb_distilbert.py` needs, out of what every CPython carries.

The domain is the Python language reference (`pydoc_data.topics`), the general text the docstrings
of the standard library, read from its source files without importing them. No sentence stands in
both, and none twice, so that a held-out one was never trained on.
"""

import ast
import random
import re
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForMaskedLM, BertTokenizer, DebertaV2Config

from mlmadapt import (
    TrainingConfig,
    WholeWordMaskingCollator,
    accelerate_train,
    group_texts,
    tokenize_with_word_ids,
)

DEFAULTS: dict[str, Any] = {
    "chunk_size": 64,
    "train_size": 5_000,
    "sentence": "The method is called with one [MASK].",
    "per_device_train_batch_size": 32,
    "max_steps": 300,
    "learning_rate": 2e-3,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "save_strategy": "no",
    "overwrite": True,
}
"""Where the demonstration differs from the recipe, which begins with a well-trained model."""


def starting_point(
    config: TrainingConfig, chunk_size: int
) -> tuple[Any, BertTokenizer, Dataset, list[str]]:
    """Train a tiny model on general text; return it, its tokenizer, the domain and that text."""
    say = PartialState().print
    # The same figures on any number of cores; more threads hardly help a model of this size, and
    # beside other work they take three times as long.
    torch.set_num_threads(1)
    domain = read_domain()
    general = read_general(domain)
    tokenizer = train_tokenizer(general, vocab_size=5_000)
    say("\nA model to start from\n---------------------")
    say(f"  the docstrings of {len(general)} modules of the standard library as general text,")
    say(f"  its {len(tokenizer):,} commonest words and pieces, 2 layers of 128, random weights")
    model = AutoModelForMaskedLM.from_config(
        DebertaV2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=2,
            # Looks at the neighbours of a word from the first step on. A plain BERT of this size
            # goes by the frequency of words alone for its first 2,000 steps.
            conv_kernel_size=5,
            conv_act="gelu",
            # Two minutes teach too little to need dropout.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    rows = Dataset.from_dict({"text": general})
    rows = rows.map(
        tokenize_with_word_ids,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns="text",
    )
    rows = rows.map(
        group_texts, batched=True, fn_kwargs={"chunk_size": chunk_size, "labels": False}
    )
    with tempfile.TemporaryDirectory() as folder:
        result = accelerate_train(
            model,
            rows,
            tokenizer=tokenizer,
            data_collator=WholeWordMaskingCollator(tokenizer, seed=config.seed),
            config=replace(
                config,
                output_dir=folder,
                max_steps=max(2 * config.max_steps, -1),
                learning_rate=3e-3,
                push_to_hub=False,
            ),
        )
    say(f"  trained for {result.global_step} steps in {result.seconds:.0f} s")
    return model, tokenizer, Dataset.from_dict({"text": domain}), general


def read_domain() -> list[str]:
    """Return the prose of each topic of the language reference."""
    return _distinct((topics[name] for name in sorted(topics)), seen=set())


def read_general(domain: list[str]) -> list[str]:
    """Return the prose of the docstrings of each module, without what the domain says too."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(sys.stdlib_module_names - {"idlelib", "lib2to3", "pydoc_data", "turtledemo"})
    files = chain.from_iterable(
        [library / f"{name}.py", *sorted((library / name).rglob("*.py"))] for name in modules
    )
    wanted = (file for file in files if file.is_file() and not {"test", "tests"} & {*file.parts})
    known = {sentence for text in domain for sentence in split_sentences(text)}
    return _distinct(map(_read_docstrings, wanted), seen=known)


def split_sentences(text: str) -> list[str]:
    """Cut at the end of a sentence, where the next one begins with a capital letter."""
    return re.split(r"\n|(?<=[.?!])\s+(?=[A-Z\"“])", text)


def train_tokenizer(texts: list[str], vocab_size: int) -> BertTokenizer:
    """Train BERT's tokenizer, to the same vocabulary in every process.

    The library's WordPiece trainer breaks ties by hash order, which differs by process, so pieces
    are taken from BPE, whose merges are ordered.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.BertNormalizer()
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    counts: Counter[str] = Counter()
    for encoding in bpe.encode_batch(texts):
        previous = [None, *encoding.word_ids]
        for token, word, before in zip(encoding.tokens, encoding.word_ids, previous, strict=False):
            counts[token if word != before else f"##{token}"] += 1
    letters = sorted({letter for token in counts for letter in token.removeprefix("##")})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters)]
    pieces += [token for token, _ in counts.most_common()]
    vocabulary = list(dict.fromkeys(pieces))[:vocab_size]
    return BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)})


def _read_docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # the library carries a few such files, for its own tests
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(ast.get_docstring(node) or "" for node in nodes)


def _distinct(texts: Iterator[str], *, seen: set[str]) -> list[str]:
    documents = []
    for text in texts:
        lines = []
        for paragraph in filter(_is_prose, re.split(r"\n\s*\n", text)):
            sentences = split_sentences(" ".join(paragraph.split()))
            fresh = [sentence for sentence in sentences if sentence not in seen]
            seen.update(fresh)
            lines.append(" ".join(fresh))
        if any(lines):
            documents.append("\n".join(filter(None, lines)))
    return documents


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return (
        len(words) >= 8
        and letters >= 0.8 * len(paragraph)
        and "::=" not in paragraph
        and words[-1][-1] in ".:;?!)"
    )


class Gap(NamedTuple):
    """A held-out sentence with one word left out."""

    sentence: str
    word: str
    token_ids: list[int]
    place: int


class Guess(NamedTuple):
    """What a model makes of a gap: the true word's chance and rank, and the likeliest five."""

    chance: float
    rank: int
    likeliest: list[str]


def find_domain_words(domain: list[str], general: list[str]) -> set[str]:
    """Find words of the domain: 4 letters, 5 occurrences, 4 times the share of general text."""
    counts, others = (
        Counter(chain.from_iterable(re.findall(r"[a-z]{4,}", text.lower()) for text in texts))
        for texts in (domain, general)
    )
    usual = counts.total() / others.total()
    return {
        word for word, count in counts.items() if count >= 5 and count >= 4 * usual * others[word]
    }


def choose_gaps(
    documents: list[str], words: set[str], tokenizer: BertTokenizer, *, count: int = 400
) -> list[Gap]:
    """Draw gaps at random out of all: places of `words` that are one token, in whole sentences."""
    sentences = [
        each for text in documents for each in split_sentences(text) if each.count(" ") > 5
    ]
    gaps = []
    for sentence in sentences:
        encoding = tokenizer(sentence, return_offsets_mapping=True)
        whole = tokenize_with_word_ids({"text": [sentence]}, tokenizer)["word_ids"][0].tolist()
        for place, (start, end) in enumerate(encoding["offset_mapping"]):
            if sentence[start:end].lower() in words and whole.count(whole[place]) == 1:
                blank = f"{sentence[:start]}____{sentence[end:]}"
                gaps.append(Gap(blank, sentence[start:end], encoding["input_ids"], place))
    generator = random.Random(0)  # noqa: S311  # nothing secret
    return generator.sample(gaps, min(count, len(gaps)))


def fill_gaps(gaps: list[Gap], model: Any, tokenizer: BertTokenizer) -> list[Guess]:
    """Ask the model for each gap, one gap in a sentence at a time."""
    model.eval()
    guesses = []
    for start in range(0, len(gaps), 50):
        batch = gaps[start : start + 50]
        inputs = tokenizer.pad({"input_ids": [gap.token_ids for gap in batch]}, return_tensors="pt")
        inputs = inputs.to(model.device)
        rows, places = range(len(batch)), [gap.place for gap in batch]
        true = inputs["input_ids"][rows, places]
        inputs["input_ids"][rows, places] = tokenizer.mask_token_id
        with torch.no_grad():
            chances = model(**inputs).logits[rows, places].softmax(-1)
        for each, token in zip(chances, true, strict=True):
            rank = int((each > each[token]).sum())
            likeliest = tokenizer.convert_ids_to_tokens(each.topk(5).indices.tolist())
            guesses.append(Guess(float(each[token]), rank, likeliest))
    return guesses


def show_gaps(gaps: list[Gap], before: list[Guess], after: list[Guess]) -> None:
    """Show how many gaps are filled with the true word, and a few of them."""
    say = PartialState().print
    say(f"\n  {len(gaps)} gaps in held-out sentences, one at a time, drawn at random. Each is a")
    say("  word of the domain: of 4 letters or more, 5 times or more in the training text, and 4")
    say("  times or more as frequent there as in the general text. The true word is")
    say("\n           the first guess   among five   given a chance of, on average")
    for name, guesses in (("before", before), ("after", after)):
        first, five = (sum(each.rank < n for each in guesses) / len(gaps) for n in (1, 5))
        chance = sum(each.chance for each in guesses) / len(gaps)
        say(f"  {name:6} {first:17.1%} {five:12.1%} {chance:15.1%}")
    say("\n  The first five of them: the chance of the true word, and the likeliest five words")
    for gap, guess_before, guess_after in list(zip(gaps, before, after, strict=True))[:5]:
        say(f"\n  {gap.sentence}   ({gap.word})")
        for name, guess in (("before", guess_before), ("after", guess_after)):
            say(f"    {name:6} {guess.chance:6.1%}   {', '.join(guess.likeliest)}")
