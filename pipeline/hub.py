"""Models on the Hugging Face hub: hf://OWNER/NAME -> a local directory, and a directory -> OWNER/NAME.

In: a name; the token from where the hub's own tools keep it (HF_TOKEN, or what `hf auth login` wrote). Out: a directory
of the hub's cache, in which later calls find it; or a commit. Only settings and weights are fetched: no code that lies
beside them comes to this machine, and none of it is run.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import UserError
from pipeline.files import user_path

HUB = "hf://"
SETTINGS = ["config.json", "config.yaml", "data.json", "preprocessor_config.json"]
SAFE = [*SETTINGS, "*.safetensors", "*.safetensors.index.json"]
PICKLES = [*SETTINGS, "pytorch_model*.bin", "pytorch_model.bin.index.json"]  # read as plain tensors, as any .bin here

Result = TypeVar("Result")


def model_of(option: str) -> Callable[[str], Path]:
    """The type of an option that names a local path or a model on the hub, which is fetched: a local path."""
    return lambda text: local_model(text) if text.startswith(HUB) else user_path(text, option)


def local_model(source: str | os.PathLike[str]) -> Path:
    """Where weights lie on this machine: a path as it is; `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION` once fetched.

    Weights are taken as safetensors; from a model that has none, as pickles of plain tensors.

    Raises:
        UserError: it names no model, there is none, it may not be read, or the hub is out of reach and none is cached.
    """
    text = os.fspath(source)
    if not text.startswith(HUB):
        return Path(text)
    name, _, revision = text.removeprefix(HUB).partition("@")
    if name.count("/") != 1:
        raise UserError(f"{text}: names no model; write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
    hub = _client(text)

    def fetch(patterns: list[str]) -> Path:
        words = {"repo_id": name, "revision": revision or None, "allow_patterns": patterns}
        return Path(_asked(text, hub.snapshot_download, **words))

    folder = fetch(SAFE)
    return folder if any(folder.glob("*.safetensors")) else fetch(PICKLES)


def new_repository(name: str) -> None:
    """Makes `OWNER/NAME` where it is not yet there, private; before the work.

    Raises:
        UserError: no name, no token, or it may not be written.
    """
    if name.count("/") != 1:
        raise UserError(f"--push {name}: names no repository; write OWNER/NAME")
    hub = _client(f"--push {name}")
    if hub.get_token() is None:
        raise UserError(f"--push {name}: no token of the hub is known; run `hf auth login`, or set HF_TOKEN")
    _asked(f"--push {name}", hub.create_repo, repo_id=name, private=True, exist_ok=True)


def push(folder: Path, name: str) -> str:
    """Commits the directory to `OWNER/NAME`; returns the commit's address.

    Raises:
        UserError: the hub does not take it.
    """
    words = {"repo_id": name, "folder_path": folder, "commit_message": "Export of a CRAFT run"}
    return str(_asked(f"--push {name}", _client(f"--push {name}").upload_folder, **words))


def _client(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{what}: needs {error.name}; pip install 'craft-audio[hf]'") from error
    return huggingface_hub


def _asked(what: str, call: Callable[..., Result], **words: Any) -> Result:
    """Calls the hub's client, whose errors are of many kinds; each becomes a line."""
    try:
        return call(**words)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        offline = isinstance(error, FileNotFoundError)  # neither in the cache nor fetched
        status = getattr(getattr(error, "response", None), "status_code", 0)
        raise UserError(
            f"{what}: {' '.join(lines[:2]) or type(error).__name__}; look at the name, the network and the token "
            "(`hf auth login`, HF_TOKEN)", transient=offline or status >= 500
        ) from error  # fmt: skip
