# SPDX-License-Identifier: Apache-2.0
"""Plots of a report of `strait stress`, each as the text of an SVG file."""
import math

WIDTH, LEFT, RIGHT = 860, 150, 20
INK, BAR, FAULT = "#333", "#4a78b5", "#c0392b"


class Svg:
    """Shapes one after the other, on white; `y` grows downwards."""

    def __init__(self, height):
        self.height, self.parts = height, []

    def add(self, tag, text=None, **attributes):
        named = " ".join(f'{key.replace("_", "-")}="{round(value, 1) if isinstance(value, float) else value}"'
                         for key, value in attributes.items())
        self.parts.append(f"<{tag} {named}/>" if text is None else f"<{tag} {named}>{text}</{tag}>")

    def text(self, x, y, text, anchor="end"):
        self.add("text", text, x=x, y=y, text_anchor=anchor, fill=INK)

    def line(self, x1, y1, x2, y2, stroke="#ccc"):
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke)

    def __str__(self):
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" font-family="sans-serif" font-size="12">\n'
                f'<rect width="{WIDTH}" height="{self.height}" fill="white"/>\n' + "\n".join(self.parts) + "\n</svg>\n")


def span(values, low, high):
    """Maps from the values' range, from 0 on, to pixels."""
    most = max([*values, 1e-9])
    return lambda value: low + (high - low) * value / most


def over_time(report):
    timeline = report["timeline"]
    bin_s = timeline["bin_s"]
    rates = [count / bin_s for count in timeline["tokens"]]
    kinds = sorted(kind for kind in timeline if kind not in ("bin_s", "tokens"))
    base, strip = 200, 24
    svg = Svg(base + 40 + strip * len(kinds) + 10)
    x = span([len(rates)], LEFT, WIDTH - RIGHT)
    y = span(rates, base, 20)
    for share in (0, 0.5, 1):
        value = share * max(rates, default=0)
        svg.line(LEFT, y(value), WIDTH - RIGHT, y(value))
        svg.text(LEFT - 8, y(value) + 4, f"{value:.0f} tokens/s")
    for i, rate in enumerate(rates):
        svg.add("rect", x=x(i), y=y(rate), width=max(1.0, x(i + 1) - x(i) - 1), height=base - y(rate), fill=BAR)
    for share in (0, 0.25, 0.5, 0.75, 1):
        svg.text(x(share * len(rates)), base + 18, f"{share * len(rates) * bin_s:.0f} s", "middle")
    for row, kind in enumerate(kinds):
        middle = base + 40 + strip * row + strip / 2
        svg.text(LEFT - 8, middle + 4, f"{kind} {sum(timeline[kind])}")
        svg.line(LEFT, middle, WIDTH - RIGHT, middle)
        most = max(timeline[kind])
        for i, count in enumerate(timeline[kind]):
            if count:
                svg.add("circle", cx=x(i + 0.5), cy=middle, r=2 + 4 * math.sqrt(count / most), fill=FAULT, fill_opacity=0.7)
    return str(svg)


def pauses(report):
    """A dot a move; pauses below a millisecond, also negative ones, lie on the lowest line."""
    dots = [(rows, max(1.0, pause)) for _, rows, _, _, pause in report["moves"] if pause is not None]
    bottom = 260
    svg = Svg(bottom + 50)
    x = span([rows for rows, _ in dots], LEFT, WIDTH - RIGHT)
    y = span([math.log10(max([10, *(pause for _, pause in dots)]))], bottom, 20)
    most_rows = max((rows for rows, _ in dots), default=1)
    power = 1
    while power <= max([10, *(pause for _, pause in dots)]):
        svg.line(LEFT, y(math.log10(power)), WIDTH - RIGHT, y(math.log10(power)))
        svg.text(LEFT - 8, y(math.log10(power)) + 4, f"{power:,} ms")
        power *= 10
    for share in (0, 0.25, 0.5, 0.75, 1):
        svg.text(x(share * most_rows), bottom + 20, f"{share * most_rows:,.0f} rows", "middle")
    for rows, pause in dots:
        svg.add("circle", cx=x(rows), cy=y(math.log10(pause)), r=2.5, fill=BAR, fill_opacity=0.6)
    return str(svg)


def rows(report):
    bars = report["move_rows_histogram"]
    strip = 22
    svg = Svg(20 + strip * len(bars) + 10)
    x = span([bar["count"] for bar in bars], LEFT, WIDTH - RIGHT - 60)
    for i, bar in enumerate(bars):
        top = 10 + strip * i
        name = f"from {bar['from']:,.0f}" if bar["to"] >= 1e12 else f"{bar['from']:,.0f} to {bar['to'] - 1:,.0f}"
        svg.text(LEFT - 8, top + 15, name)
        svg.add("rect", x=LEFT, y=top + 2, width=x(bar["count"]) - LEFT, height=strip - 4, fill=BAR)
        svg.text(x(bar["count"]) + 6, top + 15, bar["count"], "start")
    return str(svg)
