"""An SVG of ratios with their spread, on a logarithmic axis."""

from __future__ import annotations

import html
import math

ROW, LEFT, WIDTH, MARGIN = 26, 430, 520, 40     # pixels


def ratios(rows: list[dict], facts: dict) -> str:
    """Return the plot of rows of name, median, p10, p90."""
    low = math.floor(math.log10(min([0.5, *(row["p10"] for row in rows)])))
    high = math.ceil(math.log10(max([2.0, *(row["p90"] for row in rows)])))

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - low) / (high - low) * WIDTH

    height = MARGIN + ROW * len(rows) + MARGIN
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 90}" height="{height}" '
             'font-family="sans-serif" font-size="13">', '<rect width="100%" height="100%" fill="white"/>',
             f'<text x="10" y="20">{html.escape(", ".join(f"{key} {value}" for key, value in facts.items()))}</text>']
    for power in range(low, high + 1):
        at = x(10 ** power)
        parts.append(f'<line x1="{at:.1f}" y1="{MARGIN - 8}" x2="{at:.1f}" y2="{height - MARGIN + 6}" stroke="#ccc"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - MARGIN + 22}" text-anchor="middle">{10 ** power:g}</text>')
    parts.append(f'<line x1="{x(1):.1f}" y1="{MARGIN - 8}" x2="{x(1):.1f}" y2="{height - MARGIN + 6}" stroke="#666"/>')
    for number, row in enumerate(rows):
        y = MARGIN + ROW * number + ROW / 2
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{html.escape(row["name"])}</text>')
        parts.append(f'<line x1="{x(row["p10"]):.1f}" y1="{y}" x2="{x(row["p90"]):.1f}" y2="{y}" '
                     'stroke="#4a7ebb" stroke-width="4"/>')
        parts.append(f'<circle cx="{x(row["median"]):.1f}" cy="{y}" r="5" fill="#1f4e79"/>')
        parts.append(f'<text x="{LEFT + WIDTH + 10}" y="{y + 4}">{row["median"]:.3g}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
