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


def starting_point(config: TrainingConfig, chunk_size: int) -> tuple[Any, BertTokenizer, Dataset]:
    """Train a tiny model on general text, and return it with its tokenizer and the domain."""
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
    return model, tokenizer, Dataset.from_dict({"text": domain})


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


def choose_gaps(documents: Dataset, tokenizer: BertTokenizer, *, count: int = 5) -> list[Gap]:
    """Choose sentences at random, and in each a word of one token, which has one probability."""
    generator = random.Random(0)  # noqa: S311  # nothing secret
    gaps: list[Gap] = []
    for text in documents["text"]:
        sentences = [each for each in split_sentences(text) if 7 <= len(each.split()) <= 14]
        if not sentences or len(gaps) == count:
            continue
        sentence = generator.choice(sentences)
        encoding = tokenizer(sentence, return_offsets_mapping=True)
        words = tokenize_with_word_ids({"text": [sentence]}, tokenizer)["word_ids"][0].tolist()
        spans = encoding["offset_mapping"]
        places = [
            place
            for place, (start, end) in enumerate(spans)
            if words.count(words[place]) == 1 and end - start > 3
        ]
        if places:
            place = generator.choice(places)
            start, end = spans[place]
            blank = f"{sentence[:start]}____{sentence[end:]}"
            gaps.append(Gap(blank, sentence[start:end], encoding["input_ids"], place))
    return gaps


def fill_gaps(gaps: list[Gap], model: Any, tokenizer: BertTokenizer) -> list[str]:
    """Say how likely the model finds the true word, and which five it finds likeliest."""
    model.eval()
    guesses = []
    for gap in gaps:
        token_ids = torch.tensor([gap.token_ids], device=model.device)
        token_ids[0, gap.place] = tokenizer.mask_token_id
        with torch.no_grad():
            chances = model(input_ids=token_ids).logits[0, gap.place].softmax(-1)
        top = tokenizer.convert_ids_to_tokens(chances.topk(5).indices.tolist())
        guesses.append(f"{chances[gap.token_ids[gap.place]]:6.1%}   {', '.join(top)}")
    return guesses


def show_gaps(gaps: list[Gap], before: list[str], after: list[str]) -> None:
    """Show each gap's true word, its probability, and the five likeliest words."""
    say = PartialState().print
    say("\n  Held-out sentences, drawn at random: how likely the true word, and the likeliest five")
    for gap, guess_before, guess_after in zip(gaps, before, after, strict=True):
        say(f"\n  {gap.sentence}   ({gap.word})")
        say(f"    before {guess_before}\n    after  {guess_after}")
