"""The domain's own words, and a tokenizer that has them.

A word that the tokenizer splits costs a token per piece, and its pieces are predicted independently
of each other. How a tokenizer gets new words without splitting others anew depends on its kind. It
was settled by measuring: with the 1,100 to 1,450 words that `find_domain_words` finds in biomedical
abstracts, on the 525,948 distinct strings between spaces of 70,000 texts without new words.

- WordPiece takes added tokens that match whole words only. In its vocabulary, new words would begin
  others too (``hba1c`` became ``hb ##a1 ##c``). A symbol that BERT does not split off does not keep
  them from matching: ``(OROS®`` was changed, with 14 others; 2 got longer by a token.
- BPE takes them into its vocabulary, and looks up whole words before it merges (``ignore_merges``).
  No other string changed. As added tokens, they would lose the space before them.
- Unigram takes them with the scores of their pieces, which is the least that is chosen. Words that
  begin with a new one and had its pieces are joined up to there, such as ``placebo`` and ``pre`` of
  ``PlaceboPre``: 461 strings. None got longer.
"""

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from mlmadapt._types import Tokenizer
from mlmadapt.data.rows import check_whole
from mlmadapt.data.tokenization import IS_UNUSED, pre_tokens, whole_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


# Above what is lost when scores are written to a file, below any difference between two words.
_HAIR = 1e-6
# Distinct strings that are counted before they are split into words: some 20 MB.
_MOST_STRINGS = 1 << 17
_PART = 5_000  # documents that a process counts at a time


@dataclass(frozen=True)
class DomainWord:
    """A word of the domain that the tokenizer splits.

    Attributes:
        word: The word as the tokenizer normalizes it: in lower case where it ignores case.
        count: How often it stands in the texts, after white space.
        pieces: The tokens that it is split into.
    """

    word: str
    count: int
    pieces: list[str]

    @property
    def tokens_saved(self) -> int:
        """The tokens that the word saves as one token."""
        return self.count * (len(self.pieces) - 1)


@dataclass(frozen=True)
class DomainWords:
    """What `find_domain_words` found, in the order of the tokens that the words save.

    Attributes:
        found: The words, with counts and pieces.
        tokens: Tokens in all texts, as the tokenizer gives them without its special ones at the
            ends, and without chance if it samples them.
    """

    found: list[DomainWord]
    tokens: int

    @property
    def words(self) -> list[str]:
        """The words alone, as `extend_vocabulary` takes them."""
        return [word.word for word in self.found]

    @property
    def share(self) -> float:
        """The share of all tokens that the words save, in [0, 1)."""
        return sum(word.tokens_saved for word in self.found) / max(self.tokens, 1)


def find_domain_words(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    size: int = 1000,
    min_count: int = 10,
    min_length: int = 4,
    letters_only: bool = True,
    general_texts: Iterable[str] | None = None,
    num_proc: int | None = None,
) -> DomainWords:
    """Find the words of a corpus that are worth a token each, by the tokens that they save.

    Words are counted as the tokenizer's own normalizer and pre-tokenizer give them, so that what is
    proposed is what will be matched. They are counted where they follow white space; at the start
    of a text or behind a bracket RoBERTa and its kin have other tokens, which stay as they are.

    Little is saved where words are common: 7 % of the tokens of biomedical abstracts with BERT's
    tokenizer (1,441 words), 4 % with RoBERTa's, and 2 % of those of film reviews. Nothing is found
    where each character is a word, as with BERT's Chinese. Below the default `min_count` and
    `min_length`, new words change how others are split more often, and are too rare to learn.

    Args:
        texts: The documents, read once: a list, a column of a dataset, or a generator over a
            stream. About 10 MB are read per second; memory grows with the distinct words only.
        tokenizer: A fast tokenizer.
        size: Return this many words at most.
        min_count: Leave rarer words out.
        min_length: Leave words of fewer characters out.
        letters_only: Leave words out that hold anything but letters.
        general_texts: Leave words out that are not at least twice as frequent in `texts` as here.
        num_proc: Count in so many processes, with the same result: with 2 on as many free cores,
            20,000 film reviews take 1.8 s in place of 2.6 s, and a fifth more CPU time, since each
            5,000 documents are counted by themselves.

    Returns:
        The words (``.words``), each with its count, pieces and tokens saved (``.found``), and the
        share of all tokens that they save together (``.share``).

    Raises:
        TypeError: If the tokenizer is not a fast one, or a text is not a string.
        ValueError: If the tokenizer does not split at white space, or a number is not a whole
            number above 0.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> texts = ["Electroencephalography is not a film."] * 10
        >>> domain = find_domain_words(texts, tiny_tokenizer())
        >>> domain.words, domain.found[0].tokens_saved, round(domain.share, 2)
        (['electroencephalography'], 90, 0.6)
    """
    limits = {"size": size, "min_count": min_count, "min_length": min_length}
    for name, value in {**limits, "num_proc": 1 if num_proc is None else num_proc}.items():
        check_whole(name, value)
    backend = _splitting_backend(tokenizer)
    counts = _count_pre_tokens(texts, backend, num_proc, name="texts")
    tokens = counts.pop("", 0)
    tokens += sum(count * len(backend.model.tokenize(form)) for form, count in counts.items())
    domain, general = _count_words(counts, backend), Counter[str]()
    if general_texts is not None:
        general = _count_pre_tokens(general_texts, backend, num_proc, name="general_texts")
        general = _count_words(general, backend)
    # How often a word may stand in the general text, per time that it stands here.
    ratio = general.total() / max(domain.total(), 1) / 2
    # What a word in the middle of a text begins with, and a decoder would take off.
    mark = pre_tokens(backend, "x x")[1][:-1]
    decode = backend.decoder.decode if backend.decoder else lambda form: form[0].removeprefix(mark)
    words = {
        word: count
        for form, count in domain.items()
        if count >= min_count
        and general[form] <= count * ratio
        and len(word := decode([form]).strip()) >= min_length
        and not (letters_only and any(unicodedata.category(c)[0] not in "LM" for c in word))
        # RoBERTa's words without a space before them are others than those with one.
        and pre_tokens(backend, f"x {word} x")[1:-1] == [form]
    }
    split = [
        DomainWord(word, count, [*map(str, map(backend.id_to_token, pieces))])
        for (word, count), pieces in zip(words.items(), _pieces(backend, [*words]), strict=True)
        if len(pieces) > 1
    ]
    split.sort(key=lambda word: (-word.tokens_saved, word.word))
    return DomainWords(split[:size], tokens)


