"""What `Trainer` has to tell a collator, which it does not call by itself: epoch and progress.

Apart from the collator, since a callback is a class of transformers, which takes a second to load.
"""

from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainerCallback

from mlmadapt.masking.collator import WholeWordMaskingCollator
from mlmadapt.masking.rates import Clock, is_share


class MaskingCallback(TrainerCallback):
    """Give each epoch of `Trainer` its own masks, and each step the rate of its schedule.

    Without it, a collator with a seed makes the masks of epoch 0 in every epoch, and a schedule of
    rates stays where it begins. A run that is resumed goes on with the masks of an uninterrupted
    one, in the middle of an epoch too, with workers that collate ahead, and on several processes.

    Args:
        data_collator: The collator that `Trainer` has, itself and not a copy.

    Raises:
        TypeError: If it is not a `WholeWordMaskingCollator`.

    Examples:
        >>> from mlmadapt import WholeWordMaskingCollator
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> rates = {0.0: 0.3, 0.8: 0.15}
        >>> collator = WholeWordMaskingCollator(tiny_tokenizer(), wwm_probability=rates, seed=0)
        >>> callbacks = [MaskingCallback(collator)]  # for Trainer(..., data_collator=collator)
    """

    def __init__(self, data_collator: WholeWordMaskingCollator) -> None:
        if not isinstance(data_collator, WholeWordMaskingCollator):
            raise TypeError(
                f"data_collator is {data_collator!r:.40}, a {type(data_collator).__name__}; it "
                "must be the WholeWordMaskingCollator that Trainer has. Others need no callback"
            )
        self.data_collator = data_collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002  # as Trainer calls it
        """Tell the collator epoch and progress, before the epoch's first batch is made.

        Args:
            args: Settings of the run.
            state: Where it stands.
            control: Not used.
            kwargs: ``train_dataloader``, which makes the batches.

        Raises:
            ValueError: If rates follow the run and the training set is a stream.

        Examples:
            >>> from transformers import TrainerControl, TrainerState, TrainingArguments
            >>> from mlmadapt import WholeWordMaskingCollator
            >>> from mlmadapt.testing import tiny_tokenizer
            >>> callback = MaskingCallback(WholeWordMaskingCollator(tiny_tokenizer(), seed=0))
            >>> resumed = TrainerState(epoch=2.7, global_step=27, max_steps=30)
            >>> callback.on_epoch_begin(TrainingArguments(), resumed, TrainerControl())
        """
        collator = self.data_collator
        # Not round: a resumed epoch begins at its middle. A whole number may come a hair too low.
        collator.set_epoch(int((state.epoch or 0) + 1e-6))
        collator.set_progress(min(1.0, state.global_step / max(state.max_steps, 1)))
        outer = kwargs.get("train_dataloader")
        if is_share(collator.wwm_probability) or outer is None:
            return
        if isinstance(outer.dataset, IterableDataset) or hasattr(outer, "split_batches"):
            raise ValueError(
                f"wwm_probability is a schedule, {collator.wwm_probability!r:.40}, and the batches "
                f"of train_dataset, {type(outer.dataset).__name__}, cannot be counted (a stream, "
                "or dispatch_batches=True); use a number, or accelerate_train"
            )
        # Accelerate's loader has another inside, which makes the batches, and which is also where
        # the one that skips batches of a resumed epoch takes its `collate_fn` from.
        loader = getattr(outer, "base_dataloader", outer)
        if not isinstance(loader.collate_fn, _CountedBatches):
            loader.collate_fn = _CountedBatches(
                loader.collate_fn,
                collator._clock,  # noqa: SLF001  # of this room
                args.gradient_accumulation_steps,
                state.max_steps,
            )


@dataclass
class _CountedBatches:
    """Knows which batch of the epoch it collates, hence its step, however far ahead that is.

    A DataLoader deals batches out to its workers in turn, and starts again with the first worker in
    each epoch.
    """

    collate_fn: Any
    clock: Clock
    batches_per_step: int
    total_steps: int
    epoch: int = -1
    batches: int = 0

    def __call__(self, features: Any) -> Any:
        clock, worker = self.clock, get_worker_info()
        if clock.epoch != self.epoch:
            self.epoch, self.batches = clock.epoch, 0
        batch = self.batches if worker is None else self.batches * worker.num_workers + worker.id
        self.batches += 1
        # Rounded, so that a step has one progress, whichever step the count began at.
        step = round(clock.progress * self.total_steps) + batch // self.batches_per_step
        clock.progress_here = min(1.0, step / self.total_steps)
        try:
            return self.collate_fn(features)
        finally:
            clock.progress_here = None
