"""What would go wrong later is told before the first step, and a model is given back as it was."""

from __future__ import annotations

import gc
import logging
import math
import re
import weakref
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import (
    BertForPreTraining,
    BertForTokenClassification,
    BertModel,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    default_data_collator,
    get_scheduler,
)

from mlmadapt import TrainingConfig, WholeWordMaskingCollator, accelerate_train, evaluate_mlm
from mlmadapt.masking.selection import warn_of_unknown
from mlmadapt.testing import tiny_model, tiny_rows, tiny_tokenizer
from mlmadapt.training import prepare
from mlmadapt.training.prepare import check_whole, make_optimizer, make_scheduler
from tests.scripts.short_run import freeze
from tests.scripts.tiny_run import CountedStream, TinyRun, equal, logged, weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# PEFT asks for it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def _one_precision() -> Iterator[None]:
    """Accelerate's shared state, as a new process has it, before the test and after."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def count_hooks(model: nn.Module) -> int:
    """Count the hooks of a model and its modules."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def refuse(run: TinyRun, error: type[Exception], match: str, **settings: Any) -> None:
    """Check that a run is refused before it touches the disk or the model."""
    before, hooks = weights(run.model), count_hooks(run.model)
    with pytest.raises(error, match=match):
        run.train(**settings)
    assert not run.folder.exists()
    assert count_hooks(run.model) == hooks
    assert equal(weights(run.model), before)


def test_rows_that_do_not_fit_are_named(run: TinyRun) -> None:
    """Nought steps would be a success that trained nothing; the set is named as the dict does."""
    rows, refused = run.rows, partial(refuse, run, ValueError)
    run.rows = []
    refused("train_dataset has no rows; group_texts drops")
    run.rows, run.eval_rows = rows, {"domain": rows, "general": []}
    refused(r"^eval_dataset\['general'\] has no rows; group_texts drops")
    run.rows, run.eval_rows = rows, []
    refused("^eval_dataset has no rows; group_texts drops")
    run.eval_rows = None
    run.rows = [{name: values * 200 for name, values in row.items()} for row in rows]
    length = max(len(row["input_ids"]) for row in run.rows)
    refused(f"row of {length} tokens, the model has positions for 512; .* chunk_size=512")
    run.rows = [{"input_ids": [2, 900, 3], "word_ids": [-1, 0, -1]}]
    refused("token id 900, the model's embedding 475")
    without = [{name: row[name] for name in row if name != "word_ids"} for row in rows]
    for run.rows, run.eval_rows in ((without, None), (rows, without)):
        with pytest.raises(ValueError, match=r"has no 'word_ids', .* with tokenize_with_word_ids"):
            run.train()


def test_what_goes_by_an_evaluation_needs_one(run: TinyRun) -> None:
    """There is no best model without an evaluation set."""
    for setting in ({"early_stopping_patience": 1}, {"load_best_model_at_end": True}):
        settings = {"save_strategy": "epoch", **setting}
        message = "load_best_model_at_end go by an eval_dataset; pass one"
        refuse(run, ValueError, message, **settings)


