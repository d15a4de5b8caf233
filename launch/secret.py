"""What looks like a secret: a run is recorded whole, so its files, arguments and environment may hold none."""

from __future__ import annotations

import re

_KEY = re.compile(
    r"^token$|(^|_)(api_?key|access_?key|secret_?key|private_?key|secret|password|passwd|credentials?"
    r"|(hf|hub|auth|access|api|bearer|wandb)_token)$",
    re.IGNORECASE,
)
_VALUE = re.compile(r"(hf_\w{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|wandb_v1_\w{20,}|AKIA\w{16})")
_ADDRESS = re.compile(r"\w+://[^/@:]*:[^/@]+@")


def is_secret_key(name: str) -> bool:
    """Whether whatever stands under this key is a secret; `eos_token` and `sort_key` are not such keys."""
    return _KEY.search(name) is not None


def is_secret_value(text: str) -> bool:
    """Whether a value has the shape of an access token, or is an address with a password in it."""
    return _VALUE.fullmatch(text) is not None or _ADDRESS.match(text) is not None


def without_secrets(text: str) -> str:
    """`text` as it may be shown in a message."""
    return _ADDRESS.sub("(hidden)@", _VALUE.sub("(hidden)", text))


def argument_without_secrets(text: str) -> str:
    """An argument of a command as it may be recorded: `password=…` keeps its name only."""
    key, equals, value = text.partition("=")
    name = key.rpartition(".")[2].lstrip("-").replace("-", "_")
    return f"{key}=(hidden)" if equals and value and is_secret_key(name) else without_secrets(text)
