"""A finished model to the hub: only what a model is made of, and told before training if it cannot work."""

from __future__ import annotations

from pathlib import Path

from qa_deepspeed.utils.errors import UserError

UPLOADED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "README.md",
    "adapter_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "metrics.json",
]
"""Patterns of the files that go to the hub; predictions, checkpoints and logs stay."""


def check_upload(repository: str) -> None:
    """Find out before training what would stop the upload after it.

    Raises:
        UserError: the name cannot be one of a repository, nobody is logged in, or the hub is switched off.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"push_to_hub '{repository}' is no name of a repository: {_first_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("push_to_hub cannot work while HF_HUB_OFFLINE is set: unset it, or leave --push_to_hub out")
    if huggingface_hub.get_token() is None:
        raise UserError("push_to_hub needs a login: run hf auth login, or set HF_TOKEN")


def upload(folder: Path, repository: str) -> str:
    """Make the repository if it is not there, and put the model of `folder` into it; returns its address.

    Raises:
        UserError: the hub cannot be reached or refuses.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        name = api.create_repo(repository, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=UPLOADED,
            ignore_patterns=["*/*"],
            commit_message="Upload the trained reader",
        )
        return f"{api.endpoint}/{name}"
    except Exception as error:  # whatever the hub's client raises, which changes: the model itself is safe
        raise UserError(
            f"the model is in {folder}, but could not be uploaded to {repository}: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
