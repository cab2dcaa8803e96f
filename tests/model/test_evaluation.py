"""Metrics by token and by word are those of a slow reference, and nothing is moved or kept."""

from __future__ import annotations

import copy
import math
import random
import threading
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from mlmadapt import (
    MaskedLMMetrics,
    MaskedWordMetrics,
    WholeWordMaskingCollator,
    evaluate_mlm,
    evaluate_words,
    insert_random_mask,
    phrases,
    tokenize_with_word_ids,
)
from mlmadapt.model import evaluation
from mlmadapt.model.evaluation import collate_frozen, evaluate_rows, rank_targets
from mlmadapt.model.forward import MaskedForward
from mlmadapt.testing import TOKENIZER_KINDS, tiny_corpus, tiny_model, tiny_tokenizer
from tests.scripts.short_run import rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Rows = list[dict[str, Any]]


def to_rows(columns: dict[str, Any]) -> Rows:
    """Turn columns into rows of plain lists."""
    return [{name: np.asarray(row[name]).tolist() for name in row} for row in rows_of(columns)]


@pytest.fixture(scope="module")
def unfrozen() -> Rows:
    """70 rows of 3 to about 100 tokens."""
    return to_rows(tokenize_with_word_ids({"text": tiny_corpus(70)}, tiny_tokenizer()))


@pytest.fixture(scope="module")
def rows(unfrozen: Rows) -> Rows:
    """The same rows, frozen, without a prefix."""
    columns = {name: [row[name] for row in unfrozen] for name in unfrozen[0]}
    collator = WholeWordMaskingCollator(tiny_tokenizer())
    return to_rows(insert_random_mask(columns, collator, prefix=""))


@pytest.fixture(scope="module")
def expected(rows: Rows) -> MaskedLMMetrics:
    """What the slow reference finds for the model that the `bert` fixture makes."""
    return slow_metrics(tiny_model(tiny_tokenizer()), rows)


def slow_metrics(model: PreTrainedModel, rows: Rows) -> MaskedLMMetrics:
    """Every row by itself, all logits, 64 bits, one token after the other."""
    total, correct, top5_correct, count = 0.0, 0, 0, 0
    with torch.no_grad():
        for row in rows:
            inputs = {name: torch.tensor([row[name]]) for name in row if name != "labels"}
            for scores, label in zip(
                model(**inputs).logits[0].double(), row["labels"], strict=True
            ):
                if label == -100:
                    continue
                guesses = scores.argsort(descending=True, stable=True).tolist()
                total -= scores.log_softmax(0)[label].item()
                correct += guesses[0] == label
                top5_correct += label in guesses[:5]
                count += 1
    loss = total / count
    return MaskedLMMetrics(loss, math.exp(loss), correct / count, top5_correct / count, count)


def assert_same(metrics: MaskedLMMetrics, expected: MaskedLMMetrics) -> None:
    """To 1e-6: logits have 32 bits, and their kernels vary."""
    assert asdict(metrics) == pytest.approx(asdict(expected), rel=1e-5)
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16, 64, 1000])
def test_exact_for_every_batch_size(
    bert: PreTrainedModel, rows: Rows, expected: MaskedLMMetrics, batch_size: int
) -> None:
    """Rows of unequal length give the reference's figures, however they share batches."""
    metrics = evaluate_mlm(bert, rows, tokenizer=tiny_tokenizer(), batch_size=batch_size)
    assert_same(metrics, expected)


