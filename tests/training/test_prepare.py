"""What would go wrong without a word, or with an error without a name, is told before step 0."""

from __future__ import annotations

import gc
import json
import logging
import re
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import (
    BertForPreTraining,
    BertForTokenClassification,
    BertModel,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    default_data_collator,
)

from mlmadapt import TrainingConfig, WholeWordMaskingCollator, accelerate_train, evaluate_mlm
from mlmadapt.testing import tiny_model, tiny_tokenizer
from mlmadapt.training.fingerprint import describe_run
from mlmadapt.training.prepare import check_whole
from tests.scripts.short_run import freeze, make_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

# PEFT asks for it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


class Run:
    """A run of two steps, to be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = tiny_tokenizer()
        self.model: Any = tiny_model(self.tokenizer)
        self.rows: Any = make_rows(8)
        self.eval_rows: Any = freeze(make_rows(4, seed=1))
        self.collator: Any = WholeWordMaskingCollator(self.tokenizer)
        self.more: dict[str, Any] = {}

    def train(self, **settings: Any) -> Any:
        """Train with what there is now."""
        return accelerate_train(
            self.model,
            self.rows,
            self.eval_rows,
            tokenizer=self.tokenizer,
            data_collator=self.collator,
            config=TrainingConfig(
                output_dir=str(self.folder),
                **{
                    "num_train_epochs": 1,
                    "per_device_train_batch_size": 4,
                    "disable_tqdm": True,
                    **settings,
                },
            ),
            **self.more,
        )

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint would store of it."""
        return describe_run(
            TrainingConfig(),
            model=self.model,
            tokenizer=self.tokenizer,
            data_collator=self.collator,
            own={},
            datasets={"train_dataset": self.rows, "eval": self.eval_rows},
            rows_per_step=4,
        )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run into a new folder."""
    return Run(tmp_path / "out")


@pytest.fixture
def _one_precision() -> Iterator[None]:
    """Accelerate's shared state, as a new process has it, before the test and after."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("name", "value", "requirement"),
    [
        ("max_steps", 2.5, "int"),
        ("max_steps", True, "int"),
        ("seed", None, "int"),
        ("per_device_train_batch_size", "8", "int"),
        ("learning_rate", "5e-5", "float"),
        ("learning_rate", False, "float"),
        ("overwrite", 1, "bool"),
        ("gradient_checkpointing", "false", "bool"),
        ("eval_strategy", False, "Literal['no', 'epoch', 'steps']"),
        ("save_total_limit", 1.0, "int | None"),
        ("output_dir", None, "str"),
        ("dataset_name", 7, "str | None"),
        ("fill_mask", "a [MASK]", "list[str]"),
    ],
)
def test_a_setting_of_another_type_is_named(name: str, value: Any, requirement: str) -> None:
    """YAML reads 5e-5 as text and `no` as False; a step and a half would never be the last."""
    with pytest.raises(
        ValueError, match=re.escape(f"{name} is {value!r}; it must be of type {requirement}")
    ):
        TrainingConfig(**{name: value})
    with pytest.raises(ValueError, match="resume_from_checkpoint is 6; it must be True, a dir"):
        TrainingConfig(resume_from_checkpoint=6)  # type: ignore[arg-type]


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


def test_weights_in_sixteen_bits(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """float16 overflows and bfloat16 loses most updates; both name `model.float()`."""
    run.model.to(torch.float16)
    with pytest.raises(ValueError, match=r"weights in float16, .*; call model\.float\(\)"):
        run.train()
    assert not run.folder.exists()
    run.model.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, "mlmadapt"):
        run.train()
    assert "weights in bfloat16, in which most updates are lost; call model.float()" in caplog.text


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16])
def test_adapters_over_a_base_in_sixteen_bits(
    run: Run, base: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """A frozen base takes no update, so that its type does not matter."""
    run.model.to(base)
    adapt(run)
    types = {(each.dtype, each.requires_grad) for each in run.model.parameters()}
    assert types == {(base, False), (torch.float32, True)}
    assert run.train().global_step == 2
    assert "weights in" not in caplog.text


def test_an_adapter_that_transformers_added_is_trained(run: Run) -> None:
    """`add_adapter` puts it into the model itself, which has no `get_base_model` then."""
    run.model.add_adapter(peft.LoraConfig(target_modules=["query"], r=2))
    run.train()
    assert (run.folder / "adapter_model.safetensors").exists()
    assert "An adapter of `BertForMaskedLM`" in (run.folder / "README.md").read_text()


def test_quantised_weights_need_an_adapter(run: Run) -> None:
    """As `BitsAndBytesConfig` and others leave them."""
    run.model.is_quantized = True
    with pytest.raises(ValueError, match=r"BertForMaskedLM is quantised, .* peft\.get_"):
        run.train()
    assert not run.folder.exists()
    adapt(run)
    assert run.train().global_step == 2


def headless(kind: Any) -> Any:
    """Make a model of another class with the tiny BERT's configuration."""
    return kind(tiny_model(tiny_tokenizer()).config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(headless, BertModel), "BertModel has no prediction head, as AutoModel loads it"),
        (partial(headless, BertForPreTraining), "BertForPreTraining does not predict a token"),
        (
            partial(headless, BertForTokenClassification),
            r"BertForTokenClassification does not predict .* shape \(4, \d+, 2\)",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=475, n_embd=16, n_layer=1, n_head=1)),
            "GPT2LMHeadModel is a causal language model, which shifts its labels",
        ),
        (lambda: nn.DataParallel(headless(BertModel)), r"DataParallel is not .* \.module\)"),
        (lambda: nn.Linear(1, 1), "Linear is not one of transformers"),
    ],
)
def test_a_model_that_does_not_predict_masks_is_named(run: Run, make: Any, message: str) -> None:
    """With its class and the cure, in training and evaluation alike."""
    run.model = make()
    message = f"model {message}.*AutoModelForMaskedLM"
    with pytest.raises(ValueError, match=message):
        run.train()
    assert not list(run.folder.glob("[!.]*"))
    with pytest.raises(ValueError, match=message):
        evaluate_mlm(run.model, run.eval_rows, tokenizer=run.tokenizer)


