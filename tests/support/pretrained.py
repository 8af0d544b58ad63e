"""What the fixture `pretrained` gives."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pretrained:
    """A Llama whose weights were trained. `promised`: how its greedy text from the first token on begins."""

    folder: Path
    promised: str
