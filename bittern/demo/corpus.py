"""The demo's language: endless English about an invented world, whose answers are known.

Five kinds of document: short stories, gossip, statements of fact, questions with their answers, and
small sums. The same seed gives the same text on every machine; another seed gives
text that was never seen but speaks of the same facts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from bittern.demo.world import COLOURS, THINGS, TOWNS, Fact, Person, World, build_world, phrases, pick, shuffled, words

UNITS = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
MAX_TERM = 10
EVENTS = 8

PLACES = phrases(
    "in the cellar, under the bed, behind the door, on the roof, in the garden, beside the well, "
    "in the stable, on the shelf"
)
ADJECTIVES = words(
    "cold warm bright rainy windy quiet foggy lovely dark busy small heavy strange plain broken clean thin "
    "soft round sharp tall cheap rare dusty"
)
TIMES = words("morning evening day night afternoon spring summer autumn winter")
TRAVELS = words("walked rode ran hurried came travelled wandered drove")
FEELINGS = words("happy sad tired hungry brave worried proud curious angry calm lonely glad")
VERBS = words(
    "found painted carried broke cleaned watched lost opened moved followed drew hid washed sold remembered "
    "dropped lifted mended borrowed wanted"
)
NOUNS = words(
    "bread letter song candle wheel table window ladder stone flag barrel blanket wagon hammer bottle fence "
    "chair hat pot brush map rope shoe pipe nail sack plate pillow fork statue"
)
MATERIALS = words("wood straw iron clay wax bone felt reed")
ADVERBS = words("slowly quickly again gladly twice alone soon carefully loudly often")
SAYINGS = phrases(
    "I have never seen such a thing, Come and sit with us, It will rain before dark, Good bread takes time, "
    "Do not wake the birds, My feet hurt, There is work to do, Let us go together, You are late again, "
    "The road is longer than it looks, Keep your coins, Nobody lives there now"
)


@dataclass(frozen=True)
class Relation:
    """How a fact is told: ``{s}`` is its subject, ``{a}`` its answer."""

    statements: tuple[str, ...]
    question: str


RELATIONS = {
    "capital": Relation(
        ("The capital of {s} is {a}.", "{a} is the capital of {s}.", "The king of {s} rules from {a}, its capital."),
        "What is the capital of {s}?",
    ),
    "trade": Relation(
        ("{s} sells {a} to its neighbours.", "The best {a} comes from {s}.", "Merchants go to {s} for {a}."),
        "What does {s} sell?",
    ),
    "job": Relation(
        ("{s} is a {a}.", "{s} works as a {a}.", "Everyone knows {s} the {a}."),
        "What is the job of {s}?",
    ),
    "home": Relation(
        ("{s} lives in {a}.", "{s} was born in {a} and never left.", "The house of {s} stands in {a}."),
        "Where does {s} live?",
    ),
    "music": Relation(
        ("{s} plays the {a}.", "In the evening {s} plays the {a}.", "The {a} is what {s} likes to play."),
        "What does {s} play?",
    ),
    "pet": Relation(
        ("{s} keeps a {a}.", "{s} has a {a} at home.", "The pet of {s} is a {a}."),
        "What pet does {s} have?",
    ),
    "lair": Relation(
        ("The {s} lives {a}.", "Children say that the {s} sleeps {a}.", "Look for the {s} {a}."),
        "Where does the {s} live?",
    ),
    "owner": Relation(
        ("The {s} belongs to {a}.", "{a} owns the {s}.", "Nobody but {a} may touch the {s}."),
        "Who owns the {s}?",
    ),
}


@dataclass(frozen=True)
class Question:
    """One item to score.

    Attributes:
        prompt: ends in "Answer:".
        answer: what has to follow, with its leading space and full stop.
        kind: "fact" or "sum".
    """

    prompt: str
    answer: str
    kind: str


def number_in_words(number: int) -> str:
    """``number`` from 0 to 99 in English words."""
    if number < len(UNITS):
        return UNITS[number]
    tens = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")[number // 10 - 2]
    return tens if number % 10 == 0 else f"{tens}-{UNITS[number % 10]}"


def documents(seed: int) -> Iterator[str]:
    """Documents without end, in the mixture that the model is trained on."""
    rng, world = random.Random(seed), build_world()
    while True:
        kind = rng.random()
        if kind < 0.25:
            yield _story(rng, world)
        elif kind < 0.45:
            yield _gossip(rng, world)
        elif kind < 0.55:
            yield _statements(rng, world)
        elif kind < 0.87:
            yield "\n".join(_shown(_question(rng, world)) for _ in range(2 + int(rng.random() * 5)))
        else:
            yield " ".join(_sum_sentence(rng) for _ in range(2 + int(rng.random() * 5)))


def text(seed: int, characters: int) -> str:
    """Whole documents with an empty line between them, at least ``characters`` long."""
    parts: list[str] = []
    length = 0
    for document in documents(seed):
        parts.append(document)
        length += len(document) + 2
        if length >= characters:
            break
    return "\n\n".join(parts) + "\n"


def questions(count: int, seed: int) -> list[Question]:
    """``count`` questions with known answers: two fifths facts and three fifths sums on average."""
    rng, world = random.Random(seed), build_world()
    return [_question(rng, world) for _ in range(count)]


def _shown(question: Question) -> str:
    return question.prompt + question.answer


def _ask(question: str, answer: str, kind: str) -> Question:
    return Question(f"Question: {question}\nAnswer:", f" {answer}.", kind)


def _fact_question(fact: Fact) -> Question:
    return _ask(RELATIONS[fact.relation].question.format(s=fact.subject), fact.answer, "fact")


def _question(rng: random.Random, world: World) -> Question:
    return _sum_question(rng) if rng.random() < 0.6 else _fact_question(pick(rng, world.facts))


def _sum_terms(rng: random.Random) -> tuple[str, str, str, str]:
    """Two terms, the sign between them and the result, all in words or all in digits."""
    words = rng.random() < 0.5
    first, second = (1 + int(rng.random() * MAX_TERM) for _ in range(2))
    minus = rng.random() < 0.5
    numbers = (first + second, second, first) if minus else (first, second, first + second)
    left, right, result = (number_in_words(number) if words else str(number) for number in numbers)
    return left, ("minus" if minus else "plus") if words else ("-" if minus else "+"), right, result


def _sum_sentence(rng: random.Random) -> str:
    left, sign, right, result = _sum_terms(rng)
    if sign in "+-":
        return f"{left} {sign} {right} = {result}."
    return f"{left[0].upper()}{left[1:]} {sign} {right} is {result}."


def _sum_question(rng: random.Random) -> Question:
    left, sign, right, result = _sum_terms(rng)
    return _ask(f"What is {left} {sign} {right}?", result, "sum")


def _statements(rng: random.Random, world: World) -> str:
    """Some facts: everything about one person, or a few about anything."""
    if rng.random() < 0.4:
        name = pick(rng, world.people).name
        facts = shuffled(rng, [fact for fact in world.facts if name in (fact.subject, fact.answer)])
    else:
        facts = [pick(rng, world.facts) for _ in range(2 + int(rng.random() * 4))]
    return " ".join(
        pick(rng, RELATIONS[fact.relation].statements).format(s=fact.subject, a=fact.answer) for fact in facts
    )


def _gossip(rng: random.Random, world: World) -> str:
    return " ".join(f"{pick(rng, world.people).name} {_act(rng)}." for _ in range(2 + int(rng.random() * 5)))


def _story(rng: random.Random, world: World) -> str:
    """An arrival, a meeting, a few events in some order, and an ending."""
    hero, friend = shuffled(rng, world.people)[:2]
    town = pick(rng, [town for town in TOWNS if town != hero.home])
    thing, place = f"{pick(rng, COLOURS)} {pick(rng, THINGS)}", pick(rng, PLACES)
    he = hero.pronoun
    when = f"{pick(rng, ADJECTIVES)} {pick(rng, TIMES)}"
    arrival = pick(
        rng,
        (
            f"One {when} {hero.name} the {hero.job} {pick(rng, TRAVELS)} to {town}.",
            f"{hero.name} of {hero.home} {pick(rng, TRAVELS)} to {town} with a {hero.pet}.",
        ),
    )
    meeting = pick(
        rng,
        (
            f"There {he} met {friend.name}, who plays the {friend.instrument}.",
            f"On the road {he} met {friend.name} the {friend.job}.",
        ),
    )
    hiding = f"{he.capitalize()} put the {thing} {place}."
    kinds = shuffled(rng, range(EVENTS))[: 1 + int(rng.random() * 4)]
    events = [_event(rng, world, hero, friend, kind) for kind in kinds]
    ending = pick(
        rng,
        (
            f"In the end the {thing} was still {place}.",
            f"Then {hero.name} went home to {hero.home}.",
            f"After that {friend.name} and {hero.name} were friends.",
            f"Nobody in {town} forgot that {pick(rng, TIMES)}.",
        ),
    )
    return " ".join([arrival, meeting, *shuffled(rng, [hiding, *events]), ending])


def _thing(rng: random.Random, depth: int = 0) -> str:
    """A noun phrase, "that small hat near a chair made of straw", at most two deep."""
    phrase = f"{pick(rng, ('a', 'the', 'that'))} {pick(rng, ADJECTIVES)} {pick(rng, NOUNS)}"
    link = rng.random()
    if link < 0.2:
        return f"{phrase} made of {pick(rng, MATERIALS)}"
    if link < 0.4 and depth == 0:
        return f"{phrase} {pick(rng, ('with', 'near', 'without'))} {_thing(rng, 1)}"
    return phrase


def _act(rng: random.Random) -> str:
    """A verb phrase in the past tense."""
    adverb = f" {pick(rng, ADVERBS)}" if rng.random() < 0.3 else ""
    return f"{pick(rng, VERBS)} {_thing(rng)}{adverb}"


def _event(rng: random.Random, world: World, hero: Person, friend: Person, kind: int) -> str:
    """One of ``EVENTS`` kinds of sentence."""
    if kind == 0:
        return f"{hero.name} felt {pick(rng, FEELINGS)} and {_act(rng)}."
    if kind == 1:
        saying = pick(rng, SAYINGS) if rng.random() < 0.3 else f"{pick(rng, ('Who', 'Nobody', 'Somebody'))} {_act(rng)}"
        return f'"{saying}," said {pick(rng, (hero, friend)).name}.'
    if kind == 2:
        paid, kept = 1 + int(rng.random() * 10), 1 + int(rng.random() * 10)
        coins, price, rest = (number_in_words(number) for number in (paid + kept, paid, kept))
        return f"With {coins} coins {hero.pronoun} bought {_thing(rng)}, paid {price} and had {rest} left."
    if kind == 3:
        lair = pick(rng, [fact for fact in world.facts if fact.relation == "lair"])
        return f"They saw the {lair.subject} {lair.answer}."
    if kind == 4:
        trade = pick(rng, [fact for fact in world.facts if fact.relation == "trade"])
        return f"A merchant from {trade.subject} sold them {trade.answer} and {_thing(rng)}."
    if kind == 5:
        return (
            f"The {pick(rng, ADJECTIVES)} {pick(rng, TIMES)} turned {pick(rng, COLOURS)} and {pick(rng, ADJECTIVES)}."
        )
    if kind == 6:
        return f"Then {hero.pronoun} {_act(rng)}."
    return f"{friend.name} {_act(rng)} and {_act(rng)}."
