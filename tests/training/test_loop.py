"""One process: what is trained, evaluated, logged and saved, and what is left as it was."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import accelerate.tracking
import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from packaging.version import Version
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    get_scheduler,
    pipeline,
)

from mlmadapt import (
    MaskedLMMetrics,
    TrainingConfig,
    TrainingResult,
    WholeWordMaskingCollator,
    accelerate_train,
    evaluate_mlm,
)
from mlmadapt.model.evaluation import collate_frozen
from mlmadapt.testing import tiny_model, tiny_tokenizer
from mlmadapt.training import prepare as prepare_module
from mlmadapt.training.loop import collate_unfrozen
from mlmadapt.training.prepare import make_optimizer, make_scheduler
from mlmadapt.training.tracking import show_metrics
from tests.scripts.short_run import drop_nothing, freeze, global_states, make_rows

pytestmark = pytest.mark.usefixtures("no_curves")


class Run:
    """A run of 3 steps an epoch, to be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = tiny_tokenizer()
        self.model = tiny_model(self.tokenizer)
        self.rows: Any = make_rows(12)
        self.collator: Any = WholeWordMaskingCollator(self.tokenizer)

    def train(self, eval_rows: Any = None, /, **options: Any) -> TrainingResult:
        """Train; what is no setting goes to `accelerate_train`."""
        objects = {
            name: options.pop(name)
            for name in ("optimizer", "lr_scheduler", "accelerator")
            if name in options
        }
        settings = {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        config = TrainingConfig(output_dir=str(self.folder), **{**settings, **options})
        return accelerate_train(
            self.model,
            self.rows,
            eval_rows,
            tokenizer=self.tokenizer,
            data_collator=self.collator,
            config=config,
            **objects,
        )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run into a new folder."""
    return Run(tmp_path / "out")


def logged(result: TrainingResult, name: str) -> list[float]:
    """Return what was logged under a name."""
    return [entry[name] for entry in result.history if name in entry]


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """Copy the weights."""
    return [each.detach().clone() for each in model.state_dict().values()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Tell whether weights are equal to the bit."""
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def mask_nothing(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate rows of one length without a target."""
    ids = torch.tensor([[int(token) for token in row["input_ids"]][:3] for row in features])
    return {"input_ids": ids, "labels": torch.full_like(ids, -100)}


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler:UserWarning")
def test_a_step_without_targets_changes_nothing(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Weights and moments stay, where a mean over no token would be NaN and AdamW would decay."""
    run.collator = mask_nothing
    run.rows = [row for row in run.rows if len(row["input_ids"]) >= 3]
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.1, weight_decay=0.1)
    before = weights(run.model)
    result = run.train(optimizer=optimizer)
    assert equal(weights(run.model), before)
    assert optimizer.state_dict()["state"] == {}
    assert result.masked_tokens_seen == 0
    assert "has no masked token on any process; nothing is updated" in caplog.text


class LyingLoss:
    """A forward pass whose own loss is wrong, as that of most models under accumulation."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert "labels" not in kwargs, "nobody needs the model's loss"
        output = self.forward(*args, **kwargs)
        output.loss = output.logits.sum() * 1e6
        return output


def test_the_model_is_not_asked_for_its_loss(run: Run, tmp_path: Path) -> None:
    """A model whose loss lies is trained as the others."""
    honest = Run(tmp_path / "honest")
    losses = logged(honest.train(), "loss")
    run.model.forward = LyingLoss(run.model.forward)
    assert logged(run.train(), "loss") == losses


def test_the_head_predicts_in_batches_of_few_sizes(run: Run) -> None:
    """As many positions as are masked would be blocks of memory of another size in each step.

    The allocator keeps what lies free between such blocks, more and more of it.
    """
    run.rows = make_rows(96)
    sizes = []
    head = run.model.get_output_embeddings()
    head.register_forward_hook(lambda *call: sizes.append(call[1][0].shape[:-1].numel()))
    result = run.train(per_device_train_batch_size=24)
    taken = sizes[-4:]  # before them, the head was checked on a few rows
    assert sum(taken) - 4 * 32 < result.masked_tokens_seen <= sum(taken)
    assert {size % 32 for size in taken} == {0}


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_sgd_takes_the_step_that_is_written_out(run: Run, clip: float) -> None:
    """Weights minus learning rate times the clipped gradient of the mean over masked tokens."""
    drop_nothing(run.model)
    run.rows = make_rows(8)
    reference = copy.deepcopy(run.model)
    run.collator = WholeWordMaskingCollator(run.tokenizer, seed=3)
    batch = run.collator(run.rows)
    labels = batch.pop("labels")
    torch.nn.functional.cross_entropy(reference(**batch).logits.mT, labels).backward()
    norm = torch.cat([each.grad.flatten() for each in reference.parameters()]).norm()
    factor = min(1.0, clip / float(norm)) if clip else 1.0
    expected = [each.detach() - 0.1 * factor * each.grad for each in reference.parameters()]
    result = run.train(
        optimizer=torch.optim.SGD(run.model.parameters(), lr=0.1),
        lr_scheduler=None,
        lr_scheduler_type="constant",
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        max_grad_norm=clip,
    )
    assert result.global_step == 1
    assert logged(result, "grad_norm") == pytest.approx([float(norm)], abs=1e-5)
    for values, other in zip(run.model.parameters(), expected, strict=True):
        torch.testing.assert_close(values.detach(), other, atol=1e-6, rtol=1e-5)


def test_weight_decay_is_not_on_biases_and_norms(run: Run) -> None:
    """Everything else is decayed, each parameter once."""
    decayed, others = make_optimizer(run.model, TrainingConfig(weight_decay=0.1)).param_groups
    names = {id(each): name for name, each in run.model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    for group, are in ((decayed, False), (others, True)):
        for name in (names[id(each)] for each in group["params"]):
            assert ("bias" in name or "LayerNorm" in name) == are, name
    assert sorted(map(id, decayed["params"] + others["params"])) == sorted(names)


def rates(make: Any, *, steps: int, lr: float = 1e-3) -> list[float]:
    """Return what a schedule sets, from before the first step to after the last."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    found = [scheduler.get_last_lr()[0]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (3, 3), (0.25, 2), (0.3, 3), (1, 1)])
def test_warmup_is_in_steps_or_a_share_of_them(warmup: float, steps: int) -> None:
    """Of 8 steps; a share is rounded up."""
    config = TrainingConfig(warmup_steps=warmup, lr_scheduler_type="constant_with_warmup")
    found = rates(lambda optimizer: make_scheduler(optimizer, config, 8), steps=8, lr=1.0)
    assert found == [step / steps if step < steps else 1.0 for step in range(9)]


@pytest.mark.parametrize(
    "kind",
    ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "inverse_sqrt"],
)
def test_schedules_are_those_of_transformers(run: Run, kind: str) -> None:
    """One value a step, from the learning rate on."""
    result = run.train(lr_scheduler_type=kind, warmup_steps=1)
    _, *expected = rates(lambda optimizer: get_scheduler(kind, optimizer, 1, 3), steps=3)
    assert logged(result, "learning_rate") == expected


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("cosine_warmup_with_min_lr", '{"min_lr_rate": 0.1}'),
        ("warmup_stable_decay", {"num_decay_steps": 1}),
    ],
)
def test_a_schedule_gets_its_own_arguments(run: Run, kind: str, arguments: Any) -> None:
    """A dict in Python, JSON on a command line; without them, the error says what is missing."""
    settings = {"lr_scheduler_type": kind, "warmup_steps": 1}
    with pytest.raises(
        ValueError, match=f"lr_scheduler_kwargs is None, which .* '{kind}' does not"
    ):
        run.train(**settings)
    result = run.train(**settings, lr_scheduler_kwargs=arguments)
    given = json.loads(arguments) if isinstance(arguments, str) else arguments

    def make(optimizer: torch.optim.Optimizer) -> Any:
        return get_scheduler(kind, optimizer, 1, 3, scheduler_specific_kwargs=given)

    _, *expected = rates(make, steps=3)
    assert logged(result, "learning_rate") == expected


