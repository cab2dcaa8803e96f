"""Losses by word and by byte are those of a slow reference, and compare vocabularies."""

from __future__ import annotations

import copy
import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken
from transformers import DataCollatorForLanguageModeling

from mlmadapt import (
    MaskedWordMetrics,
    WholeWordMaskingCollator,
    evaluate_mlm,
    evaluate_words,
    insert_random_mask,
    tokenize_with_word_ids,
)
from mlmadapt.testing import TOKENIZER_KINDS, tiny_corpus, tiny_model, tiny_tokenizer
from tests.model.test_evaluation import ThreadAccelerator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Rows = list[dict[str, Any]]
RARE = "an uncharacteristically naïve film of electroencephalography and straightforwardness"
TEXTS = [*tiny_corpus(30), *[RARE] * 4, "café"]


def freeze(tokenizer: PreTrainedTokenizerFast, *, rate: float = 0.3, **options: Any) -> Rows:
    """Mask documents by their number, and keep the words that they were masked by."""
    columns = {**tokenize_with_word_ids({"text": TEXTS}, tokenizer), "id": range(len(TEXTS))}
    collator = WholeWordMaskingCollator(tokenizer, wwm_probability=rate, mask_replace_prob=0.9)
    frozen = insert_random_mask(columns, collator, key_column="id", **options)
    frozen["word_ids"] = columns["word_ids"]
    return [
        {name: np.asarray(values).tolist() for name, values in zip(frozen, row, strict=True)}
        for row in zip(*frozen.values(), strict=True)
    ]


def slow_words(
    model: PreTrainedModel, rows: Rows, tokenizer: PreTrainedTokenizerFast
) -> MaskedWordMetrics:
    """One row and one word after the other, all logits, in 64 bits."""
    total, right, size, count = 0.0, 0, 0, 0
    for row in rows:
        inputs = {
            name.removeprefix("masked_"): torch.tensor([values])
            for name, values in row.items()
            if name not in ("word_ids", "labels", "masked_labels")
        }
        labels = row.get("labels", row.get("masked_labels"))
        with torch.no_grad():
            scores = model(**inputs).logits[0].double().log_softmax(1)
        for word in sorted({own for own, label in zip(row["word_ids"], labels) if label != -100}):  # noqa: B905
            places = [place for place, own in enumerate(row["word_ids"]) if own == word]
            pieces = [labels[place] for place in places]
            total -= sum(scores[place, piece].item() for place, piece in zip(places, pieces))  # noqa: B905
            right += [scores[place].argmax().item() for place in places] == pieces
            size += len(tokenizer.decode(pieces).strip().encode())
            count += 1
    return MaskedWordMetrics(
        loss=total / count,
        accuracy=right / count,
        bits_per_byte=total / math.log(2) / size,
        masked_words=count,
    )


def assert_same(found: MaskedWordMetrics, expected: MaskedWordMetrics) -> None:
    """Counts are equal, and the loss to 1e-6: logits have 32 bits, and their kernels vary."""
    assert (found.masked_words, found.accuracy) == (expected.masked_words, expected.accuracy)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize("prefix", ["", "masked_"])
def test_words_are_those_of_the_reference(kind: str, prefix: str) -> None:
    """For every tokenizer, batch size and form of the rows."""
    tokenizer = tiny_tokenizer(kind)
    model, rows = tiny_model(tokenizer).eval(), freeze(tokenizer, prefix=prefix)
    expected = slow_words(model, rows, tokenizer)
    for batch_size in (1, 5, 64):
        dataset: Any = Dataset.from_list(rows) if batch_size == 64 else rows
        found = evaluate_words(model, dataset, tokenizer=tokenizer, batch_size=batch_size)
        assert_same(found, expected)
    tokenizer.padding_side = "left"  # which moves this model's positions, and no word
    by_word, by_token = (
        measure(model, rows, tokenizer=tokenizer) for measure in (evaluate_words, evaluate_mlm)
    )
    assert by_word.masked_words == expected.masked_words
    total = by_token.loss * by_token.masked_tokens
    assert by_word.loss * by_word.masked_words == pytest.approx(total)


