"""Draw the concepts: ``python docs/drawings.py`` writes ``docs/figures/concepts/*.svg``.

The pages include them inline: ``currentColor`` then is the color of the text in both themes.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

RED, BLUE, GREEN, ORANGE = COLORS = ("#d1495b", "#3b7dd8", "#2a9d6f", "#e08a1e")
INK = "currentColor"


def box(
    x: float, y: float, w: float, h: float, fill: str = "none", stroke: str = INK, **style: object
) -> str:
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    place = f'x="{x}" y="{y}" width="{w}" height="{h}" rx="3"'
    return f'<rect {place} fill="{fill}" stroke="{stroke}"{more}/>'


def dot(x: float, y: float, fill: str = "none", r: float = 9) -> str:
    stroke = INK if fill == "none" else fill
    return f'<circle cx="{x}" cy="{y}" r="{r}" fill="{fill}" stroke="{stroke}"/>'


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    color: str = INK,
    width: float = 1.2,
    arrow: bool = False,
) -> str:
    head = f' marker-end="url(#arrow-{color.strip("#")})"' if arrow else ""
    ends = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width}"{head}/>'


def text(
    x: float, y: float, words: str, anchor: str = "middle", color: str = INK, size: int = 13
) -> str:
    style = f'text-anchor="{anchor}" fill="{color}" stroke="none" font-size="{size}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def token() -> list[str]:
    """A patch of an image, a node of a graph: both are rows of x."""
    drawn = []
    for row in range(4):
        for column in range(4):
            fill = RED if (row, column) == (1, 2) else "none"
            drawn.append(box(30 + 28 * column, 20 + 28 * row, 26, 26, fill))
    drawn.append(text(86, 155, "a patch of an image"))
    places = [(480, 40), (540, 30), (590, 70), (560, 115), (490, 110), (530, 72)]
    for start, end in ((0, 5), (1, 5), (2, 5), (3, 4), (4, 5), (2, 3)):
        drawn.append(line(*places[start], *places[end]))
    drawn += [
        dot(*place, BLUE if number == 5 else "var(--color-background-primary, white)")
        for number, place in enumerate(places)
    ]
    drawn += [dot(*place) for place in places[:5]]
    drawn.append(text(535, 155, "a node of a graph"))
    for row in range(7):
        drawn.append(box(260, 14 + 17 * row, 120, 14, {2: RED, 5: BLUE}.get(row, "none")))
    drawn += [line(115, 62, 254, 55, RED, arrow=True), line(520, 74, 386, 106, BLUE, arrow=True)]
    drawn.append(text(320, 155, "tokens x: T rows of width D"))
    return drawn


EXPERT_OF = (0, 1, 1, 0, 2, 0, 3)


def routing() -> list[str]:
    """Tokens, experts, weighted pairs between them; the same sorted by expert."""
    drawn = [text(58, 18, "tokens"), text(262, 18, "experts")]
    for number, expert in enumerate(EXPERT_OF):
        y = 30 + 21 * number
        drawn.append(box(50, y, 16, 16, COLORS[expert], COLORS[expert]))
        drawn.append(text(40, y + 12, str(number), "end", size=11))
        drawn.append(
            line(68, y + 8, 232, 52 + 38 * expert, COLORS[expert], 1 + number % 3, arrow=True)
        )
    for expert, color in enumerate(COLORS):
        drawn += [
            box(240, 38 + 38 * expert, 44, 28, "none", color),
            text(262, 57 + 38 * expert, f"f{expert}", color=color),
        ]
    drawn.append(text(470, 18, "the same as a Routing: pairs sorted by expert"))
    order = sorted(range(7), key=lambda number: (EXPERT_OF[number], number))
    for place, number in enumerate(order):
        drawn.append(box(400 + 26 * place, 40, 24, 24, "none", COLORS[EXPERT_OF[number]]))
        drawn.append(text(412 + 26 * place, 57, str(number), color=COLORS[EXPERT_OF[number]]))
    drawn.append(text(390, 57, "token", "end"))
    for expert, (end, value) in enumerate(((3, 3), (5, 5), (6, 6), (7, 7))):
        drawn.append(line(399 + 26 * end, 34, 399 + 26 * end, 78, COLORS[expert], 2))
        drawn.append(text(399 + 26 * end, 95, str(value), color=COLORS[expert]))
    drawn.append(text(390, 95, "offsets", "end"))
    drawn += [
        text(390, 127, "weight", "end"),
        text(400, 127, "one number a pair, differentiable", "start"),
    ]
    drawn += [
        text(390, 152, "scores", "end"),
        text(400, 152, "(T, E), what the router thinks of all", "start"),
    ]
    return drawn


def group() -> list[str]:
    """Two groups: tokens compete with those of their own group only."""
    drawn = []
    for number, (left, scores) in enumerate(
        ((20, (0.9, 0.3, 0.8, 0.5)), (330, (0.4, 0.2, 0.35, 0.1, 0.3)))
    ):
        best = sorted(scores, reverse=True)[:2]
        drawn.append(box(left, 20, 290, 118, stroke_dasharray="5 4"))
        for place, score in enumerate(scores):
            x, high = left + 22 + 52 * place, 78 * score
            drawn.append(
                box(
                    x,
                    110 - high,
                    26,
                    high,
                    RED if score in best else "none",
                    RED if score in best else INK,
                )
            )
            drawn.append(text(x + 13, 130, f"{score}", size=11))
        drawn.append(
            text(left + 145, 158, ("one image, or one graph of a batch", "another one")[number])
        )
    return drawn


def capacity() -> list[str]:
    """Five tokens want an expert that has room for three: the likeliest get in."""
    drawn = [text(95, 18, "tokens that chose f0"), text(340, 18, "f0, capacity C = 3")]
    for row, (number, score) in enumerate(((4, 0.9), (0, 0.8), (6, 0.7), (2, 0.5), (1, 0.4))):
        y, color = 30 + 26 * row, RED if row < 3 else INK
        drawn.append(box(60, y, 20, 20, RED if row < 3 else "none", color))
        drawn += [
            text(50, y + 15, str(number), "end"),
            text(92, y + 15, f"p = {score}", "start", size=12),
        ]
        if row < 3:
            drawn += [
                line(150, y + 10, 292, 48 + 34 * row, RED, arrow=True),
                box(300, 34 + 34 * row, 80, 28, "none", RED),
            ]
    drawn.append(line(150, 118, 292, 150, INK, arrow=True))
    drawn.append(line(150, 144, 292, 156, INK, arrow=True))
    drawn.append(text(300, 157, "dropped: zero from the routed experts;", "start"))
    drawn.append(text(300, 175, "residual and shared expert still serve them", "start"))
    return drawn


def dense_start() -> list[str]:
    """y = shared(x) + g * routed(x), where g starts at 0."""
    drawn = [
        text(40, 92, "x"),
        line(52, 88, 118, 48, arrow=True),
        line(52, 88, 118, 132, arrow=True),
    ]
    drawn += [
        box(125, 28, 190, 40, "none", BLUE),
        text(220, 53, "shared expert: the dense layer", color=BLUE, size=12),
    ]
    drawn += [
        box(125, 112, 190, 40, "none", RED),
        text(220, 137, "router and E experts", color=RED),
    ]
    drawn += [line(317, 132, 382, 132, RED, arrow=True), dot(405, 132, r=16), text(405, 137, "× g")]
    drawn += [text(405, 170, "of a conv: learned, 0 at the start", size=12)]
    drawn += [line(317, 48, 500, 82, BLUE, arrow=True), line(422, 128, 500, 98, RED, arrow=True)]
    drawn += [
        dot(520, 90, r=14),
        text(520, 95, "+"),
        line(536, 90, 580, 90, arrow=True),
        text(600, 95, "y"),
    ]
    return drawn


DRAWINGS: dict[str, tuple[Callable[[], list[str]], int]] = {
    "token": (token, 165),
    "routing": (routing, 185),
    "group": (group, 165),
    "capacity": (capacity, 185),
    "dense-start": (dense_start, 180),
}


def svg(draw: Callable[[], list[str]], height: int) -> str:
    """The file: a text alternative, arrow heads in each color, and the drawing."""
    heads = "".join(
        f'<marker id="arrow-{color.strip("#")}" viewBox="0 0 8 8" refX="7" refY="4" '
        'markerWidth="7" markerHeight="7" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{color}" stroke="none"/></marker>'
        for color in (INK, *COLORS)
    )
    box = f'viewBox="0 0 640 {height}" class="concept" role="img" font-family="sans-serif"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
    return "\n".join(
        [
            head,
            f"<title>{escape((draw.__doc__ or '').strip())}</title><defs>{heads}</defs>",
            *draw(),
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    folder = Path(__file__).parent / "figures" / "concepts"
    folder.mkdir(exist_ok=True)
    for name, (draw, height) in DRAWINGS.items():
        (folder / f"{name}.svg").write_text(svg(draw, height))
