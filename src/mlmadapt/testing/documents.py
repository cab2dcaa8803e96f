"""An assertion about documents that share a row, for tests of any model that parts them."""
# ruff: noqa: PLC0415 (torch is loaded by the functions that need it)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch


def assert_documents_isolated(
    model: torch.nn.Module, rows: Iterable[Mapping[str, Any]], *, atol: float = 1e-5
) -> None:
    """Assert that each document of packed rows has the logits that it has alone.

    A row goes through the model with its ``document_ids``, then each of its documents without, from
    position 0 and in company of none.

    Args:
        model: Takes ``input_ids``, ``attention_mask`` and ``document_ids`` of shape ``(batch,
            sequence)`` and returns ``logits``: one under `isolate_documents`, or your own. Its mode
            and device are left as they are; dropout is off meanwhile.
        rows: Rows of `pack_texts`, or others with ``input_ids`` and ``document_ids``. Of the other
            columns, ``token_type_ids`` are used.
        atol: Largest difference between two logits; for 32 bits.

    Raises:
        AssertionError: With row, document, position and difference of the first fault.
        ValueError: If no row holds several documents.

    Examples:
        >>> from mlmadapt import isolate_documents
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> model = tiny_model(tiny_tokenizer())
        >>> rows = [{"input_ids": [7, 8, 9, 7], "document_ids": [0, 0, 1, 1]}]
        >>> with isolate_documents(model):
        ...     assert_documents_isolated(model, rows)
        >>> assert_documents_isolated(model, rows)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: row 0, document 0 of 2: the logits at its position 1 differ by 0... from \
those that it has alone; at most 1e-05 is allowed
    """
    __tracebackhide__ = True
    import torch

    from mlmadapt.model.checks import evaluation_mode

    device = next(model.parameters()).device
    is_packed = False

    def predict(columns: dict[str, torch.Tensor]) -> Any:
        mask = torch.ones_like(columns["input_ids"])
        return model(**columns, attention_mask=mask).logits[0].float()

    with evaluation_mode(model):
        for number, row in enumerate(rows):
            names = {"input_ids", "token_type_ids", "document_ids"} & row.keys()
            columns = {name: torch.as_tensor(row[name]).to(device)[None] for name in names}
            together = predict(dict(columns))
            documents = columns.pop("document_ids")[0]
            numbers = sorted(set(documents.tolist()))
            is_packed = is_packed or len(numbers) > 1
            for place, is_inside in enumerate(documents == document for document in numbers):
                alone = predict({name: values[:, is_inside] for name, values in columns.items()})
                differences = (together[is_inside] - alone).abs().amax(1)
                worst = int(differences.argmax())
                if not differences[worst] <= atol:
                    raise AssertionError(
                        f"row {number}, document {place} of {len(numbers)}: the logits at its "
                        f"position {worst} differ by {float(differences[worst]):.3g} from those "
                        f"that it has alone; at most {atol:g} is allowed"
                    )
    if not is_packed:
        raise ValueError("no row holds several documents; take rows from pack_texts")
