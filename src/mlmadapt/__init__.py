r"""Adapt masked language models to a domain.

The blocks, in the order data flows through them::

    documents -> tokenize_with_word_ids -> group_texts -> WholeWordMaskingCollator
                                                   \             -> accelerate_train
                                                    \-> insert_random_mask -> evaluate_mlm

Everything public is importable from here and loaded on first use: ``import mlmadapt`` loads neither
torch nor transformers, which take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlmadapt.chunking import group_texts
    from mlmadapt.config import TrainingConfig
    from mlmadapt.evaluation import MaskedLMMetrics, evaluate_mlm
    from mlmadapt.freezing import insert_random_mask
    from mlmadapt.gazetteer import phrases
    from mlmadapt.masking import WholeWordMaskingCollator
    from mlmadapt.prediction import masked_lm_loss, sparse_prediction
    from mlmadapt.result import TrainingResult
    from mlmadapt.tokenization import tokenize_with_word_ids
    from mlmadapt.training import accelerate_train
    from mlmadapt.view import show_masks

__all__ = [
    "MaskedLMMetrics",
    "TrainingConfig",
    "TrainingResult",
    "WholeWordMaskingCollator",
    "accelerate_train",
    "evaluate_mlm",
    "group_texts",
    "insert_random_mask",
    "masked_lm_loss",
    "phrases",
    "show_masks",
    "sparse_prediction",
    "tokenize_with_word_ids",
]

_HOME = {
    "MaskedLMMetrics": "evaluation",
    "TrainingConfig": "config",
    "TrainingResult": "result",
    "WholeWordMaskingCollator": "masking",
    "accelerate_train": "training",
    "evaluate_mlm": "evaluation",
    "group_texts": "chunking",
    "insert_random_mask": "freezing",
    "masked_lm_loss": "prediction",
    "phrases": "gazetteer",
    "show_masks": "view",
    "sparse_prediction": "prediction",
    "tokenize_with_word_ids": "tokenization",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("mlmadapt")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Kept in the module, so that the second look-up is an ordinary one.
    globals()[name] = value = getattr(import_module(f"mlmadapt.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
