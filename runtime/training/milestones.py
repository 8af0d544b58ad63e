"""When a run evaluates, saves and ends. Pure functions of its flags and of what a checkpoint holds, so that every rank,
and every resumed run, comes to the same answer."""

from __future__ import annotations

import math
from dataclasses import replace

from ..checkpoints.checkpoint import Progress
from ..flags.config import Config


def steps_of_epochs(config: Config, sequences: int, most: int | None = None) -> int:
    """Accumulation steps in which --nepochs × `sequences` are drawn at least (or `most`, where there are no more), in
    whole updates."""
    in_update = config.gradient_accumulate_step * config.global_batch
    wanted = config.nepochs * sequences if most is None else min(config.nepochs * sequences, most)
    return -(-wanted // in_update) * config.gradient_accumulate_step


def mean_epoch(epochs: int, drawn: int, then: int, now: int) -> int:
    """Sequences of an epoch on the mean of a run of `epochs`, where it had `then` while the first `drawn` came, and has
    `now` for what is left: so much is left as if nothing had changed."""
    left = max(0.0, epochs - drawn / then)
    return math.ceil((drawn + left * now) / epochs)


def perplexity(loss: float) -> float:
    """e^loss, of a loss in nats a token; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def evaluates(config: Config, step: int) -> bool:
    """Whether the update that ends at `step` is followed by an evaluation, if there is anything to evaluate on."""
    return step >= config.total_steps or _reached(config, step, config.evaluation_steps)


def saves(config: Config, step: int) -> bool:
    """Whether the update that ends at `step` is followed by a checkpoint, whatever was found there."""
    if step >= config.total_steps:
        return True
    if config.num_checkpoints:
        done = step // config.gradient_accumulate_step
        return _share(config, done) > _share(config, done - 1)
    return _reached(config, step, config.checkpoint_steps)


def compared_on(progress: Progress, digest: int) -> Progress:
    """`progress`, forgetting a best that was found on another held-out text than `digest`'s: the numbers do not
    compare."""
    if progress.held_out in (None, digest):
        return replace(progress, held_out=digest)
    return replace(progress, held_out=digest, best_loss=None, best_step=None, waited=0)


def judge(progress: Progress, loss: float) -> Progress:
    """`progress` with what the evaluation at its step says of the best one so far."""
    if progress.best_loss is None or loss < progress.best_loss:
        return replace(progress, best_loss=loss, best_step=progress.step, waited=0)
    return replace(progress, waited=progress.waited + 1)


def enough(config: Config, progress: Progress) -> str:
    """Why evaluation ends the run here, or "" where it does not."""
    if progress.best_loss is None:
        return ""
    best = f"perplexity {perplexity(progress.best_loss):.4g} at step {progress.best_step}"
    if config.stop_perplexity and perplexity(progress.best_loss) <= config.stop_perplexity:
        return f"{best} has reached --stop-perplexity {config.stop_perplexity:g}"
    if config.patience and progress.waited >= config.patience:
        return f"{progress.waited} evaluations in a row have not improved on {best} (--patience {config.patience})"
    return ""


def _share(config: Config, updates: int) -> int:
    """How many of --num-checkpoints are due after so many updates: n after n equal parts of the run, the last at its
    end."""
    return updates * config.num_checkpoints // config.updates


def _reached(config: Config, step: int, every: int) -> bool:
    """Whether a multiple of `every` steps was reached within the last update."""
    return every > 0 and step // every > (step - config.gradient_accumulate_step) // every
