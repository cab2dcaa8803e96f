"""What `Trainer` has to tell a collator, which it does not call by itself: epoch and progress.

Apart from the collator, since a callback is a class of transformers, which takes a second to load.
"""

from typing import Any

from transformers import TrainerCallback

from mlmadapt.masking.collator import WholeWordMaskingCollator


class MaskingCallback(TrainerCallback):
    """Give each epoch of `Trainer` its own masks, and let the rate of a schedule follow the run.

    Without it, a collator with a seed makes the masks of epoch 0 in every epoch, and a schedule of
    rates stays where it begins. Epochs are exact, with workers and on several processes too: a run
    that is resumed, in the middle of an epoch too, goes on with the masks of an uninterrupted one.

    Rates of a schedule come late, since `Trainer` makes batches ahead. The first batch of a step
    is made with the batches of the step before, and has its rate; with workers, the rate is up to
    ``num_workers * prefetch_factor`` batches older still. At the start of an epoch, and of a
    resumed run, the first step has its own rate. In `accelerate_train` each step does. Of a stream,
    `Trainer` does not know where an epoch ends: the second pass has the masks of the first.

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

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the collator epoch and progress, before the epoch's first batch is made.

        Later would be too late for the epoch: `Trainer` takes the batches of a step before it says
        that the step begins.

        Args:
            args: Not used.
            state: Where the run stands.
            control: Not used.
            kwargs: Not used.

        Examples:
            >>> from transformers import TrainerControl, TrainerState, TrainingArguments
            >>> from mlmadapt import WholeWordMaskingCollator
            >>> from mlmadapt.testing import tiny_tokenizer
            >>> callback = MaskingCallback(WholeWordMaskingCollator(tiny_tokenizer(), seed=0))
            >>> resumed = TrainerState(epoch=2.7, global_step=27, max_steps=30)
            >>> callback.on_epoch_begin(TrainingArguments(), resumed, TrainerControl())
        """
        # Not round: a resumed epoch begins at its middle. A whole number may come a hair too low.
        self.data_collator.set_epoch(int((state.epoch or 0) + 1e-6))
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002  # as Trainer calls it
        """Tell the collator the progress, before the batches of the next step are made.

        Args:
            args: Not used.
            state: Where the run stands.
            control: Not used.
            kwargs: Not used.

        Examples:
            >>> from transformers import TrainerControl, TrainerState, TrainingArguments
            >>> from mlmadapt import WholeWordMaskingCollator
            >>> from mlmadapt.testing import tiny_tokenizer
            >>> callback = MaskingCallback(WholeWordMaskingCollator(tiny_tokenizer(), seed=0))
            >>> state = TrainerState(global_step=15, max_steps=30)
            >>> callback.on_step_end(TrainingArguments(), state, TrainerControl())
        """
        self.data_collator.set_progress(min(1.0, state.global_step / max(state.max_steps, 1)))
