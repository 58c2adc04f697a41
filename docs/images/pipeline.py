"""Draws pipeline.svg, the picture of the README: `python docs/images/pipeline.py`. Standard library only."""

from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT = 1120, 300
TRAINED, FROZEN, DATA, LINE, INK = "#dbeafe", "#e5e7eb", "#dcfce7", "#475569", "#0f172a"
WIDE, TOP = 160, 40


class Box(NamedTuple):
    """One stage: its lines of text and the corner, size and colour of its rectangle."""

    title: str
    lines: tuple[str, ...]
    x: int
    y: int
    width: int
    height: int
    fill: str


STAGES = (
    Box("Videos + CSV", ("mp4, flv, mkv, ...", "titles, classes, ..."), 20, TOP, WIDE, 100, DATA),
    Box("TFRecord shards", ("16 JPEG frames a clip", "manifest, rejects"), 220, TOP, WIDE, 100, DATA),
    Box("Loader", ("order and augmentation", "are a function of", "(seed, position)"), 420, TOP, WIDE, 100, DATA),
    Box("Checkpoint", ("trained half per save,", "frozen half once,", "exact resume"), 920, TOP, 180, 100, DATA),
    Box("Video encoder", ("lr x 0.1",), 640, TOP, 110, 44, TRAINED),
    Box("Abstractor", ("queries, heads",), 760, TOP, 110, 44, TRAINED),
    Box("Language model: frozen", ("bf16 or int8, no gradient, no optimizer state",), 640, TOP + 54, 230, 46, FROZEN),
    Box("Converted weights", ("CLIP, ViT, GPT-3, BLOOM, Qwen, BERT",), 630, 210, 250, 56, FROZEN),
    Box("predict / Python API", ("caption, classify, retrieve",), 920, 186, 180, 46, DATA),
    Box("Evaluation report", ("scores beside chance, HTML",), 920, 242, 180, 46, DATA),
)
ARROWS = (
    ((180, 90), (220, 90)),
    ((380, 90), (420, 90)),
    ((580, 90), (628, 90)),
    ((882, 90), (920, 90)),
    ((755, 210), (755, 152)),
    ((960, 140), (960, 186)),
    ((1080, 140), (1080, 164), (1110, 164), (1110, 265), (1100, 265)),
)


def box(stage: Box) -> str:
    """SVG of a rectangle with a bold title and its lines below, all centred."""
    centre, step = stage.x + stage.width / 2, 17
    first = stage.y + (stage.height - step * len(stage.lines)) / 2 + 4
    texts = [f'<text x="{centre}" y="{first}" font-weight="600" font-size="14">{stage.title}</text>']
    texts += [
        f'<text x="{centre}" y="{first + step * number}" font-size="11.5">{line}</text>'
        for number, line in enumerate(stage.lines, 1)
    ]
    corner = f'x="{stage.x}" y="{stage.y}" width="{stage.width}" height="{stage.height}" rx="7"'
    return f'<rect {corner} fill="{stage.fill}" stroke="{LINE}"/>\n' + "\n".join(texts)


def arrow(points: tuple[tuple[int, int], ...]) -> str:
    """SVG of a line through the points that ends in an arrow."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.6" marker-end="url(#head)"/>'


def svg() -> str:
    """The whole picture."""
    step = f'<rect x="628" y="22" width="254" height="130" rx="9" fill="none" stroke="{LINE}" stroke-dasharray="5 4"/>'
    caption = '<text x="755" y="34" font-size="12" font-style="italic">one training step</text>'
    marker = f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'font-family="Helvetica, Arial, sans-serif" text-anchor="middle" fill="{INK}">',
            "<title>Videos become shards, a loader feeds a partly frozen training step, checkpoints answer and are scored</title>",
            f'<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">{marker}</marker></defs>',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            step,
            caption,
            *map(arrow, ARROWS),
            *map(box, STAGES),
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    (Path(__file__).parent / "pipeline.svg").write_text(svg(), encoding="utf-8")