def test_parts_of_two_models_are_named_before_a_folder_is_made(run: Run) -> None:
    """A tokenizer of another model is not answered with a resizing alone, nor a collator of it."""
    own, other = run.tokenizer, tiny_tokenizer("byte_bpe")
    run.collator = WholeWordMaskingCollator(other)
    with pytest.raises(ValueError, match=r"data_collator was made with another tokenizer: .* 512"):
        run.train()
    run.tokenizer = other
    message = (
        r"tokenizer \(\w+\) has 512 tokens, the model \(BertForMaskedLM\) .* 475; load the mod"
    )
    with pytest.raises(ValueError, match=message):
        run.train()
    run.tokenizer = run.collator.tokenizer = own
    run.model = headless(BertModel)
    with pytest.raises(ValueError, match="BertModel has no prediction head"):
        run.train()
    assert not run.folder.exists()


@pytest.mark.parametrize("which", ["train_dataset", "eval"])
def test_rows_without_words_are_named(run: Run, which: str) -> None:
    """By the argument, before a folder is made, and without a word on `Trainer`."""
    rows = [{name: each[name] for name in each if name != "word_ids"} for each in run.rows]
    run.rows, run.eval_rows = (rows, None) if which == "train_dataset" else (run.rows, rows)
    message = (
        rf"^{which} has \[.*\], without 'word_ids', .* make the rows with tokenize_with_word_ids$"
    )
    with pytest.raises(ValueError, match=message):
        run.train()
    assert not run.folder.exists()


def test_a_checkpoint_that_is_not_there_is_said_to_be_so(run: Run) -> None:
    """And what there is in its place."""
    path = run.folder / "checkpoint-9"
    message = "resume_from_checkpoint is '.*-9', which is not there; .* which holds "
    with pytest.raises(FileNotFoundError, match=f"{message}no checkpoint"):
        run.train(resume_from_checkpoint=str(path))
    run.train(overwrite=True)
    with pytest.raises(FileNotFoundError, match=f"{message}checkpoint-2"):
        run.train(resume_from_checkpoint=str(path))


@pytest.mark.filterwarnings("ignore:`log_with=:UserWarning")
def test_a_tracker_that_is_not_installed_is_named(run: Run) -> None:
    """With what to do."""
    with pytest.raises(ValueError, match=r"but \['comet_ml'\] is not installed; pip install it"):
        run.train(report_to=["comet_ml"])


def test_weights_that_are_not_finite_are_named(run: Run) -> None:
    """Not as a head that does not work position by position."""
    with torch.no_grad():
        run.model.bert.embeddings.word_embeddings.weight[7:] = torch.nan
    with pytest.raises(ValueError, match="BertForMaskedLM predicts NaN or infinity: its weights"):
        run.train()


@pytest.mark.parametrize(
    "collator",
    [
        default_data_collator,
        DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        DataCollatorForTokenClassification(tiny_tokenizer()),
    ],
)
def test_a_collator_that_hides_nothing_is_refused(run: Run, collator: Any) -> None:
    """By its first batch: each token would be a target that the model sees."""
    run.collator = collator
    ids = [[int(token) for token in row["input_ids"]][:8] for row in make_rows(20)]
    run.rows = [{"input_ids": row, "labels": row} for row in ids if len(row) == 8]
    with pytest.raises(ValueError, match=r"returned \d+ labels .* hid 0 tokens; use a collator th"):
        run.train()


