"""Offline material for tests: a small corpus, tokenizers of every family, rows, and tiny models.

Nothing here needs the hub or a file: tokenizers are trained in memory in a few hundredths of a
second, models have random weights. They are too small to be good at anything, but they put words,
pieces, spaces and special tokens where their families do, which is what code written for one family
gets wrong for another: run such a test over all of `TOKENIZER_KINDS`.
"""
# ruff: noqa: PLC0415 (transformers and torch are loaded by the functions that need them)

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import AddedToken
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TOKENIZER_KINDS = (
    "wordpiece",
    "chinese",
    "byte_bpe",
    "byte_bpe_nosplit",
    "unigram",
    "unigram_offsets",
    "no_pretokenizer",
    "wordlevel",
)
"""Every ``kind`` that `tiny_tokenizer` knows."""

# The most frequent first, so that a small vocabulary holds these whole and splits the others.
_WORDS = """
the a of and is this it was film movie in to that story with great but not its as for good actors
on scene one all never doesn't ending like very time plot really music it's watch character bad I he
she they first made so more than most even just well-made people think best director's again feel
love world old new long short quiet brilliant terrible Hollywood London 1998 3.5 10 can't won't I've
half-hearted house night dog children camera performance screenplay dialogue audience comedy sequel
thriller boring wonderful unwatchable mother-in-law's "masterpiece" (honestly) edge-of-your-seat
café naïve re-watched underwhelming cinematography misunderstandings uncharacteristically
counterrevolutionary electroencephalography incomprehensibility straightforwardness
"""
_ENGLISH = [
    "Is it good? No, but the jumps, quizzes & puzzles (all 24 of them) are fun: 7/10!",
    "EVERY GOOD BOY KNOWS JUST WHO FIXED MY VERY LAZY QUARTZ CAMERA; SOME DO NOT.",
]
_CHINESE = [
    "这部电影非常好看。演员的表演也很精彩。",
    "酒店的房间很干净、服务员态度也很好。",
    "故事情节太无聊了。我不会再看第二遍。",
    "我们在London看了这部film。音乐很好听。",
]


def tiny_corpus(rows: int = 200, *, seed: int = 0) -> list[str]:
    """Make documents of 1 to about 60 words, the same for the same arguments.

    They are noise made of English film reviews: words drawn by a Zipf-like law, with punctuation,
    apostrophes, hyphens, capitals, numbers, accents and some very long words. One document in seven
    is a single word, since that is where word ids go wrong first. No global random state is moved.

    Args:
        rows: Number of documents.
        seed: Another seed gives another corpus.

    Returns:
        As many documents; none is empty.

    Examples:
        >>> tiny_corpus()[5]
        'And.'
        >>> tiny_corpus(3) == tiny_corpus(3), tiny_corpus(3) == tiny_corpus(3, seed=1)
        (True, False)
    """
    # Python promises the same numbers for ever from `random()` only, all that `choices` draws on.
    generator = random.Random(seed)  # noqa: S311 (nothing secret)
    words = _WORDS.split()
    weights = [1 / rank for rank in range(2, len(words) + 2)]
    marks = ["", ",", ".", "!", "?", ";", " -"]
    documents = []
    for _ in range(rows):
        count = 1 + int(60 * generator.random() ** 2)
        document = ""
        for word in generator.choices(words, weights, k=count):
            starts = document == "" or document[-2] in ".!?"
            mark = generator.choices(marks, [80, 8, 6, 2, 2, 1, 1])[0]
            document += (word[0].upper() + word[1:] if starts else word) + mark + " "
        documents.append(document.rstrip(" -,;.!?") + ".")
    return documents