def test_weights_in_sixteen_bits(run: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    """float16 overflows and bfloat16 loses most updates; both name `model.float()`."""
    run.model.to(torch.float16)
    refuse(run, ValueError, r"weights in float16, .*; call model\.float\(\)")
    run.model.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, "mlmadapt"):
        run.train()
    assert "weights in bfloat16, in which most updates are lost; call model.float()" in caplog.text


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16])
def test_adapters_over_a_base_in_sixteen_bits(
    run: TinyRun, base: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """A frozen base takes no update, so that its type does not matter."""
    run.model.to(base)
    run.adapt()
    types = {(weight.dtype, weight.requires_grad) for weight in run.model.parameters()}
    assert types == {(base, False), (torch.float32, True)}
    assert run.train().global_step == 3
    assert "weights in" not in caplog.text


def test_an_adapter_that_transformers_added_is_trained(run: TinyRun) -> None:
    """`add_adapter` puts it into the model itself, which has no `get_base_model` then."""
    run.model.add_adapter(LoraConfig(target_modules=["query"], r=2))
    run.train()
    assert (run.folder / "adapter_model.safetensors").exists()
    assert "An adapter of `BertForMaskedLM`" in (run.folder / "README.md").read_text()


def test_quantised_weights_need_an_adapter(run: TinyRun) -> None:
    """As `BitsAndBytesConfig` and others leave them."""
    run.model.is_quantized = True
    message = r"BertForMaskedLM is quantised, .* drop quantization_config, or .* peft\.get_"
    refuse(run, ValueError, message)
    run.adapt()
    assert run.train().global_step == 3


def headless(kind: Any) -> Any:
    """Make a model of another class with the tiny BERT's configuration."""
    return kind(tiny_model(tiny_tokenizer()).config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(headless, BertModel), " BertModel has no prediction head, as AutoModel loads it"),
        (partial(headless, BertForPreTraining), " BertForPreTraining does not predict a token"),
        (
            partial(headless, BertForTokenClassification),
            r" BertForTokenClassification does not predict .* shape \(\d+, \d+, 2\)",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=475, n_embd=16, n_layer=1, n_head=1)),
            " GPT2LMHeadModel is a causal language model, which shifts its labels",
        ),
        (lambda: nn.DataParallel(headless(BertModel)), r"\.module BertModel has no prediction"),
        (lambda: nn.Linear(1, 1), " Linear is not one of transformers"),
        (lambda: tiny_model(tiny_tokenizer()).to("meta"), " BertForMaskedLM is on the device 'met"),
    ],
)
def test_a_model_that_does_not_predict_masks_is_named(
    run: TinyRun, make: Any, message: str
) -> None:
    """With its class and the cure, in training and evaluation alike."""
    run.model = make()
    message = f"model{message}.*AutoModelForMaskedLM"
    with pytest.raises(ValueError, match=message):
        run.train()
    assert not list(run.folder.glob("[!.]*"))
    with pytest.raises(ValueError, match=message):
        evaluate_mlm(run.model, freeze(run.rows), tokenizer=run.tokenizer)


def test_parts_of_two_models_are_named_before_a_folder_is_made(run: TinyRun) -> None:
    """A tokenizer of another model is not answered with a resizing alone, nor a collator of it."""
    first, other = run.tokenizer, tiny_tokenizer("byte_bpe")
    run.collator = WholeWordMaskingCollator(other)
    refuse(run, ValueError, r"data_collator was made with another tokenizer: .* 512")
    run.tokenizer = other
    message = (
        r"tokenizer \(\w+\) has 512 tokens, the model \(BertForMaskedLM\) .* 475; load the mod"
    )
    refuse(run, ValueError, message)
    run.tokenizer = run.collator.tokenizer = first
    run.tokenizer.add_tokens(["neologism", "hapax"])
    refuse(run, ValueError, r"477 tokens, .* for 475; .*resize_token_embeddings\(477\)")


@pytest.mark.filterwarnings("ignore:.log_with:UserWarning")
def test_a_tracker_that_is_not_installed_is_refused(run: TinyRun) -> None:
    """Accelerate goes on without it, and hours later there is no log."""
    message = r"report_to is 'comet_ml', but \['comet_ml'\] is not installed; pip install it"
    refuse(run, ValueError, message, report_to=["comet_ml"])


def test_weights_that_are_not_finite_are_named(run: TinyRun) -> None:
    """Before the first step, and not as a learning rate that is too high."""
    with torch.no_grad():
        run.model.bert.embeddings.word_embeddings.weight[7:] = torch.nan
    with pytest.raises(ValueError, match=r"in bert\..*\.word_embeddings\.weight before any step"):
        run.train()
    assert not run.folder.exists()


