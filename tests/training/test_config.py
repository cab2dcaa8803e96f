"""The settings are checked where they are made."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from transformers import HfArgumentParser, TrainingArguments

from mlmadapt import TrainingConfig


@pytest.mark.parametrize(
    ("name", "value", "requirement"),
    [
        *[
            (name, 0, "1 or more")
            for name in (
                *("per_device_train_batch_size", "per_device_eval_batch_size", "save_total_limit"),
                *("gradient_accumulation_steps", "eval_steps", "save_steps"),
                "early_stopping_patience",
            )
        ],
        ("learning_rate", float("nan"), "a finite number, 0 or more"),
        ("learning_rate", -1e-5, "a finite number, 0 or more"),
        ("weight_decay", float("inf"), "a finite number, 0 or more"),
        ("max_grad_norm", -1, "a finite number, 0 or more"),
        ("warmup_steps", -1, "a finite number, 0 or more"),
        ("dataloader_num_workers", -1, "0 or more"),
        ("num_train_epochs", 0, "above 0"),
        ("logging_steps", 0, "a finite number above 0"),
        ("logging_steps", float("inf"), "a finite number above 0"),
        ("max_steps", 0, "above 0, or -1"),
        ("max_steps", -2, "above 0, or -1"),
        ("eval_strategy", "never", "'no', 'epoch', 'steps'"),
        ("save_strategy", "best", "'no', 'epoch', 'steps'"),
        ("mixed_precision", "fp8", "'no', 'bf16', 'fp16'"),
        ("lr_scheduler_type", "lineal", "one of .*'linear'"),
        ("lr_scheduler_kwargs", "min_lr=1", "a dict, or JSON of one"),
        ("lr_scheduler_kwargs", 5, "a dict, or JSON of one"),
        ("resume_from_checkpoint", 6, "True, a directory, or None"),
        # YAML reads 5e-5 as text and `no` as False; a step and a half would never be the last.
        ("max_steps", 2.5, "of type int"),
        ("max_steps", True, "of type int"),
        ("seed", None, "of type int"),
        ("per_device_train_batch_size", "8", "of type int"),
        ("learning_rate", "5e-5", "of type float"),
        ("learning_rate", False, "of type float"),
        ("overwrite", 1, "of type bool"),
        ("gradient_checkpointing", "false", "of type bool"),
        ("eval_strategy", False, r"of type Literal\['no', 'epoch', 'steps'\]"),
        ("save_total_limit", 1.0, r"of type int \| None"),
        ("output_dir", None, "of type str"),
        ("dataset_name", 7, r"of type str \| None"),
        ("fill_mask", "a [MASK]", r"of type list\[str\]"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_required(
    name: str, value: Any, requirement: str
) -> None:
    """The argument, the value seen and what it must be."""
    seen = re.escape(f"{name} is {value!r}; it must be ")
    with pytest.raises(ValueError, match=f"^{seen}.*{requirement}"):
        TrainingConfig(**{name: value})


def test_settings_of_the_right_type_come_from_anywhere(tmp_path: Path) -> None:
    """Whole numbers where fractions are allowed, paths, and what JSON has."""
    settings = {
        "output_dir": "out",
        "learning_rate": 1,
        "num_train_epochs": 2,
        "save_total_limit": None,
        "resume_from_checkpoint": True,
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "fill_mask": ["a [MASK]"],
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    parser = HfArgumentParser(TrainingConfig)  # type: ignore[arg-type]
    (parsed,) = parser.parse_json_file(str(tmp_path / "settings.json"))
    assert parsed == TrainingConfig(**{**settings, "output_dir": Path("out")})  # type: ignore[arg-type]
    assert parsed.output_dir == "out"


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "no", "save_strategy": "no"},
        {"eval_strategy": "epoch", "save_strategy": "steps"},
        {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 4},
    ],
)
def test_the_best_model_needs_a_checkpoint_at_each_evaluation(settings: dict[str, Any]) -> None:
    """Otherwise the best evaluation is of weights that nobody has."""
    with pytest.raises(ValueError, match="load_best_model_at_end needs a checkpoint at each"):
        TrainingConfig(load_best_model_at_end=True, **settings)
    TrainingConfig(load_best_model_at_end=True)


def test_names_are_those_of_training_arguments() -> None:
    """What is not there is ours for a reason."""
    theirs = {field.name for field in fields(TrainingArguments)}
    ours = {field.name for field in fields(TrainingConfig)}
    # Two flags there, `bf16` and `fp16`; gone since transformers 5; a callback of `Trainer`; the
    # name that the scripts of transformers give it; nowhere.
    # In transformers 5.0, it was a flag: `group_by_length`.
    later = (
        {"train_sampling_strategy"}
        if Version(transformers.__version__) < Version("5.23")
        else set()
    )
    assert ours - theirs - later == {
        "mixed_precision",
        "overwrite",
        "early_stopping_patience",
        "dataset_name",
        "fill_mask",
    }


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("bf16", True, "mixed_precision='bf16'"),
        ("fp16", True, "mixed_precision='fp16'"),
        ("warmup_ratio", 0.1, "warmup_steps, of which a value below 1 is a share of all steps"),
        ("evaluation_strategy", "steps", "eval_strategy"),
        ("overwrite_output_dir", True, "output_dir or overwrite"),
        ("optim", "adamw_torch", "an optimizer to accelerate_train"),
        ("learningrate", 1e-4, "learning_rate"),
        ("xyz", 1, "one of output_dir, overwrite, resume_from_checkpoint, num_train_epochs"),
    ],
)
def test_a_name_that_is_not_ours_is_answered_with_one_that_is(
    name: str, value: Any, ours: str
) -> None:
    """As of transformers, of an older version of it, or misspelt."""
    message = f"{name} is {value!r}, but TrainingConfig has no {name}; pass {ours}"
    with pytest.raises(TypeError, match=re.escape(message)):
        TrainingConfig(**{"output_dir": "out", name: value})
    with pytest.raises(TypeError, match="positional"):
        TrainingConfig("out")  # type: ignore[misc]


def test_the_signature_is_that_of_the_fields() -> None:
    """For editors and the reference; settings are copied, pickled and inherited like any other."""
    names = [field.name for field in fields(TrainingConfig)]
    assert list(inspect.signature(TrainingConfig).parameters) == names
    config = TrainingConfig(seed=7)
    assert pickle.loads(pickle.dumps(config)) == copy.copy(config) == config  # noqa: S301
    assert replace(config, seed=42) == TrainingConfig()

    @dataclass(frozen=True, kw_only=True)
    class Ours(TrainingConfig):
        more: int = 1

    assert Ours(seed=7, more=2).seed == 7
    with pytest.raises(TypeError, match="Ours has no fewer; pass"):
        Ours(fewer=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (["tensorboard", "trackio"], "tensorboard,trackio"),
        (("wandb",), "wandb"),
        ([], "none"),
        ("none", "none"),
    ],
)
def test_trackers_come_in_a_list_too(value: Any, taken: str) -> None:
    """As in `TrainingArguments`."""
    assert TrainingConfig(report_to=value).report_to == taken


def test_options_are_described_by_the_docstring() -> None:
    """Of each field, to `HfArgumentParser`."""
    helped = {field.name: field.metadata["help"] for field in fields(TrainingConfig)}
    assert min(map(len, helped.values())) > 15
    assert helped["output_dir"] == "Directory of the final model."
    assert '"no", "bf16" or, on a GPU, "fp16"; None leaves' in helped["mixed_precision"]


def test_a_command_line_makes_them() -> None:
    """Every field can be given to `HfArgumentParser`."""
    arguments = "--output_dir out --learning_rate 1e-4 --warmup_steps 0.1 --overwrite"
    arguments += " --mixed_precision bf16 --save_total_limit 2 --eval_strategy no"
    arguments += " --resume_from_checkpoint out/checkpoint-3"
    parser = HfArgumentParser(TrainingConfig)  # type: ignore[arg-type]
    (parsed,) = parser.parse_args_into_dataclasses(arguments.split())
    assert parsed == TrainingConfig(
        output_dir="out",
        learning_rate=1e-4,
        warmup_steps=0.1,
        overwrite=True,
        mixed_precision="bf16",
        save_total_limit=2,
        eval_strategy="no",
        resume_from_checkpoint="out/checkpoint-3",
    )
