"""`Trainer` with `MaskingCallback`: after a resume, the masks of an uninterrupted run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
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
from mlmadapt.testing import tiny_corpus, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER = tiny_tokenizer()


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
    folder: Path, rows: Any, schedule: Any, **options: Any
) -> tuple[list[torch.Tensor], dict[int, list[float]]]:
    """Train for 15 steps; return the weights, and the targets of each step."""
    torch.manual_seed(0)
    model = tiny_model(TOKENIZER)
    if options.get("dataloader_persistent_workers"):
        # Their start moves the generator that dropout draws from, which is Trainer's own affair.
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    collator = options.pop("collator", None) or WholeWordMaskingCollator(
        TOKENIZER, wwm_probability=schedule, seed=3
    )
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
        callbacks=[MaskingCallback(collator)],
        compute_loss_func=masked_lm_loss,
    )
    trainer.train(resume_from_checkpoint=resume and str(folder / f"checkpoint-{resume}"))
    assert trainer.state.global_step == 15
    return [weight.detach().clone() for weight in model.parameters()], trainer.shares


WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}


@pytest.mark.parametrize("workers", [{}, WORKERS], ids=["alone", "persistent workers"])
def test_a_resumed_trainer_ends_where_it_would_have_ended(
    tmp_path: Path, rows: Dataset, workers: dict[str, Any]
) -> None:
    """Bit for bit from the middle of the first and of another epoch."""
    weights, shares = train(tmp_path, rows, 0.3, **workers)
    for step in (4, 8):
        again, later = train(tmp_path, rows, 0.3, resume=step, **workers)
        assert later == {place: shares[place] for place in range(step, 15)}
        assert all(map(torch.equal, weights, again))


class Noting(WholeWordMaskingCollator):
    """Notes which share of the run it is told."""

    def collate(self, features: Any, *, key: int, progress: float = 1.0) -> Any:
        """Collate rows."""
        self.__dict__.setdefault("shares", []).append(progress)
        return super().collate(features, key=key, progress=progress)


def test_a_rate_is_at_most_a_step_late(tmp_path: Path, rows: Dataset) -> None:
    """That of the first batch of a step, but for the first step of an epoch; none is early."""
    collator = Noting(TOKENIZER, wwm_probability=linear, seed=3)
    train(tmp_path, rows, linear, collator=collator)
    # Nine batches are five steps; accelerate makes one batch ahead.
    steps = [5 * epoch + max(0, (batch - 1) // 2) for epoch in range(3) for batch in range(9)]
    assert collator.__dict__["shares"] == [step / 15 for step in steps]


def test_a_stream_may_have_a_schedule(tmp_path: Path, rows: Dataset) -> None:
    """Its rate follows the run as that of other rows does."""
    collator = Noting(TOKENIZER, wwm_probability=linear, seed=3)
    train(tmp_path, rows.to_iterable_dataset(), linear, collator=collator, max_steps=15)
    shares = collator.__dict__["shares"]
    assert shares == sorted(shares)
    assert {*shares} == {step / 15 for step in range(15)}


@pytest.mark.parametrize(
    ("epoch", "expected"), [(None, 0), (0, 0), (0.7, 0), (1.0, 1), (2.9999999, 3), (2.999, 2)]
)
def test_an_epoch_is_the_one_that_begins_or_goes_on(epoch: float | None, expected: int) -> None:
    """A fraction is what is done of it, less a hair that floats may lose."""
    collator = WholeWordMaskingCollator(TOKENIZER, seed=0)
    state = TrainerState(epoch=epoch, global_step=3, max_steps=4)
    MaskingCallback(collator).on_epoch_begin(TrainingArguments(), state, TrainerControl())
    assert (int(collator._epoch), float(collator._progress)) == (expected, 0.75)


def test_another_collator_is_refused() -> None:
    """Those of transformers have no epoch to be told."""
    other = DataCollatorForLanguageModeling(TOKENIZER)
    with pytest.raises(TypeError, match=r"data_collator is .*, a DataCollatorForLanguageModeling"):
        MaskingCallback(other)  # type: ignore[arg-type]
