"""Keep keys, tokens and passwords out of messages and state files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH", re.IGNORECASE)
# user:password@ in an address, which MLFLOW_TRACKING_URI may have.
_IN_ADDRESS = re.compile(r"(?<=//)[^/\s@]+@")
# Shorter values are no secrets, and masking them would tear texts apart.
_SHORTEST = 6


def masked(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return a text without the secrets of the environment and without those in addresses.

    Args:
        text: Any text.
        environment: The variables; None is those of this process.
    """
    found = os.environ if environment is None else environment
    secrets = {v for name, v in found.items() if _SECRET_NAMES.search(name) and len(v) >= _SHORTEST}
    # The longest first: one may be a part of another.
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _IN_ADDRESS.sub("***@", text)
