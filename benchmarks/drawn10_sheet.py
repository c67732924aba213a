"""Draw the README's picture of drawn10: each row one thing, in the four turns that are predicted.

python benchmarks/drawn10_sheet.py benchmarks/figures/drawn10.png
"""

import sys
from pathlib import Path

from PIL import Image

from data.drawn import draw, label_of

SIDE_PX = 96
GAP_PX = 6
EXAMPLES = 4


def sheet() -> Image.Image:
    """Return ten columns, one a class: four examples upright, then the first one turned."""
    examples: dict[int, list[int]] = {label: [] for label in range(10)}
    index = 0
    while min(len(found) for found in examples.values()) < EXAMPLES:
        examples[label_of(index)].append(index)
        index += 1
    rows = EXAMPLES + 3
    step = SIDE_PX + GAP_PX
    page = Image.new("RGB", (10 * step - GAP_PX, rows * step + GAP_PX), "white")
    for label, found in examples.items():
        for row in range(rows):
            turns = max(0, row - EXAMPLES + 1)
            picture = draw(found[0 if turns else row], "train", SIDE_PX)
            below = GAP_PX * 2 if turns else 0
            page.paste(picture.rotate(90 * turns), (label * step, row * step + below))
    return page


if __name__ == "__main__":
    sheet().save(Path(sys.argv[1]), optimize=True)