def test_every_form_of_frozen_rows(
    bert: PreTrainedModel,
    wordpiece: PreTrainedTokenizerFast,
    rows: Rows,
    unfrozen: Rows,
    expected: MaskedLMMetrics,
) -> None:
    """Lists and datasets, with the prefix or without, tensors, and columns left in by `map`."""
    collator = WholeWordMaskingCollator(wordpiece)
    tokenized = datasets.Dataset.from_list(unfrozen)
    mapped = {"batched": True, "fn_kwargs": {"data_collator": collator}}
    kept = tokenized.map(insert_random_mask, **mapped)
    assert {"word_ids", "input_ids", "masked_input_ids"} <= set(kept.column_names)
    removed = tokenized.map(insert_random_mask, remove_columns=tokenized.column_names, **mapped)
    with_words = [
        {**row, "word_ids": old["word_ids"]} for row, old in zip(rows, unfrozen, strict=True)
    ]
    forms = [
        kept,
        removed,
        removed.with_format("torch"),
        with_words,
        datasets.Dataset.from_list(rows),
    ]
    for form in forms:
        metrics = evaluate_mlm(bert, form, tokenizer=wordpiece, batch_size=16)
        assert_same(metrics, expected)


def test_models_without_a_sparse_head(
    wordpiece: PreTrainedTokenizerFast, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that mixes positions, and an encoder-decoder, get the figures of their full head."""
    bert = tiny_model(wordpiece)
    head = bert.cls.forward
    mixing = lambda hidden: head(hidden + hidden[:, :1])  # noqa: E731
    monkeypatch.setattr(bert.cls, "forward", mixing)
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=len(wordpiece), d_model=16, encoder_layers=1, decoder_layers=1)
    ).eval()
    for model in (bert, bart):
        metrics = evaluate_mlm(model, rows[:20], tokenizer=wordpiece, batch_size=8)
        assert_same(metrics, slow_metrics(model, rows[:20]))


@pytest.mark.parametrize("form", ["list", "dataset", "shuffled", "prefixed"])
def test_rows_are_sorted_by_length(bert: PreTrainedModel, rows: Rows, form: str) -> None:
    """So that little is padded; rows of one length stay in their order."""
    widths, firsts = [], []

    def record(module: nn.Module, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        widths.append(kwargs["input_ids"].shape[1])
        firsts.append(kwargs["input_ids"][:, 1].tolist())

    dataset: Any = rows
    if form == "prefixed":
        dataset = Dataset.from_list([{f"masked_{name}": row[name] for name in row} for row in rows])
    elif form != "list":
        dataset = Dataset.from_list(rows)
        dataset = dataset.shuffle(seed=1) if form == "shuffled" else dataset
    handle = bert.register_forward_pre_hook(record, with_kwargs=True)
    evaluate_mlm(bert, dataset, tokenizer=tiny_tokenizer(), batch_size=16)
    lengths = sorted((len(row["input_ids"]) for row in rows), reverse=True)
    assert widths[-5:] == lengths[::16]
    short = [{name: row[name][:6] for name in row} for row in rows if len(row["input_ids"]) > 5]
    evaluate_mlm(bert, short, tokenizer=tiny_tokenizer(), batch_size=len(short))
    assert firsts[-1] == [row["input_ids"][1] for row in short]
    handle.remove()


@pytest.mark.parametrize("architecture", ["bert", "fnet"])
def test_rows_whose_lengths_are_not_known_are_taken_as_they_come(
    wordpiece: PreTrainedTokenizerFast, rows: Rows, architecture: str
) -> None:
    """Of a dataset whose rows are made when they are read, and of a class of one's own.

    Of FNet, which sees padding, each is a batch of its own.
    """
    model = tiny_model(wordpiece, architecture=architecture)
    expected = evaluate_mlm(model, rows, tokenizer=wordpiece)

    class Lazy:
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return rows[index]

    def make(columns: dict[str, list[int]]) -> dict[str, Any]:
        return {name: [rows[place][name] for place in columns["place"]] for name in rows[0]}

    made = Dataset.from_dict({"place": [*range(len(rows))]}).with_transform(make)
    for form in (Lazy(), made):
        assert_same(evaluate_mlm(model, form, tokenizer=wordpiece, batch_size=16), expected)


def test_never_all_logits_at_once(
    bert: PreTrainedModel,
    wordpiece: PreTrainedTokenizerFast,
    rows: Rows,
    expected: MaskedLMMetrics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head sees each masked token once, a bounded number at a time."""
    seen: list[int] = []
    bert.get_output_embeddings().register_forward_hook(
        lambda _, args, output: seen.append(output.shape[:-1].numel())
    )
    for limit, highest in ((evaluation.MAX_LOGITS, 10**6), (40 * len(wordpiece), 96)):
        monkeypatch.setattr(evaluation, "MAX_LOGITS", limit)
        seen.clear()
        metrics = evaluate_mlm(bert, rows, tokenizer=wordpiece, batch_size=35)
        assert_same(metrics, expected)
        passes = seen[4:]  # behind those on a few rows
        masked = sum(label != -100 for row in rows for label in row["labels"])
        # In multiples of 32.
        assert masked <= sum(passes) < masked + 32 * len(passes)
        assert max(passes) <= highest
    assert len(passes) > 2


def test_nothing_is_moved(
    bert: PreTrainedModel,
    wordpiece: PreTrainedTokenizerFast,
    rows: Rows,
    expected: MaskedLMMetrics,
) -> None:
    """Modes of single modules, gradients, hooks, rows and global random state are left."""
    bert.train()
    bert.bert.embeddings.eval()
    bert.bert.embeddings.word_embeddings.weight.requires_grad_(requires_grad=False)
    needs = [parameter.requires_grad for parameter in bert.parameters()]
    modes = [module.training for module in bert.modules()]
    state = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    given_rows = copy.deepcopy(rows)
    assert_same(evaluate_mlm(bert, rows, tokenizer=wordpiece), expected)
    assert rows == given_rows
    assert [parameter.requires_grad for parameter in bert.parameters()] == needs
    assert all(parameter.grad is None for parameter in bert.parameters())
    assert [module.training for module in bert.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bert.modules())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), repr(np.random.get_state())) == state[1:]  # noqa: NPY002