def add_words(
    tokenizer: Tokenizer, words: Iterable[str], *, reuse_unused: bool = False
) -> tuple[Tokenizer, dict[int, list[int]]]:
    """Return a copy of a tokenizer that has each word as one token, and what the words were before.

    See `extend_vocabulary`, which does the same to the model.

    Returns:
        The tokenizer, and for the id of each new word the ids of the old tokens that it had.

    Raises:
        TypeError: If the tokenizer is not a fast one, or `words` is not a list of strings.
        ValueError: If there are no words, the tokenizer does not split at white space, or some
            words cannot be added; the error names them, with the reason.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> extended, pieces = add_words(tokenizer, ["scorer"])
        >>> extended.tokenize("the scorer")
        ['the', 'scorer']
        >>> [tokenizer.convert_ids_to_tokens(old) for old in pieces.values()]
        [['s', '##co', '##re', '##r']]
    """
    backend = _splitting_backend(tokenizer)
    forms = _check_words(words, tokenizer, backend)
    ids = _unused_ids(tokenizer) if reuse_unused else []
    first_free = max(tokenizer.get_vocab().values()) + 1
    ids = [*ids, *range(first_free, first_free + len(forms))][: len(forms)]
    new = dict(zip(ids, forms, strict=True))
    pieces = dict(zip(ids, _pieces(backend, [*forms.values()]), strict=True))
    kind = type(backend.model).__name__
    if kind == "WordPiece":
        extended = _extend_wordpiece(tokenizer, new)
    elif kind == "Unigram":
        extended = _extend_unigram(tokenizer, new, pieces)
    else:
        extended = _extend_whole_words(tokenizer, new)

    texts = [f"x {word} x" for word in forms.values()]
    read_back = [
        reader.batch_decode(reader(texts, add_special_tokens=False)["input_ids"])
        for reader in (tokenizer, extended)
    ]
    ids_now = _pieces(extended.backend_tokenizer, [*forms.values()])
    rows = zip(forms.values(), pieces.items(), ids_now, *read_back, strict=True)
    problems = {}
    for word, (new_id, old_ids), ids, before, after in rows:
        if ids != [new_id]:
            problems[word] = f"does not become one token of this {kind} tokenizer"
        # Pieces are not joined without a decoder, nor read back where one was unknown.
        elif before != after and backend.decoder and tokenizer.unk_token_id not in old_ids:
            problems[word] = f"would be read back in {after!r}, not {before!r}"
    _refuse(problems)
    return extended, pieces


