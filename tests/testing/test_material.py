"""The corpus, tokenizers and models that other tests stand on."""

from __future__ import annotations

import math
import os
import random
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoTokenizer

from mlmadapt import tokenize_with_word_ids
from mlmadapt.testing import (
    TOKENIZER_KINDS,
    material,
    tiny_corpus,
    tiny_model,
    tiny_rows,
    tiny_tokenizer,
)

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SENTENCE = "The film doesn't end well; electroencephalography!"
ARCHITECTURES = ["albert", "bert", "camembert", "deberta-v2", "distilbert", "electra"]
ARCHITECTURES += ["modernbert", "mpnet", "roberta"]


def test_corpus_depends_on_its_arguments_alone() -> None:
    """The same arguments give the same documents, and the global generator plays no part."""
    random.seed(1)
    state = random.getstate()
    first = tiny_corpus(50, seed=3)
    assert random.getstate() == state
    random.seed(2)
    assert tiny_corpus(50, seed=3) == first
    assert tiny_corpus(50, seed=4) != first
    assert tiny_corpus(0) == []


def test_corpus_holds_what_goes_wrong() -> None:
    """One-word documents, apostrophes, hyphens, capitals, numbers, accents and long words."""
    corpus = tiny_corpus()
    lengths = [len(document.split()) for document in corpus]
    assert len(corpus) == 200
    assert min(lengths) == 1
    assert 55 <= max(lengths) <= 65
    assert sum(length == 1 for length in lengths) >= 10
    text = " ".join(corpus)
    for needed in ["'", "-", ",", ";", "?", "!", "The", "Hollywood", "1998", "3.5", "é", " - "]:
        assert needed in text
    assert max(map(len, text.split())) > 20


def test_every_kind_has_what_masking_needs(tokenizer: PreTrainedTokenizerFast) -> None:
    """Special tokens have ids of their own within the vocabulary, and stand around a document."""
    names = ["unk", "pad", "cls", "sep", "mask"]
    ids = [getattr(tokenizer, f"{name}_token_id") for name in names]
    assert len(set(ids)) == 5
    assert set(ids) == set(tokenizer.all_special_ids)
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    assert tokenizer.model_max_length == 512
    encoded = tokenizer(SENTENCE)
    assert set(encoded) == set(tokenizer.model_input_names)
    assert encoded["input_ids"][0] == tokenizer.cls_token_id
    assert encoded["input_ids"][-1] == tokenizer.sep_token_id
    masked = tokenizer(f"This is a great {tokenizer.mask_token}.")["input_ids"]
    assert masked.count(tokenizer.mask_token_id) == 1


@pytest.mark.parametrize(
    ("kind", "words"),
    list(zip(TOKENIZER_KINDS, (10, 10, 9, 1, 6, 6, 1, 6), strict=True)),
)
def test_kinds_number_words_as_their_families_do(kind: str, words: int) -> None:
    """The tokenizer's own words of one sentence, and its last, rare word in several pieces."""
    encoded = tiny_tokenizer(kind)(SENTENCE)
    word_ids = [word for word in encoded.word_ids() if word is not None]
    assert word_ids == sorted(word_ids)
    assert len(set(word_ids)) == words
    rare_word = range(SENTENCE.index("electro"), len(SENTENCE) - 1)
    pieces = {encoded.char_to_token(character) for character in rare_word}
    assert len(pieces) == 1 if kind == "wordlevel" else len(pieces) >= 5


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_offsets_include_the_space_where_the_family_says_so(kind: str) -> None:
    """The second word starts at its space or at its first letter."""
    encoded = tiny_tokenizer(kind)(SENTENCE, return_offsets_mapping=True)
    with_space = kind in {"byte_bpe_nosplit", "unigram_offsets", "no_pretokenizer"}
    assert encoded["offset_mapping"][2] == ((3, 8) if with_space else (4, 8))


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_mask_and_model_inputs_are_those_of_the_family(kind: str) -> None:
    """Only BERT and DeBERTa have token types, and a mask takes the space before it if tokens do."""
    tokenizer = tiny_tokenizer(kind)
    assert ("token_type_ids" in tokenizer(SENTENCE)) == (
        kind in {"wordpiece", "chinese", "unigram_offsets"}
    )
    takes_space = kind in {"byte_bpe", "byte_bpe_nosplit", "unigram", "no_pretokenizer"}
    assert tokenizer.added_tokens_decoder[tokenizer.mask_token_id].lstrip == takes_space


def test_tokens_begin_with_end_with_and_span_spaces_where_nothing_splits() -> None:
    """A tokenizer without word split has all three in its running text."""
    tokenizer = tiny_tokenizer("byte_bpe_nosplit")
    tokens = [token for text in tiny_corpus() for token in tokenizer.tokenize(text)]
    letters = [token for token in tokens if token.strip("Ġ")]
    for condition in (
        lambda token: token[0] == "Ġ",
        lambda token: token[-1] == "Ġ",
        lambda token: "Ġ" in token.strip("Ġ"),
    ):
        assert sum(map(condition, letters)) > 50