FROZEN = {"input_ids": [2, 4, 3], "labels": [-100, 9, -100]}


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "no rows; group_texts drops"),
        ([{"input_ids": [2, 9, 3]}], ValueError, r"not frozen: its rows have \['input_ids'\]"),
        ([{"input_ids": [2, 9], "labels": 1}], ValueError, "dataset is not frozen"),
        # A copy of the tokens, and one with -100 at the padding as some collators leave it.
        ([{"input_ids": [2, 9], "labels": [2, 9]}] * 9, ValueError, "not frozen.*insert_random"),
        (
            [{"input_ids": [2, 9, 0, 0], "labels": [2, 9, -100, -100]}] * 9,
            ValueError,
            "not frozen: .*, without a label other than -100 and its token",
        ),
        (
            [{"masked_input_ids": [2, 4, 3], "masked_labels": [-100] * 3}],
            ValueError,
            "no masked token .*insert_random_mask",
        ),
        ({"test": [FROZEN]}, TypeError, "dataset is a dict, .*; it must be a Dataset or a list"),
        (iter([FROZEN]), TypeError, "dataset is a list_iterator, .*; it must be a Dataset or a"),
        ([{**FROZEN, "text": "a film"}], ValueError, "'text' is not a column of tokens"),
        ([{**FROZEN, "input_ids": [2, 4, 10**6]}], ValueError, "dataset has token id 1000000"),
        (
            [{"input_ids": [2] * 600, "labels": [-100] * 600}],
            ValueError,
            "dataset has a row of 600 tokens, the model has positions for 512",
        ),
    ],
)
def test_wrong_rows_are_told(
    bert: PreTrainedModel,
    wordpiece: PreTrainedTokenizerFast,
    dataset: Any,
    error: type[Exception],
    message: str,
) -> None:
    """No rows, rows without masks, several sets, a column too many, and rows of another model."""
    with pytest.raises(error, match=message):
        evaluate_mlm(bert, dataset, tokenizer=wordpiece)


