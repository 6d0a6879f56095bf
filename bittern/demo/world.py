"""The invented world of the demo: who lives where, what each land sells, who owns the silver lamp.

Names are hand-made lists; who has what is drawn once from ``WORLD_SEED``. Every text that
:mod:`bittern.demo.corpus` writes, under any seed, agrees with these facts, so that an answer can be
scored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

WORLD_SEED = 2024


def words(line: str) -> tuple[str, ...]:
    """The words of a line."""
    return tuple(line.split())


def phrases(line: str) -> tuple[str, ...]:
    """What stands between the commas of a line."""
    return tuple(line.split(", "))


LANDS = words(
    "Velmar Orsund Kethra Balvia Drennis Falune Garroth Heskia Ilvane Jorund Kalmere Lothia Morvane Nerith "
    "Ostrel Pelluria Quarnia Rhodane Selvik Tarnell Undrel Varsk Wendal Zephra"
)
TOWNS = words(
    "Tosk Brell Canver Dunmar Eskel Fennig Golt Harrow Ister Juniper Kesh Lanver Mordo Nim Oxley Pard Quill "
    "Ravel Stenn Tindle Ulmer Vash Wick Yarrow"
)
WOMEN = words(
    "Mirel Anwen Belda Corra Dessa Elmira Fyra Gwenna Hilda Ivora Jessa Kalli Lunet Merrin Nessa Odile Petra "
    "Runa Sella Tamsin Una Vesna Wilda Zora"
)
MEN = words(
    "Oren Aldo Bram Corvin Dorn Edric Falk Garet Hobb Ivo Joram Kell Lorcan Milo Nolan Osric Perrin Roderic "
    "Silas Tobin Ulric Varn Wendel Zeno"
)
GOODS = words(
    "salt wool honey copper paper silk glass pepper timber cheese butter coal leather candles barley wine tea "
    "marble silver rope herring soap plums tin"
)
JOBS = words(
    "baker miller weaver potter tailor sailor teacher doctor gardener mason painter shepherd carpenter fisher "
    "hunter locksmith printer brewer judge beekeeper"
)
INSTRUMENTS = words("flute fiddle drum harp horn lute piano whistle bell trumpet")
COLOURS = words("red blue green white black grey brown yellow golden purple silver pink")
PETS = words("cat dog goat parrot rabbit hen pony mouse turtle goose")
BEASTS = words("fox wolf bear hare deer badger raven swan lynx heron")
LAIRS = phrases(
    "in the old mill, under the stone bridge, behind the waterfall, in the hollow tree, on the high cliff, "
    "near the quiet lake, inside the broken tower, beside the salt marsh, in the dark cave, above the chapel, "
    "below the windy hill, among the tall reeds, in the empty barn, along the river bank, "
    "beyond the last gate, under the market hall"
)
THINGS = words("lamp key box ring cup cloak book knife mirror basket kite boat clock mask coin saddle")


@dataclass(frozen=True)
class Person:
    """Somebody of the world; ``pronoun`` is "he" or "she"."""

    name: str
    pronoun: str
    job: str
    home: str
    instrument: str
    pet: str


@dataclass(frozen=True)
class Fact:
    """One thing that is true: ``relation`` is a key of ``corpus.RELATIONS``."""

    relation: str
    subject: str
    answer: str


@dataclass(frozen=True)
class World:
    """The people and all facts about everything."""

    people: tuple[Person, ...]
    facts: tuple[Fact, ...]

    def answer(self, relation: str, subject: str) -> str:
        """What is true of ``subject``; KeyError when the world says nothing about it."""
        for fact in self.facts:
            if (fact.relation, fact.subject) == (relation, subject):
                return fact.answer
        raise KeyError((relation, subject))


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of ``items``. Only ``random()`` is promised to give the same numbers in every Python."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """``items`` in a random order, with the same promise as :func:`pick`."""
    keyed = [(rng.random(), index) for index in range(len(items))]
    return [items[index] for _, index in sorted(keyed)]


def build_world() -> World:
    """The one world, the same on every machine."""
    rng = random.Random(WORLD_SEED)
    people = tuple(
        Person(
            name=name,
            pronoun=pronoun,
            job=pick(rng, JOBS),
            home=pick(rng, TOWNS),
            instrument=pick(rng, INSTRUMENTS),
            pet=f"{pick(rng, COLOURS)} {pick(rng, PETS)}",
        )
        for pronoun, names in (("she", WOMEN), ("he", MEN))
        for name in names
    )
    facts = [Fact("capital", *pair) for pair in zip(LANDS, shuffled(rng, TOWNS), strict=True)]
    facts += [Fact("trade", *pair) for pair in zip(LANDS, shuffled(rng, GOODS), strict=True)]
    for person in people:
        facts += [
            Fact("job", person.name, person.job),
            Fact("home", person.name, person.home),
            Fact("music", person.name, person.instrument),
            Fact("pet", person.name, person.pet),
        ]
    beasts = shuffled(rng, [f"{colour} {beast}" for colour in COLOURS for beast in BEASTS])
    facts += [Fact("lair", *pair) for pair in zip(beasts[: len(LAIRS)], shuffled(rng, LAIRS), strict=True)]
    things = shuffled(rng, [f"{colour} {thing}" for colour in COLOURS for thing in THINGS])
    facts += [Fact("owner", thing, pick(rng, people).name) for thing in things[:32]]
    return World(people, tuple(facts))
