"""The model card of a run: what was trained on what, how, and what came of it.

Written for a reader who has the folder only, by `huggingface_hub`, whose classes know what the hub
reads. A name is on it if the caller gave it or the hub knows it; a path of this machine never is.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # no __all__

from mlmadapt.training.run import Run

logger = logging.getLogger(__name__)

_METRICS = {
    "perplexity": ".2f",
    "loss": ".4f",
    "accuracy": ".1%",
    "top5_accuracy": ".1%",
    "masked_tokens": ",.0f",
}
_EXACT = "Over the masked tokens of rows whose masks are the same before and after."
# By an object of the caller's own.
_REPLACED = {
    "optimizer": ("learning_rate", "weight_decay"),
    "lr_scheduler": ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
}
_PACKAGES = ("mlmadapt", "transformers", "torch", "datasets", "accelerate", "huggingface_hub")


def write_model_card(run: Run, *, filled: Mapping[str, str]) -> None:
    """Write ``README.md`` into the output folder, and the curves if matplotlib is installed.

    Args:
        run: A run whose model is saved.
        filled: How that model fills in the sentences of `config.fill_mask`.
    """
    folder, config, model, step, result = (
        run.folder,
        run.config,
        run.model,
        run.saved_step,
        run.result(),
    )
    settings = {**run.fingerprint, "mixed_precision": run.accelerator.mixed_precision}
    name = str(config.dataset_name or "")
    if PurePath(name).is_absolute() or os.path.exists(name):  # noqa: PTH110  # a name may be long
        name = PurePath(name).name
    base, dataset = hub_name(model.name_or_path or ""), hub_name(name) if "/" in name else None
    is_peft = hasattr(model, "peft_config")
    bare: Any = model.get_base_model() if is_peft else model  # type: ignore[operator]  # PEFT's
    kind = type(bare).__name__.removeprefix("FSDP")
    title = f"{base or kind}, adapted to {name or 'a domain'}"
    evaluations = _find_evaluations(result.history, step)
    data = ModelCardData(
        base_model=base,
        datasets=dataset,
        library_name="peft" if is_peft else "transformers",
        pipeline_tag="fill-mask",
        tags=["masked-language-modeling", "domain-adaptation", "mlmadapt"],
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="fill-mask",
                # Of several sets, only the caller knows which is of this data.
                dataset_type=dataset if dataset and len(evaluations) == 1 else each,
                dataset_name=each,
                metric_type="perplexity",
                metric_value=after[f"{each}_perplexity"],
            )
            for each, (_, after) in evaluations.items()
        ],
    )
    story = (
        f"{'An adapter of ' * is_peft}`{kind}` of {model.num_parameters():,} parameters, adapted "
        f"by masked language modeling: {result.global_step:,} steps, {result.tokens_seen:,} "
        f"tokens, {result.masked_tokens_seen:,} of them to be predicted."
    )
    if step != result.global_step:
        story += f" Saved is the model of step {step:,}, which had the lowest loss."
    metrics = [
        (each, when, *(f"{entry[f'{each}_{name}']:{form}}" for name, form in _METRICS.items()))
        for each, entries in evaluations.items()
        for when, entry in zip(("before", "after"), entries, strict=True)
    ]
    curves = ""
    try:
        result.plot().savefig(folder / "curves.png")
        curves = "![Loss, perplexity and learning rate by step](curves.png)"
    except Exception as error:  # noqa: BLE001  # a picture must not cost a training
        level = logging.INFO if isinstance(error, ImportError) else logging.WARNING
        logger.log(level, "the model card has no curves: %s", error)
    before = run.state.filled
    guesses = [(each, before.get(each, "(asked later)"), words) for each, words in filled.items()]
    collator, _, masking = settings["data_collator"].partition(" ")
    unused = {"data_collator", "model", "tokenizer"}.union(
        *(_REPLACED.get(name, ()) for name in settings),
        ["num_train_epochs" if config.max_steps > 0 else "max_steps"],
    )
    training = [each for each in settings.items() if each[0] not in unused]
    versions = [(each, _version(each)) for each in _PACKAGES]
    parts = (
        f"---\n{data.to_yaml()}\n---\n\n# {_plain(title)}\n\n{story}",
        _section("Evaluation", ("set", "", *_METRICS), metrics, note=_EXACT),
        curves,
        _section("Masks filled in", ("sentence", "before", "after"), guesses),
        _section("Masking", (_plain(collator), ""), list(json.loads(masking or "{}").items())),
        _section("Training", ("setting", "value"), training),
        _section("Versions", ("package", "version"), versions),
    )
    ModelCard("\n\n".join(filter(None, parts)) + "\n").save(folder / "README.md")


def hub_name(name: str) -> str | None:
    """Return a name if it can be one on the hub; not that of a folder here, nor of none.

    Examples:
        >>> hub_name("distilbert/distilbert-base-uncased")
        'distilbert/distilbert-base-uncased'
        >>> hub_name("/home/someone/model"), hub_name("")
        (None, None)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def _find_evaluations(
    history: Iterable[Mapping[str, float]], step: int
) -> dict[str, tuple[Mapping[str, float], Mapping[str, float]]]:
    """Return by the name of each set what was logged of it first, and at a step."""
    entries: dict[str, list[Mapping[str, float]]] = {}
    for entry in history:
        for name in entry:
            if name.endswith("_perplexity"):
                entries.setdefault(name.removesuffix("_perplexity"), []).append(entry)
    return {
        name: (logged[0], next(entry for entry in logged[::-1] if entry["step"] == step))
        for name, logged in entries.items()
    }


def _section(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], *, note: str = ""
) -> str:
    """Return a heading and a table without what is None; nothing if there are no rows."""
    lines = [[_plain(cell) for cell in row] for row in rows if row[-1] is not None]
    table = "\n".join(f"| {' | '.join(each)} |" for each in [header, ["---"] * len(header), *lines])
    return "\n\n".join(filter(None, (f"## {title}", note, table))) if rows else ""


def _plain(value: Any) -> str:
    """Escape what Markdown and HTML would take for a sign of their own."""
    return re.sub(r"([\\`*\[\]<>&|~$]|\b_|_\b)", r"\\\1", " ".join(str(value).split()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # on the path, but not installed
        return "unknown"
