"""A run of a few steps that can be killed, interrupted and poisoned, for tests of what comes after.

Imported by `processes`, whose forks call these functions by name, and started as a script by tests
of real launchers: ``python short_run.py '{"folder": ..., ...}'``.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import signal
import sys
import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.distributed.fsdp import fully_shard
from transformers import DataCollatorForLanguageModeling

from mlmadapt import (
    TrainingConfig,
    WholeWordMaskingCollator,
    accelerate_train,
    insert_random_mask,
    pack_texts,
)
from mlmadapt.testing import tiny_model, tiny_rows, tiny_tokenizer
from mlmadapt.training import loop
from mlmadapt.training.batches import BatchPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

logging.getLogger("mlmadapt.training.batches").setLevel(logging.INFO)

SETTINGS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "disable_tqdm": True,
}


def rows_of(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn columns into rows."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def make_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Tokenize documents of unequal lengths."""
    return tiny_rows(tiny_tokenizer(), count, seed=seed)


def pack(rows: list[dict[str, Any]], *, chunk_size: int) -> list[dict[str, Any]]:
    """Lay documents side by side."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return rows_of(pack_texts(columns, chunk_size=chunk_size))


def yield_rows(shards: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of all shards."""
    for shard in shards:
        yield from shard


def stream_shards(rows: list[dict[str, Any]]) -> IterableDataset:
    """Make a stream of six shards of unequal length."""
    cuts = [len(rows) * share // 24 for share in (0, 1, 3, 6, 10, 15, 24)]
    shards = [rows[first:end] for first, end in pairwise(cuts)]
    return IterableDataset.from_generator(yield_rows, gen_kwargs={"shards": shards})


def make_stream(rows: list[dict[str, Any]], kind: str) -> IterableDataset:
    """Make a stream of a kind that `train` tells of."""
    if kind in ("plain", "shuffled"):
        stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=3)
        return stream if kind == "plain" else stream.shuffle(seed=1, buffer_size=7)
    stream = stream_shards(rows)
    if kind == "parts":
        return split_dataset_by_node(stream, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return stream if kind == "shards" else split_dataset_by_node(stream, 0, 2)


def freeze(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mask rows once and for all."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return rows_of(insert_random_mask(columns, WholeWordMaskingCollator(tiny_tokenizer())))


def warm_up(folder: str) -> None:
    """Load what is loaded at first use; what is saved for that goes to `folder`."""
    for architecture in ("bert", "deberta-v2"):
        model = tiny_model(tiny_tokenizer(), architecture=architecture)
        # Makes the table of renamed weights of every architecture, which takes a quarter of a run.
        model.save_pretrained(folder)
    TrainingConfig()
    with suppress(ImportError):
        from matplotlib.figure import Figure

        Figure().savefig(io.BytesIO())
    DataCollatorForLanguageModeling(tiny_tokenizer())


def drop_nothing(model: torch.nn.Module) -> torch.nn.Module:
    """Switch dropout off, wherever the model keeps its probabilities."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout_prob", "attention_dropout"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return model


def waits_of_turns(**arguments: Any) -> Any:
    """Call `pretend_device`, which changes the process for good."""
    import pretend_device

    return pretend_device.waits_of_turns(**arguments)


def digest(model: torch.nn.Module) -> str:
    """Hash all weights, to the bit."""
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(values.numpy().tobytes() for _, values in state)).hexdigest()


def global_states() -> tuple[str, str, str]:
    """Hash the states of all global generators."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()  # noqa: NPY002
    return tuple(hashlib.sha256(repr(state).encode()).hexdigest() for state in states)


def train(
    folder: str,
    *,
    rows: int = 24,
    rows_seed: int = 0,
    architecture: str = "bert",
    dropout: bool = True,
    packed: bool = False,
    collator: str | dict[str, Any] = "ours",
    stream: str | None = None,
    sharded: bool = False,
    at_step: dict[str, list[Any]] | None = None,
    at_event: list[Any] | None = None,
    while_saving: dict[str, list[Any]] | None = None,
    in_worker: str | None = None,
    count_events: bool = False,
    curves: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train for a few steps and return what must not depend on interruptions.

    Args:
        folder: Output folder.
        rows: Training rows; 6 others are evaluated on.
        rows_seed: Another seed gives another dataset.
        architecture: Of the model.
        dropout: Whether the model has any.
        packed: Whether rows hold several documents.
        collator: ``"ours"``, its settings, ``"ours, by schedule"`` or ``"transformers"``.
        stream: ``"plain"`` or ``"shuffled"`` for an `IterableDataset` of 3 shards; ``"shards"`` for
            one of 6 of unequal length, ``"parts"`` for this process's part of it, ``"one part"``
            for the first of two.
        sharded: Whether `fully_shard` is applied first.
        at_step: By step (as text), what to do before it: see `_act`.
        at_event: A number and what to do before the so-manyth event of the filesystem below
            `folder`.
        while_saving: By step, what to do when half of that checkpoint is written.
        in_worker: What a worker does at the first row that it reads.
        count_events: Whether to return how many events there were.
        curves: Whether the model card has a picture, which takes as long to draw as all the rest.
        **settings: Of `TrainingConfig`, over `SETTINGS`.
    """
    torch.set_num_threads(1)
    if not curves:
        sys.modules["matplotlib.figure"] = None  # as if it were not installed
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, architecture=architecture)
    if not dropout:
        drop_nothing(model)
    if sharded:
        torch.distributed.init_process_group("gloo")
        fully_shard(model)
    if collator == "ours, by schedule":
        collator = {"wwm_probability": {0.0: 0.5, 0.5: 0.3, 0.8: 0.1}}
    if collator != "transformers":
        choices = collator if isinstance(collator, dict) else {}
        data_collator: Any = WholeWordMaskingCollator(tokenizer, **choices)
    else:
        data_collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    train_rows: Any = make_rows(rows, seed=rows_seed)
    if packed:
        train_rows = pack(train_rows, chunk_size=40)
    if stream is not None:
        train_rows = make_stream(train_rows, stream)
    if in_worker is not None:
        train_rows = ActingRows(train_rows)
        train_rows.action = in_worker
    events = _watch_files(folder, at_event, while_saving or {})
    _act_at_steps(model, at_step or {})
    before = global_states()
    result = accelerate_train(
        model,
        train_rows,
        freeze(make_rows(6, seed=9)),
        tokenizer=tokenizer,
        data_collator=data_collator,
        config=TrainingConfig(output_dir=folder, **{**SETTINGS, **settings}),
    )
    return {
        "weights": digest(model),
        "history": result.history,
        "final": result.final.loss,
        "steps": result.global_step,
        "tokens": [result.tokens_seen, result.masked_tokens_seen],
        "randomness_moved": global_states() != before,
        **({"events": len(events)} if count_events else {}),
    }


def execute(*, script: str, name: str) -> Any:
    """Run a script and return one of its variables."""
    names: dict[str, Any] = {}
    exec(script, names)  # noqa: S102  # it stands in the documentation
    return names[name]


def train_differently(folder: str, *, differ: str) -> dict[str, Any]:
    """Train with something else on the second process."""
    value = {"rows": 24, "rows_seed": 0, "per_device_train_batch_size": 4, "seed": 1}[differ]
    return train(folder, **{differ: value + 4 * (os.environ["RANK"] == "1")})


def reference(*, rows: int, batch: int = 8, epochs: int | None = None) -> dict[str, Any]:
    """Train as `train` does without dropout, in the plainest way: one full batch a step.

    Full head, one padded batch, one mean; AdamW and a linear schedule written out.
    """
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()
    model = drop_nothing(tiny_model(tokenizer)).train()
    data = [{**row, "place": place} for place, row in enumerate(make_rows(rows))]
    epochs = epochs or (2 if rows == 8 else 1)
    collator = WholeWordMaskingCollator(tokenizer, seed=42, key_column="place")
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS["learning_rate"])
    plan = BatchPlan(rows=rows, batch_size=batch, seed=42)
    total = epochs * plan.steps_per_epoch
    made: dict[str, Any] = {"losses": [], "norms": [], "tokens": [0, 0]}
    frozen = freeze(make_rows(6, seed=9))
    nll = count = 0.0
    for row in frozen:
        labels = torch.from_numpy(row["masked_labels"])[None]
        with torch.no_grad():
            ids = torch.from_numpy(row["masked_input_ids"])[None]
            logits = model(input_ids=ids).logits.double()
        nll += float(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum"))
        count += int((labels != -100).sum())
    made["perplexity"] = math.exp(nll / count)
    for epoch in range(epochs):
        collator.set_epoch(epoch)
        order = plan.order(epoch).tolist()
        for start in range(0, rows, batch):
            inputs = collator([data[row] for row in order[start : start + batch]])
            labels = inputs.pop("labels")
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits.mT, labels)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = SETTINGS["learning_rate"] * (1 - len(made["losses"]) / total)
            optimizer.step()
            optimizer.zero_grad()
            made["losses"].append(float(loss))
            made["norms"].append(float(norm))
            made["tokens"][0] += int(inputs["attention_mask"].sum())
            made["tokens"][1] += int((labels != -100).sum())
    return made


def dropout_of_rank(folder: str) -> list[list[bool]]:
    """Return what dropout drew on this process in each of its training steps."""
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    drawn: list[list[bool]] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if module.training and torch.is_grad_enabled():
            drawn.append((output[0, 0] == 0).tolist())

    model.bert.embeddings.dropout.register_forward_hook(note)
    settings = {**SETTINGS, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    accelerate_train(
        model,
        make_rows(12),
        tokenizer=tokenizer,
        data_collator=WholeWordMaskingCollator(tokenizer),
        config=TrainingConfig(output_dir=folder, **settings),
    )
    return drawn[-3:]  # before them, the model was looked at and DDP set up


_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}


def _act(model: torch.nn.Module, name: str, rank: int = -1) -> None:  # noqa: C901  # a list
    """Do harm: on one process, or on all (-1)."""
    if rank not in (-1, int(os.environ.get("RANK", "0"))):
        return
    if name in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[name])
    elif name.endswith(" group"):  # workers included
        os.killpg(0, _SIGNALS[name.removesuffix(" group")])
    elif name == "term parent":  # torchrun, which hands it to all
        os.kill(os.getppid(), signal.SIGTERM)
    elif name == "poison gradient":
        parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        parameter.register_hook(lambda gradient: gradient * float("nan"))
    elif name == "poison loss":
        # The loss of these targets is infinite, and its gradient finite.
        with torch.no_grad():
            model.get_output_embeddings().bias.fill_(-float("inf"))
            model.get_output_embeddings().bias[:8] = 0.0
    elif name == "nudge":
        with torch.no_grad():  # of one number alone, the next update may round it away
            model.get_output_embeddings().bias.nextafter_(torch.tensor(torch.inf))
    elif name == "hang":
        threading.Event().wait()
    elif name == "fail":
        raise ValueError("on purpose")
    elif name == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise ValueError(name)


class ActingRows(list[dict[str, Any]]):
    """Rows of which the first that a worker reads does harm."""

    action = ""

    def __getitem__(self, place: Any) -> Any:
        """Read a row."""
        if self.action and torch.utils.data.get_worker_info() is not None:
            action, self.action = self.action, ""
            _act(torch.nn.Module(), action)
        return super().__getitem__(place)


def _act_at_steps(model: torch.nn.Module, actions: dict[str, list[Any]]) -> None:
    original = loop.take_step

    def take_step(run: Any, batches: Any, **kwargs: Any) -> Any:
        for action in actions.get(str(run.state.step), []):
            _act(model, *([action] if isinstance(action, str) else action))
        return original(run, batches, **kwargs)

    loop.take_step = take_step


def _watch_files(
    folder: str, at_event: list[Any] | None, while_saving: dict[str, list[Any]]
) -> list[str]:
    """Note what this process does to files below a folder; torch's and Rust's code is not seen."""
    events: list[str] = []
    # The last file of a checkpoint that Python itself writes, before it has its name.
    half_written = re.compile(r"checkpoint-(\d+)[^/]*/state\.json").search

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        names = [str(name) for name in arguments if isinstance(name, (str, Path))]
        if not event.startswith(("open", "os.", "shutil.")) or threading.current_thread() is not (
            threading.main_thread()
        ):
            return
        if any(name.startswith(folder) for name in names):
            if at_event is not None and len(events) == at_event[0]:
                _act(torch.nn.Module(), *at_event[1:])
            events.append(f"{event} {names}")
            if event == "open" and "w" in names[1:] and (match := half_written(names[0])):
                for action in while_saving.pop(match[1], []):
                    _act(torch.nn.Module(), action)

    sys.addaudithook(watch)
    return events


if __name__ == "__main__":
    outcome = train(**json.loads(sys.argv[1]))
    Path(outcome_path := sys.argv[2] + os.environ.get("RANK", "0")).write_text(json.dumps(outcome))
