"""Draws the pictures of README.md and docs/concepts.md: python docs/figures/pictures.py [FOLDER]"""

import sys
from pathlib import Path

INK, PALE, GRID, ROUTED, OWN, SAMPLED = "#1f2933", "#7b8794", "#cbd2d9", "#2f6fbb", "#e0a030", "#3a9a68"
ROUTED_CHUNKS = {1: 0.55, 4: 0.15, 7: 0.30}  # chunk: pbar, of the query that the pictures follow
CHUNKS = 10  # before the own one


class Picture:
    """An SVG under construction; lengths are pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.parts = [f"<title>{title}</title>"]

    def box(self, x: float, y: float, width: float, height: float, fill: str = "none", opacity: float = 1.0) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" '
            f'fill-opacity="{opacity:g}" stroke="{GRID}"/>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "middle", size: int = 13, color: str = INK) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{words}</text>'
        )

    def curve(self, x: float, y: float, to_x: float, to_y: float, color: str, width: float) -> None:
        middle = (y + to_y) / 2
        self.parts.append(
            f'<path d="M{x:g} {y:g} C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}" fill="none" '
            f'stroke="{color}" stroke-width="{width:g}" stroke-opacity="0.8"/>'
        )

    def save(self, path: Path) -> None:
        body = "\n".join(self.parts)
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'font-family="Helvetica, Arial, sans-serif">\n'
            f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
        )


def chunk_row(picture: Picture, x: float, y: float, routed: dict[int, float]) -> list[float]:
    """A row of chunks, shaded by pbar, with the own one at the end; the middles of all."""
    middles = []
    for chunk in range(CHUNKS + 1):
        left = x + chunk * 56
        picture.box(left, y, 50, 34)
        if chunk == CHUNKS:
            picture.box(left, y, 50, 34, OWN, 0.85)
        elif chunk in routed:
            picture.box(left, y, 50, 34, ROUTED, 0.25 + routed[chunk])
            picture.text(left + 25, y + 22, f".{round(100 * routed[chunk]):02d}", color="white")
        middles.append(left + 25)
    return middles


def idea() -> Picture:
    """One query, the chunks that it routes to, their tokens; a block of tokens with one routing."""
    picture = Picture(760, 330, "DashAttention: a query routes to a few chunks and attends to their tokens")
    picture.text(20, 26, "one token", "start", 15)
    middles = chunk_row(picture, 122, 70, ROUTED_CHUNKS)
    picture.box(middles[-1] - 9, 18, 18, 18, INK)
    picture.text(middles[-1] - 16, 32, "query", "end", color=PALE)
    for chunk, pbar in ROUTED_CHUNKS.items():
        picture.curve(middles[-1], 36, middles[chunk], 68, ROUTED, 1 + 5 * pbar)
    picture.text(112, 86, "stage 1:", "end", 12, PALE)
    picture.text(112, 101, "chunks, by pbar", "end", 12, PALE)
    for chunk in [*ROUTED_CHUNKS, CHUNKS]:
        color = OWN if chunk == CHUNKS else ROUTED
        for token in range(8 if chunk < CHUNKS else 5):
            weight = ((token * 5 + chunk) % 7) / 6
            picture.box(middles[chunk] - 25 + 6.3 * token, 124, 5.3, 20, color, 0.35 + 0.5 * weight)
    picture.text(112, 132, "stage 2:", "end", 12, PALE)
    picture.text(112, 147, "softmax over", "end", 12, PALE)
    picture.text(112, 162, "their tokens", "end", 12, PALE)

    picture.text(20, 206, "a routing block", "start", 15)
    middles = chunk_row(picture, 122, 262, ROUTED_CHUNKS)
    for token in range(4):
        picture.box(middles[-1] - 46 + 22 * token, 194, 18, 18, INK)
    picture.text(middles[-1] - 54, 208, "four tokens, one choice: from the mean of the last queries", "end", color=PALE)
    picture.box(middles[-1] - 50, 190, 92, 26)
    for chunk, pbar in ROUTED_CHUNKS.items():
        picture.curve(middles[-1] - 4, 216, middles[chunk], 260, ROUTED, 1 + 5 * pbar)
    picture.text(middles[-1], 314, "own chunk", size=12, color=PALE)
    picture.text(middles[4], 314, "the past, in chunks of 64 tokens", size=12, color=PALE)
    return picture


def density() -> Picture:
    """Which tokens route to which chunks: the share of the triangle that is filled."""
    picture = Picture(500, 250, "Density: routed over eligible pairs")
    size, rows = 16, 11
    filled = eligible = 0
    for token in range(rows):
        for chunk in range(token + 1):
            is_own = chunk == token
            is_routed = not is_own and (token * token + chunk * 3) % 7 == 0
            x, y = 60 + chunk * (size + 2), 20 + token * (size + 2)
            picture.box(x, y, size, size, OWN if is_own else ROUTED, 0.85 if is_own or is_routed else 0.0)
            eligible += not is_own
            filled += is_routed
    picture.text(50, 124, "tokens", "end", 12, PALE)
    picture.text(160, 238, "chunks", size=12, color=PALE)
    picture.text(280, 70, f"{filled} blue of {eligible} before the own:", "start")
    picture.text(280, 92, f"density {filled / eligible:.2f}", "start", 15, ROUTED)
    picture.text(280, 122, "(the own chunk", "start", 12, PALE)
    picture.text(280, 138, "counts on neither side)", "start", 12, PALE)
    return picture


def union() -> Picture:
    """A tile of four tokens that disagree, and one that shares its choice."""
    picture = Picture(600, 190, "The union factor: what a tile reads over what its tokens asked for")
    choices = [{1, 4}, {1, 6}, {3, 4}, {4, 8}]
    for left, wanted, words in ((20, choices, "each token its own choice"), (320, [{1, 4}] * 4, "one choice")):
        for token, chunks in enumerate(wanted):
            for chunk in range(10):
                picture.box(left + 26 * chunk, 32 + 22 * token, 22, 18, ROUTED, 0.75 if chunk in chunks else 0.0)
        read = set().union(*wanted)
        for chunk in range(10):
            picture.box(left + 26 * chunk, 130, 22, 18, INK, 0.75 if chunk in read else 0.0)
        picture.text(left, 20, words, "start", 14)
        asked = sum(map(len, wanted)) / len(wanted)
        picture.text(
            left, 172, f"the tile reads {len(read)} chunks for {asked:g}: U = {len(read) / asked:g}", "start", 13
        )
    return picture


def sampling() -> Picture:
    """What vAttention reads: some tokens for certain, of the rest a sample."""
    picture = Picture(640, 110, "vAttention: certain tokens and a sample of the rest")
    heavy, sampled = {12, 13, 27}, {8, 16, 19, 24, 31, 36}
    for token in range(46):
        color = OWN if token < 4 or token >= 40 else ROUTED if token in heavy else SAMPLED if token in sampled else None
        picture.box(20 + 13 * token, 30, 11, 26, color or PALE, 0.85 if color else 0.05)
    picture.text(46, 76, "sink", size=12, color=PALE)
    picture.text(192, 76, "heavy", size=12, color=ROUTED)
    picture.text(330, 76, "sampled: each stands for several", size=12, color=SAMPLED)
    picture.text(576, 76, "window", size=12, color=PALE)
    return picture


PICTURES = {"idea": idea, "density": density, "union": union, "sampling": sampling}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, draw in PICTURES.items():
        draw().save(folder / f"{name}.svg")