def tiny_tokenizer(kind: str = "wordpiece") -> PreTrainedTokenizerFast:
    """Train a tokenizer of one family in memory, with a vocabulary that splits rare words.

    The kinds differ in where words begin and in what the offsets of a token cover:

    ==================== ============= =======================================================
    kind                 like          ``word_ids()`` of the tokenizer itself
    ==================== ============= =======================================================
    ``wordpiece``        BERT uncased  words and punctuation apart, pieces begin with ``##``
    ``chinese``          BERT Chinese  the same, and every Chinese character is a word
    ``byte_bpe``         RoBERTa       as GPT-2 splits (``doesn`` + ``'t``), spaces trimmed
    ``byte_bpe_nosplit`` ModernBERT    one word per document; tokens hold and span spaces
    ``unigram``          ALBERT, XLM-R split at spaces, punctuation stays with its word
    ``unigram_offsets``  DeBERTa-v3    the same, but offsets include the space before
    ``no_pretokenizer``  Llama, Gemma  one word per document; offsets include the space before
    ``wordlevel``        a lookup      split at spaces, rare words are ``[UNK]``
    ==================== ============= =======================================================

    Args:
        kind: One of `TOKENIZER_KINDS`.

    Returns:
        A new tokenizer each time, yours to change (the training is cached, the object is not), with
        all special tokens of masked language models and a ``model_max_length`` of 512.

    Raises:
        ValueError: If ``kind`` is not one of `TOKENIZER_KINDS`.

    Examples:
        >>> tokenizer = tiny_tokenizer()
        >>> encoding = tokenizer("The boring film!")
        >>> tokenizer.convert_ids_to_tokens(encoding["input_ids"])
        ['[CLS]', 'the', 'b', '##or', '##ing', 'film', '!', '[SEP]']
        >>> encoding.word_ids()
        [None, 0, 1, 1, 1, 2, 3, None]
        >>> tiny_tokenizer("byte_bpe_nosplit")("A film!").word_ids()
        [None, 0, 0, 0, None]
    """
    if kind not in TOKENIZER_KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(TOKENIZER_KINDS)}.")
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    special = _special_tokens(kind)
    if kind in {"byte_bpe", "unigram", "unigram_offsets", "no_pretokenizer"}:
        special |= {"bos": special["cls"], "eos": special["sep"]}
    has_types = kind in {"wordpiece", "chinese", "unigram_offsets"}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(_train(kind)),
        model_max_length=512,
        model_input_names=["input_ids", *["token_type_ids"] * has_types, "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
    )


