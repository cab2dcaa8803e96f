"""One process: what is trained, evaluated and saved, and what is left as it was."""

from __future__ import annotations

import copy
import shutil
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import IterableDataset
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, pipeline

from mlmadapt import TrainingConfig, WholeWordMaskingCollator, evaluate_mlm, extend_vocabulary
from mlmadapt.model.checks import try_model
from mlmadapt.model.evaluation import collate_frozen
from mlmadapt.testing import tiny_model, tiny_rows, tiny_tokenizer
from mlmadapt.training.batches import BatchPlan
from mlmadapt.training.loop import collate_unfrozen
from tests.scripts.short_run import drop_nothing, freeze, global_states
from tests.scripts.tiny_run import SAVING, TinyRun, equal, logged, weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler:UserWarning")
def test_a_step_without_targets_changes_nothing(
    run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights and moments stay, where a mean over no token would be NaN and AdamW would decay."""
    last = int(BatchPlan(rows=13, batch_size=4, seed=42).order(0)[-1])
    run.rows = [{"input_ids": [7, 8], "word_ids": [-1, -1]} for _ in range(13)]
    run.rows[last]["word_ids"] = [0, 1]  # or it would be refused
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.1, weight_decay=0.1)
    run.objects["optimizer"] = optimizer
    before = weights(run.model)
    result = run.train(max_steps=3)
    assert equal(weights(run.model), before)
    assert logged(result, "loss") == []
    assert optimizer.state_dict()["state"] == {}
    assert result.masked_tokens_seen == 0
    assert "has no masked token on any process; nothing is updated" in caplog.text


class LyingLoss:
    """A forward pass whose own loss is wrong, as that of most models under accumulation."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Lie."""
        assert "labels" not in kwargs, "nobody needs the model's loss"
        output = self.forward(*args, **kwargs)
        output.loss = output.logits.sum() * 1e6
        return output


def test_the_model_is_not_asked_for_its_loss(run: TinyRun, tmp_path: Path) -> None:
    """A model whose loss lies is trained as the others."""
    losses = logged(TinyRun(tmp_path / "honest").train(), "loss")
    run.model.forward = LyingLoss(run.model.forward)
    assert logged(run.train(), "loss") == losses


def test_the_head_predicts_in_batches_of_few_sizes(run: TinyRun) -> None:
    """As many positions as are masked would be blocks of memory of another size in each step.

    The allocator keeps what lies free between such blocks, more and more of it.
    """
    run.rows = tiny_rows(run.tokenizer, 96)
    sizes = []
    head = run.model.get_output_embeddings()
    head.register_forward_hook(lambda *call: sizes.append(call[1][0].shape[:-1].numel()))
    result = run.train(per_device_train_batch_size=24)
    taken = sizes[-4:]  # before them, the head was checked on a few rows
    assert sum(taken) - 4 * 32 < result.masked_tokens_seen <= sum(taken)
    assert {size % 32 for size in taken} == {0}


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_sgd_takes_the_step_that_is_written_out(run: TinyRun, clip: float) -> None:
    """Weights minus learning rate times the clipped gradient of the mean over masked tokens."""
    drop_nothing(run.model)
    run.rows = run.rows[:8]
    reference = copy.deepcopy(run.model)
    run.collator = WholeWordMaskingCollator(run.tokenizer, seed=3)
    by_place = replace(run.collator, key_column="place")
    batch = by_place([{**row, "place": place} for place, row in enumerate(run.rows)])
    labels = batch.pop("labels")
    torch.nn.functional.cross_entropy(reference(**batch).logits.mT, labels).backward()
    norm = torch.cat([weight.grad.flatten() for weight in reference.parameters()]).norm()
    factor = min(1.0, clip / float(norm)) if clip else 1.0
    expected = [weight.detach() - 0.1 * factor * weight.grad for weight in reference.parameters()]
    run.objects["optimizer"] = torch.optim.SGD(run.model.parameters(), lr=0.1)
    result = run.train(
        lr_scheduler_type="constant",
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        max_grad_norm=clip,
    )
    assert result.global_step == 1
    assert logged(result, "grad_norm") == pytest.approx([float(norm)], abs=1e-5)
    for values, other in zip(run.model.parameters(), expected, strict=True):
        torch.testing.assert_close(values.detach(), other, atol=1e-6, rtol=1e-5)


def test_gradients_outside_of_the_optimizer_do_not_pile_up(tmp_path: Path) -> None:
    """An optimizer of the head alone: the norm is that of each step, as if all were in it."""
    norms = []
    for lr_of_the_rest in (None, 0.0):
        run = TinyRun(tmp_path / str(lr_of_the_rest))
        head = {*run.model.cls.parameters()}
        rest = [weight for weight in run.model.bert.parameters() if weight not in head]
        groups: list[dict[str, Any]] = [{"params": list(run.model.cls.parameters())}]
        if lr_of_the_rest is not None:
            groups.append({"params": rest, "lr": lr_of_the_rest})
        run.objects["optimizer"] = torch.optim.SGD(groups, lr=1e-3)
        norms.append(logged(run.train(), "grad_norm"))
    assert norms[0] == norms[1]


@pytest.mark.parametrize("logging_steps", [1, 100])
@pytest.mark.parametrize("fused", [False, True])
def test_a_spoiled_step_changes_no_weight(
    tmp_path: Path, *, fused: bool, logging_steps: int
) -> None:
    """Nor does the next, whose gradient is finite, and which began before the host knew."""
    settings = {"lr_scheduler_type": "constant", "logging_steps": logging_steps}
    trained = []
    for steps, is_spoiled in ((2, False), (9, True)):
        run = TinyRun(tmp_path / str(steps))
        run.rows = tiny_rows(run.tokenizer, 40)
        optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-3, fused=fused)
        run.objects["optimizer"] = optimizer
        passes = count()
        bias = run.model.get_output_embeddings().bias
        bias.register_hook(lambda grad: grad * (torch.nan if next(passes) == 2 else 1.0))  # noqa: B023
        message = r"step 2 \(epoch 0\) is not finite: .* training rows \d+, \d+, \d+, \d+\. The we"
        error = pytest.raises(FloatingPointError, match=message)
        with error if is_spoiled else nullcontext():
            run.train(max_steps=steps, **settings)
        assert next(passes) == (2 if not is_spoiled else 4 if fused and logging_steps > 1 else 3)
        trained.append(weights(run.model))
    assert equal(*trained)
    assert not hasattr(optimizer, "found_inf")
    assert not (run.folder / "model.safetensors").exists()


