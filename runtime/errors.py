"""What a run is told wrongly."""

from __future__ import annotations


class ConfigError(ValueError):
    """A flag that cannot be; the message names it and says what would do."""