def test_the_loss_is_the_sum_over_pieces(bert: PreTrainedModel) -> None:
    """Words and tokens have one total, and where each word is a token, one mean."""
    tokenizer = tiny_tokenizer()
    rows = freeze(tokenizer)
    by_word = evaluate_words(bert, rows, tokenizer=tokenizer)
    by_token = evaluate_mlm(bert, rows, tokenizer=tokenizer)
    total = by_token.loss * by_token.masked_tokens
    assert by_word.loss * by_word.masked_words == pytest.approx(total)
    assert by_word.masked_words < by_token.masked_tokens
    single = [{**row, "word_ids": [*range(len(row["word_ids"]))]} for row in rows]
    assert evaluate_words(bert, single, tokenizer=tokenizer).loss == pytest.approx(by_token.loss)


def test_a_word_is_right_if_all_its_pieces_are() -> None:
    """And a byte of it is a byte of its text, without what stands around it."""
    tokenizer = tiny_tokenizer("byte_bpe")
    (row,) = freeze_one(tokenizer, " naïve")
    pieces = [label for label in row["labels"] if label != -100]
    assert len(pieces) > 1

    for known, accuracy in ((pieces, 1.0), (pieces[:-1], 0.0)):
        model = tiny_model(tokenizer)
        head = model.get_output_embeddings()
        with torch.no_grad():
            head.bias.zero_()
        places = {place: label for place, label in enumerate(row["labels"]) if label in known}

        def be_sure(
            module: Any, args: Any, logits: torch.Tensor, places: dict[int, int] = places
        ) -> torch.Tensor:
            known = list(places.values())
            if logits.ndim == 3:
                known = [places.get(place, 0) for place in range(logits.shape[1])]
            for place, label in enumerate(known):
                logits.flatten(0, -2)[place, label] = 100.0
            return logits

        head.register_forward_hook(be_sure)
        found = evaluate_words(model, [row], tokenizer=tokenizer)
        assert (found.accuracy, found.masked_words) == (accuracy, 1)
        nats = found.bits_per_byte * math.log(2) * len("naïve".encode())
        assert nats == pytest.approx(found.loss)