def test_an_infinite_loss_with_a_finite_gradient_stops_the_run(run: TinyRun) -> None:
    """Of targets that are out of the vocabulary."""
    run.collator = WholeWordMaskingCollator(run.tokenizer, wwm_probability=1.0)

    def spoil(*_: Any) -> None:
        with torch.no_grad():
            run.model.get_output_embeddings().bias[8:] = -torch.inf

    optimizer = run.objects["optimizer"] = torch.optim.SGD(run.model.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"the gradient of step 1 .* loss of this .* inf"):
        run.train()


def test_the_callers_own_optimizer_schedule_and_accelerator_are_used(run: TinyRun) -> None:
    """Each is the object that is stepped, once a step."""
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    accelerator = Accelerator(gradient_accumulation_steps=4)  # not ours to use, and undone
    run.objects = {"optimizer": optimizer, "lr_scheduler": schedule, "accelerator": accelerator}
    with patch.object(accelerator, "prepare", wraps=accelerator.prepare) as prepare:
        result = run.train()
    prepare.assert_called_once_with(run.model, optimizer)
    assert logged(result, "learning_rate") == [0.25, 0.125, 0.0625]
    assert schedule.last_epoch == 3


def test_accumulation_of_the_callers_accelerator_does_not_scale_the_gradient(
    run: TinyRun, tmp_path: Path
) -> None:
    """Accelerate divides each backward pass by it."""
    plain = logged(TinyRun(tmp_path / "plain").train(), "grad_norm")
    run.objects["accelerator"] = Accelerator(gradient_accumulation_steps=4)
    assert logged(run.train(), "grad_norm") == pytest.approx(plain, rel=1e-6)