def test_chinese_characters_are_words_of_their_own() -> None:
    """Spaces do not matter to the Chinese kind, and it knows the characters."""
    encoded = tiny_tokenizer("chinese")("这部film很好看。")
    assert encoded.tokens()[1:-1] == ["这", "部", "film", "很", "好", "看", "。"]
    assert encoded.word_ids()[1:-1] == list(range(7))


def test_tokenizers_are_yours_to_change(tokenizer: PreTrainedTokenizerFast) -> None:
    """What is done to one tokenizer shows in no other of its kind."""
    kind = next(kind for kind in TOKENIZER_KINDS if material._train(kind) == _json(tokenizer))
    before = _json(tokenizer)
    tokenizer.add_tokens(["brandnew"])
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert _json(tokenizer) != before
    assert _json(tiny_tokenizer(kind)) == before


def test_tokenizers_are_saved_and_loaded_whole(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A tokenizer read back from a folder encodes alike, special tokens and names included."""
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"{SENTENCE} This is a great {tokenizer.mask_token}. 中文 🎉"
    assert dict(loaded(text)) == dict(tokenizer(text))
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.model_max_length == 512


def test_rows_are_what_documents_are_tokenized_to(tokenizer: PreTrainedTokenizerFast) -> None:
    """Plain lists, of texts that are given or of so many of the corpus."""
    texts = tiny_corpus(5, seed=2)
    columns = tokenize_with_word_ids({"text": texts}, tokenizer)
    rows = tiny_rows(tokenizer, texts)
    assert rows == tiny_rows(tokenizer, 5, seed=2) != tiny_rows(tokenizer, 5)
    assert {name: [row[name] for row in rows] for name in rows[0]} == {
        name: [values.tolist() for values in column] for name, column in columns.items()
    }
    assert tiny_rows(tokenizer, []) == []
    with pytest.raises(TypeError, match="column 'text' is 'a film', not a batch of documents"):
        tiny_rows(tokenizer, "a film")


def test_unknown_kind_is_named() -> None:
    """The message holds the kind asked for and all there are."""
    with pytest.raises(
        ValueError, match=r"kind is 'bpe'; it must be one of wordpiece, .*wordlevel"
    ):
        tiny_tokenizer("bpe")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe"])
def test_models_take_full_rows_of_any_tokenizer(architecture: str, kind: str) -> None:
    """Every architecture takes 512 tokens and padding, and starts as ignorant as it should be."""
    tokenizer = tiny_tokenizer(kind)
    model = tiny_model(tokenizer, architecture=architecture)
    assert not model.training
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.num_hidden_layers == 2
    assert sum(weight.numel() for weight in model.parameters()) < 150_000
    input_ids = torch.full((2, 512), tokenizer.pad_token_id)
    input_ids[0] = torch.arange(512) % len(tokenizer)
    input_ids[0][input_ids[0] == tokenizer.pad_token_id] = tokenizer.unk_token_id
    input_ids[1, :7] = input_ids[0, :7]
    attention_mask = (input_ids != tokenizer.pad_token_id).long()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    with torch.no_grad():
        output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
    assert output.logits.shape == (2, 512, len(tokenizer))
    assert output.loss.item() == pytest.approx(math.log(len(tokenizer)), rel=0.1)


def test_weights_depend_on_the_seed_alone(wordpiece: PreTrainedTokenizerFast) -> None:
    """The same seed gives the same weights, and torch's global generator stays where it was."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = tiny_model(wordpiece), tiny_model(wordpiece)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    third, other = tiny_model(wordpiece), tiny_model(wordpiece, seed=1)
    assert _equal(first, second)
    assert _equal(first, third)
    assert not _equal(first, other)


def test_unknown_architecture_is_named(wordpiece: PreTrainedTokenizerFast) -> None:
    """Transformers says which name it does not know, and which model has no such head."""
    with pytest.raises(ValueError, match="brt"):
        tiny_model(wordpiece, architecture="brt")
    with pytest.raises(ValueError, match="GPT2Config"):
        tiny_model(wordpiece, architecture="gpt2")


def test_session_is_offline_and_has_its_own_cache() -> None:
    """The settings of conftest.py came in time for the libraries that read them on import."""
    import datasets
    import huggingface_hub

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert str(datasets.config.HF_DATASETS_CACHE) == os.environ["HF_DATASETS_CACHE"]
    assert "mlmadapt-datasets-" in str(datasets.config.HF_DATASETS_CACHE)


@pytest.mark.data
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("wordpiece", "bert-base-uncased"),
        ("chinese", "bert-base-chinese"),
        ("byte_bpe", "roberta-base"),
        ("unigram", "albert-base"),
    ],
)
def test_words_are_those_of_the_real_tokenizers(kind: str, name: str, data_dir: Path) -> None:
    """The characters of every word are the same as with the tokenizer that the kind stands for."""
    real = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / name)
    for text in (SENTENCE, "Naïve café, isn't it? We've  seen 3 of 10 films: 中文电影!"):
        assert _words(tiny_tokenizer(kind), text) == _words(real, text)


def _words(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[int, int]]:
    encoded = tokenizer(text)
    words = sorted({word for word in encoded.word_ids() if word is not None})
    return [tuple(encoded.word_to_chars(word)) for word in words]


def _json(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.backend_tokenizer.to_str()


def _equal(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)
