"""The model card of a run: what was trained on what, how, and what came of it.

It is written for a reader who has the output directory only. What it says stands in the template
beside this file; `huggingface_hub` fills that in and knows what the hub reads. A name is on the
card if the caller gave it or the hub knows it; a path of this machine never is.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # no __all__

from mlmadapt.model.checks import unwrap
from mlmadapt.training.result import TrainingResult
from mlmadapt.training.run import Run

logger = logging.getLogger(__name__)

_PACKAGES = ("mlmadapt", "transformers", "torch", "datasets", "accelerate", "huggingface_hub")
# Settings that an object of the caller's own replaces.
_REPLACED = {
    "optimizer": ("learning_rate", "weight_decay"),
    "lr_scheduler": ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
}


def write_model_card(run: Run, *, filled: Mapping[str, str]) -> None:
    """Write ``README.md`` into the output directory, and the curves if matplotlib is installed.

    Args:
        run: A run whose model is saved.
        filled: How that model fills in the sentences of `config.fill_mask`.
    """
    model, step, result = run.model, run.saved_step, run.result()
    name = str(run.config.dataset_name or "")
    if PurePath(name).is_absolute() or os.path.exists(name):  # noqa: PTH110  # a name may be long
        name = PurePath(name).name
    base, dataset = hub_name(model.name_or_path or ""), hub_name(name) if "/" in name else None
    is_peft = hasattr(model, "peft_config")
    kind = type(unwrap(model)).__name__
    title = f"{base or kind}, adapted to {name or 'a domain'}"
    evaluations = []
    for each in run.eval_sets:
        entries = [entry for entry in result.history if f"{each}_perplexity" in entry]
        after = next(entry for entry in reversed(entries) if entry["step"] == step)
        evaluations.append((each, entries[0], after))
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
                # Of several sets, only the caller knows which one is from this data.
                dataset_type=(dataset if len(evaluations) == 1 else None) or each,
                dataset_name=(name if len(evaluations) == 1 else None) or each,
                metric_type="perplexity",
                metric_value=after[f"{each}_perplexity"],
            )
            for each, _, after in evaluations
        ],
    )
    settings = {**run.fingerprint, "mixed_precision": run.accelerator.mixed_precision}
    collator, _, masking = settings["data_collator"].partition(" ")
    unused = {"data_collator", "model", "model_settings", "tokenizer"}.union(
        *(_REPLACED.get(each, ()) for each in settings),
        ["num_train_epochs" if run.config.max_steps > 0 else "max_steps"],
    )
    ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_suffix(".md")),
        plain=_plain,
        run=run,
        result=result,
        title=title,
        kind=kind,
        is_peft=is_peft,
        evaluations=evaluations,
        has_curves=_save_curves(result, run.folder),
        filled=filled,
        collator=collator,
        masking=json.loads(masking or "{}"),
        training=[each for each in settings.items() if each[0] not in unused],
        versions=[(each, _version(each)) for each in _PACKAGES],
    ).save(run.folder / "README.md")


def hub_name(name: str) -> str | None:
    """Return a name if it can be one on the hub, and None if it is empty or that of a folder here.

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


def _save_curves(result: TrainingResult, folder: Path) -> bool:
    try:
        result.plot().savefig(folder / "curves.png")
    except Exception as error:  # noqa: BLE001  # a picture must not cost a training
        level = logging.INFO if isinstance(error, ImportError) else logging.WARNING
        logger.log(level, "the model card has no curves: %s", error)
        return False
    return True


def _plain(value: Any) -> str:
    """Escape what Markdown and HTML would read as markup."""
    return re.sub(r"([\\`*\[\]<>&|~$]|\b_|_\b)", r"\\\1", " ".join(str(value).split()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # on the path, but not installed
        return "unknown"