@given(st.integers(1, 4), st.integers(2, 12), st.integers(0, 10**6))
def test_ties_go_to_the_lower_id(rows: int, vocabulary: int, seed: int) -> None:
    """Among equal logits guesses are ordered as by argmax and a stable sort."""
    drawn = np.random.default_rng(seed).choice([-math.inf, -1.0, 0.0, 1.0], (rows, vocabulary))
    logits, label = torch.from_numpy(drawn), seed % vocabulary
    guesses = logits.argsort(dim=1, descending=True, stable=True).tolist()
    metrics = evaluation._sum_tokens(*rank_targets(logits, torch.full((len(logits),), label)), {})
    assert metrics[1] == sum(row[0] == label for row in guesses)
    assert metrics[1] == (logits.argmax(1) == label).sum()
    assert metrics[2] == sum(label in row[:5] for row in guesses)
    assert metrics[3] == len(logits)


def test_a_broken_model_has_no_accuracy() -> None:
    """NaN logits are no right guesses."""
    ranked = rank_targets(torch.full((2, 9), torch.nan), torch.tensor([0, 3]))
    metrics = evaluation._sum_tokens(*ranked, {})
    assert metrics[0].isnan()
    assert metrics[1:].tolist() == [0, 0, 2]


def test_metrics_of_extreme_sums() -> None:
    """A perplexity too large for a float is infinite; nothing masked is an error."""
    metrics = MaskedLMMetrics.from_sums(loss=3e4, correct=1, top5_correct=2, masked_tokens=4)
    assert metrics == MaskedLMMetrics(7500.0, math.inf, 0.25, 0.5, 4)
    with pytest.raises(ValueError, match="no masked token"):
        MaskedLMMetrics.from_sums(loss=0.0, correct=0, top5_correct=0, masked_tokens=0)