def freeze_one(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
    """Mask every word of a text."""
    columns = tokenize_with_word_ids({"text": [text]}, tokenizer)
    collator = WholeWordMaskingCollator(tokenizer, wwm_probability=1)
    frozen = {**insert_random_mask(columns, collator, prefix=""), "word_ids": columns["word_ids"]}
    return [{name: np.asarray(values[0]).tolist() for name, values in frozen.items()}]


def test_processes_have_the_figures_of_one(bert: PreTrainedModel) -> None:
    """Three share the rows out, the last with fewer."""
    tokenizer = tiny_tokenizer()
    rows = freeze(tokenizer)[:7]
    barrier, mail = threading.Barrier(3, timeout=120), [None] * 3
    found: list[Any] = [None] * 3

    def evaluate(rank: int) -> None:
        model, accelerator = copy.deepcopy(bert), ThreadAccelerator(rank, barrier, mail)
        found[rank] = evaluate_words(
            model,
            rows,
            tokenizer=tokenizer,
            batch_size=2,
            accelerator=accelerator,  # type: ignore[arg-type]
        )

    threads = [threading.Thread(target=evaluate, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == found[1] == found[2]
    assert_same(found[0], slow_words(bert, rows, tokenizer))


def test_two_vocabularies_are_asked_for_the_same_words() -> None:
    """Where words become tokens of their own, the same words are masked, and no others."""
    old, new = tiny_tokenizer("wordpiece"), tiny_tokenizer("wordpiece")
    words = ["uncharacteristically", "electroencephalography", "straightforwardness"]
    new.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    texts = []
    for tokenizer in (old, new):
        rows = freeze(tokenizer)
        texts.append(
            [
                [
                    tokenizer.decode(
                        [
                            label
                            for label, own in zip(
                                row["masked_labels"], row["word_ids"], strict=True
                            )
                            if own == word and label != -100
                        ]
                    )
                    for word in sorted({*row["word_ids"]} - {-1})
                ]
                for row in rows
            ]
        )
    assert texts[0] == texts[1]
    assert any(set(words) & set(row) for row in texts[0])
    lengths = [sum(len(row["word_ids"]) for row in freeze(each)) for each in (old, new)]
    assert lengths[0] > lengths[1]


def test_rows_that_do_not_know_their_words(bert: PreTrainedModel) -> None:
    """They are refused by what is missing: the column, its length, the words of tokens masked."""
    tokenizer = tiny_tokenizer()
    rows = freeze(tokenizer)

    def evaluate(rows: Any) -> None:
        evaluate_words(bert, rows, tokenizer=tokenizer)

    without = [{name: row[name] for name in row if name != "word_ids"} for row in rows]
    with pytest.raises(ValueError, match=r"no 'word_ids', only \['masked_.*out of remove_columns"):
        evaluate(without)
    with pytest.raises(ValueError, match=r"word_ids"):
        evaluate([{**row, "word_ids": row["word_ids"][:-1]} for row in rows])
    none = [{**row, "word_ids": [-1] * len(row["word_ids"])} for row in rows]
    with pytest.raises(ValueError, match=r"a masked token, '.+', that belongs to no word"):
        evaluate(none)
    unmasked = [{**row, "masked_labels": [-100] * len(row["word_ids"])} for row in rows]
    with pytest.raises(ValueError, match=r"no masked word; freeze masks into it"):
        evaluate(unmasked)
    with pytest.raises(ValueError, match=r"dataset is not frozen"):
        evaluate([{"input_ids": [2, 7, 3], "word_ids": [-1, 0, -1]}])
    with pytest.raises(ValueError, match=r"batch_size is 0"):
        evaluate_words(bert, rows, tokenizer=tokenizer, batch_size=0)


def test_keys_take_the_place_of_tokens() -> None:
    """A mask depends on seed, key and word, not on batch, order or tokens; strings are keys too."""
    tokenizer = tiny_tokenizer("wordpiece")
    columns: dict[str, Any] = dict(tokenize_with_word_ids({"text": TEXTS}, tokenizer))
    collator = WholeWordMaskingCollator(tokenizer, mask_replace_prob=0.8, random_replace_prob=0.1)
    dataset = Dataset.from_dict({**columns, "id": [f"text {place}" for place in range(len(TEXTS))]})

    def frozen(rows: Dataset, **options: Any) -> list[Any]:
        options = {"batched": True, "remove_columns": rows.column_names, **options}
        seed = options.pop("seed", 3)
        arguments = {"data_collator": collator, "key_column": "id", "seed": seed}
        mapped = rows.map(insert_random_mask, fn_kwargs=arguments, **options)
        return list(mapped.with_format(None))

    whole = frozen(dataset)
    assert "masked_id" not in whole[0]
    assert frozen(dataset, batch_size=7) == whole
    assert frozen(dataset, seed=4) != whole
    assert frozen(dataset.with_format("arrow"), batch_size=50) == whole
    backwards = dataset.select(range(len(TEXTS) - 1, -1, -1))
    assert frozen(backwards)[::-1] == whole
    same = Dataset.from_dict({**columns, "id": ["one"] * len(TEXTS)})
    assert frozen(same) != whole
    long = {"input_ids": [[9] * 9000] * 3, "word_ids": [[*range(9000)]] * 3}  # three blocks
    made = insert_random_mask({**long, "id": [0, 1, 0]}, collator, key_column="id")
    labels = np.asarray(made["masked_labels"])
    assert (labels[0] == labels[2]).all()
    assert (labels[0] != labels[1]).any()


def test_keys_that_are_none() -> None:
    """A column that is not there, of values that are no keys, of packed rows, for others' masks."""
    tokenizer = tiny_tokenizer("wordpiece")
    columns: dict[str, Any] = {"input_ids": [[2, 7, 3]], "word_ids": [[-1, 0, -1]], "id": [0]}
    collator = WholeWordMaskingCollator(tokenizer)
    with pytest.raises(ValueError, match=r"key_column is 'number', the columns are \['input_ids'"):
        insert_random_mask(columns, collator, key_column="number")
    packed = {**columns, "document_ids": [[0, 0, 0]]}
    with pytest.raises(ValueError, match=r"without document_ids"):
        insert_random_mask(packed, collator, key_column="id")
    others = DataCollatorForLanguageModeling(tokenizer)
    with pytest.raises(ValueError, match=r"is DataCollatorForLanguageModeling; .* for WholeWord"):
        insert_random_mask(columns, others, key_column="id")
    with pytest.raises(TypeError):
        insert_random_mask({**columns, "id": [1.5]}, collator, key_column="id")
