"""An SVG of ratios with their spread, on a logarithmic axis, for light and dark pages."""

from __future__ import annotations

import html
import math

ROW, LEFT, WIDTH, MARGIN = 26, 470, 480, 40     # pixels
STYLE = """<style>
  text { font: 13px sans-serif; fill: #1b1f24 }
  .page { fill: #fff } .grid { stroke: #d0d7de } .one { stroke: #57606a }
  .bar { stroke: #54aeff; stroke-width: 4 } .dot { fill: #0550ae }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .page { fill: #0d1117 } .grid { stroke: #3d444d } .one { stroke: #9198a1 }
    .bar { stroke: #1f6feb } .dot { fill: #79c0ff }
  }
</style>"""


def ratios(rows: list[dict], facts: dict) -> str:
    """Return the plot of rows of name, median, p10, p90."""
    low = math.floor(math.log10(min([0.5, *(row["p10"] for row in rows)])))
    high = math.ceil(math.log10(max([2.0, *(row["p90"] for row in rows)])))

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - low) / (high - low) * WIDTH

    height, width = MARGIN + ROW * len(rows) + MARGIN, LEFT + WIDTH + 70
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
             "<title>Ratios of faasd to others: median, 10th to 90th percentile</title>", STYLE,
             '<rect width="100%" height="100%" class="page"/>',
             f'<text x="10" y="20">{html.escape(", ".join(f"{key} {value}" for key, value in facts.items()))}</text>']
    for power in range(low, high + 1):
        at, kind = x(10 ** power), "grid" if power else "one"
        parts.append(f'<line x1="{at:.1f}" y1="{MARGIN - 8}" x2="{at:.1f}" y2="{height - MARGIN + 6}" class="{kind}"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - MARGIN + 22}" text-anchor="middle">{10 ** power:g}</text>')
    for number, row in enumerate(rows):
        y = MARGIN + ROW * number + ROW / 2
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{html.escape(row["name"])}</text>')
        parts.append(f'<line x1="{x(row["p10"]):.1f}" y1="{y}" x2="{x(row["p90"]):.1f}" y2="{y}" class="bar"/>')
        parts.append(f'<circle cx="{x(row["median"]):.1f}" cy="{y}" r="5" class="dot"/>')
        parts.append(f'<text x="{LEFT + WIDTH + 10}" y="{y + 4}">{row["median"]:.3g}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
