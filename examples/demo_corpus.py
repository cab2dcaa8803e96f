"""Real English that every CPython carries, for a demonstration without a download.

The domain is the Python language reference (`pydoc_data.topics`), the general text the docstrings
of the standard library, read from its source files without importing them. No sentence stands in
both, and none twice.
"""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer

_LEFT_OUT = re.compile(
    r"(^|/)(site-packages|test|tests|idlelib|lib2to3|pydoc_data|ensurepip|turtledemo|config-[^/]*)(/|$)"
)


def read_domain() -> list[str]:
    """Return the prose of each topic of the language reference."""
    return _distinct((topics[name] for name in sorted(topics)), seen=set())


def read_general(domain: list[str]) -> list[str]:
    """Return the prose of the docstrings of each module, without what the domain says too."""
    library = Path(sysconfig.get_path("stdlib"))
    files = (
        path
        for path in sorted(library.rglob("*.py"))
        if not _LEFT_OUT.search(path.relative_to(library).as_posix())
    )
    known = {sentence for text in domain for sentence in split_sentences(text)}
    return _distinct(map(_read_docstrings, files), seen=known)


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
