r"""Adapt masked language models to a domain.

The blocks, in the order data flows through them::

    documents -> tokenize_with_word_ids -> group_texts -> WholeWordMaskingCollator
                                        or pack_texts \          -> accelerate_train
                                                       \-> insert_random_mask -> evaluate_mlm

Everything public is importable from here and loaded on first use: ``import mlmadapt`` loads neither
torch nor transformers, which take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlmadapt.data.chunking import group_texts
    from mlmadapt.data.packing import pack_texts
    from mlmadapt.data.tokenization import phrases, tokenize_with_word_ids
    from mlmadapt.data.vocabulary import find_domain_words
    from mlmadapt.masking.callback import MaskingCallback
    from mlmadapt.masking.collator import WholeWordMaskingCollator
    from mlmadapt.masking.frozen_masks import insert_random_mask
    from mlmadapt.masking.show import show_masks
    from mlmadapt.model.documents import isolate_documents
    from mlmadapt.model.embeddings import extend_vocabulary
    from mlmadapt.model.evaluation import (
        MaskedLMMetrics,
        MaskedWordMetrics,
        evaluate_mlm,
        evaluate_words,
    )
    from mlmadapt.model.head import masked_lm_loss, sparse_prediction
    from mlmadapt.training.config import TrainingConfig
    from mlmadapt.training.loop import accelerate_train
    from mlmadapt.training.result import TrainingResult

    __version__: str

__all__ = [
    "MaskedLMMetrics",
    "MaskedWordMetrics",
    "MaskingCallback",
    "TrainingConfig",
    "TrainingResult",
    "WholeWordMaskingCollator",
    "accelerate_train",
    "evaluate_mlm",
    "evaluate_words",
    "extend_vocabulary",
    "find_domain_words",
    "group_texts",
    "insert_random_mask",
    "isolate_documents",
    "masked_lm_loss",
    "pack_texts",
    "phrases",
    "show_masks",
    "sparse_prediction",
    "tokenize_with_word_ids",
]

_HOME = {
    "MaskedLMMetrics": "model.evaluation",
    "MaskedWordMetrics": "model.evaluation",
    "MaskingCallback": "masking.callback",
    "TrainingConfig": "training.config",
    "TrainingResult": "training.result",
    "WholeWordMaskingCollator": "masking.collator",
    "accelerate_train": "training.loop",
    "evaluate_mlm": "model.evaluation",
    "evaluate_words": "model.evaluation",
    "extend_vocabulary": "model.embeddings",
    "find_domain_words": "data.vocabulary",
    "group_texts": "data.chunking",
    "insert_random_mask": "masking.frozen_masks",
    "isolate_documents": "model.documents",
    "masked_lm_loss": "model.head",
    "pack_texts": "data.packing",
    "phrases": "data.tokenization",
    "show_masks": "masking.show",
    "sparse_prediction": "model.head",
    "tokenize_with_word_ids": "data.tokenization",
}


if not TYPE_CHECKING:  # to a type checker, a name that is not imported above is misspelt

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
