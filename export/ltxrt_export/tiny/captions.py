# SPDX-License-Identifier: Apache-2.0
"""Prompts for drawn clips: which colours they name, in many wordings, and the ones that tests keep for themselves."""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from ltxrt_export.tiny.corpus import EXPRESSIONS, PEOPLE, SHOTS, VERBS
from ltxrt_export.tiny.world import COLOURS, DEFAULTS, PARTS

__all__ = ["all_names", "caption", "held_out_captions", "held_out_names", "random_names", "tokenizer_corpus"]

_PHRASES: Mapping[str, tuple[str, ...]] = {
    "background": (
        "on a {} background",
        "in front of a {} background",
        "against a {} wall",
        "in a {} room",
        "with a {} background",
        "{} background",
        "the background is {}",
        "before a {} wall",
    ),
    "skin": (
        "with {} skin",
        "{}-skinned",
        "{} skin",
        "with a {} face",
        "whose skin is {}",
        "{}-faced",
        "the skin is {}",
        "{} face",
    ),
    "shirt": (
        "wearing a {} shirt",
        "in a {} shirt",
        "{} shirt",
        "with a {} shirt",
        "who wears a {} shirt",
        "dressed in {}",
        "the shirt is {}",
        "in a {} sweater",
    ),
}
_FIXED = (
    "a {skin}-skinned face on a {background} background wearing a {shirt} shirt, talking",
    "A {skin}-skinned person in a {shirt} shirt {verb} in front of a {background} background.",
    "{shot} of a {mood} {person} with {skin} skin and a {shirt} shirt, {background} background.",
    "A {mood} {skin} face, {shirt} shirt, {background} wall, {verb}, soft light.",
    "The {person} has {skin} skin and wears a {shirt} shirt, {background} background, the mouth moves with the voice.",
)
_HELD_OUT = (
    "A talking {person} with {skin} skin, in a {shirt} shirt, on a {background} background.",
    "In front of a {background} wall, a {mood} {skin}-skinned {person} in a {shirt} shirt {verb}.",
    "{shot}: {background} background, a {person} who wears a {shirt} shirt, with a {skin} face.",
    "a {skin}-faced {person} dressed in {shirt}, the background is {background}, {verb}",
)
_PLAIN = (
    "{shot} of a {mood} {person} who {verb}",
    "A {mood} {person} {verb}.",
    "a talking face",
    "a person talking",
    "{shot} of a {mood} young {person} in a sunlit room who looks into the camera and speaks, soft light, 35 mm",
    "The {person} looks straight ahead and {verb}, the mouth moves with the voice.",
    "A cartoon face, {mood}, {verb}, simple shapes, no motion blur.",
)


def all_names() -> list[dict[str, str]]:
    """Every choice of three different colours for the parts, 336 of them."""
    return [dict(zip(PARTS, names, strict=True)) for names in itertools.permutations(COLOURS, len(PARTS))]


def held_out_names() -> list[dict[str, str]]:
    """The 64 choices that training never sees together."""
    names = all_names()
    order = np.random.default_rng(20).permutation(len(names))
    return [names[int(index)] for index in order[:64]]


def held_out_captions() -> list[tuple[str, dict[str, str]]]:
    """64 prompts in wordings and with choices of colours that training never sees, each with its colours."""
    random = np.random.default_rng(21)
    return [(_filled(random, _HELD_OUT[i % len(_HELD_OUT)], names), names) for i, names in enumerate(held_out_names())]


def random_names(random: np.random.Generator) -> dict[str, str]:
    """Colours for a training clip."""
    kept_back = held_out_names()
    while True:
        chosen = random.permutation(list(COLOURS))[: len(PARTS)]
        names = dict(zip(PARTS, map(str, chosen), strict=True))
        if names not in kept_back:
            return names


def caption(random: np.random.Generator, names: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """A training prompt, and the colours that it stands for: defaults where it names none.

    Seven in ten prompts name all parts, one in ten none.
    """
    kind = random.random()
    if kind < 0.1:
        return _filled(random, str(random.choice(_PLAIN)), names), dict(DEFAULTS)
    if kind < 0.4:
        return _filled(random, str(random.choice(_FIXED)), names), dict(names)
    named = [part for part in PARTS if kind > 0.6 or random.random() < 0.6]
    order = [str(part) for part in random.permutation(named)] if named else []
    phrases = [str(random.choice(_PHRASES[part])).format(names[part]) for part in order]
    opening = str(
        random.choice(("a face", "{shot} of a {person}", "a {mood} {person}", "The {person}", "a talking face"))
    )
    ending = (
        [str(random.choice(("{verb}", "soft light", "looking straight ahead", "talking")))]
        if random.random() < 0.7
        else []
    )
    glue = str(random.choice((", ", ", ", " ")))
    text = glue.join([_filled(random, opening, names), *phrases]) + "".join(
        f", {_filled(random, end, names)}" for end in ending
    )
    if random.random() < 0.5:
        text = text[0].upper() + text[1:] + "."
    return text, {part: names[part] if part in named else DEFAULTS[part] for part in PARTS}


def tokenizer_corpus() -> Iterator[str]:
    """Prompts from which the tokenizer learns these words, always the same."""
    random = np.random.default_rng(22)
    for names in all_names():
        yield caption(random, names)[0]


def _filled(random: np.random.Generator, template: str, names: Mapping[str, str]) -> str:
    return template.format(
        **{part: names[part] for part in PARTS},
        person=random.choice(PEOPLE),
        mood=random.choice(EXPRESSIONS),
        verb=random.choice(VERBS),
        shot=str(random.choice(SHOTS)).capitalize(),
    )
