"""Help for tests: tiny offline material, and assertions about masks, rows, losses and runs.

Nothing here needs the hub, a file or pytest, and the import loads nothing heavy. Where pytest runs,
the fixtures ``mlmadapt_tokenizer`` and ``mlmadapt_model`` are there without an import.
"""

from mlmadapt.testing.chunks import assert_documents_kept, assert_tokens_kept
from mlmadapt.testing.documents import assert_documents_isolated
from mlmadapt.testing.losses import assert_same_loss
from mlmadapt.testing.masks import assert_masks_reproducible, assert_whole_words_masked
from mlmadapt.testing.material import (
    TOKENIZER_KINDS,
    tiny_corpus,
    tiny_model,
    tiny_rows,
    tiny_tokenizer,
)
from mlmadapt.testing.runs import assert_resumes_exactly

__all__ = [
    "TOKENIZER_KINDS",
    "assert_documents_isolated",
    "assert_documents_kept",
    "assert_masks_reproducible",
    "assert_resumes_exactly",
    "assert_same_loss",
    "assert_tokens_kept",
    "assert_whole_words_masked",
    "tiny_corpus",
    "tiny_model",
    "tiny_rows",
    "tiny_tokenizer",
]


def __dir__() -> list[str]:
    return __all__.copy()