def _count_pre_tokens(
    texts: Iterable[str], backend: "Backend", num_proc: int | None, *, name: str
) -> Counter[str]:
    """Count what the pre-tokenizer makes of the texts, in parts where processes share them.

    Under ``""``, which it never makes, is by how many tokens added ones make the texts longer.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} is {texts!r:.40}; it must be a list or column of documents")
    rows = enumerate(texts)
    if num_proc is None or num_proc == 1:
        return _count_rows(rows, backend, name)
    counts, count = Counter[str](), partial(_count_rows, backend=backend, name=name)
    with ProcessPoolExecutor(num_proc) as pool:
        for some in iter(lambda: [*islice(rows, 4 * num_proc * _PART)], []):
            parts = [some[start : start + _PART] for start in range(0, len(some), _PART)]
            for part_counts in pool.map(count, parts):
                counts.update(part_counts)
    return counts


def _count_rows(rows: Iterable[tuple[int, str]], backend: "Backend", name: str) -> Counter[str]:
    counts = Counter[str]()
    added = backend.get_added_tokens_decoder().values()
    # One that holds a space is not found between spaces.
    gap = None if any(" " in token.content for token in added) else " "
    for before, strings in _count_strings(rows, name, gap):
        by_count = defaultdict[int, list[str]](list)
        for string, count in strings.items():
            by_count[count].append(string)
        # Those that are as frequent are split in one call, which saves a quarter of the time.
        size = 32 if before else 1
        for count, alike in by_count.items():
            for start in range(0, len(alike), size):
                text = before + " ".join(alike[start : start + size])
                forms = pre_tokens(backend, text)
                for form in forms:
                    counts[form] += count
                # Added tokens are cut out before a text is split, which takes as long again to see.
                if any(not token.special or token.content in text for token in added):
                    seen = len(backend.encode(text, add_special_tokens=False))
                    counts[""] += count * (seen - sum(map(len, map(backend.model.tokenize, forms))))
    return counts


def _count_strings(rows: Iterable[tuple[int, str]], name: str, gap: str | None) -> Iterator[Any]:
    """Count what stands between spaces, which is split far fewer times than it occurs.

    The first string of a text has no space before it, which byte-level tokenizers tell apart.
    """
    firsts, others = Counter[str](), Counter[str]()
    for row, text in rows:
        if not isinstance(text, str):
            seen = f"{text!r:.40}, of type {type(text).__name__}"
            raise TypeError(f"document {row} of {name} is {seen}; each document must be a str")
        first, *rest = text.split(gap) if gap else [text]
        firsts[first] += 1
        others.update(rest)
        if len(firsts) + len(others) > _MOST_STRINGS:
            yield from (("", firsts), (" ", others))
            firsts, others = Counter(), Counter()
    yield from (("", firsts), (" ", others))


def _count_words(counts: Counter[str], backend: "Backend") -> Counter[str]:
    """Count words without the marks that SentencePiece leaves behind them: ``▁film,``."""
    del counts[""]
    if type(backend.model).__name__ != "Unigram":
        return counts
    words: Counter[str] = Counter()
    for form, count in counts.items():
        marks = (i for i, c in enumerate(form) if i > 1 and unicodedata.category(c)[0] in "PS")
        words[form if form[1:].isalpha() else form[: next(marks, None)]] += count
    return words


def _splitting_backend(tokenizer: Tokenizer) -> "Backend":
    backend = whole_backend(tokenizer)
    # What samples its tokens, BPE and Unigram, would count others each time.
    sampling = [name for name in ("dropout", "alpha") if getattr(backend.model, name, None)]
    backend = deepcopy(backend) if sampling else backend
    for name in sampling:
        setattr(backend.model, name, None)
    if len(pre_tokens(backend, "one two")) != 2:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} does not split texts into words at white space, "
            "so that no word can be told from the text around it; use one with such a pre-tokenizer"
        )
    return backend


def _pieces(backend: "Backend", words: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each word as it occurs in the middle of a text."""
    encodings = backend.encode_batch([f"x {word} x" for word in words], add_special_tokens=False)
    pairs = [zip(encoding.ids, encoding.word_ids, strict=True) for encoding in encodings]
    return [[i for i, word in tokens if word == 1] for tokens in pairs]


