"""Upload of a finished run to the Hugging Face hub, if the settings ask for it.

The repository is made before the first step, so that a wrong name or token is found then. The
upload comes when everything is saved, so that a failure costs nothing but a message.
"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode

from mlmadapt.training.config import TrainingConfig


def make_repository(config: TrainingConfig) -> str:
    """Make the model's repository on the hub unless it exists, and return its full name.

    Raises:
        ValueError: If the hub is switched off, or no token is stored.
        OSError: By the hub's client, if the hub refuses or cannot be reached.
    """
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    if is_offline_mode():
        raise ValueError("push_to_hub is True, but HF_HUB_OFFLINE is set; unset one of them")
    if get_token() is None:
        raise ValueError(
            "push_to_hub is True, but no token of the hub is stored; run 'hf auth login', or set "
            "HF_TOKEN"
        )
    repository = HfApi().create_repo(name, private=config.hub_private_repo, exist_ok=True)
    return str(repository.repo_id)


def push(config: TrainingConfig, files: Sequence[str]) -> None:
    """Upload the files of a saved model, but no checkpoint, log or lock.

    Raises:
        OSError: By the hub's client, if the upload fails.
    """
    try:
        HfApi().upload_folder(
            repo_id=make_repository(config),
            folder_path=config.output_dir,
            allow_patterns=[pattern for name in files for pattern in (name, f"{name}/*")],
            commit_message="Adapt the model with mlmadapt",
        )
    except Exception as error:
        error.add_note(
            f"The model is saved in {config.output_dir!r}. Call again with "
            "resume_from_checkpoint=True, or push it with 'hf upload'."
        )
        raise
