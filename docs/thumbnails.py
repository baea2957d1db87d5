"""Draw the gallery's thumbnails.

``python -m docs.thumbnails`` writes ``docs/figures/examples/*.svg``.

Each says what its example is about; none shows a result. The gray of their lines can be read on a
white page and on a black one, since a thumbnail does not know which it is on.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import cos, exp, pi, sin
from pathlib import Path

from docs.drawings import BLUE, COLORS, GREEN, INK, ORANGE, RED, box, dot, line, text

GRAY = "#8b949e"
WIDTH, HEIGHT = 320, 220


def swap_pyg_conv() -> list[str]:
    """One conv becomes four, under a router."""
    drawn = [box(20, 85, 100, 50), text(70, 115, "GATConv", size=16)]
    drawn.append(line(128, 110, 168, 110, arrow=True, width=2))
    for place, color in enumerate(COLORS):
        drawn.append(box(190, 22 + 46 * place, 110, 36, color, color))
    return drawn


def ogbn_arxiv() -> list[str]:
    """A seed, its neighbors and theirs."""
    drawn, center = [], (160, 110)
    for near in range(4):
        angle = 2 * pi * near / 4 + 0.4
        first = center[0] + 55 * cos(angle), center[1] + 45 * sin(angle)
        drawn.append(line(*center, *first, width=2))
        for far in (-0.5, 0, 0.5):
            second = (
                center[0] + 130 * cos(angle + far),
                center[1] + 92 * sin(angle + far),
            )
            drawn += [line(*first, *second), dot(*second, COLORS[near], r=8)]
        drawn.append(dot(*first, COLORS[(near + 1) % 4], r=11))
    return [*drawn, dot(*center, RED, r=15)]


def molecules() -> list[str]:
    """Two molecules, their atoms colored by expert."""
    drawn = []
    for left, size in ((95, 6), (235, 5)):
        ring = [
            (left + 48 * cos(2 * pi * atom / size), 95 + 48 * sin(2 * pi * atom / size))
            for atom in range(size)
        ]
        tail = ring[1][0], ring[1][1] + 52
        bonds = [*zip(ring, [*ring[1:], ring[0]], strict=True), (ring[1], tail)]
        drawn += [line(*start, *end, width=3) for start, end in bonds]
        atoms = zip([*ring, tail], (BLUE, RED, BLUE, GREEN, BLUE, BLUE, ORANGE), strict=False)
        drawn += [dot(*atom, color, r=13) for atom, color in atoms]
    return drawn


def typed_nodes() -> list[str]:
    """Nodes of two types, and relations of two colors between them."""
    papers = ((240, 50), (240, 110), (240, 170))
    authors = ((80, 80), (80, 140))
    drawn = [line(*author, *paper, BLUE, width=3) for author in authors for paper in papers[:2]]
    drawn += [line(*authors[1], *papers[2], BLUE, width=3)]
    drawn += [line(*papers[place], *papers[place + 1], RED, width=4) for place in (0, 1)]
    drawn += [dot(*place, GRAY, r=14) for place in authors]
    return [*drawn, *(box(x - 14, y - 14, 28, 28, ORANGE, ORANGE) for x, y in papers)]


def upcycle_timm_vit() -> list[str]:
    """Six blocks; every second has experts beside its MLP."""
    drawn = []
    for block in range(6):
        y = 180 - 32 * block
        drawn.append(box(50, y, 100, 24))
        if block % 2:
            drawn += [
                box(170 + 32 * expert, y, 26, 24, color, color)
                for expert, color in enumerate(COLORS)
            ]
    return drawn


def vit_cifar10() -> list[str]:
    """The patches of an image, colored by expert."""
    drawn = []
    for row in range(6):
        for column in range(6):
            ring = max(abs(row - 2.5), abs(column - 2.5))
            color = RED if ring < 1 else ORANGE if ring < 2 else (BLUE, GREEN)[row > 3]
            drawn.append(box(65 + 32 * column, 14 + 32 * row, 29, 29, color, color))
    return drawn


def own_router() -> list[str]:
    """Scores of eight experts, of which a token takes the best two."""
    logits = (-0.5, 0.8, -1.2, 2.2, 0.1, -0.3, 1.6, -2.0)
    best = sorted(logits)[-2:]
    drawn = [line(30, 190, 295, 190, width=2)]
    for place, logit in enumerate(logits):
        high, color = 160 / (1 + exp(-logit)), RED if logit in best else INK
        drawn.append(
            box(38 + 32 * place, 190 - high, 24, high, RED if logit in best else "none", color)
        )
    return drawn


def lightning_module() -> list[str]:
    """The load of experts, step by step."""
    drawn = [line(40, 190, 300, 190, width=2), line(40, 190, 40, 20, width=2)]
    for start, color in zip((30, 80, 130, 180), COLORS, strict=True):
        points = [(40 + 25 * step, 105 + (start - 105) * exp(-step / 3)) for step in range(11)]
        drawn += [line(*left, *right, color, width=4) for left, right in pairwise(points)]
    return drawn


def hub_save_load() -> list[str]:
    """A model goes into a folder and comes back."""
    drawn = []
    for left in (20, 230):
        drawn.append(box(left, 60, 70, 100))
        drawn += [
            box(left + 10 + 27 * (place % 2), 75 + 40 * (place // 2), 23, 32, color, color)
            for place, color in enumerate(COLORS)
        ]
    drawn += [box(128, 78, 28, 12, GRAY, GRAY), box(128, 86, 64, 52, GRAY, GRAY)]
    drawn += [line(94, 110, 122, 110, arrow=True, width=2)]
    return [*drawn, line(196, 110, 224, 110, arrow=True, width=2)]


def forces() -> list[str]:
    """A molecule, its atoms colored by element, and what pulls at them."""
    atoms = (((110, 140), RED), ((170, 90), BLUE), ((230, 140), RED), ((170, 165), ORANGE))
    drawn = [line(170, 90, *place, width=3) for place, color in atoms if color != BLUE]
    for (left, top), color in atoms:
        right, bottom = left + 0.5 * (left - 170), top + 0.7 * (top - 122)
        drawn.append(line(left, top, right, bottom, color, arrow=True, width=4))
        drawn.append(dot(left, top, color, r=15))
    return drawn


def sources() -> list[str]:
    """The errors of four sources, a bar for each of two models."""
    heights = ((60, 45), (70, 55), (130, 95), (120, 90))
    drawn = [line(30, 190, 300, 190, width=3)]
    for place, pair in enumerate(heights):
        for part, height in enumerate(pair):
            color = (GRAY, BLUE)[part]
            drawn.append(box(45 + 65 * place + 24 * part, 190 - height, 22, height, color, color))
    return drawn


def shrink_and_save() -> list[str]:
    """Eight experts become three, which go into a folder."""
    drawn = [
        box(20 + 44 * (place % 2), 25 + 44 * (place // 2), 36, 36, color, color)
        for place, color in enumerate([*COLORS, *COLORS])
    ]
    drawn.append(line(118, 110, 156, 110, arrow=True, width=2))
    drawn += [
        box(168, 47 + 44 * place, 36, 36, color, color) for place, color in enumerate(COLORS[:3])
    ]
    drawn += [box(238, 78, 28, 12, GRAY, GRAY), box(238, 86, 64, 52, GRAY, GRAY)]
    return drawn


THUMBNAILS: tuple[Callable[[], list[str]], ...] = (
    forces,
    hub_save_load,
    lightning_module,
    molecules,
    ogbn_arxiv,
    own_router,
    shrink_and_save,
    sources,
    swap_pyg_conv,
    typed_nodes,
    upcycle_timm_vit,
    vit_cifar10,
)
"""One an example, and called as it is."""
ARROW = (
    '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="10" '
    'markerHeight="10" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z" '
    f'fill="{GRAY}" stroke="none"/></marker>'
)


def main() -> None:
    """Write them all."""
    folder = Path(__file__).parent / "figures" / "examples"
    folder.mkdir(exist_ok=True)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    for draw in THUMBNAILS:
        drawn = "\n".join(draw()).replace(f"#arrow-{INK}", "#arrow").replace(INK, GRAY)
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
        lines = [head, f"<defs>{ARROW}</defs>", drawn, "</svg>", ""]
        (folder / f"{draw.__name__}.svg").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
