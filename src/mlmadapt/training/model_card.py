"""The model card of a run: what was trained on what, how, and what came of it.

It is written for a reader who has the output directory only. What it says stands in the template
beside this file; `huggingface_hub` fills that in and knows what the hub reads. A name is on the
card if the caller gave it or the hub knows it; a path of this machine never is.
"""

import copy
import logging
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # no __all__
from transformers import FillMaskPipeline

from mlmadapt._types import Model, Tokenizer
from mlmadapt.model.checks import check_rows, evaluation_mode, unwrap
from mlmadapt.training.result import TrainingResult
from mlmadapt.training.state import TrainingRun

logger = logging.getLogger(__name__)

_PACKAGES = ("mlmadapt", "transformers", "torch", "datasets", "accelerate", "huggingface_hub")
# Settings that an object of the caller's own replaces.
_REPLACED = {
    "optimizer": ("learning_rate", "weight_decay"),
    "lr_scheduler": ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
}


def write_model_card(run: TrainingRun, *, filled: Mapping[str, str]) -> None:
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
    for eval_set in run.eval_sets:
        entries = [entry for entry in result.history if f"{eval_set}_perplexity" in entry]
        after = next(entry for entry in reversed(entries) if entry["step"] == step)
        evaluations.append((eval_set, entries[0], after))
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
                dataset_type=(dataset if len(evaluations) == 1 else None) or eval_set,
                dataset_name=(name if len(evaluations) == 1 else None) or eval_set,
                metric_type="perplexity",
                metric_value=after[f"{eval_set}_perplexity"],
            )
            for eval_set, _, after in evaluations
        ],
    )
    settings = {**run.fingerprint, "mixed_precision": run.accelerator.mixed_precision}
    masking = dict(settings["data_collator"])
    unused = {"data_collator", "model", "model_settings", "tokenizer"}.union(
        *(_REPLACED.get(setting, ()) for setting in settings),
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
        collator=masking.pop("class"),
        masking=masking,
        training=[item for item in settings.items() if item[0] not in unused],
        versions=[(package, _version(package)) for package in _PACKAGES],
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


def check_sentences(sentences: Sequence[str], tokenizer: Tokenizer, model: Model) -> None:
    """Check that a model can fill in the mask of each sentence.

    Raises:
        ValueError: If a sentence has no mask or several, or is too long for the model.
    """
    reader: Any = copy.deepcopy(tokenizer)  # which calls would leave without its truncation
    for sentence in sentences:
        text = _with_mask(sentence, reader)
        if (masks := text.count(str(tokenizer.mask_token))) != 1:
            raise ValueError(
                f"fill_mask has {sentence!r} with {masks} masks; each sentence must have one [MASK]"
            )
        check_rows("fill_mask", [{"input_ids": reader(text)["input_ids"]}], model=model)


def fill_masks(model: Model, sentences: Sequence[str], *, tokenizer: Tokenizer) -> dict[str, str]:
    """Return for each sentence the five likeliest tokens for its mask, with their probabilities.

    A mask is ``[MASK]``, or the tokenizer's own name for it, so that one list works for all models.
    No random state is moved, and the model keeps its mode.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> fill_masks(tiny_model(tokenizer), ["a [MASK] film"], tokenizer=tokenizer)
        {'a [MASK] film': '...%, ...%, ...%, ...%, ...%'}
    """
    filled = {}
    reader: Any = copy.deepcopy(tokenizer)  # which calls would leave without its truncation
    pipeline = FillMaskPipeline(model=unwrap(model), tokenizer=reader, device=model.device)
    with evaluation_mode(model):
        for sentence in sentences:
            guesses: Any = pipeline(_with_mask(sentence, reader), top_k=5)
            filled[sentence] = ", ".join(
                f"{guess['token_str'].strip()} {guess['score']:.1%}" for guess in guesses
            )
    return filled


def _with_mask(sentence: str, reader: Any) -> str:
    mask = str(reader.mask_token)
    text = sentence.replace("[MASK]", mask)
    # Left over before a mask that does not take it in, a space is a token that no training row has.
    is_left = len(reader(f"a {mask}")["input_ids"]) > len(reader(f"a{mask}")["input_ids"])
    return text.replace(f" {mask}", mask) if is_left else text
