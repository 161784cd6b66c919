"""Upload of a finished model to the hub: model files only, with a check before training that it can work."""

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
"""Patterns of the uploaded files; predictions, checkpoints and logs are not uploaded."""


def check_upload(repository: str) -> None:
    """Check before training whether the upload can work after it.

    Raises:
        UserError: the repository's name is not valid, there is no login, or HF_HUB_OFFLINE is set.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not in its __all__

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"push_to_hub '{repository}' is no name of a repository: {_first_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("push_to_hub cannot work while HF_HUB_OFFLINE is set: unset it, or omit --push_to_hub")
    if huggingface_hub.get_token() is None:
        raise UserError("push_to_hub needs a login: run hf auth login, or set HF_TOKEN")


def upload(folder: Path, repository: str) -> str:
    """Upload the model in `folder`, creating the repository if it does not exist; returns its address.

    Raises:
        UserError: the hub cannot be reached, or refuses.
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
            commit_message="Upload the trained model",
        )
        return f"{api.endpoint}/{name}"
    except Exception as error:  # the client raises many types, changing with its version; the model is saved
        raise UserError(
            f"the model is in {folder}, but could not be uploaded to {repository}: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