def test_several_sets_are_evaluated_and_the_first_one_counts(run: TinyRun) -> None:
    """The domain and a general one, so that forgetting shows."""
    sets = {"domain": freeze(run.rows[:5]), "general": freeze(tiny_rows(run.tokenizer, 7, seed=2))}
    run.eval_rows = sets
    result = run.train()
    assert len(logged(result, "eval_domain_loss")) == len(logged(result, "eval_general_loss")) == 2
    assert result.initial is not None
    assert result.final is not None
    assert [result.initial.loss, result.final.loss] == logged(result, "eval_domain_loss")
    for name, rows in sets.items():
        metrics = evaluate_mlm(run.model, rows, tokenizer=run.tokenizer, batch_size=2)
        assert metrics.loss == pytest.approx(logged(result, f"eval_{name}_loss")[-1], abs=1e-6)


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_rows_that_are_not_frozen_are_frozen_once(run: TinyRun, kind: str) -> None:
    """Each evaluation sees the same masks: with a rate of 0, the figure stays."""
    if kind == "transformers":
        run.collator = DataCollatorForLanguageModeling(run.tokenizer, mlm_probability=0.3)
    run.eval_rows = tiny_rows(run.tokenizer, 9, seed=4)
    result = run.train(learning_rate=0.0, num_train_epochs=2)
    losses = logged(result, "eval_loss")
    assert len(losses) == 3
    assert len(set(losses)) == 1
    assert logged(result, "eval_masked_tokens")[0] > 9


def test_the_best_model_is_kept_and_saved(run: TinyRun) -> None:
    """It is worse at the end, and the checkpoint of the best outlives the limit of one."""
    run.eval_rows = freeze(tiny_rows(run.tokenizer, 5, seed=1))
    result = run.train(
        learning_rate=0.3,
        lr_scheduler_type="constant",
        num_train_epochs=8,
        save_strategy="epoch",
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
        metrics = evaluate_mlm(model, run.eval_rows, tokenizer=run.tokenizer)
        assert metrics.loss == pytest.approx(best, abs=1e-6)
    kept = {path.name for path in run.folder.glob("checkpoint-*")}
    assert kept == {"checkpoint-24", f"checkpoint-{3 * losses.index(best)}"}


def test_bfloat16_is_near_and_the_model_stays_in_float32(run: TinyRun, tmp_path: Path) -> None:
    """Autocast only; the wrapper is taken off again."""
    plain = logged(TinyRun(tmp_path / "plain").train(), "loss")
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
    assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}


def test_a_stream_is_trained(run: TinyRun) -> None:
    """Epoch after epoch, each opened once, until `max_steps`; one that is read once is an error."""
    rows, opened = run.rows, []

    def read() -> Iterator[dict[str, list[int]]]:
        opened.append(0)
        yield from rows

    run.rows = IterableDataset.from_generator(read)
    with pytest.raises(ValueError, match=r"train_dataset is a stream, max_steps is -1"):
        run.train()
    opened.clear()
    result = run.train(max_steps=7, overwrite=True)
    assert result.global_step == 7
    assert logged(result, "epoch")[-1] >= 2
    assert len(opened) == 3
    run.rows = iter(rows)
    with pytest.raises(ValueError, match="and yield the same ones each time it is read"):
        run.train(max_steps=30, overwrite=True)


def test_the_saved_model_predicts_masks(run: TinyRun) -> None:
    """Model and tokenizer lie in the folder itself, as `pipeline` wants them."""
    run.train(**SAVING)
    fill = pipeline("fill-mask", model=str(run.folder), device="cpu")
    assert len(fill("This is a great [MASK].")) == 5
    assert equal(weights(fill.model), weights(run.model))
    checkpoint = AutoModelForMaskedLM.from_pretrained(run.folder / "checkpoint-3")
    assert equal(weights(checkpoint), weights(run.model))


