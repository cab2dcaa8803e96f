"""What makes a resumed run the same run.

Most loops continue a checkpoint with another learning rate, batch size or dataset without a word,
and train something that neither setting describes. Here a fingerprint, all that decides the
outcome, is stored beside the weights and compared field by field.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from typing import Any

from accelerate.utils import gather_object

from mlmadapt._types import Model, Tokenizer
from mlmadapt.data.table import split_part
from mlmadapt.masking.rates import sample_rates
from mlmadapt.model.checks import unwrap
from mlmadapt.model.evaluation import argument_of
from mlmadapt.training.batches import OpenStream
from mlmadapt.training.config import TrainingConfig

# Settings that may differ: where things are written, what is shown, and how rows are cut into
# batches, as long as a step has the same rows.
_FREE = {"output_dir", "overwrite", "resume_from_checkpoint"}
_FREE |= {"save_strategy", "save_steps", "save_total_limit"}
_FREE |= {"report_to", "disable_tqdm", "dataset_name", "fill_mask"}
_FREE |= {"push_to_hub", "hub_model_id", "hub_private_repo"}
_FREE |= {"per_device_train_batch_size", "per_device_eval_batch_size", "dataloader_num_workers"}
_FREE |= {"gradient_accumulation_steps", "gradient_checkpointing", "torch_compile"}
_ROWS_LOOKED_AT = 64
# Told, not refused: a stream may be shuffled anew.
OTHER_STREAM = "train_dataset: first rows changed"
# What the configuration of a model or an adapter says about where it came from and was saved.
_ORIGINS = {"architectures", "dtype", "torch_dtype", "revision", "inference_mode"}


def describe_run(
    config: TrainingConfig,
    *,
    model: Model,
    tokenizer: Tokenizer,
    data_collator: Any,
    replaced: Mapping[str, str],
    datasets: Mapping[str, Any],
    rows_per_step: int,
) -> dict[str, Any]:
    """Return the fingerprint of a run: what decides its outcome, in values that JSON can hold.

    `replaced` names the classes of the caller's objects that take the place of settings.
    """
    state = model.state_dict(keep_vars=True).items()
    weights = [(name, list(x.shape), str(x.dtype), x.requires_grad) for name, x in state]
    bare = unwrap(model)
    adapters = [*map(_without_origins, getattr(model, "peft_config", {}).values())]
    # Both, since dropout may have been set in the modules, whose text does not tell their heads.
    settings = {"modules": [re.sub(" at 0x[0-9a-f]+", "", repr(bare))], "adapters": adapters}
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        **{name: value for name, value in asdict(config).items() if name not in _FREE},
        "rows per step (processes x batch x accumulation)": rows_per_step,
        "model": _shorten({"class": type(bare).__name__, "weights": weights}),
        "model_settings": _shorten({**settings, **_without_origins(bare.config)}),
        "tokenizer": _shorten({"tokens": len(tokenizer), "vocabulary": vocabulary}),
        "data_collator": _shorten(_describe_collator(data_collator)),
        **replaced,
        **{argument_of(name): _shorten(_describe_rows(rows)) for name, rows in datasets.items()},
    }


def list_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return each field in which two fingerprints differ, with both values unless they are hashes.

    Examples:
        >>> list_differences({"seed": 1, "max_steps": 9}, {"seed": 2, "max_steps": 9})
        ['seed was 1, is 2']
    """
    found = []
    for name in {**current, **stored}:
        was, now = stored.get(name), current.get(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += [f"{name}: {difference}" for difference in list_differences(was, now)]
        elif was != now:
            is_hash = " #" in f"{was} {now}"
            found.append(f"{name} changed" if is_hash else f"{name} was {was!r}, is {now!r}")
    return found


def check_same_everywhere(settings: Mapping[str, Any]) -> None:
    """Check that all processes were given the same, or they would wait for each other for ever.

    Raises:
        ValueError: If not, on all processes.
    """
    for rank, others in enumerate(gather_object([settings])):
        differences = [text for text in list_differences(settings, others) if text != OTHER_STREAM]
        if differences:
            raise ValueError(
                f"process {rank} trains otherwise than another ({'; '.join(differences)[:200]}); "
                "give all processes the same rows and settings"
            )


def _without_origins(config: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in _ORIGINS and not name.endswith(("name_or_path", "_version"))
    }


def _describe_collator(data_collator: Any) -> dict[str, Any]:
    settings = getattr(data_collator, "__dict__", {})
    if is_dataclass(data_collator):
        names = [field.name for field in fields(data_collator) if field.name != "tokenizer"]
        settings = {name: getattr(data_collator, name) for name in names}
    elif isinstance(data_collator, partial):
        settings = {"function": [data_collator.func, data_collator.args], **data_collator.keywords}
    settings = {name: settings[name] for name in settings if name[:1] != "_"}  # those may change
    schedule = settings.get("wwm_probability")
    if isinstance(schedule, Mapping):
        settings["wwm_probability"] = str(dict(schedule))
    elif callable(schedule):  # by its rates, since all lambdas have one name
        settings["rates"] = sample_rates(schedule)
    name = getattr(data_collator, "__qualname__", type(data_collator).__qualname__)
    return {"class": name, **settings}


def _describe_rows(rows: Any) -> dict[str, Any]:
    if isinstance(rows, OpenStream):
        part = split_part(rows.dataset)
        kind = f"a stream, {type(rows.dataset).__name__}"
        first = [sorted(row.items()) for row in rows.peek()]
        return {"kind": kind, "parts": part and part[1], "first rows": first}
    # A sample spread over all rows: to read a whole large dataset would take longer than to resume.
    places = sorted({i * (len(rows) - 1) // _ROWS_LOOKED_AT for i in range(_ROWS_LOOKED_AT + 1)})
    return {"rows": len(rows), "content": [sorted(rows[place].items()) for place in places]}


def _shorten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put a hash in the place of all that is no number, word or None."""
    short = dict(settings)
    for name, value in settings.items():
        if not isinstance(value, int | float | str | None):
            text = json.dumps(value, skipkeys=True, default=_in_json)
            digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            short[name] = f"{type(value).__name__} #{digest}"
    return short


def _in_json(value: Any) -> Any:
    """Return what JSON can hold of a value, the same in every process."""
    if hasattr(value, "tolist"):  # arrays and tensors
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return getattr(value, "__qualname__", type(value).__qualname__)
