"""The output folder of a run: one run's alone, and with a whole model in it at the end."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mlmadapt import checkpoints
from mlmadapt.config import TrainingConfig
from mlmadapt.preflight import check_output_dir
from mlmadapt.processes import is_sharded, on_main_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def own_folder(accelerator: Accelerator, config: TrainingConfig) -> Iterator[Path]:
    """Hold ``output_dir`` for one run; a second one is refused until the first has ended.

    Raises:
        BlockingIOError: If another run holds it.
        OSError: If it cannot be used.
    """
    folder = Path(config.output_dir)
    lock = FileLock(folder / ".lock")
    resumes = bool(config.resume_from_checkpoint)

    def take() -> None:
        check_output_dir(folder, overwrite=config.overwrite or resumes)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(
                f"output_dir is {str(folder)!r}, which another run is using; name another folder"
            ) from None
        checkpoints.clear(folder, checkpoints=config.overwrite and not resumes)

    on_main_process(accelerator, take)
    try:
        yield folder
    finally:
        lock.release()


def save_model(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    accelerator: Accelerator,
) -> list[str]:
    """Save model and tokenizer, whole or not at all; return their files' names.

    Raises:
        OSError: If the model could not be saved, which `save_pretrained` alone does not always say.
    """
    state = None
    if is_sharded(model):  # gathering the shards takes every process
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)

    def write() -> list[str]:
        building = folder / ".model.tmp"
        shutil.rmtree(building, ignore_errors=True)
        model.save_pretrained(building, state_dict=state)
        tokenizer.save_pretrained(building)
        if not any(building.glob("*.safetensors")):
            raise OSError(f"{str(folder)!r} holds no weights after saving; the model was not saved")
        names = [path.name for path in building.iterdir()]
        for name in names:
            (building / name).replace(folder / name)
        building.rmdir()
        return names

    return on_main_process(accelerator, write)
