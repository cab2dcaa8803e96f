"""The output directory: held by one run at a time, and with a whole model in it at the end."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mlmadapt._types import Model, Tokenizer
from mlmadapt.training.checkpoint import clear, find_checkpoints
from mlmadapt.training.config import TrainingConfig
from mlmadapt.training.distributed import on_main_process


@contextmanager
def own_output_dir(accelerator: Accelerator, config: TrainingConfig) -> Iterator[Path]:
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
        clear(folder, checkpoints=config.overwrite and not resumes)

    on_main_process(accelerator, take)
    try:
        yield folder
    finally:
        lock.release()


def save_model(
    folder: Path,
    model: Model,
    tokenizer: Tokenizer,
    accelerator: Accelerator,
) -> list[str]:
    """Save model and tokenizer, whole or not at all; return their files' names.

    Raises:
        OSError: If the model could not be saved; `save_pretrained` alone does not always say so.
    """

    def write() -> list[str]:
        building = folder / ".model.tmp"
        shutil.rmtree(building, ignore_errors=True)
        try:
            model.save_pretrained(building)
            tokenizer.save_pretrained(building)
            if not any(building.rglob("*.safetensors")):
                raise OSError("no weights were written")  # noqa: TRY301  # told below
            names = [path.name for path in building.iterdir()]
            for name in names:
                shutil.rmtree(folder / name, ignore_errors=True)  # of an adapter that has a name
                (building / name).replace(folder / name)
            # from_pretrained would load the weights of an earlier model beside these.
            for pattern in ("adapter_*", "model*.safetensors*", "pytorch_model*"):
                for path in folder.glob(pattern):
                    if path.name not in names:
                        path.unlink()
        except (OSError, SafetensorError) as error:
            kept = [path.name for path in find_checkpoints(folder)] or ["no checkpoint"]
            raise OSError(
                f"the model could not be saved in {str(folder)!r} ({error}); {kept[0]} is intact"
            ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return names

    return on_main_process(accelerator, write)


def check_output_dir(output_dir: str | Path, *, overwrite: bool) -> None:
    """Make the folder and check that files can be written and renamed in it.

    Raises:
        NotADirectoryError: If `output_dir` is a file.
        FileExistsError: If it holds files and `overwrite` is False.
        OSError: If it cannot be written: of the class that the system's error has.
    """
    folder = Path(output_dir)
    if folder.is_file():
        raise NotADirectoryError(
            f"output_dir is {str(output_dir)!r}, which is a file; name a folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".probe-") as probe:
            written = Path(probe, "written")
            written.write_text("probe", encoding="utf-8")
            written.rename(Path(probe, "renamed"))
    except OSError as error:
        raise type(error)(
            f"output_dir is {str(output_dir)!r}, which cannot be written ({error.strerror}); name "
            "a folder that can"
        ) from error
    # A run that failed before its first checkpoint leaves its lock, and nothing to lose.
    if not overwrite and any(path.name != ".lock" for path in folder.iterdir()):
        raise FileExistsError(
            f"output_dir is {str(output_dir)!r}, which holds files of another run; name an empty "
            "folder, or pass overwrite=True"
        )
