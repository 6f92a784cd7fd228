"""Draws the panels of a Grafana dashboard as an SVG."""
import re
import time
from html import escape

# Of Grafana's grid, in pixels.
COLUMN, ROW, GAP = 50, 34, 8
COLOURS = ["#3274d9", "#e0752d", "#56a64b", "#e02f44", "#a352cc", "#ba9c19", "#37872d", "#8f3bb8", "#5794f2", "#c4162a"]
STAT = {"green": "#37872d", "orange": "#e0752d", "red": "#c4162a", "text": "#24292e"}


def dashboard(document, queries):
    """Returns the picture. `queries` answers the queries."""
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in document["panels"]) * ROW + 2 * GAP
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {24 * COLUMN + GAP} {height}" '
             'font-family="sans-serif" font-size="11" fill="#24292e">',
             f'<rect width="{24 * COLUMN + GAP}" height="{height}" fill="#f4f5f5"/>']
    for panel in document["panels"]:
        place = panel["gridPos"]
        x, y = place["x"] * COLUMN + GAP, place["y"] * ROW + GAP
        width, tall = place["w"] * COLUMN - GAP, place["h"] * ROW - GAP
        parts.append(f'<g transform="translate({x} {y})"><rect width="{width}" height="{tall}" fill="#fff" stroke="#dcdfe3"/>'
                     f'<text x="10" y="17" font-weight="bold">{escape(panel["title"])}</text>')
        draw = {"stat": stat, "timeseries": lines, "table": table}[panel["type"]]
        parts += draw(panel, queries, width, tall)
        parts.append("</g>")
    return "\n".join(parts + ["</svg>", ""])


def stat(panel, queries, width, tall):
    defaults = panel["fieldConfig"]["defaults"]
    answer = queries.now(panel["targets"][0]["expr"])
    if not answer:
        return nothing(width, tall)
    value = answer[0][1]
    steps = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or value >= step["value"]]
    text = shown(value, defaults["unit"])
    return [f'<text x="{width / 2:.0f}" y="{tall / 2 + 22:.0f}" font-size="32" text-anchor="middle" '
            f'fill="{STAT[steps[-1]["color"]]}">{text}</text>']


def lines(panel, queries, width, tall):
    series = []
    for target in panel["targets"]:
        for labels, points in queries.range(target["expr"]):
            name = re.sub(r"\{\{(\w+)\}\}", lambda it: labels.get(it[1], ""), target["legendFormat"])
            series.append((name, points))
    if not series:
        return nothing(width, tall)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    left, top, right, bottom = 60, 28, width - 10, tall - 54
    scale = 2 ** 20 if unit == "bytes" else 1
    highest = nice(max(value for _, points in series for _, value in points) / scale) * scale
    start, end = queries.start, queries.end

    def x(at):
        return left + (at - start) / (end - start) * (right - left)

    def y(value):
        return bottom - value / highest * (bottom - top)

    parts = []
    for nth in range(5):
        value = highest * nth / 4
        parts.append(f'<path d="M{left} {y(value):.1f}H{right}" stroke="#e8eaed"/>'
                     f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{shown(value, unit)}</text>')
    for at in range(int(start) // 30 * 30 + 30, int(end), 30):
        clock = time.strftime("%H:%M:%S", time.gmtime(at))
        parts.append(f'<text x="{x(at):.1f}" y="{bottom + 15}" text-anchor="middle">{clock}</text>')
    beside, under = left, tall - 26
    for nth, (name, points) in enumerate(series):
        colour = COLOURS[nth % len(COLOURS)]
        parts.append(f'<path d="{path(points, x, y)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if beside + 16 + 6 * len(name) > right:
            beside, under = left, under + 15
        parts.append(f'<rect x="{beside}" y="{under - 5}" width="12" height="3" fill="{colour}"/>'
                     f'<text x="{beside + 16}" y="{under}">{escape(name)}</text>')
        beside += 30 + 6 * len(name)
    return parts


def path(points, x, y):
    """A line with gaps, without the points within a level part."""
    drawn, last = [], None
    for nth, (at, value) in enumerate(points):
        follows = last is not None and at - last < 1.5
        level = follows and nth + 1 < len(points) and points[nth - 1][1] == value == points[nth + 1][1] \
            and points[nth + 1][0] - at < 1.5
        if not level:
            drawn.append(f'{"L" if follows else "M"}{x(at):.1f} {y(value):.1f}')
        # A single point is a short line.
        if not follows and (nth + 1 == len(points) or points[nth + 1][0] - at >= 1.5):
            drawn.append("h2")
        last = at
    return "".join(drawn)


def table(panel, queries, width, tall):
    rows = [labels for labels, _ in queries.now(panel["targets"][0]["expr"])]
    if not rows:
        return nothing(width, tall)
    columns = sorted(set().union(*rows) - {"__name__"})
    step = (width - 20) / len(columns)
    parts = []
    for nth, row in enumerate([{name: name for name in columns}] + rows):
        style = ' font-weight="bold"' if nth == 0 else ""
        for place, name in enumerate(columns):
            parts.append(f'<text x="{10 + place * step:.0f}" y="{45 + 22 * nth}"{style}>{escape(row.get(name, ""))}</text>')
    return parts


def nothing(width, tall):
    return [f'<text x="{width / 2:.0f}" y="{tall / 2:.0f}" text-anchor="middle" fill="#8e9297">no data</text>']


def nice(value):
    """The next round number, which four lines divide."""
    step = 1e-9
    while True:
        for factor in (1, 2, 4, 8):
            if factor * step >= value:
                return factor * step
        step *= 10


def shown(value, unit):
    if unit == "bytes":
        return f"{value / 2 ** 20:.1f} MiB"
    if unit == "s":
        return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
    return f"{value:.4g}" + (" p/s" if unit == "pps" else "")
