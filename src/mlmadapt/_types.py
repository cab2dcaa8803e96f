"""The types that several rooms share, each name with one meaning.

Aliases are strings where the real type would cost an import of seconds: they are for readers and
type checkers, and nothing here is evaluated when the library runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Models and tokenizers of transformers.
Model: TypeAlias = "PreTrainedModel"
Tokenizer: TypeAlias = "PreTrainedTokenizerBase"

# A row by column, the rows of a batch, a dataset whose rows can be counted and looked up, and one
# whose rows come one after another.
Row: TypeAlias = Mapping[str, Any]
Features: TypeAlias = Sequence[Row]
Rows: TypeAlias = "Dataset | Sequence[Row]"
Stream: TypeAlias = "IterableDataset"
# What `map` hands to a function with ``batched=True``, and gets back: lists by column, or a table.
Columns = TypeVar("Columns", Mapping[str, Any], "pa.Table")
# What a model is called with, each of shape (batch, sequence).
Batch: TypeAlias = "dict[str, torch.Tensor]"
# Rows to a batch with labels.
DataCollator: TypeAlias = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Hashes: TypeAlias = npt.NDArray[np.uint64]