def test_rows_with_masks_need_no_collator_that_masks(run: Run) -> None:
    """By its first batch, too: the same collator is fine where the rows hide something."""
    run.collator = default_data_collator
    run.rows = [{"input_ids": [2, 4, 9, 3], "labels": [-100, 8, 9, -100]}] * 24
    assert run.train().global_step == 6


def take_out(model: Any) -> None:
    """Take some tokens out of a model's vocabulary."""
    with torch.no_grad():
        model.get_output_embeddings().bias[-20:] = -torch.inf


def test_tokens_can_be_out_of_the_vocabulary(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of -inf that was there from the beginning is no update that was too large."""
    take_out(run.model)
    settings = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole = run.train(load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, **settings)
    assert np.isfinite(whole.final.loss)
    assert "runs with its full head" not in caplog.text
    # What JSON holds of it is compared, too.
    settings |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    run.model = tiny_model(run.tokenizer)
    with pytest.raises(ValueError, match=r"weights of -inf was \{.*20\}, is None"):
        run.train(resume_from_checkpoint=True, **settings)
    take_out(run.model)
    again = run.train(resume_from_checkpoint=str(run.folder / "checkpoint-1"), **settings)
    assert again.final == whole.final


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("prepare", [lambda model: None, take_out], ids=["finite", "taken out"])
def test_a_weight_that_a_step_made_infinite_is_refused(
    run: Run, value: float, prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any kind, beside weights that were -inf before as well."""
    prepare(run.model)
    step = torch.optim.AdamW.step

    def spoil(self: Any, closure: Any = None) -> Any:
        found = step(self, closure)
        with torch.no_grad():
            run.model.get_output_embeddings().bias[9] = value
        return found

    run.more["optimizer"] = torch.optim.AdamW(run.model.parameters())
    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(FloatingPointError, match=r"bias is not finite, .* a lower learning_rate"):
        run.train(max_steps=1)


@pytest.mark.usefixtures("_one_precision")
def test_a_second_run_does_not_take_the_precision_of_the_first(run: Run, tmp_path: Path) -> None:
    """All accelerators of a process share their precision; the error names the cure."""
    run.train(mixed_precision="bf16")
    again = Run(tmp_path / "again")
    for precision in ("no", None):
        message = f"mixed_precision is {precision!r}, but .* began with 'bf16', .* in a new process"
        with pytest.raises(ValueError, match=message):
            again.train(mixed_precision=precision)
    again.train(mixed_precision="bf16")


@pytest.mark.usefixtures("_one_precision")
def test_a_precision_that_would_not_be_the_settings_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the caller's accelerator is another, or a CPU has none like it."""
    run.more["accelerator"] = Accelerator()
    with pytest.raises(ValueError, match="mixed_precision is 'bf16' and the accelerator's 'no'"):
        run.train(mixed_precision="bf16")
    run.more = {}
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"accelerator's 'fp16' on 'cpu'; .* 'bf16' or 'no'"):
        run.train()
    assert not run.folder.exists()


