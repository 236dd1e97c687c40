"""Plain filler sentences: the part of the almanac that states no facts."""

from __future__ import annotations

import random

NOUNS = (
    "lamp kite basket bottle blanket bucket candle carpet chair clock coat cup hammer hat key kettle ladder letter map "
    "mirror needle pencil pillow rope saddle scarf shovel spoon stool table tent ticket towel wheel book box"
).split()
PLACES = (
    "garden kitchen market harbour forest library museum station stable tower valley village cellar meadow chapel "
    "tavern bakery school orchard castle cabin theatre square attic"
).split()
ADJECTIVES = (
    "red blue green yellow white black grey brown small large old new heavy light round square broken clean dusty "
    "narrow"
).split()
NAMES = (
    "Abel Agnes Bruno Celia Doris Elias Fiona Gideon Hilda Igor Jenny Kurt Lydia Milo Nelly Orson Pearl Quentin Rita "
    "Silas Tilda Ursula Vince Wanda"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
WORDS = [*NOUNS, *PLACES, *ADJECTIVES, *NAMES]
_WEATHER = "sunny rainy windy cold warm cloudy foggy stormy mild dry".split()
_ANIMALS = "dog cat goat donkey pigeon rooster duck pony squirrel hedgehog".split()
_DEEDS = "slept waited rested played walked ran hid sat stood wandered".split()
_TIMES = (
    "in the morning",
    "in the evening",
    "at noon",
    "at night",
    "after the rain",
    "before dawn",
    "all day",
    "last week",
)
_GROUPS = "children neighbours travellers workers visitors students villagers merchants".split()
_ACTIONS = "painted repaired cleaned carried found lost sold bought borrowed hid".split()
_ASIDES = (
    "Nobody knew why.",
    "It took a long time.",
    "That was the end of it.",
    "Everyone was pleased.",
    "The rest is well known.",
    "It happens every year.",
    "There was little to say.",
    "The news spread quickly.",
)


def sentence(rng: random.Random) -> str:
    """One plain sentence of 3 to 14 words.

    Args:
        rng: Source of chance.

    Returns:
        The sentence, capitalised, ending in a full stop.
    """
    pick = rng.choice
    form = rng.randrange(8)
    if form == 0:
        return f"The {pick(ADJECTIVES)} {pick(NOUNS)} is in the {pick(PLACES)}."
    if form == 1:
        return (
            f"On {pick(DAYS)} it was {pick(_WEATHER)} and the {pick(_ANIMALS)} {pick(_DEEDS)} near the {pick(PLACES)}."
        )
    if form == 2:
        return f"The {pick(_GROUPS)} {pick(_ACTIONS)} a {pick(ADJECTIVES)} {pick(NOUNS)} {pick(_TIMES)}."
    if form == 3:
        return f"A {pick(_ANIMALS)} {pick(_DEEDS)} in the {pick(PLACES)} {pick(_TIMES)}."
    if form == 4:
        return f"There is a {pick(NOUNS)} on the {pick(NOUNS)} and a {pick(_ANIMALS)} under it."
    if form == 5:
        return f"{pick(NAMES)} went to the {pick(PLACES)} with a {pick(NOUNS)} and came back {pick(_TIMES)}."
    if form == 6:
        return (
            f"The weather on {pick(DAYS)} will be {pick(_WEATHER)}, so the {pick(_GROUPS)} stay in the {pick(PLACES)}."
        )
    return pick(_ASIDES)
