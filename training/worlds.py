"""What there is and how often: tables of words with their numbers, and worlds as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .outlines import SHAPES

COLORS = {
    "red": (0.92, 0.13, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.14, 0.72, 0.24),
    "cyan": (0.10, 0.80, 0.86),
    "blue": (0.15, 0.32, 0.95),
    "purple": (0.55, 0.18, 0.84),
    "pink": (1.00, 0.42, 0.74),
}
# Screen coordinates: y grows downwards. The first four are the cardinal ones.
DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up right": (math.sqrt(0.5), -math.sqrt(0.5)),
    "up left": (-math.sqrt(0.5), -math.sqrt(0.5)),
    "down right": (math.sqrt(0.5), math.sqrt(0.5)),
    "down left": (-math.sqrt(0.5), math.sqrt(0.5)),
}
SPEEDS = {"slow": (1.2, 1.8), "steady": (2.1, 2.8), "fast": (3.3, 4.2)}  # units per frame
SIZES = ("small", "medium", "large")  # their radii are the world's
TONES = {"dark": (0.03, 0.18), "grey": (0.38, 0.50), "light": (0.78, 0.93)}
PATTERNS = ("plain", "gradient", "striped", "checkered")
# How the first of two objects passes the second.
ORDERS = ("apart", "in front", "behind")
HELD_OUT_CYCLE = 10  # one combination in so many is kept from training
Split = Literal["train", "held-out", "all"]
SPLITS: tuple[Split, ...] = ("train", "held-out", "all")


@dataclass(frozen=True, slots=True)
class World:
    """What there is, and how often. Shares are of clips unless said otherwise."""

    name: str
    shapes: int = len(SHAPES)  # the first of SHAPES
    radii: tuple[tuple[float, float], ...] = ((12.0, 13.5), (15.0, 17.5), (19.5, 23.0))
    pair_share: float = 0.4  # with two objects; a few find no room and stay single
    crossing_share: float = 0.5  # of these, one passing in front of the other
    texture_share: float = 0.3  # of medium and large objects, striped or checkered
    diagonal_share: float = 0.35  # of objects
    common_patterns: int = 2  # the first of PATTERNS
    pattern_share: float = 0.4  # with any of PATTERNS
    slip_share: float = 0.0  # of captions' colours, shapes and directions that are told wrong
    holds_out: bool = True  # whether some combinations are kept from training
    text_tokens: int = 48  # columns of a row of ids: the longest caption, its EOS and padding
    is_first: bool = False  # its clips are drawn in the order of the first release

    @property
    def exam_split(self) -> Split:
        """What exams ask: combinations that no training clip has, where there are such."""
        return "held-out" if self.holds_out else "train"


WIDE = World("wide")
# That of the first shipped models and their figures: a seed gives its clips to the bit, for ever.
PLAIN = World(
    "plain",
    shapes=4,
    radii=((10.5, 12.5), (14.0, 17.0), (19.0, 23.0)),
    pair_share=0.0,
    crossing_share=0.0,
    texture_share=0.0,
    diagonal_share=0.2,
    pattern_share=0.0,
    holds_out=False,
    text_tokens=32,
    is_first=True,
)
WORLDS = {world.name: world for world in (PLAIN, WIDE)}