def _check_words(words: Iterable[str], tokenizer: Tokenizer, backend: "Backend") -> dict[str, str]:
    """Return the words by what the pre-tokenizer makes of each."""
    if isinstance(words, str) or not isinstance(words, Iterable):
        raise TypeError(f"words is {words!r:.40}; it must be a list of words, such as ['placebo']")
    words = list(words)
    if not words:
        raise ValueError("words is empty; pass at least one word, or keep the tokenizer as it is")
    for word in words:
        if not isinstance(word, str):
            kind = type(word).__name__
            raise TypeError(f"words holds {word!r:.40}, a {kind}; each must be a str")
    added = tokenizer.get_added_vocab()
    forms: dict[str, str] = {}
    problems = {}
    for word, pieces in zip(words, _pieces(backend, words), strict=True):
        form = pre_tokens(backend, f"x {word} x")[1:-1]
        if word in added:
            problems[word] = "is a special or an added token"
        elif len(form) != 1 or word.split() != [word]:
            problems[word] = f"is {len(form)} words to this tokenizer"
        elif len(pieces) == 1 and pieces != [tokenizer.unk_token_id]:
            problems[word] = "is one token already"
        elif form[0] in forms:
            problems[word] = "comes twice"
        else:
            forms[form[0]] = word
    _refuse(problems)
    return forms


def _refuse(problems: dict[str, str]) -> None:
    if problems:
        seen = "; ".join(f"{word!r:.40} {problem}" for word, problem in problems.items())
        seen = shorten(seen, 220, placeholder=" ...")
        raise ValueError(f"words has {len(problems)} that cannot be added: {seen}; leave them out")


def _unused_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of reserved tokens; added tokens can be taken out of BPE only."""
    is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    tokens = tokenizer.added_tokens_decoder.items()
    added = {i for i, token in tokens if token.special or not is_bpe}
    vocab = tokenizer.get_vocab().items()
    return sorted(i for token, i in vocab if IS_UNUSED(token) and i not in added)


def _extend_wordpiece(tokenizer: Tokenizer, new: dict[int, str]) -> Tokenizer:
    from tokenizers import AddedToken  # noqa: PLC0415  # loaded by what made the tokenizer

    extended = deepcopy(tokenizer)
    vocab = extended.backend_tokenizer.get_vocab(with_added_tokens=False)
    if not new.keys().isdisjoint(vocab.values()):
        model = extended.backend_tokenizer.model
        options = ("unk_token", "max_input_chars_per_word", "continuing_subword_prefix")
        extended.backend_tokenizer.model = type(model)(
            {new.get(i, token): i for token, i in vocab.items()},
            **{name: getattr(model, name) for name in options},
        )
    tokens = [AddedToken(form, single_word=True, normalized=True) for form in new.values()]
    extended.add_tokens(tokens)
    return extended


def _extend_unigram(
    tokenizer: Tokenizer, new: dict[int, str], pieces: dict[int, list[int]]
) -> Tokenizer:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, extended = spec["model"], deepcopy(tokenizer)
    scores = [score for _, score in model["vocab"]]
    lowest = min(scores)
    # The library's own penalty of 10 for the unknown token.
    scores[model["unk_id"]] = lowest - 10
    # Added tokens too, which may lie behind the vocabulary.
    entries = {token["id"]: (token["content"], lowest) for token in spec["added_tokens"]}
    entries |= dict(enumerate(map(tuple, model["vocab"])))
    for i, form in new.items():
        # More for more tokens saved, so that of two new words the longer one wins.
        score = sum(scores[piece] for piece in pieces[i]) + _HAIR * (len(pieces[i]) - 1)
        entries[i] = (form, score)
    # Not by way of the JSON: the library reads numbers from it that differ in the last bit.
    extended.backend_tokenizer.model = type(extended.backend_tokenizer.model)(
        [entries[i] for i in range(len(entries))], model["unk_id"], model["byte_fallback"]
    )
    return extended


def _extend_whole_words(tokenizer: Tokenizer, new: dict[int, str]) -> Tokenizer:
    """Extend BPE and WordLevel, which look whole words up in the vocabulary."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  # a second to load

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {i: token for token, i in spec["model"]["vocab"].items()}
    # Added tokens too: those in no vocabulary are numbered behind it when the file is read.
    names |= {token["id"]: token["content"] for token in spec["added_tokens"]} | new
    spec["model"]["vocab"] = {token: i for i, token in names.items()}
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] not in new]
    if spec["model"]["type"] == "BPE":
        # Of what samples its merges, no word is whole for sure.
        spec["model"] |= {"ignore_merges": True, "dropout": None}
    # Not of the same class: `RobertaTokenizer` builds its backend anew when it is loaded, without
    # `ignore_merges`.
    left_out = {"vocab_file", "merges_file", "added_tokens_decoder", "name_or_path"}
    settings = {k: value for k, value in tokenizer.init_kwargs.items() if k not in left_out}
    kept = ("model_input_names", "model_max_length", "padding_side", "truncation_side")
    settings |= {name: getattr(tokenizer, name) for name in kept} | tokenizer.special_tokens_map
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)  # type: ignore[no-untyped-call]
