"""A picture of one step: what each rank computed, and what was on the wires meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ...pipeline.timeline import Span
from ...pipeline.trace import RankSpans, kind_of

COLOURS = {
    "receive": "#9ecae1",
    "forward": "#4c78a8",
    "send": "#f2b134",
    "backward": "#e4572e",
    "gradients": "#7b5ea7",
    "optimizer": "#3a9d6b",
}
_COMPUTING = ("forward", "backward", "optimizer")
# Kind → top and height within a rank's row of height 1: computing above, the wires below it.
_PLACES = {
    **dict.fromkeys(_COMPUTING, (0.06, 0.50)),
    "send": (0.60, 0.10),
    "receive": (0.72, 0.10),
    "gradients": (0.84, 0.10),
}
_NOTED = 0.001  # of a step: what began that little before it is not told
_MOST_LABELLED = 40  # spans of a row; more would not be readable


def typical_step(first: RankSpans) -> tuple[str, float, float] | None:
    """Name, start and end of the update that took the median time on rank 0, or None where there is none.

    An update lasts from the end of the one before. The first has no such start, and is taken only if it is alone.
    """
    ends = [s for s in first.spans if kind_of(s.lane) == "optimizer"]
    if not ends:
        return None
    steps = [(after.name, before.end, after.end) for before, after in pairwise(ends)]
    steps = steps or [(ends[0].name, min(s.start for s in first.spans if kind_of(s.lane) != "data"), ends[0].end)]
    return sorted(steps, key=lambda step: step[2] - step[1])[len(steps) // 2]


def draw_step(ranks: Sequence[RankSpans], path: Path) -> None:
    """Write a PNG of a typical step: a row for each rank, colours by kind. Nothing where no update was recorded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    step = typical_step(ranks[0])
    if step is None:
        return
    name, start, end = step
    figure = Figure(figsize=(14, 1.6 + 0.85 * len(ranks)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels, earlier = [], False
    for row, r in enumerate(ranks):
        seen = [
            s._replace(start=s.start - start, end=min(s.end, end) - start)
            for s in r.spans
            if s.end > start and s.start < end and kind_of(s.lane) in _PLACES and s.name != "vote"
        ]
        for s in seen:
            if s.start < -_NOTED * (end - start):
                top, height = _PLACES[kind_of(s.lane)]
                told = f"← {-s.start * 1e3:.0f} ms"
                axes.text(0, row + top + height / 2, told, ha="left", va="center", fontsize=6)
                earlier = True
        inside = [s._replace(start=max(s.start, 0.0)) for s in seen]
        for kind in _PLACES:
            bars = [s for s in inside if kind_of(s.lane) == kind]
            top, height = _PLACES[kind]
            axes.broken_barh(
                [(s.start * 1e3, (s.end - s.start) * 1e3) for s in bars],
                (row + top, height),
                facecolors=COLOURS[kind],
                # A message may be too short to be seen: its own colour around it makes it a hairline.
                edgecolor="white" if kind in _COMPUTING else COLOURS[kind],
                linewidth=0.5,
            )
        computing = [s for s in inside if kind_of(s.lane) in _COMPUTING]
        if len(computing) <= _MOST_LABELLED:
            for s in computing:
                _write_on(axes, s, row, end - start)
        busy = sum(s.end - s.start for s in computing)
        labels.append(f"rank {r.rank}\nreplica {r.replica}, stage {r.stage}\nbubble {1 - busy / (end - start):.0%}")
        axes.axhline(row, color="#dddddd", linewidth=0.6)
    axes.set_yticks([row + 0.4 for row in range(len(ranks))], labels, fontsize=9)
    axes.set_xlim(0, (end - start) * 1e3)
    axes.set_ylim(len(ranks), 0)
    axes.set_xlabel("milliseconds" + (" (←: it began so much earlier)" if earlier else ""))
    axes.set_title(f"{name}: {(end - start) * 1e3:.1f} ms", loc="left", fontsize=11)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    patches = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(COLOURS), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _write_on(axes: object, s: Span, row: int, seconds: float) -> None:
    """The micro-batch's number on its bar, where the bar is wide enough for it."""
    number = s.name.rpartition("F")[2] if kind_of(s.lane) == "forward" else s.name.rpartition("B")[2]
    if number.isdigit() and (s.end - s.start) / seconds > 0.012:
        top, height = _PLACES[kind_of(s.lane)]
        at = (s.start + s.end) / 2 * 1e3, row + top + height / 2
        axes.text(*at, number, ha="center", va="center", fontsize=8, color="white")  # type: ignore[attr-defined]
