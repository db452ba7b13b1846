# SPDX-License-Identifier: Apache-2.0
"""FP8 recipes: which linear layers are quantised and which stay 16-bit, as data with a reason for every line.

A recipe is a TOML file of ``recipes/``. Its patterns are regular expressions that match the end of a checkpoint key
from the start of a segment. Every linear layer of the network has to be matched, so that a layer which nobody thought
of cannot slip into either precision; a pattern that matches nothing is refused as well.
"""

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from ltxrt.errors import ExportError, shown

__all__ = ["RECIPES", "BlockRule", "Recipe", "Rule", "Selection", "load_recipe"]

#: Precisions that have a recipe, by network. The other networks are convolutions and take a small part of a clip's
#: arithmetic; the FP8 pass knows products of matrices alone. (NVIDIA's filter for LTX has the decoder's up blocks too.)
RECIPES: Mapping[str, tuple[str, ...]] = {"denoiser": ("fp8", "fp8-mixed"), "text_encoder": ("fp8",)}

_KEYS = {"network", "precision", "description", "activations", "quantise", "keep", "blocks"}


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern over checkpoint keys, and why it stands there."""

    pattern: str
    reason: str

    def matches(self, key: str) -> bool:
        """Whether the end of ``key``, from the start of a segment, is the pattern."""
        return re.search(rf"(?:^|\.)(?:{self.pattern})$", key) is not None


@dataclass(frozen=True, slots=True)
class BlockRule:
    """Blocks at both ends of the network that stay 16-bit.

    Attributes:
        pattern: Regular expression with one group, the number of the block.
        of: Depth that ``first`` and ``last`` are meant for; at another depth they scale, rounded up.
        first: Blocks from the start.
        last: Blocks from the end.
        reason: Why.
    """

    pattern: str
    of: int
    first: int
    last: int
    reason: str

    def kept(self, keys: Iterable[str]) -> frozenset[str]:
        """The keys that lie in those blocks."""
        blocks = {key: int(match[1]) for key in keys if (match := re.search(self.pattern, key))}
        depth = max(blocks.values(), default=-1) + 1
        first, last = (math.ceil(depth * count / self.of) for count in (self.first, self.last))
        return frozenset(key for key, block in blocks.items() if block < first or block >= depth - last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a recipe does to a network.

    Attributes:
        quantised: Keys of the weights that become FP8, in the order given.
        kept: Keys of the weights that stay 16-bit, and why.
        matches: Number of layers by pattern, for the report; a block rule counts what it takes from the others.
    """

    quantised: tuple[str, ...]
    kept: Mapping[str, str]
    matches: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One recipe.

    Attributes:
        network: Network name.
        precision: Name of the precision in presets.
        description: One sentence.
        activations: Whether an activation's scale comes from its largest magnitude or from its percentile.
        quantise: What becomes FP8.
        keep: What stays 16-bit, whatever ``quantise`` says.
        blocks: Blocks that stay 16-bit as a whole, or None.
    """

    network: str
    precision: str
    description: str
    activations: Literal["amax", "percentile"]
    quantise: tuple[Rule, ...]
    keep: tuple[Rule, ...]
    blocks: BlockRule | None

    def names(self, key: str) -> bool:
        """Whether a weight of that name would be quantised, whichever block it is in."""
        return any(rule.matches(key) for rule in self.quantise) and not any(rule.matches(key) for rule in self.keep)

    def select(self, keys: Iterable[str]) -> Selection:
        """Sort the weights of a network's linear layers.

        Raises:
            ExportError: A pattern matches none of them, or one of them is matched by no pattern.
        """
        keys = tuple(dict.fromkeys(keys))
        name = f"recipe {self.network} {self.precision}"
        rules = {rule: {key for key in keys if rule.matches(key)} for rule in (*self.quantise, *self.keep)}
        at_ends = self.blocks.kept(keys) if self.blocks else frozenset[str]()
        idle = [rule.pattern for rule, matched in rules.items() if not matched]
        idle += [self.blocks.pattern] if self.blocks and not at_ends else []
        if idle:
            raise ExportError(f"{name}: {shown(idle[0])} matches no linear layer of this network")
        unmatched = [key for key in keys if not any(key in matched for matched in rules.values())]
        if unmatched:
            raise ExportError(
                f"{name}: {len(unmatched)} linear layers are matched by no pattern, {unmatched[0]} among them:"
                " say whether they are quantised or kept"
            )
        kept = {key: rule.reason for rule in self.keep for key in rules[rule]}
        if self.blocks:
            kept = {**dict.fromkeys(sorted(at_ends), self.blocks.reason), **kept}
        matches = {rule.pattern: len(matched) for rule, matched in rules.items()}
        if self.blocks:
            matches[self.blocks.pattern] = len(at_ends)
        return Selection(quantised=tuple(key for key in keys if key not in kept), kept=kept, matches=matches)


def load_recipe(network: str, precision: str) -> Recipe:
    """The recipe of a network for a precision.

    Raises:
        ExportError: There is none, or its file is malformed.
    """
    if precision not in RECIPES.get(network, ()):
        known = ", ".join(f"{name} {kind}" for name, kinds in RECIPES.items() for kind in kinds)
        raise ExportError(f"there is no recipe for {network} in {shown(precision)}; there are: {known}")
    file = resources.files("ltxrt_export.quantize").joinpath("recipes", f"{network}-{precision}.toml")
    return parse_recipe(file.read_text("utf-8"), f"{network}-{precision}.toml")


def parse_recipe(text: str, name: str) -> Recipe:
    """A recipe from TOML; ``name`` is for messages.

    Raises:
        ExportError: It is no TOML, or keys or values are missing, unknown or of the wrong kind.
    """
    try:
        data = tomllib.loads(text)
        if set(data) | {"blocks", "keep"} != _KEYS:
            raise ExportError(f"{name}: keys {sorted((set(data) | {'blocks', 'keep'}) ^ _KEYS)} are unknown or missing")
        if data["activations"] not in ("amax", "percentile"):
            raise ExportError(f"{name}: activations = {shown(data['activations'])}; allowed: amax, percentile")
        return Recipe(
            network=data["network"],
            precision=data["precision"],
            description=data["description"],
            activations=data["activations"],
            quantise=tuple(_rule(entry, name) for entry in data["quantise"]),
            keep=tuple(_rule(entry, name) for entry in data.get("keep", ())),
            blocks=BlockRule(**data["blocks"]) if "blocks" in data else None,
        )
    except (tomllib.TOMLDecodeError, TypeError, re.error) as error:
        raise ExportError(f"{name}: {error}") from error


def _rule(entry: Mapping[str, Any], name: str) -> Rule:
    rule = Rule(**entry)
    if not rule.reason.strip():
        raise ExportError(f"{name}: {shown(rule.pattern)} has no reason")
    re.compile(rule.pattern)
    return rule
