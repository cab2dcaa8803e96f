"""`Trainer` with `MaskingCallback`: after a resume, masks and rates of an uninterrupted run."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mlmadapt import (
    MaskingCallback,
    WholeWordMaskingCollator,
    group_texts,
    masked_lm_loss,
    tokenize_with_word_ids,
)
from mlmadapt.masking.callback import _CountedBatches
from mlmadapt.masking.rates import Clock
from mlmadapt.testing import tiny_corpus, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER = tiny_tokenizer()
RATES = {0.0: 0.6, 0.5: 0.3, 0.8: 0.1}


def linear(done: float) -> float:
    """Fall from 60 to 10 %."""
    return 0.6 - 0.5 * done


@pytest.fixture(scope="module", name="rows")
def _rows() -> Dataset:
    """Eighteen rows: nine batches of two, five steps of two batches, the last of one."""
    tokens = tokenize_with_word_ids({"text": tiny_corpus(60)}, TOKENIZER)
    chunks = group_texts(tokens, chunk_size=24, labels=False)
    return Dataset.from_dict(dict(chunks)).select(range(18))


class Targets(Trainer):
    """Keeps what share of its tokens each step has as targets."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take the step of a batch."""
        share = (inputs["labels"] != -100).float().mean().item()
        self.__dict__.setdefault("shares", {}).setdefault(self.state.global_step, []).append(share)
        return super().training_step(model, inputs, *args, **kwargs)


def train(
    folder: Path, rows: Any, schedule: Any, *, callback: Any = MaskingCallback, **options: Any
) -> tuple[list[torch.Tensor], dict[int, list[float]]]:
    """Train for 15 steps; return the weights, and the targets of each step."""
    torch.manual_seed(0)
    model = tiny_model(TOKENIZER)
    if options.get("dataloader_persistent_workers"):
        # Their start moves the generator that dropout draws from, which is Trainer's own affair.
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    collator = WholeWordMaskingCollator(TOKENIZER, wwm_probability=schedule, seed=3)
    resume = options.pop("resume", None)
    arguments = TrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Targets(
        model,
        arguments,
        data_collator=collator,
        train_dataset=rows,
        callbacks=[callback(collator)],
        compute_loss_func=masked_lm_loss,
    )
    trainer.train(resume_from_checkpoint=resume and str(folder / f"checkpoint-{resume}"))
    assert trainer.state.global_step == 15
    return [each.detach().clone() for each in model.parameters()], trainer.shares


WORKERS: dict[str, dict[str, Any]] = {
    "none": {},
    "two": {"dataloader_num_workers": 2},
    "persistent": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
}


@pytest.mark.parametrize(
    ("schedule", "workers"),
    [
        (0.3, "none"),
        (0.3, "persistent"),
        (linear, "none"),
        (linear, "persistent"),
        (RATES, "two"),
        (RATES, "persistent"),
    ],
    ids=["number", "number-persistent", "callable", "callable-persistent", "two", "persistent"],
)
def test_a_resumed_trainer_ends_where_it_would_have_ended(
    tmp_path: Path, rows: Dataset, schedule: Any, workers: str
) -> None:
    """Bit for bit from the middle of the first and of another epoch, with workers too."""
    weights, shares = train(tmp_path, rows, schedule, **WORKERS[workers])
    for step in (4, 8):
        again, later = train(tmp_path, rows, schedule, resume=step, **WORKERS[workers])
        assert later == {each: shares[each] for each in range(step, 15)}
        assert all(map(torch.equal, weights, again))


def test_rounding_the_epoch_would_not_do(tmp_path: Path, rows: Dataset) -> None:
    """What the documentation said until 0.1 makes another epoch's masks after a resume."""

    class Rounding(TrainerCallback):
        def __init__(self, collator: WholeWordMaskingCollator) -> None:
            self.collator = collator

        def on_epoch_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            self.collator.set_epoch(round(state.epoch))

    weights, _ = train(tmp_path, rows, 0.3, callback=Rounding)
    again, _ = train(tmp_path, rows, 0.3, callback=Rounding, resume=8)
    assert not all(map(torch.equal, weights, again))
    again, _ = train(tmp_path, rows, 0.3, resume=8)
    assert all(map(torch.equal, weights, again))


@pytest.mark.parametrize("workers", ["none", "persistent"])
def test_each_step_has_its_rate(tmp_path: Path, rows: Dataset, workers: str) -> None:
    """That of the share of steps before it, though batches are collated ahead."""
    rates = {0.0: 1.0, 7 / 15: 0.0, 12 / 15: 1.0}
    _, shares = train(tmp_path, rows, rates, **WORKERS[workers])
    assert [min(shares[step]) > 0.5 for step in range(15)] == [True] * 7 + [False] * 5 + [True] * 3
    assert [max(shares[step]) < 0.5 for step in range(7, 12)] == [True] * 5
    assert len(list(chain.from_iterable(shares.values()))) == 27


@pytest.mark.parametrize(
    ("epoch", "expected"), [(None, 0), (0, 0), (0.7, 0), (1.0, 1), (2.9999999, 3), (2.999, 2)]
)
def test_an_epoch_is_the_one_that_begins_or_goes_on(epoch: float | None, expected: int) -> None:
    """A fraction is what is done of it, less a hair that floats may lose."""
    collator = WholeWordMaskingCollator(TOKENIZER, seed=0)
    state = TrainerState(epoch=epoch, global_step=3, max_steps=4)
    MaskingCallback(collator).on_epoch_begin(TrainingArguments(), state, TrainerControl())
    assert (collator._clock.epoch, collator._clock.progress) == (expected, 0.75)


def test_a_step_has_one_progress_wherever_the_count_began() -> None:
    """To the last bit, so that a step at which the rate changes is the same after a resume."""
    seen: list[float] = []
    clock = Clock()
    for total in range(1, 120):
        for step in range(total):
            clock.set(progress=step / total)
            counted = _CountedBatches(lambda _: seen.append(clock.progress), clock, 1, total)
            counted([])
            counted([])
            assert seen[-2:] == [step / total, (step + 1) / total]
    assert clock.progress_here is None


def test_a_number_leaves_the_loader_alone(tmp_path: Path, rows: Dataset) -> None:
    """Nothing is put around the collator where there is no schedule."""
    loader = torch.utils.data.DataLoader(rows, collate_fn=np.asarray)
    state = TrainerState(epoch=0, global_step=0, max_steps=4)
    collator = WholeWordMaskingCollator(TOKENIZER, seed=0)
    MaskingCallback(collator).on_epoch_begin(
        TrainingArguments(output_dir=str(tmp_path)),
        state,
        TrainerControl(),
        train_dataloader=loader,
    )
    assert loader.collate_fn is np.asarray


def test_a_stream_cannot_have_a_schedule(tmp_path: Path, rows: Dataset) -> None:
    """Its batches are dealt out otherwise, which is said before the first step."""
    stream = rows.to_iterable_dataset()
    assert isinstance(stream, datasets.IterableDataset)
    with pytest.raises(ValueError, match=r"wwm_probability is a schedule, \{0\.0: .*a stream.*acc"):
        train(tmp_path, stream, RATES, max_steps=15)


def test_another_collator_is_refused() -> None:
    """Those of transformers have no epoch to be told."""
    other = DataCollatorForLanguageModeling(TOKENIZER)
    with pytest.raises(TypeError, match=r"data_collator is .*, a DataCollatorForLanguageModeling"):
        MaskingCallback(other)  # type: ignore[arg-type]
