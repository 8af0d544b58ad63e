"""What a run is told wrongly."""

from __future__ import annotations


class ConfigError(ValueError):
    """Flags that cannot be; each message names one and says what would do."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
