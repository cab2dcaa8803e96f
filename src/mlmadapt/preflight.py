"""What can be known to fail is found before the first step, not hours after it.

A token id past the embedding is an `IndexError` without a name on the CPU and a device assert on a
GPU; an output folder that cannot be written costs the whole run.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow.compute as pc
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_rows(
    name: str,
    dataset: "datasets.Dataset | Sequence[dict[str, Any]]",
    *,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    """Check that `model` can read every row of `dataset`.

    Raises:
        ValueError: If there are no rows, the tokenizer or a row has ids past the model's embedding, or
            a row is longer than the model's positions.
    """
    if not len(dataset):
        message = f"{name} has no rows; group_texts drops what is shorter than chunk_size"
        raise ValueError(message)
    embeddings = model.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
    if len(tokenizer) > embeddings:
        message = (
            f"tokenizer has {len(tokenizer)} tokens, the model's embedding {embeddings}; call "
            f"model.resize_token_embeddings({len(tokenizer)})"
        )
        raise ValueError(message)
    longest, highest = _measure(dataset)
    if highest >= embeddings:
        message = (
            f"{name} has token id {highest}, the model's embedding {embeddings} rows; tokenize with "
            "the model's own tokenizer"
        )
        raise ValueError(message)
    positions = position_capacity(model)
    if positions is not None and longest > positions:
        message = (
            f"{name} has a row of {longest} tokens, the model has positions for {positions}; call "
            f"group_texts with chunk_size={positions} or less"
        )
        raise ValueError(message)


def check_output_dir(output_dir: str | Path, *, overwrite: bool) -> None:
    """Make the folder and check that files can be written and renamed in it.

    Raises:
        NotADirectoryError: If `output_dir` is a file.
        FileExistsError: If it holds files and `overwrite` is False.
        PermissionError: If it cannot be written.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        message = f"output_dir is {str(output_dir)!r}, which is a file; name a folder"
        raise NotADirectoryError(message)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-", delete=False) as probe:
            path = Path(probe.name)
        path.rename(path.with_suffix(".renamed")).unlink()
    except OSError as error:
        message = (
            f"output_dir is {str(output_dir)!r}, which cannot be written ({error.strerror}); name a "
            "folder that can"
        )
        raise PermissionError(message) from error
    if not overwrite and any(folder.iterdir()):
        message = (
            f"output_dir is {str(output_dir)!r}, which holds files of another run; name an empty "
            "folder, or pass overwrite=True"
        )
        raise FileExistsError(message)


def position_capacity(model: "PreTrainedModel") -> int | None:
    """Return how many tokens the model has positions for; None where positions are not a table.

    RoBERTa and its kin count positions from the padding id: of 514, two are never used.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> position_capacity(tiny_model(tiny_tokenizer("byte_bpe"), architecture="roberta"))
        512
    """
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    return None


def _measure(dataset: "datasets.Dataset | Sequence[dict[str, Any]]") -> tuple[int, int]:
    """Return the longest row in tokens and the highest token id."""
    if not isinstance(dataset, datasets.Dataset):
        rows = [row["input_ids"] if "input_ids" in row else row["masked_input_ids"] for row in dataset]
        return max(map(len, rows)), max((int(max(row)) for row in rows if len(row)), default=0)
    name = "input_ids" if "input_ids" in dataset.column_names else "masked_input_ids"
    if name not in dataset.column_names:
        message = f"columns are {dataset.column_names}, without 'input_ids'; tokenize the documents first"
        raise ValueError(message)
    longest = highest = 0
    for table in dataset.select_columns(name).with_format("arrow").iter(batch_size=10_000):
        longest = max(longest, pc.max(pc.list_value_length(table[name])).as_py() or 0)
        highest = max(highest, pc.max(pc.list_flatten(table[name])).as_py() or 0)
    return longest, highest
