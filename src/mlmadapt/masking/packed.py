"""The attention mask of rows that hold several documents, which no model takes for an ordinary one.

transformers' models swallow arguments that they do not know, ``document_ids`` among them. A loop
without `isolate_documents` would train with documents that see each other, and nothing would tell.
"""

from typing import Any

import torch

# What keeps the type of a mask, and what gives an ordinary tensor or number.
_MOVING = {
    "__getitem__",
    "clone",
    "contiguous",
    "cpu",
    "cuda",
    "detach",
    "pin_memory",
    "record_stream",
}
_READING = {
    "__array__",
    "__eq__",
    "__format__",
    "__get__",  # an attribute, such as the shape
    "__len__",
    "__ne__",
    "__reduce_ex__",  # to and from worker processes
    "__repr__",
    "as_subclass",
    "dim",
    "equal",
    "is_pinned",
    "numel",
    "numpy",
    "size",
    "sum",
    "tolist",
    "unbind",
}


class PackedAttentionMask(torch.Tensor):
    """An attention mask that can be moved and read, and that raises where a model computes with it.

    `isolate_documents` takes it out before the model sees it;
    ``mask.as_subclass(torch.Tensor)`` makes an ordinary one of it.

    Examples:
        >>> mask = torch.ones(1, 4, dtype=torch.int64).as_subclass(PackedAttentionMask)
        >>> mask.to("cpu").sum()
        tensor(4)
        >>> 1 - mask
        Traceback (most recent call last):
            ...
        ValueError: rows of the batch hold several documents ('document_ids'), which this model ...
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Copy it; torch's own way computes with it."""
        return self.clone()

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Let a mask be moved and read, and refuse all else.

        Raises:
            ValueError: If a model without `isolate_documents` uses the mask.
        """
        name = func.__name__
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if name in _MOVING or (
            name == "to" and not any(isinstance(each, torch.dtype) for each in given)
        ):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if name in _READING:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  # as torch's own code does
                return func(*args, **kwargs)
        raise ValueError(
            "rows of the batch hold several documents ('document_ids'), which this model would let "
            "see each other; call isolate_documents(model) before the loop, or remove the column "
            "'document_ids' if documents are to be joined"
        )