def test_an_optimizer_of_another_model_is_refused(
    run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that was made before the model had new words; of a part of it, it is told."""
    optimizer = torch.optim.AdamW(tiny_model(run.tokenizer).parameters())
    run.objects["optimizer"] = optimizer
    refuse(run, ValueError, "optimizer is AdamW, with 0 of the 42 weights")
    run.objects["optimizer"] = torch.optim.AdamW(run.model.cls.parameters(), lr=1e-3)
    run.train()
    assert "with 6 of the 42 weights of the model that are to be trained" in caplog.text


@pytest.mark.parametrize("config", [{"max_steps": 1}, SimpleNamespace(max_steps=1)])
def test_settings_of_another_kind_are_refused(run: TinyRun, config: Any) -> None:
    """A dict, or the `TrainingArguments` of a script for `Trainer`."""
    message = f"config is a {type(config).__name__}; it must be a TrainingConfig, whose settings"
    with pytest.raises(TypeError, match=message):
        accelerate_train(
            run.model, run.rows, tokenizer=run.tokenizer, data_collator=run.collator, config=config
        )


def words_of(*words: int) -> dict[str, list[int]]:
    """Make a row of three tokens that belong to these words."""
    return {"input_ids": [7, 8, 9], "word_ids": list(words)}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("make", [list, Dataset.from_list, iter])
def test_rows_without_a_word_are_refused(run: TinyRun, make: Any, batch_size: int) -> None:
    """As of a script that the vocabulary does not know; one word anywhere is enough."""
    settings = {"max_steps": 2, "per_device_train_batch_size": batch_size, "overwrite": True}
    empty = [words_of(-1, -1, -1)] * 7
    run.rows = make(empty)
    message = "train_dataset has no row with a word, so that nothing is to be predicted; tokenize"
    with pytest.raises(ValueError, match=message):
        run.train(**settings)
    run.rows = make([*empty, words_of(-1, 0, 1)])
    result = run.train(**settings)
    logs = [entry for entry in result.history if "grad_norm" in entry]
    masked = [step for step, entry in enumerate(logs) if entry["grad_norm"]]
    assert [step for step, entry in enumerate(logs) if "loss" in entry] == masked
    assert len(logs) == 2


@pytest.mark.parametrize(
    ("unknown", "said"), [(0, None), (1, None), (3, "2 %"), (100, "50 %"), (200, "100 %")]
)
def test_the_share_of_unknown_words_is_told(
    run: TinyRun, caplog: pytest.LogCaptureFixture, unknown: int, said: str | None
) -> None:
    """Once, where it is above 1 %, of rows that are spread over all: those at the end count too."""
    words = [*range(100)]
    known: Any = {"input_ids": [2, *[7, 8] * 50, 3], "word_ids": [-1, *words, -1]}
    last = {**known, "input_ids": [2, *[1] * min(unknown, 100), *[7] * max(100 - unknown, 0), 3]}
    first = {**known, "input_ids": [2, *[1] * 100, 3]} if unknown == 200 else known
    for rows in ([first, last], Dataset.from_list([first, last])):
        caplog.clear()
        warn_of_unknown(rows, run.tokenizer)
        warn_of_unknown([{"input_ids": [1, 1, 1]}], run.tokenizer)  # no words to tell by
        message = f"{said} of the words of train_dataset hold [UNK], which .* by extend_vocabulary"
        assert len(caplog.records) == bool(said)
        assert said is None or re.search(re.escape(message).replace(r"\.\*", ".*"), caplog.text)
        assert len(caplog.text) < 300
    run.rows = [last, known] * 2
    caplog.clear()
    result = run.train()
    assert caplog.text.count("of the words of train_dataset hold") == bool(said)
    assert all(math.isfinite(loss) for loss in logged(result, "loss"))


def test_a_model_that_only_knows_the_unknown_is_not_praised(run: TinyRun) -> None:
    """Chinese by an English vocabulary is mostly [UNK], which is easily guessed: it counts not."""
    row: Any = {"input_ids": [2, *[1, 1, 7, 8, 9] * 20, 3], "word_ids": [-1, *range(100), -1]}
    run.rows = run.eval_rows = [row] * 4
    with torch.no_grad():
        run.model.get_output_embeddings().bias[1] += 9
    initial = run.train().initial
    assert initial.loss > 8
    assert initial.accuracy == 0


def test_all_rows_say_whether_they_are_frozen(run: TinyRun) -> None:
    """Empty ones at the start hide no frozen ones."""
    empty: Any = {"input_ids": [2, 3], "labels": [-100, -100]}
    frozen = [{name: row[f"masked_{name}"] for name in empty} for row in freeze(run.rows)]
    run.eval_rows = {"domain": [empty] * 30 + frozen}
    targets = sum(label != -100 for row in frozen for label in row["labels"])
    assert run.train().initial.masked_tokens == targets


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_frozen_rows_are_trained_as_they_are(run: TinyRun, tmp_path: Path, kind: str) -> None:
    """By all collators, of lists and of a dataset that kept its words: each epoch has the masks."""
    frozen = [
        {**{name.removeprefix("masked_"): new[name] for name in new}, "word_ids": old["word_ids"]}
        for new, old in zip(freeze(run.rows), run.rows, strict=True)
    ]
    targets = sum(label != -100 for row in frozen for label in row["labels"])
    for number, rows in enumerate((frozen, Dataset.from_list(frozen))):
        other = TinyRun(tmp_path / str(number))
        other.rows = rows
        if kind == "transformers":
            other.collator = DataCollatorForLanguageModeling(other.tokenizer)
        assert other.train(num_train_epochs=2).masked_tokens_seen == 2 * targets


@pytest.mark.parametrize(
    "collator",
    [
        default_data_collator,
        DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        DataCollatorForTokenClassification(tiny_tokenizer()),
    ],
)
def test_a_collator_that_hides_nothing_is_refused(run: TinyRun, collator: Any) -> None:
    """By its first batch: each token would be a target that the model sees."""
    run.collator = collator
    ids = [row["input_ids"][:8] for row in tiny_rows(run.tokenizer, 20)]
    run.rows = [{"input_ids": row, "labels": row} for row in ids if len(row) == 8]
    with pytest.raises(ValueError, match=r"returned \d+ labels .* hid 0 tokens; use a collator th"):
        run.train()


def test_rows_with_masks_need_no_collator_that_masks(run: TinyRun) -> None:
    """By its first batch, too: the same collator is fine where the rows hide something."""
    run.collator = default_data_collator
    run.rows = [{"input_ids": [2, 4, 9, 3], "labels": [-100, 8, 9, -100]}] * 24
    assert run.train().global_step == 6


@pytest.mark.usefixtures("_one_precision")
def test_a_second_run_does_not_take_the_precision_of_the_first(run: TinyRun) -> None:
    """All accelerators of a process share their precision; the error names the cure."""
    run.train(mixed_precision="bf16")
    for precision in ("no", None):
        message = f"mixed_precision is {precision!r}, but .* began with 'bf16', .* in a new process"
        with pytest.raises(ValueError, match=message):
            run.train(mixed_precision=precision, overwrite=True)
    run.train(mixed_precision="bf16", overwrite=True)


@pytest.mark.usefixtures("_one_precision")
def test_a_precision_that_would_not_be_the_settings_is_refused(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the caller's accelerator is another, or a CPU has none like it."""
    run.objects["accelerator"] = Accelerator()
    message = "mixed_precision is 'bf16' and the accelerator's 'no'"
    refuse(run, ValueError, message, mixed_precision="bf16")
    run.objects.clear()
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    refuse(run, ValueError, "mixed_precision is 'fp16', which a CPU has not; pass 'bf16' or 'no'")
    run.objects["accelerator"] = Accelerator()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    refuse(run, ValueError, r"accelerator's 'fp16' on 'cpu'; .* 'bf16' or 'no'")


@pytest.mark.usefixtures("_one_precision")
@pytest.mark.parametrize("after", ["bf16", "no"])
def test_a_refused_precision_leaves_the_process_as_it_was(run: TinyRun, after: str) -> None:
    """The next run may have another."""
    refuse(run, ValueError, "'fp16', which a CPU has not", mixed_precision="fp16")
    run.train(mixed_precision=after)


@pytest.mark.usefixtures("_one_precision")
def test_the_precision_of_the_environment_is_compared(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` may choose it, in each launch another."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run.train(save_strategy="epoch")
    AcceleratorState._reset_state()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    run.model = tiny_model(run.tokenizer)
    with pytest.raises(ValueError, match="mixed_precision was 'bf16', is 'no'"):
        run.train(save_strategy="epoch", resume_from_checkpoint=True)


def test_a_stream_with_a_length_is_a_stream(run: TinyRun, tmp_path: Path) -> None:
    """It has no rows to look up; trained as any other, of which `max_steps` is wanted too."""
    plain = TinyRun(tmp_path / "plain")
    plain.rows = iter(plain.rows)
    plain.train(max_steps=3)
    run.rows = CountedStream(run.rows)
    refuse(run, ValueError, "is a stream, max_steps is -1 and dataloader_num_workers 0")
    run.train(max_steps=3)
    assert equal(weights(run.model), weights(plain.model))


@pytest.mark.parametrize("kind", [None, "torch", "numpy", "arrow", "pandas"])
def test_rows_train_and_evaluate_alike_in_every_format(
    run: TinyRun, tmp_path: Path, kind: str | None
) -> None:
    """Also where a row is a table or a frame."""
    plain = TinyRun(tmp_path / "plain")
    plain.eval_rows = freeze(plain.rows[:4])
    run.rows = Dataset.from_list(tiny_rows(run.tokenizer, 12)).with_format(kind)
    frozen = Dataset.from_list([{name: list(row[name]) for name in row} for row in plain.eval_rows])
    run.eval_rows = frozen.with_format(kind)
    assert run.train().final == plain.train().final
    assert equal(weights(run.model), weights(plain.model))
    found = evaluate_mlm(run.model, run.eval_rows, tokenizer=run.tokenizer)
    assert found == evaluate_mlm(run.model, plain.eval_rows, tokenizer=run.tokenizer)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_long_row_late_in_a_stream_is_named(run: TinyRun, architecture: str) -> None:
    """Behind the rows that are looked at before the first step; with the limit that holds."""
    run.tokenizer = tiny_tokenizer("byte_bpe")
    run.model = tiny_model(run.tokenizer, architecture=architecture)
    run.collator = WholeWordMaskingCollator(run.tokenizer)
    rows = [{"input_ids": [9] * size, "word_ids": [*range(size)]} for size in [8] * 104 + [513]]
    run.rows = iter(rows)
    message = "^row 104 of train_dataset, a stream, has 513 tokens, the model has .* for 512;"
    with pytest.raises(ValueError, match=message):
        run.train(max_steps=3, per_device_train_batch_size=52)


class MapStyle:
    """Rows as `torch.utils.data.Dataset` has them, which never end when they are iterated."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        if place > 1000:
            raise AssertionError("read far past the end")
        return self.rows[place % len(self.rows)]


def test_a_map_style_dataset_is_read_by_its_length(run: TinyRun) -> None:
    """Nothing asks for a row behind the last."""
    run.rows, run.eval_rows = MapStyle(run.rows), MapStyle(run.rows[:4])
    assert run.train().global_step == 3


def test_rows_of_unknown_lengths_cannot_be_grouped(run: TinyRun) -> None:
    """Of a stream, and of a dataset whose rows are made when they are read."""
    settings = {"max_steps": 3, "train_sampling_strategy": "group_by_length"}
    rows, message = run.rows, "'group_by_length', but the lengths of train_dataset are not known"
    run.rows = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        run.train(**settings)
    places = Dataset.from_dict({"place": [*range(len(rows))]})
    run.rows = places.with_transform(
        lambda columns: {name: [rows[at][name] for at in columns["place"]] for name in rows[0]}
    )
    with pytest.raises(ValueError, match=message + ".* or leave it at 'random'"):
        run.train(**settings)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_plugin_that_would_shard_the_model_is_refused(kind: str) -> None:
    """Accelerate's own, by name; several processes that each hold the model are not."""
    model = tiny_model(tiny_tokenizer())
    with pytest.raises(ValueError, match=rf"model is sharded \(Accelerate's {kind}\)"):
        check_whole(model, SimpleNamespace(distributed_type=DistributedType[kind]))
    for whole in ("NO", "MULTI_CPU", "MULTI_GPU"):
        check_whole(model, SimpleNamespace(distributed_type=DistributedType[whole]))


def test_weight_decay_is_not_on_biases_and_norms(run: TinyRun) -> None:
    """Everything else is decayed, each parameter once."""
    decayed, others = make_optimizer(run.model, TrainingConfig(weight_decay=0.1)).param_groups
    names = {id(weight): name for name, weight in run.model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    for group, are in ((decayed, False), (others, True)):
        for name in (names[id(weight)] for weight in group["params"]):
            assert ("bias" in name or "LayerNorm" in name) == are, name
    assert sorted(map(id, decayed["params"] + others["params"])) == sorted(names)


def rates(make: Any, *, steps: int, lr: float = 1e-3) -> list[float]:
    """Return what a schedule sets, from before the first step to after the last."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    values = [scheduler.get_last_lr()[0]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        values.append(scheduler.get_last_lr()[0])
    return values


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (3, 3), (0.25, 2), (0.3, 3), (1, 1)])
def test_warmup_is_in_steps_or_a_share_of_them(warmup: float, steps: int) -> None:
    """Of 8 steps; a share is rounded up."""
    config = TrainingConfig(warmup_steps=warmup, lr_scheduler_type="constant_with_warmup")
    values = rates(lambda optimizer: make_scheduler(optimizer, config, 8), steps=8, lr=1.0)
    assert values == [step / steps if step < steps else 1.0 for step in range(9)]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("linear", None),
        ("cosine", None),
        ("cosine_with_restarts", None),
        ("polynomial", None),
        ("constant", None),
        ("inverse_sqrt", None),
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 1}),
    ],
)
def test_schedules_are_those_of_transformers(kind: str, arguments: Any) -> None:
    """One value a step; what a schedule needs beside that is named where it is missing."""
    settings = {"lr_scheduler_type": kind, "warmup_steps": 1}
    config = TrainingConfig(lr_scheduler_kwargs=arguments, **settings)
    theirs = partial(get_scheduler, kind, num_warmup_steps=1, num_training_steps=3)
    expected = rates(lambda made: theirs(made, scheduler_specific_kwargs=arguments), steps=3)
    assert rates(lambda made: make_scheduler(made, config, 3), steps=3) == expected
    if arguments is not None:
        message = f"lr_scheduler_kwargs is None, which .* '{kind}' does not"
        with pytest.raises(ValueError, match=message):
            rates(lambda made: make_scheduler(made, TrainingConfig(**settings), 3), steps=3)


def test_a_schedule_that_waits_for_a_metric_gets_the_evaluations(run: TinyRun) -> None:
    """The loss of the first set, once an evaluation, and never a step."""
    arguments = {"mode": "max", "patience": 0, "factor": 0.5}  # a falling loss is no gain
    plateau: dict[str, Any] = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": arguments,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau.* goes by evaluations, .* 0 sets"):
        run.train(**plateau)
    run.eval_rows = run.rows[:4]
    with pytest.raises(ValueError, match="eval_strategy 'no', 1 sets"):
        run.train(**{**plateau, "eval_strategy": "no"})
    result = run.train(**plateau)
    losses = logged(result, "eval_loss")
    assert losses == sorted(losses, reverse=True)
    # The first is the best so far; each later one halves the rate, and is logged after its step.
    assert logged(result, "learning_rate") == [1e-3, 1e-3, 5e-4]


def test_a_schedule_of_another_optimizer_is_refused(run: TinyRun) -> None:
    """It would set the learning rate of nothing."""
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    run.objects["lr_scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    for other in (None, torch.optim.SGD(run.model.parameters(), lr=0.5)):
        run.objects["optimizer"] = other
        with pytest.raises(ValueError, match=r"lr_scheduler sets .* pass that one as optimizer"):
            run.train()


def test_what_no_checkpoint_can_hold_is_found_before_the_first_step(run: TinyRun) -> None:
    """Not hours later, when a run is resumed."""
    optimizer = run.objects["optimizer"] = torch.optim.SGD(run.model.parameters(), lr=0.1)
    optimizer.param_groups[0]["held"] = object()
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=r"holds what no checkpoint can \("):
        run.train()


def test_gradient_checkpointing_gives_the_same_losses(run: TinyRun, tmp_path: Path) -> None:
    """Dropout included; afterwards the model does without."""
    plain = TinyRun(tmp_path / "plain").train()
    result = run.train(gradient_checkpointing=True)
    assert logged(result, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)
    assert not any(getattr(part, "gradient_checkpointing", False) for part in run.model.modules())


def test_a_run_that_fails_leaves_the_model_as_it_was(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hooks, no frozen parameters, the same mode, whether it fails late or while starting."""
    hooks, training, forward = count_hooks(run.model), run.model.training, run.model.forward

    def fail(*_: Any) -> None:
        raise ArithmeticError("on purpose")

    for place in ("optimizer", "schedule"):
        optimizer = run.objects["optimizer"] = torch.optim.SGD(run.model.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(fail)
        if place == "schedule":
            monkeypatch.setattr(prepare, "make_scheduler", fail)
        # The second time without `overwrite`: what failed before a checkpoint left nothing behind.
        with pytest.raises(ArithmeticError, match="on purpose"):
            run.train()
        assert count_hooks(run.model) == hooks
        assert run.model.training == training
        assert run.model.forward == forward
        assert all(weight.grad is None for weight in run.model.parameters())


def test_the_callers_accelerator_does_not_keep_the_model(run: TinyRun) -> None:
    """It holds what it held before, so that a model can go when its run is over."""
    accelerator = run.objects["accelerator"] = Accelerator()
    mine = accelerator.prepare(nn.Linear(1, 1))
    run.train()
    assert accelerator._models == [mine]
    assert accelerator._optimizers == []
    kept = weakref.ref(run.model)
    run.model = None
    gc.collect()
    assert kept() is None
