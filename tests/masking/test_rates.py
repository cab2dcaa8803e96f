"""Rates that follow the run: a function of its share that is done, and of nothing else."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from mlmadapt import WholeWordMaskingCollator, insert_random_mask
from mlmadapt.masking.rates import rate_at, sample_rates
from mlmadapt.testing import TOKENIZER_KINDS, tiny_rows, tiny_tokenizer

shared = functools.cache(tiny_tokenizer)
STEPS = {0.0: 0.6, 0.5: 0.3, 0.8: 0.1}


@functools.cache
def rows_of(kind: str) -> tuple[dict[str, list[int]], ...]:
    """Return 40 documents as rows."""
    return tuple(tiny_rows(shared(kind), 40))


def linear(done: float) -> float:
    """Fall from 60 to 10 %."""
    return 0.6 - 0.5 * done


def lists(batch: Any) -> dict[str, Any]:
    """Return a batch that can be compared."""
    return {name: [np.asarray(row).tolist() for row in rows] for name, rows in batch.items()}


@pytest.mark.parametrize("schedule", [STEPS, linear, {0: 0.25}], ids=["steps", "linear", "one"])
@pytest.mark.parametrize("progress", [0, 0.3, 0.5, np.float64(0.79), 0.8, 1.0])
def test_a_schedule_masks_as_its_rate_does(schedule: Any, progress: float) -> None:
    """What is collated at a share of the run is what a collator with that rate makes."""
    rate = rate_at(schedule, progress)
    following = WholeWordMaskingCollator(shared("unigram"), wwm_probability=schedule, seed=4)
    fixed = WholeWordMaskingCollator(shared("unigram"), wwm_probability=rate, seed=4)
    rows = rows_of("unigram")
    following.set_progress(progress)
    assert lists(following(rows)) == lists(fixed(rows))
    assert lists(following.collate(rows, key=7, progress=progress)) == lists(
        fixed.collate(rows, key=7)
    )


def test_steps_begin_where_they_say() -> None:
    """A rate holds from its share on, up to the next one, in whatever order they are given."""
    shuffled = dict(sorted(STEPS.items(), reverse=True))
    places = (0, 0.499, 0.5, 0.799, 0.8, 1)
    expected = [0.6, 0.6, 0.3, 0.3, 0.1, 0.1]
    for schedule in (STEPS, shuffled):
        assert [rate_at(schedule, place) for place in places] == expected


WEIGHTS = {"even": None, "by length": lambda word: float(len(word))}


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@given(data=st.data())
def test_targets_of_a_lower_rate_are_among_those_of_a_higher_one(
    kind: str, data: st.DataObject
) -> None:
    """With what stands there instead; but for weighted rows that get one so that they have one."""
    rates = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    key = data.draw(st.integers(0, 2**64 - 1))
    budget = data.draw(st.sampled_from(["bernoulli", "exact"]))
    weights = data.draw(st.sampled_from([*WEIGHTS]))
    columns = {name: [row[name] for row in rows_of(kind)] for name in rows_of(kind)[0]}
    lower, higher = (
        WholeWordMaskingCollator(
            shared(kind),
            wwm_probability=rate,
            budget=budget,
            word_weights=WEIGHTS[weights],
            mask_replace_prob=0.5,
            random_replace_prob=0.3,
        ).mask(columns, key=key)[0]
        for rate in rates
    )
    start = 0
    for words in columns["word_ids"]:
        row = slice(start, start := start + len(words))
        targets = lower["labels"][row] != -100
        if weights != "even" and budget == "bernoulli" and len({*np.asarray(words)[targets]}) == 1:
            continue
        for name in ("labels", "input_ids"):
            assert (higher[name][row][targets] == lower[name][row][targets]).all()


def test_a_weighted_row_may_have_its_only_target_for_itself() -> None:
    """Which the docstring says: the most urgent word need not be the first that a rate reaches."""
    columns = {"input_ids": [[5, *range(20, 40)]], "word_ids": [[*range(21)]]}
    weights = np.ones(len(shared("wordpiece")))
    weights[5] = 20
    none, some = (
        WholeWordMaskingCollator(shared("wordpiece"), wwm_probability=rate, word_weights=weights)
        for rate in (0.0, 0.09)
    )
    alone = 0
    for key in range(200):
        (low, _), (high, _) = (collator.mask(columns, key=key) for collator in (none, some))
        alone += int(((low["labels"] != -100) & (high["labels"] == -100)).sum())
    assert 0 < alone < 50


def test_frozen_sets_have_the_rate_of_the_end() -> None:
    """Wherever the run stands, so that all evaluations see the same masks."""
    rows = Dataset.from_list(list(rows_of("byte_bpe")))
    following = WholeWordMaskingCollator(shared("byte_bpe"), wwm_probability=STEPS, seed=4)
    fixed = WholeWordMaskingCollator(shared("byte_bpe"), wwm_probability=0.1)
    expected = lists(insert_random_mask(rows[:], fixed, prefix=""))
    for progress in (0.0, 0.6):
        following.set_progress(progress)
        assert lists(insert_random_mask(rows[:], following, prefix="")) == expected


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda done: 1.2 - done, r"wwm_probability is 1\.2 when a share 0\.0 of the run is done"),
        (lambda done: 0.7 - done, r"wwm_probability is -0\.00\d* when a share 0\.701 of the run"),
        (lambda done: "often", r"wwm_probability is 'often' when a share 0\.0 .* in \[0, 1\]"),
        (lambda done: None, r"wwm_probability is None when a share 0\.0"),
        ({0.5: 0.3}, r"wwm_probability is None when a share 0\.0 of the run is done"),
        ({}, r"wwm_probability is None when a share 0\.0 of the run is done"),
        ({0.0: 0.3, 0.9: 15}, r"wwm_probability is 15 when a share 0\.9 of the run is done"),
        ({0.0: 0.3, 0.98765: 2}, r"wwm_probability is 2 when a share 0\.988 of the run is done"),
        ({0.0: 0.3, 80: 0.15}, r"wwm_probability has a step at 80; it must be in \[0, 1\]"),
        ({"0.0": 0.3}, r"wwm_probability has a step at '0\.0'; it must be in \[0, 1\]"),
        ([0.3, 0.15], r"wwm_probability is \[0\.3, 0\.15\]; it must be a probability in \[0, 1\]"),
        (True, r"wwm_probability is True; it must be a probability in \[0, 1\]"),
        (float("nan"), r"wwm_probability is nan; it must be a probability in \[0, 1\]"),
    ],
)
def test_wrong_schedules_are_refused_before_a_run(schedule: Any, message: str) -> None:
    """By the rate and the share at which it would be met, hours into a run."""
    with pytest.raises(ValueError, match=message):
        WholeWordMaskingCollator(shared("wordpiece"), wwm_probability=schedule)


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan"), "0.5", None])
def test_progress_is_a_share(progress: Any) -> None:
    """Steps, or percent, are not."""
    collator = WholeWordMaskingCollator(shared("wordpiece"), wwm_probability=STEPS)
    message = r"progress is .*; it must be a share of the run, in \[0, 1\]"
    with pytest.raises(ValueError, match=message):
        collator.set_progress(progress)
    with pytest.raises(ValueError, match=message):
        collator.collate(rows_of("wordpiece"), key=0, progress=progress)


def test_samples_tell_schedules_apart() -> None:
    """Two that differ for a thousandth of a run have other samples, equal ones the same."""
    assert sample_rates(linear) == sample_rates(lambda done: 0.6 - 0.5 * done)
    assert sample_rates({0.0: 0.3, 0.8: 0.1}) != sample_rates({0.0: 0.3, 0.801: 0.1})