class ThreadAccelerator:
    """Stands in for the Accelerator of one of several processes, which are threads."""

    num_processes = 3

    def __init__(self, process_index: int, barrier: threading.Barrier, mail: list[Any]) -> None:
        self.process_index, self.barrier, self.mail = process_index, barrier, mail

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate over processes."""
        self.mail[self.process_index] = values
        self.barrier.wait()
        gathered = torch.cat(list(self.mail))
        self.barrier.wait()
        return gathered

    def reduce(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        """Sum over processes."""
        assert reduction == "sum"
        return self.gather(values[None]).sum(0)


@pytest.mark.parametrize(("count", "batch_size"), [(70, 16), (70, 70), (7, 3), (1, 4)])
def test_processes_stay_in_step(
    bert: PreTrainedModel, rows: Rows, monkeypatch: pytest.MonkeyPatch, count: int, batch_size: int
) -> None:
    """Every process makes as many forward passes, and all have the figures of one."""
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(evaluation, "MAX_LOGITS", 400 * len(tokenizer))
    barrier, mail, metrics = threading.Barrier(3, timeout=120), [None] * 3, [None] * 3
    passes = [0, 0, 0]

    def evaluate(rank: int) -> None:
        model = copy.deepcopy(bert)

        def count_pass(module: nn.Module, args: Any) -> None:
            passes[rank] += 1

        model.register_forward_pre_hook(count_pass)
        metrics[rank] = evaluate_rows(
            model,
            rows[:count],
            collate=partial(collate_frozen, tokenizer=tokenizer),
            batch_size=batch_size,
            forward=MaskedForward(device=model.device),
            accelerator=ThreadAccelerator(rank, barrier, mail),
        )

    threads = [threading.Thread(target=evaluate, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert metrics[0] == metrics[1] == metrics[2]
    assert metrics[0] is not None
    assert_same(metrics[0], slow_metrics(bert, rows[:count]))
    assert passes[0] == passes[1] == passes[2] > 0


RARE = "an uncharacteristically naïve film of electroencephalography and straightforwardness"
TEXTS = [*tiny_corpus(30), *[RARE] * 4, "café"]


def freeze_words(tokenizer: PreTrainedTokenizerFast, *, rate: float = 0.3, **options: Any) -> Rows:
    """Mask documents by their number, and keep the words that they were masked by."""
    columns = {**tokenize_with_word_ids({"text": TEXTS}, tokenizer), "id": range(len(TEXTS))}
    collator = WholeWordMaskingCollator(tokenizer, wwm_probability=rate, mask_replace_prob=0.9)
    frozen = insert_random_mask(columns, collator, key_column="id", **options)
    return to_rows({**frozen, "word_ids": columns["word_ids"]})


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
        for word in sorted({word for word, label in zip(row["word_ids"], labels) if label != -100}):  # noqa: B905
            places = [place for place, number in enumerate(row["word_ids"]) if number == word]
            pieces = [labels[place] for place in places]
            total -= sum(scores[place, piece].item() for place, piece in zip(places, pieces))  # noqa: B905
            right += [scores[place].argmax().item() for place in places] == pieces
            size += len("".join(tokenizer.decode(pieces).split()).encode())
            count += 1
    return MaskedWordMetrics(
        loss=total / count,
        accuracy=right / count,
        bits_per_byte=total / math.log(2) / size,
        masked_words=count,
    )


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize("prefix", ["", "masked_"])
def test_words_are_those_of_the_reference(kind: str, prefix: str) -> None:
    """For every tokenizer, batch size and form of the rows."""
    tokenizer = tiny_tokenizer(kind)
    model, rows = tiny_model(tokenizer).eval(), freeze_words(tokenizer, prefix=prefix)
    expected = slow_words(model, rows, tokenizer)
    for batch_size in (1, 5, 64):
        dataset: Any = Dataset.from_list(rows) if batch_size == 64 else rows
        metrics = evaluate_words(model, dataset, tokenizer=tokenizer, batch_size=batch_size)
        assert asdict(metrics) == pytest.approx(asdict(expected), rel=1e-6)
    tokenizer.padding_side = "left"  # which moves nothing
    by_word, by_token = (
        measure(model, rows, tokenizer=tokenizer) for measure in (evaluate_words, evaluate_mlm)
    )
    assert by_word.masked_words == expected.masked_words
    total = by_token.loss * by_token.masked_tokens
    assert by_word.loss * by_word.masked_words == pytest.approx(total)


def test_a_word_is_right_if_all_its_pieces_are() -> None:
    """And a byte of it is a byte of its text, without what stands around it."""
    tokenizer = tiny_tokenizer("byte_bpe")
    columns = tokenize_with_word_ids({"text": [" naïve"]}, tokenizer)
    labels = [
        [token if word >= 0 else -100 for token, word in zip(*row, strict=True)]
        for row in zip(columns["input_ids"], columns["word_ids"], strict=True)
    ]
    batch = collate_frozen(to_rows({**columns, "labels": labels}), tokenizer, with_words=True)
    pieces = batch["labels"][batch["labels"] != -100]
    assert len(pieces) > 1
    losses, right = torch.ones(len(pieces)), torch.zeros(len(pieces))
    for before, count in ((right, 1), (right + 1, 0), (right.index_fill(0, torch.tensor(1), 2), 0)):
        sums = evaluation._sum_words(losses, before, batch, tokenizer=tokenizer)
        assert sums.tolist() == [len(pieces), count, len("naïve".encode()), 1]


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "unigram"])
def test_a_phrase_has_the_bytes_of_its_text(kind: str) -> None:
    """Whatever the tokenizer puts between its words, and whoever cuts the row."""
    tokenizer, asked = tiny_tokenizer(kind), []
    text = "a film of mother-in-law"
    columns = tokenize_with_word_ids(
        {"text": [text]}, tokenizer, word_boundaries=phrases(["mother-in-law", "film of"])
    )
    rows = to_rows(columns)
    WholeWordMaskingCollator(tokenizer, word_weights=lambda word: asked.append(word) or 1.0)(rows)
    assert asked == ["a", "filmof", "mother-in-law"]
    words = np.array(rows[0]["word_ids"])
    whole = {**rows[0], "labels": np.where(words < 0, -100, rows[0]["input_ids"]).tolist()}
    halves = [{name: whole[name][part] for name in whole} for part in (slice(6), slice(6, None))]
    for cut in ([whole], halves):
        batch = collate_frozen(cut, tokenizer, with_words=True)
        number = int((batch["labels"] != -100).sum())
        sums = evaluation._sum_words(
            torch.ones(number), torch.zeros(number), batch, tokenizer=tokenizer
        )
        assert sums[2] == len(text.replace(" ", ""))


def test_rows_that_do_not_know_their_words(bert: PreTrainedModel) -> None:
    """They are refused by what is missing: the column, its length, the words of tokens masked."""
    tokenizer = tiny_tokenizer()
    rows = freeze_words(tokenizer)

    def evaluate(rows: Any) -> None:
        evaluate_words(bert, rows, tokenizer=tokenizer)

    without = [{name: row[name] for name in row if name != "word_ids"} for row in rows]
    with pytest.raises(ValueError, match=r"no 'word_ids', only \['masked_.*out of remove_columns"):
        evaluate(without)
    with pytest.raises(ValueError, match=r"word_ids"):
        evaluate([{**row, "word_ids": row["word_ids"][:-1]} for row in rows])
    none = [{**row, "word_ids": [-1] * len(row["word_ids"])} for row in rows]
    with pytest.raises(ValueError, match=r"a masked token, .+, that belongs to no word"):
        evaluate(none)
    unmasked = [{**row, "masked_labels": [-100] * len(row["word_ids"])} for row in rows]
    with pytest.raises(ValueError, match=r"no masked word; freeze masks into it"):
        evaluate(unmasked)
    with pytest.raises(ValueError, match=r"dataset is not frozen"):
        evaluate([{"input_ids": [2, 7, 3], "word_ids": [-1, 0, -1]}])
    for measure in (evaluate_words, evaluate_mlm):
        with pytest.raises(ValueError, match="batch_size is 0; it must be 1 or more"):
            measure(bert, rows, tokenizer=tokenizer, batch_size=0)


# All that `tiny_model` builds small.
SEES_PADDING = {"convbert", "fnet", "nystromformer", "yoso"}
REFUSED = {
    "big_bird": "BigBirdForMaskedLM has attention_type 'block_sparse', which",
    "tapas": "TapasForMaskedLM fails on a batch of",
    "xmod": "XmodForMaskedLM fails on a batch of",
}
BUILT = """
    albert bart bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra
    ernie esm esmc eurobert flaubert fnet gte ibert jina_embeddings_v3 layoutlm longformer mbart
    megatron-bert mobilebert modernbert mpnet mra mvp nomic_bert nystromformer rembert roberta
    roberta-prelayernorm roc_bert roformer tapas ultrabert xlm-roberta xmod yoso