@pytest.mark.usefixtures("_one_precision")
def test_the_precision_of_the_environment_is_compared(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` may choose it, in each launch another."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run.train()
    AcceleratorState._reset_state()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    run.model = tiny_model(run.tokenizer)
    with pytest.raises(ValueError, match="mixed_precision was 'bf16', is 'no'"):
        run.train(resume_from_checkpoint=True)


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


def test_a_map_style_dataset_is_read_by_its_length(run: Run) -> None:
    """Nothing asks for a row behind the last."""
    run.rows, run.eval_rows = MapStyle(run.rows), MapStyle(run.eval_rows)
    assert run.train().global_step == 2


def test_the_callers_accelerator_does_not_keep_the_model(run: Run) -> None:
    """It holds what it held before, so that a model can go when its run is over."""
    accelerator = run.more["accelerator"] = Accelerator()
    mine = accelerator.prepare(nn.Linear(1, 1))
    run.train()
    assert accelerator._models == [mine]
    assert accelerator._optimizers == []
    kept = weakref.ref(run.model)
    run.model = None
    gc.collect()
    assert kept() is None


def test_a_failed_start_leaves_nothing_of_a_tracker(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of TensorBoard's would block the next try."""

    def init_trackers(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        (run.folder / "runs").mkdir()

    monkeypatch.setattr(Accelerator, "init_trackers", init_trackers)
    run.more["accelerator"] = Accelerator()
    run.more["optimizer"] = torch.optim.SGD(run.model.parameters(), lr=0.1)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    run.more["lr_scheduler"] = torch.optim.lr_scheduler.ConstantLR(other)
    with pytest.raises(ValueError, match="lr_scheduler sets the learning rate of an optimizer"):
        run.train(report_to="tensorboard")
    assert not (run.folder / "runs").exists()
    del run.more["lr_scheduler"]
    run.train(report_to="tensorboard")
    assert (run.folder / "runs").exists()


def test_a_sentence_longer_than_the_model_is_told(run: Run) -> None:
    """Before the first step, with both lengths and a cure that fits a sentence."""
    message = "fill_mask has a row of 603 tokens, the model has positions for 512; shorten it"
    with pytest.raises(ValueError, match=message):
        run.train(fill_mask=["film " * 600 + "[MASK]"])


class Collating:
    """A collator that is not a dataclass; what is private may change as it works."""

    def __init__(self, run: Run, probability: float) -> None:
        self.tokenizer, self.probability, self._calls = run.tokenizer, probability, 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Mask as ours does."""
        self._calls += 1
        return WholeWordMaskingCollator(self.tokenizer, wwm_probability=self.probability)(rows)


def collate(rows: Any, **settings: Any) -> Any:
    """Stand in for a function with settings."""


def adapt(run: Run, alpha: int = 8) -> None:
    """Add an adapter to the model."""
    config = peft.LoraConfig(target_modules=["key", "query", "value"], r=2, lora_alpha=alpha)
    run.model = peft.get_peft_model(run.model, config)


def change(run: Run, what: str) -> None:
    """Make another run of it."""
    bert = None if what.startswith("adapter") else run.model.bert
    if what == "dropout":
        bert.embeddings.dropout.p = 0.3
    elif what == "heads":
        run.model.config.num_attention_heads = 1
    elif what == "activation":
        bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    elif what == "frozen layer":
        bert.encoder.layer[0].requires_grad_(requires_grad=False)
    elif what == "type":
        run.model.to(torch.bfloat16)
    elif what == "labels":
        run.eval_rows[0]["masked_labels"] = run.eval_rows[0]["masked_labels"] + 1
    elif what == "words":
        run.rows[0]["word_ids"] = [0] * len(run.rows[0]["word_ids"])
    elif what.startswith("adapter"):
        adapt(run, alpha=int(what.removeprefix("adapter ")))
    else:
        weights = {"weights": np.ones(475), "other weights": np.arange(475.0)}
        run.collator = {
            "0.2": Collating(run, 0.2),
            "0.3": Collating(run, 0.3),
            "partial 0.2": partial(collate, probability=0.2),
            "partial 0.3": partial(collate, probability=0.3),
            **{
                name: WholeWordMaskingCollator(run.tokenizer, word_weights=each)
                for name, each in {**weights, "function": len, "other function": hash}.items()
            },
        }[what]


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("", "dropout", "model_settings"),
        ("", "heads", "model_settings"),
        ("", "activation", "model_settings"),
        ("adapter 8", "adapter 16", "model_settings"),
        ("", "frozen layer", "model"),
        ("", "type", "model"),
        ("", "labels", "eval"),
        ("", "words", "train_dataset"),
        ("weights", "other weights", "data_collator"),
        ("function", "other function", "data_collator"),
        ("0.2", "0.3", "data_collator"),
        ("partial 0.2", "partial 0.3", "data_collator"),
    ],
)
def test_another_run_has_another_fingerprint(
    tmp_path: Path, first: str, second: str, name: str
) -> None:
    """In the field that names what is other."""
    one, other = Run(tmp_path), Run(tmp_path)
    for run, what in ((one, first), (other, second)):
        if what:
            change(run, what)
    stored, given = one.fingerprint(), other.fingerprint()
    assert [key for key in stored if stored[key] != given[key]] == [name]


def test_the_same_run_has_the_same_fingerprint(run: Run, tmp_path: Path) -> None:
    """After a run, from tensors or lists, and with another name and version of the model."""
    run.collator = Collating(run, 0.2)
    before = run.fingerprint()
    run.train(gradient_checkpointing=True)
    run.model.config._name_or_path = "another/name"
    run.model.config.transformers_version = "4.0"
    run.rows = [{name: torch.as_tensor(row[name]) for name in sorted(row)} for row in run.rows]
    assert run.fingerprint() == before
    assert json.loads(json.dumps(before)) == before


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_plugin_that_would_shard_the_model_is_refused(kind: str) -> None:
    """Accelerate's own, by name; several processes that each hold the model are not."""
    model = tiny_model(tiny_tokenizer())
    with pytest.raises(ValueError, match=rf"model is sharded \(Accelerate's {kind}\)"):
        check_whole(model, SimpleNamespace(distributed_type=DistributedType[kind]))
    for whole in ("NO", "MULTI_CPU", "MULTI_GPU"):
        check_whole(model, SimpleNamespace(distributed_type=DistributedType[whole]))
