"""Models and data sets of the Hugging Face hub, through huggingface_hub and its cache."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt"]


def download_model(hub_id: str, *, local_files_only: bool = False) -> Path:
    """The directory of a hub model; FileNotFoundError, in one line, where it cannot be had."""
    from huggingface_hub import snapshot_download

    def get(local: bool) -> str:
        return snapshot_download(
            hub_id, allow_patterns=PATTERNS, ignore_patterns=["*/*"], local_files_only=local
        )  # subfolders hold other formats

    return _get(get, f"source: {hub_id}: no such directory, and ", local_files_only)


def download_config(hub_id: str, *, local_files_only: bool = False) -> Path:
    """The config.json of a hub model, without its weights; FileNotFoundError, in one line, where it cannot be had."""
    from huggingface_hub import hf_hub_download

    def get(local: bool) -> str:
        return hf_hub_download(hub_id, "config.json", local_files_only=local)

    return _get(get, f"source: {hub_id}: no such directory, and ", local_files_only)


def download_data(hub_id: str, name: str, *, local_files_only: bool = False) -> Path:
    """One file of a hub data set; FileNotFoundError, in one line, where it cannot be had."""
    from huggingface_hub import hf_hub_download

    def get(local: bool) -> str:
        return hf_hub_download(hub_id, name, repo_type="dataset", local_files_only=local)

    return _get(get, f"{hub_id} {name}: ", local_files_only)


def _get(get: Callable[[bool], str], what: str, local_files_only: bool) -> Path:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    reachable = not local_files_only and _reachable()
    try:
        with _quiet():
            return Path(get(not reachable))
    except HFValidationError as error:
        raise ValueError(f"{what}not the name of anything on the hub: {_line(error)}") from None
    except RepositoryNotFoundError:
        reason = "the hub has no such repository, or it asks for a login (hf auth login)"
    except LocalEntryNotFoundError:
        reason = "not in the local cache" + (
            " (local_files_only)" if local_files_only else ", and the hub cannot be reached"
        )
    except (HfHubHTTPError, OSError) as error:
        reason = f"the hub cannot be reached ({_line(error)})"
    raise FileNotFoundError(what + reason)


def _reachable() -> bool:
    """Whether the hub's name resolves (its library would try for half a minute); True where a proxy does that."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443))
    except OSError:
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings: one error of ours says it all."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(before if os.environ.get("HF_HUB_VERBOSITY") else logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
