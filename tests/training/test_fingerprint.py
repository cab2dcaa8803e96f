"""Another run is refused by name and values, and the same one known again."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from mlmadapt import WholeWordMaskingCollator
from mlmadapt.testing import tiny_model, tiny_rows
from mlmadapt.training.fingerprint import list_differences
from tests.scripts.tiny_run import SAVING, TinyRun

if TYPE_CHECKING:
    from pathlib import Path

# PEFT asks for it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints."""
    run = TinyRun(tmp_path_factory.mktemp("finished"))
    run.eval_rows = run.rows[:4]
    run.train(**SAVING)
    return run.folder


def swap(run: TinyRun, what: str) -> None:
    """Put something else into a run."""
    if what == "rows":
        run.rows = tiny_rows(run.tokenizer, 12, seed=1)
    elif what == "fewer rows":
        run.rows = run.rows[:-1]
    elif what == "tokenizer":
        run.tokenizer.add_tokens(["neologism"])
        run.model.resize_token_embeddings(len(run.tokenizer), mean_resizing=False)
    elif what == "model":
        run.model = tiny_model(run.tokenizer, architecture="distilbert")
    elif what == "optimizer":
        run.objects["optimizer"] = torch.optim.SGD(run.model.parameters(), lr=5e-5)
    elif what == "evaluation rows":
        run.eval_rows = run.rows[:5]
    else:
        run.collator.wwm_probability = 0.3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"learning_rate": 2e-4}, "learning_rate was 0.001, is 0.0002"),
        ({"per_device_train_batch_size": 2}, r"rows per step .* was 4, is 2"),
        ({"gradient_accumulation_steps": 2}, r"rows per step .* was 4, is 8"),
        (
            {"num_train_epochs": 2},
            "num_train_epochs was 1, is 2; .*, or train on from its model in",
        ),
        ("rows", "train_dataset: content changed;"),
        ("fewer rows", "train_dataset: rows was 12, is 11; train_dataset: content changed;"),
        ("tokenizer", "tokenizer: tokens was 475, is 476"),
        (
            "model",
            "model: class was 'BertForMaskedLM', is 'DistilBertForMaskedLM'; .*; [0-9]+ more;",
        ),
        ("collator", "data_collator: wwm_probability was 0.2, is 0.3;"),
        ("optimizer", "optimizer was None, is 'SGD'"),
        ("evaluation rows", "eval_dataset: rows was 4, is 5;"),
    ],
)
def test_another_run_is_refused_by_name_and_values(
    run: TinyRun, finished: Path, change: dict[str, Any] | str, expected: str
) -> None:
    """Settings, data or model that a checkpoint was not made with are an error, not a mixture."""
    run.folder, run.eval_rows = finished, run.rows[:4]
    files = {path: path.read_bytes() for path in finished.rglob("*.safetensors")}
    settings = {**SAVING, "resume_from_checkpoint": True}
    if isinstance(change, dict):
        settings |= change
    else:
        swap(run, change)
    message = rf"checkpoint-3 is of another run: .*{expected}"
    with pytest.raises(ValueError, match=message) as raised:
        run.train(**settings)
    assert len(str(raised.value)) <= 300
    assert {path: path.read_bytes() for path in finished.rglob("*.safetensors")} == files


