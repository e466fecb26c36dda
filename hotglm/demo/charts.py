"""Pictures of the runs as inline SVG: every request a dot, every update a mark, all runs on one scale.

Rules this module keeps:

- Nothing is thinned out or smoothed: as many dots as requests. The accuracy alone is an average, over `_BIN_S`.
- Colours come from the page's style by class, so that light and dark need one picture.
- Text is escaped; there are no links, scripts or styles in here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import torch

from hotglm.demo.releases import OLD
from hotglm.demo.tally import Kind, Moment, Run, find_gaps
from hotglm.demo.traffic import TORN, Answer
from hotglm.demo.training import SHEET_SIZE

__all__ = ["Scale", "draw_digit", "draw_run", "make_scale"]

_WIDTH, _LEFT, _RIGHT = 1080, 62, 14
_LANE = 24  # where the numbered marks are
_RIGHT_TOP, _RIGHT_HEIGHT = _LANE + 10, 40  # the strip that shows how many digits are right
_TOP = _RIGHT_TOP + _RIGHT_HEIGHT + 22
_HEIGHT = 156
_BOTTOM = _TOP + _HEIGHT
_AXIS = 34
_BIN_S = 0.05
_LEAST_RIGHT = 0.5  # the strip's lower edge
_GAP_S = 0.1
"""From which length a time without answers is shaded."""
_LABEL_WIDTH = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The scale that all runs share: seconds across, milliseconds upwards in powers of ten."""

    duration_s: float
    low_ms: float
    high_ms: float

    def x(self, at_s: float) -> float:
        """Return where a time since the start of the traffic is."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * at_s / self.duration_s

    def y(self, latency_ms: float) -> float:
        """Return where a latency is."""
        share = math.log10(max(latency_ms, self.low_ms) / self.low_ms) / math.log10(self.high_ms / self.low_ms)
        return _BOTTOM - _HEIGHT * share

    @property
    def decades_ms(self) -> list[float]:
        """The powers of ten on the scale."""
        low, high = round(math.log10(self.low_ms)), round(math.log10(self.high_ms))
        return [10.0**power for power in range(low, high + 1)]


def make_scale(runs: Sequence[Run]) -> Scale:
    """Return the smallest scale that holds every answered request of all `runs`."""
    latencies_ms = [1e3 * (a.ended_s - a.began_s) for run in runs for a in run.answers if a.version is not None]
    low, high = min(latencies_ms, default=1.0), max(latencies_ms, default=10.0)
    return Scale(
        duration_s=max(run.ended_s - run.began_s for run in runs),
        low_ms=10.0 ** math.floor(math.log10(low)),
        high_ms=10.0 ** math.ceil(math.log10(high)),
    )


def draw_run(run: Run, scale: Scale) -> str:
    """Return the picture of one run."""
    parts = [
        *_draw_gaps(run, scale),
        *_draw_grid(scale),
        *_draw_moments(run, scale),
        *_draw_accuracy(run, scale),
        *_draw_failures(run, scale),
        *_draw_answers(run, scale),
    ]
    data = (
        f'data-left="{_LEFT}" data-width="{_WIDTH - _LEFT - _RIGHT}" data-seconds="{scale.duration_s:.4f}" '
        f'data-top="{_TOP}" data-height="{_HEIGHT}" data-low="{scale.low_ms:g}" data-high="{scale.high_ms:g}"'
    )
    label = escape(f"Latency of every request to {run.name}, over time")
    size = f'viewBox="0 0 {_WIDTH} {_BOTTOM + _AXIS}"'
    return f'<svg class="chart" role="img" aria-label="{label}" {size} {data}>\n' + "\n".join(parts) + "\n</svg>"


def _draw_grid(scale: Scale) -> Iterator[str]:
    for ms in scale.decades_ms:
        y = scale.y(ms)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(_LEFT - 8, y + 4, f"{ms:g} ms", "tick end")
    for second in range(math.floor(scale.duration_s) + 1):
        x = scale.x(second)
        yield _text(x, _BOTTOM + 18, f"{second} s" if second else "0", "tick middle")
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_BOTTOM}" y2="{_BOTTOM + 4}"/>'
    yield _text(_LEFT + 4, _TOP - 6, "latency of each request", "axis")
    yield _text(_LEFT + 4, _RIGHT_TOP - 4, "digits right", "axis")
    for share in (_LEAST_RIGHT, 1.0):
        y = _right_y(share)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(_LEFT - 8, y + 4, f"{share:.0%}", "tick end")


def _draw_gaps(run: Run, scale: Scale) -> Iterator[str]:
    for begin_s, end_s in find_gaps(run, longer_than_s=_GAP_S):
        left, right = scale.x(begin_s - run.began_s), scale.x(end_s - run.began_s)
        size = f'x="{left:.1f}" width="{right - left:.1f}" y="{_RIGHT_TOP}" height="{_BOTTOM - _RIGHT_TOP}"'
        yield f'<rect class="gap" {size}/>'
        num_failed = sum(a.version is None and begin_s <= a.ended_s <= end_s for a in run.answers)
        lines = [f"{1e3 * (end_s - begin_s):,.0f} ms", "without an answer", f"{num_failed:,} requests failed"]
        for place, line in enumerate(lines if right - left > _LABEL_WIDTH else lines[:1]):
            yield _text((left + right) / 2, _TOP + _HEIGHT / 2 + 18 * (place - 1), line, "loud middle")


def _draw_moments(run: Run, scale: Scale) -> Iterator[str]:
    number = 0
    repeats: list[float] = []
    for moment in run.moments:
        left = scale.x(moment.began_s - run.began_s)
        width = max(1.2, scale.x(moment.ended_s - run.began_s) - left)
        if moment.is_repeat:
            repeats.append(left)
            size = f'x="{left:.1f}" width="{width:.1f}" y="{_LANE - 6}" height="9"'
            yield f'<rect class="mark {_class_of(moment)}" {size}/>'
            continue
        number += 1
        if moment.ended_s - moment.began_s > _GAP_S:
            width = 1.2  # what it did to the service is shaded already
        band = f'x="{left:.1f}" width="{width:.1f}" y="{_LANE}" height="{_BOTTOM - _LANE}"'
        yield f'<g class="moment" data-moment="{number}"><rect class="band {_class_of(moment)}" {band}/>'
        yield f'<circle class="badge {_class_of(moment)}" cx="{left:.1f}" cy="{_LANE - 10}" r="9.5"/>'
        yield f"{_text(left, _LANE - 6, str(number), 'number middle')}</g>"
    if repeats:
        yield _text(repeats[0], _LANE - 11, f"{len(repeats)} more, there and back again", "axis")


def _class_of(moment: Moment) -> str:
    if moment.kind is Kind.REFUSAL:
        return "refused"
    return "old" if moment.serving == OLD else "new"


def _right_y(share: float) -> float:
    return _RIGHT_TOP + _RIGHT_HEIGHT * (1 - (max(share, _LEAST_RIGHT) - _LEAST_RIGHT) / (1 - _LEAST_RIGHT))


def _draw_accuracy(run: Run, scale: Scale) -> Iterator[str]:
    bins: dict[int, list[int]] = defaultdict(list)
    for answer in run.answers:
        if answer.version is not None:
            bins[int((answer.ended_s - run.began_s) / _BIN_S)].append(answer.num_right)
    path, last = [], None
    for number in sorted(bins):
        y = _right_y(sum(bins[number]) / (len(bins[number]) * SHEET_SIZE))
        x = scale.x(min((number + 0.5) * _BIN_S, scale.duration_s))
        path.append(f"{'L' if last == number - 1 else 'M'}{x:.1f} {y:.1f}")
        last = number
    yield f'<path class="accuracy" d="{"".join(path)}"/>'


def _draw_failures(run: Run, scale: Scale) -> Iterator[str]:
    marks = [f"M{scale.x(a.ended_s - run.began_s):.1f} {_BOTTOM}v-9" for a in run.answers if a.version is None]
    if marks:
        yield f'<path class="failed" d="{"".join(marks)}"/>'


def _draw_answers(run: Run, scale: Scale) -> Iterator[str]:
    """Yield one path of dots for each client and version; torn answers as crosses, on top of all."""
    groups: dict[tuple[int, str], list[Answer]] = defaultdict(list)
    for answer in run.answers:
        if answer.version is not None:
            groups[answer.client, answer.version].append(answer)
    for (client, version), answers in sorted(groups.items(), key=lambda item: (item[0][1] == TORN, item[0])):
        points = [(scale.x(a.ended_s - run.began_s), scale.y(1e3 * (a.ended_s - a.began_s))) for a in answers]
        if version == TORN:
            shape = "".join(f"M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8" for x, y in points)
        else:
            shape = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
        style = "torn" if version == TORN else "old" if version == OLD else "new"
        yield f'<path class="dots {style}" data-client="{client + 1}" data-version="{escape(version)}" d="{shape}"/>'


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def draw_digit(image: torch.Tensor) -> str:
    """Return one handwritten digit, [64] with values in 0..1, as a picture."""
    pixels = [
        f'<rect x="{place % 8}" y="{place // 8}" width="1.04" height="1.04" opacity="{value:.2f}"/>'
        for place, value in enumerate(image.tolist())
        if value > 0
    ]
    return f'<svg class="digit" viewBox="0 0 8 8" aria-hidden="true">{"".join(pixels)}</svg>'
