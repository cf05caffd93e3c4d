"""Captions of scenes in varied words, and the plain prompt of a scene.

Colour, shape, direction, texture and who passes in front are always said; size, speed and
background only sometimes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from .outlines import SHAPES, TEXTURES
from .world import Scenes
from .worlds import COLORS, DIRECTIONS, ORDERS, PATTERNS, SIZES, SPEEDS, TONES


@dataclass(frozen=True, slots=True)
class Thing:
    """One object in words."""

    shape: str
    color: str
    texture: str
    direction: str
    speed: str
    size: str


@dataclass(frozen=True, slots=True)
class Story:
    """One clip in words."""

    things: tuple[Thing, ...]
    tone: str
    pattern: str
    order: str


SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "ball", "dot"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "ring", "hoop", "donut"),
    "cross": ("cross", "cross", "plus sign"),
    "heart": ("heart",),
}
COLOR_WORDS = {
    **{color: (color,) for color in COLORS},
    "cyan": ("cyan", "cyan", "turquoise", "teal"),
    "purple": ("purple", "purple", "violet"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("",), "large": ("large", "big")}
SPEED_WORDS = {
    "slow": ("slowly", "gently"),
    "steady": ("",),
    "fast": ("quickly", "fast", "rapidly"),
}
DIRECTION_WORDS = {
    "right": ("right", "right", "to the right", "from left to right", "rightwards"),
    "left": ("left", "left", "to the left", "from right to left", "leftwards"),
    "up": ("up", "up", "upwards", "to the top", "from bottom to top"),
    "down": ("down", "down", "downwards", "to the bottom", "from top to bottom"),
    "up right": ("up and to the right", "diagonally up right", "to the upper right"),
    "up left": ("up and to the left", "diagonally up left", "to the upper left"),
    "down right": ("down and to the right", "diagonally down right", "to the lower right"),
    "down left": ("down and to the left", "diagonally down left", "to the lower left"),
}
TONE_WORDS = {
    "dark": ("dark", "dark", "black"),
    "grey": ("grey", "gray"),
    "light": ("light", "light", "bright", "white"),
}
PATTERN_WORDS = {
    "plain": ("", "plain"),
    "gradient": ("gradient", "shaded"),
    "striped": ("striped",),
    "checkered": ("checkered",),
}
TEXTURE_WORDS = {
    "plain": ("",),
    "striped": ("striped", "striped", "stripy"),
    "checkered": ("checkered", "checkered", "checked"),
}
ORDER_WORDS = {
    "apart": (" and ", " and ", ", "),
    "in front": (" in front of ", " in front of ", " passing in front of ", " covering "),
    "behind": (" behind ", " behind ", " passing behind ", " hidden by "),
}
MOVING = ("moving", "moving", "moving", "gliding", "sliding", "drifting", "floating", "flying")
MOVES = ("moves", "moves", "goes", "glides", "slides", "drifts", "floats", "flies")
OPENINGS = ("",) * 8 + ("a video of ", "a short clip of ", "an animation of ", "a picture of ")


def stories(scenes: Scenes) -> list[Story]:
    """The attributes of every scene, in words."""
    words = {
        "shape": SHAPES,
        "color": tuple(COLORS),
        "texture": TEXTURES,
        "direction": tuple(DIRECTIONS),
        "speed": tuple(SPEEDS),
        "size": SIZES,
    }
    columns = {name: getattr(scenes, f"{name}_BO").tolist() for name in words}
    backdrops = zip(
        scenes.tone_B.tolist(), scenes.pattern_B.tolist(), scenes.order_B.tolist(), strict=True
    )
    result = []
    for row, (count, backdrop) in enumerate(zip(scenes.count_B.tolist(), backdrops, strict=True)):
        things = tuple(
            Thing(**{name: words[name][columns[name][row][i]] for name in words})
            for i in range(count)
        )
        tone, pattern, order = backdrop
        result.append(Story(things, tuple(TONES)[tone], PATTERNS[pattern], ORDERS[order]))
    return result


def misheard(story: Story, share: float, rng: Random) -> Story:
    """The story as a careless listener tells it: that share of what counts most is anything.

    Captions of real films are wrong at times. A model taught with such ones makes what is asked
    for only as often as they were right, unless guidance pushes it away from the rest.
    """

    if share == 0:
        return story

    def heard(word: str, words: tuple[str, ...]) -> str:
        return rng.choice(words) if rng.random() < share else word

    things = tuple(
        replace(
            thing,
            shape=heard(thing.shape, SHAPES),
            color=heard(thing.color, tuple(COLORS)),
            direction=heard(thing.direction, tuple(DIRECTIONS)),
        )
        for thing in story.things
    )
    return replace(story, things=things)


def plain_prompt(story: Story) -> str:
    """One sentence with every attribute, always the same words."""
    phrases = []
    for thing in story.things:
        size = "" if thing.size == "medium" else f"{thing.size} "
        pace = {"slow": " slowly", "steady": "", "fast": " quickly"}[thing.speed]
        way = DIRECTION_WORDS[thing.direction][0]
        texture = "" if thing.texture == "plain" else f"{thing.texture} "
        phrases.append(f"a {size}{texture}{thing.color} {thing.shape} moving {way}{pace}")
    pattern = "" if story.pattern == "plain" else f"{story.pattern} "
    told = ORDER_WORDS[story.order][0].join(phrases)
    return _article(f"{told} on a {story.tone} {pattern}background")


def caption(story: Story, rng: Random) -> str:
    """A random way to tell the story."""
    is_sentence = rng.random() < 0.3
    phrases = [_phrase(thing, is_sentence, rng) for thing in story.things]
    text = rng.choice(ORDER_WORDS[story.order]).join(phrases)
    if rng.random() < 0.75:
        text += f" {rng.choice(('on', 'on', 'over', 'against'))} a {_backdrop(story, rng)}"
    if not is_sentence:
        text = rng.choice(OPENINGS) + text
    text = _article(text)
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:] + rng.choice((".", ""))
    return text


def _phrase(thing: Thing, is_sentence: bool, rng: Random) -> str:
    size = rng.choice(SIZE_WORDS[thing.size]) if rng.random() < 0.6 else ""
    pace = rng.choice(SPEED_WORDS[thing.speed]) if rng.random() < 0.6 else ""
    way = rng.choice(DIRECTION_WORDS[thing.direction])
    color, shape = rng.choice(COLOR_WORDS[thing.color]), rng.choice(SHAPE_WORDS[thing.shape])
    # No choice where there is none: captions of plain objects stay those of the first release.
    texture = "" if thing.texture == "plain" else rng.choice(TEXTURE_WORDS[thing.texture])
    verb = rng.choice(MOVES if is_sentence else MOVING)
    article = rng.choice(("a", "a", "a", "the", ""))
    is_early = rng.random() < 0.5
    words = (article, size, texture, color, shape, verb, pace if is_early else "", way)
    return " ".join(word for word in (*words, "" if is_early else pace) if word)


def _backdrop(story: Story, rng: Random) -> str:
    tone = rng.choice(TONE_WORDS[story.tone])
    pattern = rng.choice(PATTERN_WORDS[story.pattern])
    words = [tone, pattern] if rng.random() < 0.7 else [pattern, tone]
    return " ".join(word for word in (*words, "background") if word)


def _article(text: str) -> str:
    """The article that `orange` takes."""
    words = text.split(" ")
    for index in range(len(words) - 1):
        if words[index] == "a" and words[index + 1][:1] in "aeiou":
            words[index] = "an"
    return " ".join(words)