def tiny_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | int = 12, *, seed: int = 0
) -> list[dict[str, list[int]]]:
    """Tokenize documents with `tokenize_with_word_ids`, each into a row as a collator takes it.

    Args:
        tokenizer: A fast tokenizer.
        texts: The documents, or how many of `tiny_corpus` to take.
        seed: Another seed gives another corpus.

    Returns:
        A dict per document, with a list per column: ``input_ids``, ``word_ids`` and what else the
        tokenizer's models take. Lengths differ.

    Raises:
        TypeError: If the tokenizer is not a fast one, or `texts` are something else than strings.

    Examples:
        >>> rows = tiny_rows(tiny_tokenizer(), ["The boring film!"])
        >>> rows[0]["word_ids"]
        [-1, 0, 1, 1, 1, 2, 3, -1]
        >>> [len(row["input_ids"]) for row in tiny_rows(tiny_tokenizer(), 4)]
        [82, 83, 15, 31]
    """
    from mlmadapt.data.tokenization import tokenize_with_word_ids

    if isinstance(texts, int):
        texts = tiny_corpus(texts, seed=seed)
    columns = tokenize_with_word_ids({"text": texts}, tokenizer)
    lists = ([row.tolist() for row in column] for column in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _special_tokens(kind: str) -> dict[str, AddedToken]:
    """Name the special tokens as the family does, in the order of their ids."""
    from tokenizers import AddedToken

    if kind in {"byte_bpe", "no_pretokenizer"}:
        names = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    else:
        names = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    special = {name: AddedToken(token, special=True) for name, token in names.items()}
    if kind in {"byte_bpe", "byte_bpe_nosplit", "unigram", "no_pretokenizer"}:
        # Tokens hold the space before them here, and so does the mask that stands for them.
        special["mask"] = AddedToken(names["mask"], special=True, lstrip=True)
    return special


@functools.cache
def _train(kind: str) -> str:
    """Train a tokenizer and return its JSON.

    Byte-pair encoding finds the pieces of every kind. The library's WordPiece and Unigram trainers
    give another vocabulary in every process, and processes that train together have to agree.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, processors, trainers
    from tokenizers import normalizers as norm
    from tokenizers import pre_tokenizers as pre

    special = _special_tokens(kind)
    ids = {name: index for index, name in enumerate(special)}
    unk = special["unk"].content
    byte_level = kind.startswith("byte_bpe")
    documents = tiny_corpus() + _ENGLISH + _CHINESE * (kind == "chinese")

    bert, cased = pre.BertPreTokenizer(), norm.BertNormalizer(lowercase=False)
    no_split = pre.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    # Four words at a time, for training: tokens come to begin with, end with and span spaces.
    phrases = pre.Sequence([pre.Split(Regex(r"( ?\S+){1,4}"), "isolated"), no_split])
    albert = norm.Sequence([norm.NFKD(), norm.StripAccents(), norm.Lowercase()])
    word_spaces = pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()])
    spaces = norm.Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")
    deberta = norm.Sequence([spaces, norm.NFC(), norm.Strip(left=False)])
    prepend = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
    tokenizer = Tokenizer(models.BPE(unk_token=None if byte_level else unk, fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = {
        "wordpiece": (norm.BertNormalizer(), bert, decoders.WordPiece()),
        "chinese": (cased, bert, decoders.WordPiece()),
        "byte_bpe": (None, pre.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
        "byte_bpe_nosplit": (norm.NFC(), phrases, decoders.ByteLevel()),
        "unigram": (albert, word_spaces, decoders.Metaspace()),
        "unigram_offsets": (deberta, pre.Metaspace(), decoders.Metaspace()),
        "no_pretokenizer": (prepend, pre.Metaspace(prepend_scheme="never"), decoders.Metaspace()),
        "wordlevel": (None, pre.WhitespaceSplit(), None),
    }[kind]
    trainer = trainers.BpeTrainer(
        vocab_size=512 if byte_level else 240,
        special_tokens=list(special.values()),
        initial_alphabet=pre.ByteLevel.alphabet() if byte_level else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)

    vocab = tokenizer.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    if kind in {"wordpiece", "chinese"}:
        pieces += [f"##{piece}" for piece in pieces[len(special) :]]
        vocab = {piece: index for index, piece in enumerate(pieces)}
        tokenizer.model = models.WordPiece(vocab, unk_token=unk)
    elif kind in {"unigram", "unigram_offsets"}:
        counts = Counter(token for text in documents for token in tokenizer.encode(text).tokens)
        scores = [math.log((counts[piece] + 0.1) / counts.total()) for piece in pieces]
        # Rounded, since the library's JSON does not give long floats back to the last bit.
        scored = [(piece, round(score, 4)) for piece, score in zip(pieces, scores, strict=True)]
        tokenizer.model = models.Unigram(scored, unk_id=ids["unk"])
    elif kind == "wordlevel":
        counts = Counter(word for text in documents for word in text.split())
        words = [word for word, _ in counts.most_common(120)]
        vocab = {word: index for index, word in enumerate(pieces[: len(special)] + words)}
        tokenizer.model = models.WordLevel(vocab, unk_token=unk)
    elif kind == "byte_bpe_nosplit":
        tokenizer.pre_tokenizer = no_split
    elif kind == "no_pretokenizer":
        tokenizer.pre_tokenizer = None  # pieces are learnt within words, as by SentencePiece

    cls, sep = ((special[name].content, ids[name]) for name in ("cls", "sep"))
    if kind == "byte_bpe":
        tokenizer.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=False)
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls[0]} $A {sep[0]}",
            pair=f"{cls[0]} $A {sep[0]} $B:1 {sep[0]}:1",
            special_tokens=[cls, sep],
        )
    return tokenizer.to_str()


def tiny_model(
    tokenizer: PreTrainedTokenizerBase, *, architecture: str = "bert", seed: int = 0
) -> PreTrainedModel:
    """Build a masked language model of 2 layers, hidden size 32 and random weights.

    It is the real class of its architecture, dropout included; its loss starts near
    ``log(len(tokenizer))``. Torch's global generators stay where they are.

    Args:
        tokenizer: Fixes the vocabulary size and the ids of the special tokens.
        architecture: A ``model_type`` of transformers with a masked-language-model head, such as
            ``"bert"``, ``"distilbert"``, ``"roberta"``, ``"albert"``, ``"electra"``,
            ``"deberta-v2"``, ``"modernbert"`` or ``"mpnet"``. One with other names for its sizes
            (``"xlm"``, ``"perceiver"``, ``"funnel"``) comes out at full size or cannot be built.
        seed: Seed of the weights.

    Returns:
        The model on the CPU, in evaluation mode as ``from_pretrained`` gives it, for 512 tokens.

    Raises:
        ValueError: By transformers, if there is no such architecture, or none with that head.
        NotImplementedError: By transformers, for some that have other names for their sizes.

    Examples:
        >>> tokenizer = tiny_tokenizer()
        >>> model = tiny_model(tokenizer, architecture="distilbert")
        >>> type(model).__name__, model.config.vocab_size == len(tokenizer), model.training
        ('DistilBertForMaskedLM', True, False)
    """
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    default = AutoConfig.for_model(architecture)
    # RoBERTa and its kin, known by a padding id of 1, count positions from behind that id: from 2.
    offset = 2 if getattr(default, "pad_token_id", None) == 1 else 0
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512 + offset,
        "hidden_size": 32,
        "embedding_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_dim": 64,  # of DistilBERT
        "relative_attention": True,  # of DeBERTa
        "pos_att_type": ["p2c", "c2p"],
    }
    for name in ("pad", "bos", "eos", "cls", "sep", "mask"):
        sizes[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    known = {name: size for name, size in sizes.items() if hasattr(default, name)}
    config = AutoConfig.for_model(architecture, **known)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = AutoModelForMaskedLM.from_config(config)  # type: ignore[no-untyped-call]
    model.eval()  # type: ignore[no-untyped-call]
    return model
