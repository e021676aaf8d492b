"""Passwords and tokens, which belong into the environment. Layer 0."""

import re
from typing import Any

from xpo.config.errors import ConfigError

# A URL's user:password@ or ?token=, and NAME_TOKEN=... in a command; then the last words of keys for such things.
_SECRET_VALUE = re.compile(
    r"://[^/@\s]*:[^/@\s]+@|[?&](?:password|token|access_token|api_key)=|[A-Z]_?(?:TOKEN|KEY|SECRET|PASSWORD)=\S"
)
_SECRET_KEY = re.compile(
    r"(?i:(?:^|[._])(?:api_key|hub_token|access_token|password|secret))$|[A-Z]_(?:TOKEN|KEY|SECRET|PASSWORD)$"
)


def no_secret(key: str, value: Any) -> None:
    """Refuses passwords and tokens: what a run is given stands in files, in MLflow and on the terminal."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and item and (_SECRET_VALUE.search(item) or _SECRET_KEY.search(key)):
            remedy = "give it in an environment variable, such as HF_TOKEN or the one that judge.api_key_env names"
            if "uri" in key.lower():
                remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (PGPASSWORD for PostgreSQL) instead"
            raise ConfigError(f"{key} holds a secret, which would stand in files and in MLflow; {remedy}")
