"""A run of three steps in this process, to be changed before it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import torch

from mlmadapt import TrainingConfig, WholeWordMaskingCollator, accelerate_train
from mlmadapt.testing import tiny_model, tiny_rows, tiny_tokenizer
from mlmadapt.training.fingerprint import describe_run

if TYPE_CHECKING:
    from pathlib import Path

    from mlmadapt import TrainingResult

SETTINGS = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
SAVING = {"save_strategy": "steps", "save_steps": 1}


class CountedStream(torch.utils.data.IterableDataset[Any]):
    """A stream of torch that knows how many rows it has."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class TinyRun:
    """What `accelerate_train` takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = tiny_tokenizer()
        self.model: Any = tiny_model(self.tokenizer)
        self.rows: Any = tiny_rows(self.tokenizer, 12)
        self.eval_rows: Any = None
        self.collator: Any = WholeWordMaskingCollator(self.tokenizer)
        self.objects: dict[str, Any] = {}

    def train(self, **settings: Any) -> TrainingResult:
        """Train with what there is now."""
        return accelerate_train(
            self.model,
            self.rows,
            self.eval_rows,
            tokenizer=self.tokenizer,
            data_collator=self.collator,
            config=TrainingConfig(output_dir=str(self.folder), **{**SETTINGS, **settings}),
            **self.objects,
        )

    def adapt(self, name: str = "default", **options: Any) -> None:
        """Add an adapter to the model."""
        config = peft.LoraConfig(**{"target_modules": ["query"], "r": 2, **options})
        self.model = peft.get_peft_model(self.model, config, name)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint would store of it."""
        return describe_run(
            TrainingConfig(),
            model=self.model,
            tokenizer=self.tokenizer,
            data_collator=self.collator,
            replaced={},
            datasets={"train_dataset": self.rows, "eval": self.eval_rows or self.rows[:1]},
            rows_per_step=4,
        )


def logged(result: Any, name: str) -> list[float]:
    """Return what was logged under a name, by a run here or in another process."""
    history = result["history"] if isinstance(result, dict) else result.history
    return [entry[name] for entry in history if name in entry]


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """Copy the weights."""
    return [values.detach().clone() for values in model.state_dict().values()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Tell whether weights are equal to the bit."""
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))