class Collating:
    """A collator that is not a dataclass; what is private may change as it works."""

    def __init__(self, run: TinyRun, probability: float) -> None:
        self.tokenizer, self.probability, self._calls = run.tokenizer, probability, 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Mask as ours does."""
        self._calls += 1
        return WholeWordMaskingCollator(self.tokenizer, wwm_probability=self.probability)(rows)


def collate(rows: Any, **settings: Any) -> Any:
    """Stand in for a function with settings."""


def ours(name: str, value: Any) -> Any:
    """Make what puts our collator with a setting into a run."""
    return lambda run: setattr(
        run, "collator", WholeWordMaskingCollator(run.tokenizer, **{name: value})
    )


def theirs(make: Any) -> Any:
    """Make what puts another collator into a run."""
    return lambda run: setattr(run, "collator", make(run))


def in_bert(change: Any) -> Any:
    """Make what changes a module of the model."""
    return lambda run: change(run.model.bert)


def change_labels(run: TinyRun) -> None:
    """Change a row that is evaluated."""
    run.eval_rows = [{**run.rows[0], "input_ids": [9] * len(run.rows[0]["input_ids"])}]


def change_words(run: TinyRun) -> None:
    """Make one word of a row."""
    run.rows[0] = {**run.rows[0], "word_ids": [0] * len(run.rows[0]["word_ids"])}


def activate(bert: Any) -> None:
    """Have a layer use another function."""
    bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


# By the field that is to differ: what two runs are changed by.
CHANGES: dict[str, list[tuple[Any, Any]]] = {
    "model_settings": [
        (None, in_bert(lambda bert: setattr(bert.embeddings.dropout, "p", 0.3))),
        (None, in_bert(activate)),
        (None, lambda run: setattr(run.model.config, "num_attention_heads", 1)),
        (partial(TinyRun.adapt, lora_alpha=8), partial(TinyRun.adapt, lora_alpha=16)),
    ],
    "model": [
        (None, in_bert(lambda bert: bert.encoder.layer[0].requires_grad_(requires_grad=False))),
        (None, lambda run: run.model.to(torch.bfloat16)),
    ],
    "eval_dataset": [(None, change_labels)],
    "train_dataset": [(None, change_words)],
    "data_collator": [
        *(
            (ours(name, first), ours(name, second))
            for name, first, second in (
                ("word_weights", np.ones(475), np.arange(475.0)),
                ("word_weights", len, hash),
                ("wwm_probability", {0.0: 0.3, 0.8: 0.15}, {0.0: 0.3, 0.80001: 0.15}),
                ("wwm_probability", lambda done: 0.2 - done / 10, lambda done: 0.2 - done / 11),
            )
        ),
        (theirs(lambda run: Collating(run, 0.2)), theirs(lambda run: Collating(run, 0.3))),
        (
            theirs(lambda _: partial(collate, probability=0.2)),
            theirs(lambda _: partial(collate, probability=0.3)),
        ),
    ],
}


@pytest.mark.parametrize(
    ("name", "changes"), [(name, pair) for name, pairs in CHANGES.items() for pair in pairs]
)
def test_another_run_has_another_fingerprint(
    tmp_path: Path, name: str, changes: tuple[Any, Any]
) -> None:
    """In the field that names what is other, and in no other; the same change gives the same."""
    fingerprints = []
    for change in (*changes, changes[-1]):
        run = TinyRun(tmp_path)
        run.eval_rows = run.rows[:1]
        if change is not None:
            change(run)
        fingerprints.append(run.fingerprint())
    first, second, again = fingerprints
    assert {difference.split(":")[0] for difference in list_differences(first, second)} == {name}
    assert again == second


def test_the_same_run_has_the_same_fingerprint(run: TinyRun) -> None:
    """After a run, from tensors or lists, and with another name and version of the model."""
    run.collator, run.eval_rows = Collating(run, 0.2), run.rows[:4]
    before = run.fingerprint()
    run.train(gradient_checkpointing=True)
    run.model.config._name_or_path = "another/name"
    run.model.config.transformers_version = "4.0"
    run.rows = [{name: torch.as_tensor(row[name]) for name in sorted(row)} for row in run.rows]
    assert run.fingerprint() == before
    assert json.loads(json.dumps(before)) == before


def test_what_differs_is_named_by_its_place(run: TinyRun) -> None:
    """A setting of the model's or the collator's, with both values, and not a hash of all."""
    before = run.fingerprint()
    run.model.config.hidden_dropout_prob = 0.25
    run.collator = WholeWordMaskingCollator(
        run.tokenizer, mask_replace_prob=0.8, seed=3, word_weights=len
    )
    after = run.fingerprint()
    assert list_differences(before, after) == [
        "model_settings: hidden_dropout_prob was 0.1, is 0.25",
        "data_collator: mask_replace_prob was 1.0, is 0.8",
        "data_collator: word_weights changed",
        "data_collator: seed was None, is 3",
    ]
    assert "data_collator: word_weights changed" in list_differences(after, before)


@pytest.mark.parametrize("change", [None, 0, 11, "fewer"])
def test_another_stream_is_told_when_a_run_goes_on(
    run: TinyRun, caplog: pytest.LogCaptureFixture, change: Any
) -> None:
    """By all rows that are looked at before the first step; the same one is not."""
    rows = list(run.rows)
    run.rows = iter(rows)
    settings = {**SAVING, "max_steps": 2}
    run.train(**settings)
    if change is not None:
        place = 0 if change == "fewer" else change
        rows[place : place + 1] = [] if change == "fewer" else [rows[place - 1]]
    run.rows, run.model = iter(rows), tiny_model(run.tokenizer)
    caplog.clear()
    run.train(**settings, resume_from_checkpoint=True)
    told = "checkpoint-2 is resumed, but train_dataset: first rows changed: is it this stream?"
    assert (told in caplog.text) == (change is not None)