""".split()  # noqa: SIM905 (a line each would take the page)


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """All that modules hold beside weights and hooks, as far as it can be compared."""
    buffers = {name: buffer.tolist() for name, buffer in model.named_buffers()}
    plain = (bool, int, float, str, type(None))
    parts = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, plain)
    }
    return buffers | parts


@pytest.mark.parametrize("architecture", BUILT)
def test_a_row_is_alone_in_every_batch(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    """One figure for each batch size and padding side, that of rows without padding; or refused.

    What sees padding is named, and the model is left as it was.
    """
    tokenizer = tiny_tokenizer()
    try:
        model = tiny_model(tokenizer, architecture=architecture)
    except ValueError:
        pytest.skip(f"{architecture} is not in this version of transformers")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.ndim > 1 else 1)
    rows = [
        {name: row[name][:40] for name in row} for row in freeze_words(tokenizer, prefix="")[:7]
    ]
    before = state_of(model)
    if architecture in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[architecture]):
            evaluate_mlm(model, rows, tokenizer=tokenizer)
        assert state_of(model) == before
        return
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        ids = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model(**ids).logits[labels != -100]
        total += nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum").item()
        count += len(logits)
    for side, size in (("right", 5), ("left", 1), ("left", 3), ("left", 5)):
        tokenizer.padding_side = side
        loss = evaluate_mlm(model, rows, tokenizer=tokenizer, batch_size=size).loss
        assert loss == pytest.approx(total / count, rel=1e-5)
    assert state_of(model) == before
    is_named = f"{type(model).__name__} sees padding" in caplog.text
    assert is_named == (architecture in SEES_PADDING)
