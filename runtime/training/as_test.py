"""`--as-test`: one update through all that the real run will do, in a folder of its own beside the real run's files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from ...modules.shards import ShardStore
from ..checkpoints.lineage import CheckpointError
from ..flags.config import Config


def shortened(config: Config) -> Config:
    """The same run, one update and (if there is held-out data) one batch of evaluation long, from its beginning."""
    return replace(
        config,
        checkpoint_path=str(config.checkpoints / "as-test"),
        load_checkpoint=False,
        load_step=0,
        total_steps=config.gradient_accumulate_step,
        nepochs=0,
        warmup_steps=0,  # the learning rate of the one update is the peak's: the weights do change
        checkpoint_steps=0,
        num_checkpoints=0,
        evaluation_steps=0,
        evaluation_num_batch=1,
        stop_perplexity=0.0,
        patience=0,
    )


def export(folder: Path) -> Path | None:
    """Write the checkpoint in `folder` as a plain Hugging Face folder beside it, by the script that a person would use.

    Returns that folder, or None where this site holds only some of the layers. Raises `CheckpointError`.
    """
    store = ShardStore(folder)
    if store.missing_units():
        return None
    target = folder.parent / "exported"
    shutil.rmtree(target, ignore_errors=True)
    script = f"farspan.converters.convert_to_hf_{store.spec.family}"
    words = [sys.executable, "-m", script, "--ckpt-path", str(folder), "--save-path", str(target)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise CheckpointError(f"--as-test: exporting {folder} failed: {reason}")
    return target
