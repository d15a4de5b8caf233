"""Brings an exported model to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.errors import ConfigError, DataError, RunFolderError
from launch.hub import hub_trouble
from launch.record import model_folder


@dataclass(frozen=True)
class Push:
    """What is, or would be, brought to the Hub."""

    repository: str
    folder: Path
    files: dict[str, int]
    """Bytes of each, by its name in the folder."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(self.files.values())


def plan_push(run: Path, repository: str, *, adapter: bool = False) -> Push:
    """Which files of a run's export go where; nothing is asked of the Hub.

    Raises:
        ConfigError: it is no name of a repository.
        RunFolderError: the run has exported no model, or the folder has no model card.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"command line: REPO = {repository}: {error}; such as your-name/your-model") from None
    folder = model_folder(run, adapter=adapter)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    if not any(name.endswith(".safetensors") for name in files):
        raise RunFolderError(f"{folder}: there is no model in it (no .safetensors file)")
    return Push(repository, folder, files)


def push(planned: Push, *, private: bool = False) -> str:
    """Make the repository if it is not there, and bring all files in one commit; the address of the repository.

    What the Hub has already is not sent again.

    Raises:
        DataError: the Hub cannot be reached, does not know the user, or takes no such files.
    """
    from huggingface_hub import HfApi

    if why := hub_trouble("/api/models?limit=1"):
        raise DataError(f"{planned.repository}: {why}; the files are in {planned.folder}")
    hub = HfApi()
    try:
        url = hub.create_repo(planned.repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=url.repo_id, folder_path=planned.folder, commit_message="Model trained with shoal")
    except Exception as error:  # the Hub, the network and the libraries between fail in many ways
        raise DataError(f"{planned.repository}: {_refused(error)}") from error
    return str(url)


def _refused(error: Exception) -> str:
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "the Hub does not know you; log in by `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "your token may not write there; take another name, or a token that may"
    said = " ".join(str(error).split())
    return f"the Hub says {status}: {said:.300}" if status else f"broken off: {type(error).__name__}: {said:.300}"