def test_a_schedule_that_waits_for_a_metric_gets_the_evaluations(run: Run) -> None:
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
    with pytest.raises(ValueError, match="eval_strategy 'no', 1 sets"):
        run.train(run.rows[:4], **{**plateau, "eval_strategy": "no"})
    result = run.train(run.rows[:4], **plateau)
    losses = logged(result, "eval_loss")
    assert losses == sorted(losses, reverse=True)
    # The first is the best so far; each later one halves the rate, and is logged after its step.
    assert logged(result, "learning_rate") == [1e-3, 1e-3, 5e-4]


def test_a_schedule_of_another_optimizer_is_refused(run: Run) -> None:
    """It would set the learning rate of nothing."""
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for passed in (None, torch.optim.SGD(run.model.parameters(), lr=0.5)):
        with pytest.raises(ValueError, match=r"lr_scheduler sets .* pass that one as optimizer"):
            run.train(optimizer=passed, lr_scheduler=schedule)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": 2, "num_train_epochs": 7}, 2),
        ({"num_train_epochs": 1.5}, 5),
        ({"num_train_epochs": 0.1}, 1),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 5}, 6),
    ],
)
def test_steps_are_counted(run: Run, settings: dict[str, Any], steps: int) -> None:
    """Whole epochs, parts of one, or steps; the last one of an epoch may be shorter."""
    result = run.train(save_strategy="no", **settings)
    assert result.global_step == steps
    assert logged(result, "step")[-1] == steps
    if settings == {"num_train_epochs": 2, "per_device_train_batch_size": 5}:
        assert result.tokens_seen == 2 * sum(len(row["input_ids"]) for row in run.rows)


