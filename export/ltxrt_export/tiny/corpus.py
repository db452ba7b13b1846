# SPDX-License-Identifier: Apache-2.0
"""Prompts about talking faces: what the tiny tokenizer learns its pieces from, and the words the model knows.

The lists are the vocabulary of the clips that the tiny model is meant for: a drawn person who speaks in front
of a plain background.
"""

from collections.abc import Iterator

__all__ = ["COLOURS", "EXPRESSIONS", "PEOPLE", "PLACES", "SHOTS", "THINGS", "VERBS", "prompts"]

COLOURS = (
    "red",
    "green",
    "blue",
    "yellow",
    "orange",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
    "grey",
    "teal",
    "golden",
    "silver",
    "dark",
    "light",
    "beige",
    "violet",
    "turquoise",
)
PEOPLE = (
    "woman",
    "man",
    "girl",
    "boy",
    "person",
    "child",
    "teacher",
    "singer",
    "presenter",
    "robot",
    "doctor",
    "grandmother",
    "grandfather",
    "student",
    "chef",
    "pilot",
    "politician",
    "queen",
    "king",
    "puppet",
)
VERBS = (
    "talks to the camera",
    "speaks slowly",
    "speaks quickly",
    "sings a song",
    "reads the news",
    "tells a story",
    "whispers",
    "shouts",
    "laughs and talks",
    "counts to ten",
    "answers a question",
    "says hello",
    "explains an idea",
    "recites a poem",
    "gives a speech",
    "announces the winner",
)
EXPRESSIONS = (
    "smiling",
    "serious",
    "happy",
    "sad",
    "calm",
    "excited",
    "surprised",
    "tired",
    "angry",
    "friendly",
    "thoughtful",
    "nervous",
    "proud",
)
PLACES = (
    "in front of a {colour} background",
    "against a {colour} wall",
    "in a {colour} room",
    "under a {colour} sky",
    "on a {colour} stage",
    "beside a {colour} window",
    "behind a {colour} desk",
    "near a {colour} curtain",
)
THINGS = ("hat", "scarf", "tie", "beard", "necklace", "earrings", "sweater", "dress", "uniform", "headphones")
SHOTS = ("close-up", "portrait", "medium shot", "front view", "studio shot", "wide angle", "cinematic shot")

_SENTENCES = (
    "A {mood} {person} with {hair} hair and a {shirt} shirt {verb} {place}.",
    "{Shot} of a {person} in a {shirt} shirt who {verb}, {place}.",
    "The {person} has {hair} hair, {eyes} eyes and a {shirt} jacket. The mouth moves with the voice.",
    "A cartoon face, {mood}, {hair} hair, {shirt} shirt, {verb} {place}, soft light, no motion blur.",
    "{Person} wearing a {shirt} shirt and {eyes} glasses {verb} while the camera stays still.",
    "An old {person} with a {eyes} {thing} {verb}, lips in sync with the sound, looking straight ahead.",
    "A young {person}, {mood} expression, {hair} {thing}, opens and closes the mouth, blinks, nods the head.",
    "Flat drawing of a {mood} {person} with a round face and {eyes} {thing}, simple shapes, smooth colours.",
)
_COUNT = 600


def prompts() -> Iterator[str]:
    """600 prompts, always the same: the lists are walked with steps that have no common divisor."""
    for index in range(_COUNT):
        person = _pick(PEOPLE, index, 3)
        shot = _pick(SHOTS, index, 2)
        yield _pick(_SENTENCES, index, 1).format(
            mood=_pick(EXPRESSIONS, index, 5),
            person=person,
            Person=person.capitalize(),
            Shot=shot.capitalize(),
            hair=_pick(COLOURS, index, 5),
            shirt=_pick(COLOURS, index, 7),
            eyes=_pick(COLOURS, index, 11),
            thing=_pick(THINGS, index, 3),
            verb=_pick(VERBS, index, 7),
            place=_pick(PLACES, index, 3).format(colour=_pick(COLOURS, index // 5, 7)),
        )


def _pick(choices: tuple[str, ...], index: int, step: int) -> str:
    return choices[(index * step + index // len(choices)) % len(choices)]
