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

from mlmadapt._types import Model, Tokenizer
from mlmadapt.data.table import split_part
from mlmadapt.masking.rates import sample_rates
from mlmadapt.model.checks import unwrap
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
    configs = [bare.config, *getattr(model, "peft_config", {}).values()]
    # Both, since dropout may have been set in the modules, whose text does not tell their heads.
    modules = re.sub(" at 0x[0-9a-f]+", "", repr(bare))
    settings = [modules, *(_describe_config(config.to_dict()) for config in configs)]
    return {
        **{name: value for name, value in asdict(config).items() if name not in _FREE},
        "rows per step (processes x batch x accumulation)": rows_per_step,
        "model": f"{type(bare).__name__} {_digest(weights)}",
        "model_settings": f"configuration and modules {_digest(settings)}",
        "tokenizer": f"{len(tokenizer)} tokens {_digest(sorted(tokenizer.get_vocab().items()))}",
        "data_collator": _describe_collator(data_collator),
        **replaced,
        **{name: _describe_rows(rows) for name, rows in datasets.items()},
    }


def list_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return each field in which two fingerprints differ, with both values.

    Examples:
        >>> list_differences({"seed": 1, "max_steps": 9}, {"seed": 2, "max_steps": 9})
        ['seed was 1, is 2']
    """
    return [
        f"{name} was {stored.get(name)!r}, is {current.get(name)!r}"
        for name in {**current, **stored}
        if stored.get(name) != current.get(name)
    ]


def _describe_config(config: Mapping[str, Any]) -> list[Any]:
    return sorted(
        (name, value)
        for name, value in config.items()
        if name not in _ORIGINS and not name.endswith(("name_or_path", "_version"))
    )


def _describe_collator(data_collator: Any) -> str:
    name = getattr(data_collator, "__qualname__", type(data_collator).__qualname__)
    if not is_dataclass(data_collator):
        attributes = getattr(data_collator, "__dict__", {}).items()
        public = [item for item in attributes if not item[0].startswith("_")]  # the rest may change
        if isinstance(data_collator, partial):
            public = [data_collator.func, data_collator.args, *data_collator.keywords.items()]
        return f"{name} {json.dumps({'settings': _digest(public)})}" if public else str(name)
    settings = {field.name: getattr(data_collator, field.name) for field in fields(data_collator)}
    settings.pop("tokenizer", None)
    schedule = settings.get("wwm_probability")
    if isinstance(schedule, Mapping):
        settings["wwm_probability"] = str(dict(schedule))
    elif callable(schedule):  # by its rates, since all lambdas have one name
        settings["wwm_probability"] = f"{_in_json(schedule)} {_digest(sample_rates(schedule))}"
    for setting, value in settings.items():
        if not isinstance(value, int | float | str | None):
            settings[setting] = f"{type(value).__name__} {_digest(value)}"
    return f"{name} {json.dumps(settings, sort_keys=True)}"


def _describe_rows(dataset: Any) -> str:
    if not hasattr(dataset, "__len__"):
        part = split_part(dataset)
        return f"a stream, {type(dataset).__name__}" + (f", in {part[1]} parts" if part else "")
    # A sample spread over all rows: to read a whole large dataset would take longer than to resume.
    places = sorted({i * (len(dataset) - 1) // _ROWS_LOOKED_AT for i in range(_ROWS_LOOKED_AT + 1)})
    return f"{len(dataset)} rows {_digest([sorted(dataset[place].items()) for place in places])}"


def _digest(value: Any) -> str:
    text = json.dumps(value, skipkeys=True, default=_in_json)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _in_json(value: Any) -> Any:
    """Return what JSON can hold of a value, the same in every process."""
    if hasattr(value, "tolist"):  # arrays and tensors
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return getattr(value, "__qualname__", type(value).__qualname__)