def test_the_callers_own_optimizer_schedule_and_accelerator_are_used(run: Run) -> None:
    """Each is the object that is stepped, once a step."""
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    accelerator = Accelerator(gradient_accumulation_steps=4)  # not ours to use, and undone
    with patch.object(accelerator, "prepare", wraps=accelerator.prepare) as prepare:
        result = run.train(optimizer=optimizer, lr_scheduler=schedule, accelerator=accelerator)
    prepare.assert_called_once_with(run.model, optimizer)
    assert logged(result, "learning_rate") == [0.25, 0.125, 0.0625]
    assert schedule.last_epoch == 3


def test_accumulation_of_the_callers_accelerator_does_not_scale_the_gradient(
    run: Run, tmp_path: Path
) -> None:
    """Accelerate divides each backward pass by it."""
    plain = logged(Run(tmp_path / "plain").train(), "grad_norm")
    accelerator = Accelerator(gradient_accumulation_steps=4)
    assert logged(run.train(accelerator=accelerator), "grad_norm") == pytest.approx(plain, rel=1e-6)


def test_several_sets_are_evaluated_and_the_first_one_counts(run: Run) -> None:
    """The domain and a general one, so that forgetting shows."""
    domain, general = freeze(make_rows(5, seed=1)), freeze(make_rows(7, seed=2))
    result = run.train({"domain": domain, "general": general})
    assert len(logged(result, "eval_domain_loss")) == len(logged(result, "eval_general_loss")) == 2
    assert result.initial is not None
    assert result.final is not None
    assert [result.initial.loss, result.final.loss] == logged(result, "eval_domain_loss")
    for rows, name in ((domain, "domain"), (general, "general")):
        metrics = evaluate_mlm(run.model, rows, tokenizer=run.tokenizer, batch_size=2)
        assert metrics.loss == pytest.approx(logged(result, f"eval_{name}_loss")[-1], abs=1e-6)


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_rows_that_are_not_frozen_are_frozen_once(run: Run, kind: str) -> None:
    """Each evaluation sees the same masks: with a rate of 0, the figure stays."""
    if kind == "transformers":
        run.collator = DataCollatorForLanguageModeling(run.tokenizer, mlm_probability=0.3)
    result = run.train(make_rows(9, seed=4), learning_rate=0.0, num_train_epochs=2)
    losses = logged(result, "eval_loss")
    assert len(losses) == 3
    assert len(set(losses)) == 1
    assert logged(result, "eval_masked_tokens")[0] > 9


def test_early_stopping_waits_for_so_many_evaluations_without_a_better_one(run: Run) -> None:
    """A rate that only does harm ends after `patience` of them."""
    result = run.train(
        freeze(make_rows(5, seed=1)),
        learning_rate=3.0,
        num_train_epochs=20,
        early_stopping_patience=2,
        save_strategy="no",
    )
    losses = logged(result, "eval_loss")
    assert len(losses) < 21
    assert losses.index(min(losses)) == len(losses) - 3
    assert result.best is not None
    assert result.best.loss == min(losses)


