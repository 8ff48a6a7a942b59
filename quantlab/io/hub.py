"""Checkpoints of the Hugging Face hub, through huggingface_hub and its cache."""

from __future__ import annotations

from pathlib import Path

PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt"]


def download(hub_id: str, *, local_files_only: bool = False) -> Path:
    """The directory of a hub model; FileNotFoundError, in one line, where it cannot be had."""
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, allow_patterns=PATTERNS, local_files_only=local_files_only)
        )
    except HFValidationError as error:
        raise ValueError(f"source: {hub_id!r} is no hub id: {error}") from None
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or it asks for a login (huggingface-cli login)"
    except LocalEntryNotFoundError:
        reason = "not in the local cache" + (
            " (local_files_only)" if local_files_only else ", and the hub cannot be reached"
        )
    except (HfHubHTTPError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"the hub cannot be reached ({lines[0]})"
    raise FileNotFoundError(f"source: {hub_id}: no such directory, and {reason}")