def test_nothing_of_the_callers_is_moved(run: TinyRun) -> None:
    """Global generators, rows, mode, hooks, frozen parameters."""
    run.model.train()
    run.model.bert.embeddings.word_embeddings.weight.requires_grad_(requires_grad=False)
    flags = [weight.requires_grad for weight in run.model.parameters()]
    rows, forward, states = copy.deepcopy(run.rows), run.model.forward, global_states()
    run.eval_rows = run.rows[:4]
    run.train(num_train_epochs=2, dataloader_num_workers=1)
    assert global_states() == states
    assert run.rows == rows
    assert run.model.training
    assert run.model.forward == forward
    assert [weight.requires_grad for weight in run.model.parameters()] == flags
    assert all(weight.grad is None for weight in run.model.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in run.model.modules()
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_of_a_peft_model_the_adapter_is_trained_and_saved(run: TinyRun, architecture: str) -> None:
    """The base stays as it was; base and adapter together predict what was trained, to the bit."""
    run.model = tiny_model(run.tokenizer, architecture=architecture)
    base = copy.deepcopy(run.model)
    run.adapt(target_modules=["q_lin" if architecture == "distilbert" else "query"])
    before = {name: values.clone() for name, values in run.model.state_dict().items()}
    run.eval_rows = freeze(run.rows)
    result = run.train(learning_rate=0.1)
    after = run.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora" in name}
    assert {path.name for path in run.folder.glob("*.safetensors")} == {"adapter_model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(base, str(run.folder))
    assert evaluate_mlm(loaded, run.eval_rows, tokenizer=run.tokenizer) == result.final


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("architecture", "kind", "layers"),
    [
        ("bert", "wordpiece", "query"),
        ("roberta", "byte_bpe", "query"),
        ("distilbert", "wordpiece", "q_lin"),
        ("modernbert", "byte_bpe", "Wqkv"),
        ("albert", "unigram", "query"),
    ],
)
def test_new_words_are_learned_by_adapters(
    run: TinyRun, architecture: str, kind: str, layers: str, tmp_path: Path
) -> None:
    """Their rows alone, in head and embeddings alike; merged and loaded, all is the same."""
    old = tiny_tokenizer(kind)
    words = ["placebo", "goodness"]
    model = tiny_model(old, architecture=architecture)
    run.tokenizer, run.model = extend_vocabulary(old, model, words)
    base = copy.deepcopy(run.model)
    text = "placebo of goodness and goodness of placebo"
    run.rows = [{"input_ids": run.tokenizer(text)["input_ids"]}] * 12
    run.collator = DataCollatorForLanguageModeling(run.tokenizer, mlm_probability=0.5)
    new = [*range(len(old), len(run.tokenizer))]
    run.adapt(target_modules=[layers], trainable_token_indices=new)
    run.train(learning_rate=0.1)
    inputs = {"input_ids": torch.tensor([run.rows[0]["input_ids"]])}
    expected = try_model(run.model, inputs)
    merged = peft.PeftModel.from_pretrained(base, str(run.folder)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(try_model(loaded, inputs), expected)
    table = loaded.get_input_embeddings().weight
    assert loaded.get_output_embeddings().weight is table
    was = extend_vocabulary(old, model, words)[1].get_input_embeddings().weight
    moved = (table != was).any(1).nonzero().flatten()
    assert moved.tolist() == new


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_that_train_embeddings_alone_are_refused(run: TinyRun) -> None:
    """Before the first step, with what trains the head as well."""
    run.adapt(modules_to_save=["word_embeddings"])
    with pytest.raises(ValueError, match="train them apart; give LoraConfig trainable_token"):
        run.train()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_model_resumes_to_the_bit(run: TinyRun) -> None:
    """From the checkpoint of the first epoch, with a new adapter on a new model."""
    trained = []
    for resume in (False, True):
        run.model = tiny_model(tiny_tokenizer())
        with torch.random.fork_rng():
            torch.manual_seed(int(resume))  # other weights, unless they are loaded
            run.adapt()
        settings = {**SAVING, "learning_rate": 0.1, "resume_from_checkpoint": resume or None}
        run.train(**settings)
        trained.append(weights(run.model))
        shutil.rmtree(run.folder / "checkpoint-3")
    assert equal(*trained)


def test_rows_are_frozen_on_the_way() -> None:
    """Evaluation rows become what `insert_random_mask` makes of them, whatever their batch."""
    tokenizer = tiny_tokenizer()
    rows = tiny_rows(tokenizer, 12)
    run: Any = SimpleNamespace(
        tokenizer=tokenizer,
        data_collator=WholeWordMaskingCollator(tokenizer),
        config=TrainingConfig(seed=0),
    )
    expected = collate_frozen(freeze(rows), tokenizer)
    for place in (0, 5):
        batch = collate_unfrozen(rows[place : place + 5], run=run)
        width = batch["labels"].shape[1]
        for name, values in batch.items():
            assert torch.equal(values, expected[name][place : place + 5, :width])