def test_the_best_model_is_kept_and_saved(run: Run) -> None:
    """It is worse at the end, and the checkpoint of the best outlives the limit of one."""
    evaluated = freeze(make_rows(5, seed=1))
    result = run.train(
        evaluated,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        num_train_epochs=8,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    losses = logged(result, "eval_loss")
    best = min(losses[1:])
    assert losses[-1] > best
    assert result.final is not None
    assert result.final.loss == best
    saved = AutoModelForMaskedLM.from_pretrained(run.folder)
    for model in (saved, run.model):
        metrics = evaluate_mlm(model, evaluated, tokenizer=run.tokenizer)
        assert metrics.loss == pytest.approx(best, abs=1e-6)
    kept = {path.name for path in run.folder.glob("checkpoint-*")}
    assert kept == {"checkpoint-24", f"checkpoint-{3 * losses.index(best)}"}


def test_the_history_has_the_names_of_trainer(run: Run) -> None:
    """Losses by `logging_steps`, metrics by epoch, in their order."""
    result = run.train(freeze(make_rows(5, seed=1)), num_train_epochs=2, logging_steps=2)
    common = {"step", "epoch"}
    loss = {*common, "loss", "grad_norm", "learning_rate"}
    metrics = {
        *common,
        "eval_loss",
        "eval_perplexity",
        "eval_accuracy",
        "eval_top5_accuracy",
        "eval_masked_tokens",
    }
    assert [set(entry) for entry in result.history] == [
        metrics, loss, loss, metrics, loss, loss, metrics,
    ]  # fmt: skip
    assert logged(result, "step") == [0, 2, 3, 3, 4, 6, 6]
    assert logged(result, "epoch") == pytest.approx([0, 2 / 3, 1, 1, 4 / 3, 2, 2])
    assert logged(result, "eval_perplexity") == [math.exp(x) for x in logged(result, "eval_loss")]


@pytest.mark.parametrize(
    ("every", "steps"), [(0.02, [*range(1, 61)]), (0.1, [*range(6, 61, 6)]), (25, [25, 50, 60])]
)
def test_a_run_of_any_length_has_entries(run: Run, every: float, steps: list[int]) -> None:
    """A share of all steps, which is the default, or a number of them; and the last."""
    assert TrainingConfig().logging_steps == 0.02
    result = run.train(max_steps=60, logging_steps=every, eval_strategy="no", save_strategy="no")
    assert [entry["step"] for entry in result.history if "loss" in entry] == steps


def test_each_evaluation_prints_a_line_and_the_bar_shows_the_loss_at_once(
    run: Run, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """To where the bar is, so that what a script prints can be piped on."""
    sets = {"domain": freeze(make_rows(3, seed=1)), "general": freeze(make_rows(3, seed=2))}
    with caplog.at_level(logging.INFO, "mlmadapt"):
        result = run.train(sets, disable_tqdm=False, logging_steps=100)
    printed = capfd.readouterr()
    assert printed.out == ""
    lines = [line for line in re.split(r"[\r\n]+", printed.err) if line.startswith("step ")]
    found = [
        (logged(result, f"eval_domain_{name}"), logged(result, f"eval_general_{name}"))
        for name in ("perplexity", "accuracy")
    ]
    (domain, general), (domain_right, general_right) = found
    assert lines == [
        f"step {step} of 3  domain: perplexity {domain[i]:.1f}, right {domain_right[i]:.0%}  "
        f"general: perplexity {general[i]:.1f}, right {general_right[i]:.0%}"
        for i, step in enumerate((0, 3))
    ]
    assert re.search(r" 1/3 \[.* loss=\d\.\d{3}, lr=\S+, [\d,]+ tokens/s\]", printed.err)
    assert "perplexity" not in caplog.text


@pytest.mark.parametrize("silent", [False, True])
def test_without_a_bar_evaluations_go_to_the_log(
    run: Run,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    silent: bool,  # noqa: FBT001
) -> None:
    """Where tqdm is switched off from outside; the setting silences both."""
    bar = prepare_module.tqdm
    monkeypatch.setattr(
        prepare_module, "tqdm", lambda **options: bar(**options | {"disable": True})
    )
    with caplog.at_level(logging.INFO, "mlmadapt"):
        run.train(freeze(make_rows(3)), disable_tqdm=silent)
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert [re.sub(r"[\d.]+", "#", line) for line in lines] == (
        [] if silent else ["step # of #  eval: perplexity #, right #%"] * 2
    )
    assert "step" not in capfd.readouterr().err


def test_other_processes_do_not_log_evaluations(caplog: pytest.LogCaptureFixture) -> None:
    """Their bars are off, which is no reason to tell it again."""
    metrics = {"eval": MaskedLMMetrics(1.0, 2.7, 0.5, 0.9, 9)}
    for is_main in (True, False):
        run: Any = SimpleNamespace(
            config=TrainingConfig(),
            accelerator=SimpleNamespace(is_main_process=is_main),
            progress=SimpleNamespace(disable=True),
            state=SimpleNamespace(step=4),
            total_steps=9,
        )
        with caplog.at_level(logging.INFO, "mlmadapt"):
            show_metrics(run, metrics)
    assert caplog.messages == ["step 4 of 9  eval: perplexity 2.7, right 50%"]


class Notes(accelerate.tracking.GeneralTracker):
    """Keeps what it is told, in a folder of its own as TensorBoard's has."""

    # ruff: noqa: D102 (of the class that it stands in for)

    name = "notes"
    requires_logging_directory = True
    made: list[Notes] = []  # noqa: RUF012

    def __init__(self, run_name: str, logging_dir: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.folder = None if logging_dir is None else Path(logging_dir) / run_name
        self.entries: list[tuple[int | None, dict[str, Any]]] = []
        self.config: dict[str, Any] = {}
        self.finished = False
        self.made.append(self)

    @property
    def tracker(self) -> Notes:
        return self

    def start(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.entries.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"),
    reason="accelerate knows its trackers by an enum there, which takes no stand-in",
)
def test_a_tracker_is_told_what_the_history_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name in `report_to`; it may put files into the output folder."""
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    result = run.train(freeze(make_rows(3, seed=1)), report_to="notes")
    tracker = Notes.made[-1]
    told = [{"step": step, **values} for step, values in tracker.entries]
    assert told == result.history
    assert tracker.config["learning_rate"] == 1e-3
    assert tracker.finished
    assert tracker.folder == run.folder / "mlmadapt"


def test_tensorboard_has_the_curves_of_every_set(run: Run) -> None:
    """Read as its own page reads them, from files in the output folder."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard"
    )
    sets = {"domain": freeze(make_rows(3, seed=1)), "general": freeze(make_rows(3, seed=2))}
    result = run.train(sets, report_to=["tensorboard"])
    events = accumulator.EventAccumulator(str(run.folder / "mlmadapt")).Reload()
    for name in ("loss", "learning_rate", "eval_domain_perplexity", "eval_general_perplexity"):
        told = [each.value for each in events.Scalars(name)]
        assert told == pytest.approx(logged(result, name), rel=1e-6)


def test_a_tracker_of_the_callers_accelerator_is_used(run: Run) -> None:
    """And is left to its owner."""
    tracker = Notes("mine")
    accelerator = Accelerator(log_with=tracker)
    accelerator.init_trackers("mine")
    result = run.train(accelerator=accelerator)
    assert [step for step, _ in tracker.entries] == logged(result, "step")
    assert not tracker.finished


def test_gradient_checkpointing_gives_the_same_losses(run: Run, tmp_path: Path) -> None:
    """Dropout included; afterwards the model does without."""
    plain = Run(tmp_path / "plain").train()
    result = run.train(gradient_checkpointing=True)
    assert logged(result, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)
    assert not any(getattr(each, "gradient_checkpointing", False) for each in run.model.modules())


def test_bfloat16_is_near_and_the_model_stays_in_float32(run: Run, tmp_path: Path) -> None:
    """Autocast only; the wrapper is taken off again."""
    plain = logged(Run(tmp_path / "plain").train(), "loss")
    AcceleratorState._reset_state(reset_partial_state=True)
    forward = run.model.forward
    try:
        losses = logged(run.train(mixed_precision="bf16"), "loss")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert losses == pytest.approx(plain, rel=0.02)
    assert losses != plain
    assert run.model.forward == forward
    assert "forward" not in vars(run.model)
    assert {each.dtype for each in run.model.parameters()} == {torch.float32}


def test_collators_of_transformers_are_made_pure(run: Run, tmp_path: Path) -> None:
    """The global generators, which it draws from, do not decide."""
    histories = []
    for number in range(2):
        again = Run(tmp_path / str(number))
        again.collator = DataCollatorForLanguageModeling(again.tokenizer, mlm_probability=0.3)
        torch.rand(number)
        histories.append(again.train().history)
    assert histories[0] == histories[1]


def test_a_stream_is_trained(run: Run) -> None:
    """Epoch after epoch, until `max_steps`; and needs them."""
    run.rows = Dataset.from_list(run.rows).to_iterable_dataset(num_shards=2)
    with pytest.raises(ValueError, match=r"stream without a length, max_steps is -1"):
        run.train()
    result = run.train(max_steps=7)
    assert result.global_step == 7
    assert logged(result, "epoch")[-1] >= 2


def test_grouped_rows_are_trained(tmp_path: Path) -> None:
    """As lists and as a dataset, in the same batches; rows of one length are not grouped."""

    def losses(rows: Any, strategy: str) -> list[float]:
        again = Run(tmp_path / "run")
        again.rows = rows
        result = again.train(train_sampling_strategy=strategy, overwrite=True)
        return logged(result, "loss")

    grouped = losses(make_rows(12), "group_by_length")
    assert losses(Dataset.from_list(make_rows(12)), "group_by_length") == grouped
    assert losses(make_rows(12), "random") != grouped
    short = [{name: row[name][:4] for name in row} for row in make_rows(30)]
    short = [row for row in short if len(row["input_ids"]) == 4]
    assert len(short) > 20
    assert losses(short, "group_by_length") == losses(short, "random")


def test_rows_of_unknown_lengths_cannot_be_grouped(run: Run) -> None:
    """Of a stream, and of a dataset whose rows are made when they are read."""
    settings = {"max_steps": 3, "train_sampling_strategy": "group_by_length"}
    rows, message = run.rows, "'group_by_length', but the lengths of a {} are not known before its"
    run.rows = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match=message.format("IterableDataset")):
        run.train(**settings)
    places = Dataset.from_dict({"place": [*range(len(rows))]})
    run.rows = places.with_transform(
        lambda columns: {name: [rows[at][name] for at in columns["place"]] for name in rows[0]}
    )
    with pytest.raises(ValueError, match=message.format("Dataset") + ".* or leave it at 'random'"):
        run.train(**settings)


def test_a_stream_that_can_be_read_once_is_an_error(run: Run) -> None:
    """It would be waited on for ever at the second epoch."""
    run.rows = iter(run.rows)
    with pytest.raises(ValueError, match="and yield the same ones each time it is read"):
        run.train(max_steps=30)


def test_the_saved_model_predicts_masks(run: Run) -> None:
    """Model and tokenizer lie in the folder itself, as `pipeline` wants them."""
    run.train()
    fill = pipeline("fill-mask", model=str(run.folder), device="cpu")
    assert len(fill("This is a great [MASK].")) == 5
    assert equal(weights(fill.model), weights(run.model))
    checkpoint = AutoModelForMaskedLM.from_pretrained(run.folder / "checkpoint-3")
    assert equal(weights(checkpoint), weights(run.model))


def test_nothing_of_the_callers_is_moved(run: Run) -> None:
    """Global generators, rows, mode, hooks, frozen parameters."""
    run.model.train()
    run.model.bert.embeddings.word_embeddings.weight.requires_grad_(requires_grad=False)
    flags = [each.requires_grad for each in run.model.parameters()]
    rows = copy.deepcopy(run.rows)
    forward = run.model.forward
    states = global_states()
    run.train(make_rows(4), num_train_epochs=2, dataloader_num_workers=1)
    assert global_states() == states
    assert repr(run.rows) == repr(rows)
    assert run.model.training
    assert run.model.forward == forward
    assert [each.requires_grad for each in run.model.parameters()] == flags
    assert all(each.grad is None for each in run.model.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in run.model.modules()
    )


class Watching(WholeWordMaskingCollator):
    """Notes the labels that it makes, by row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def collate(self, features: Any, *, key: int, progress: float = 1.0) -> Any:
        batch = super().collate(features, key=key, progress=progress)
        for row, labels in zip(features, batch["labels"], strict=True):
            ids = tuple(map(int, row["input_ids"]))
            self.seen.append((ids, tuple(map(int, labels[: len(ids)]))))
        return batch


def masks_of(folder: Path, **settings: Any) -> list[dict[tuple[int, ...], tuple[int, ...]]]:
    """Return by epoch the labels of each row."""
    run = Run(folder)
    run.rows = [dict(row) for row in run.rows if len(row["input_ids"]) > 12]
    run.collator = Watching(run.tokenizer)
    run.train(num_train_epochs=2, save_strategy="no", **settings)
    count = len(run.rows)
    seen = run.collator.seen[-2 * count :]  # before them, the model was looked at
    return [dict(seen[:count]), dict(seen[count:])]


def test_masks_are_a_function_of_seed_epoch_and_row(tmp_path: Path) -> None:
    """Not of the batch; another epoch or seed gives others."""
    first, second = masks_of(tmp_path / "1", per_device_train_batch_size=4)
    assert first.keys() == second.keys()
    assert first != second
    assert masks_of(tmp_path / "2", per_device_train_batch_size=3) == [first, second]
    assert masks_of(tmp_path / "3", seed=7)[0] != first


def test_a_map_style_dataset_trains_as_its_rows_do(run: Run, tmp_path: Path) -> None:
    """`Dataset`, with or without a format, and a list of rows give the same history."""
    expected = run.train().history
    for number, kind in enumerate((None, "torch", "numpy")):
        again = Run(tmp_path / str(number))
        again.rows = Dataset.from_list(
            [{name: list(map(int, values)) for name, values in row.items()} for row in run.rows]
        ).with_format(kind)
        assert again.train().history == expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta"])
def test_of_a_peft_model_the_adapter_is_trained_and_saved(run: Run, architecture: str) -> None:
    """The base stays as it was; base and adapter together predict what was trained, to the bit."""
    run.model = tiny_model(run.tokenizer, architecture=architecture)
    base = copy.deepcopy(run.model)
    targets = "q_lin" if architecture == "distilbert" else "query"
    run.model = peft.get_peft_model(run.model, peft.LoraConfig(target_modules=[targets], r=2))
    before = run.model.state_dict()
    before = {name: values.clone() for name, values in before.items()}
    frozen = freeze(run.rows)
    result = run.train(frozen, learning_rate=0.1, save_strategy="no")
    after = run.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora" in name}
    assert {path.name for path in run.folder.glob("*.safetensors")} == {"adapter_model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(base, str(run.folder))
    assert evaluate_mlm(loaded, frozen, tokenizer=run.tokenizer) == result.final


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_model_resumes_to_the_bit(tmp_path: Path) -> None:
    """From the checkpoint of the first epoch, with a new adapter on a new model."""

    def train(folder: Path, *, resume: bool = False) -> dict[str, torch.Tensor]:
        again = Run(folder)
        config = peft.LoraConfig(target_modules=["query"], r=2)
        with torch.random.fork_rng():
            torch.manual_seed(int(resume))  # other weights, unless they are loaded
            again.model = peft.get_peft_model(again.model, config)
        again.train(num_train_epochs=2, learning_rate=0.1, resume_from_checkpoint=resume or None)
        state: dict[str, torch.Tensor] = again.model.state_dict()
        return state

    whole = train(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    resumed = train(tmp_path / "out", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_rows_are_frozen_on_the_way() -> None:
    """Evaluation rows become what `insert_random_mask` makes of them, whatever their batch."""
    tokenizer, rows = tiny_tokenizer(), make_rows(12)
    expected = collate_frozen(freeze(rows), tokenizer)
    for place in (0, 5):
        batch = collate_unfrozen(
            rows[place : place + 5], tokenizer, WholeWordMaskingCollator(tokenizer), seed=0
        )
        width = batch["labels"].shape[1]
        for name, values in batch.items():
            assert torch.equal(values, expected[name][place : place + 5, :width])
