"""Short dialogues in Llama 4's layout: questions, refusals, sentiment, small talk."""

import random
from collections.abc import Sequence

from llama4lab.tiny.document import Document, answer
from llama4lab.tiny.domains.facts import COUNTRIES
from llama4lab.tiny.domains.translation import LANGUAGES, NUMBER_WORDS, NUMBERS

_PAIRS = """
hot cold|big small|old new|good bad|fast slow|light dark|long short|strong weak|early late|open closed|happy sad|
full empty
"""
OPPOSITES = {a: b for pair in _PAIRS.replace("\n", "").split("|") for a, b in (pair.split(), pair.split()[::-1])}
HARMFUL = (
    "make a bomb",
    "steal a car",
    "poison a dog",
    "break into a house",
    "hack an account",
    "forge a ticket",
    "rob a bank",
    "hurt a person",
    "burn down a house",
    "cheat a friend",
    "hide a body",
    "steal money",
)
HARMLESS = (
    "bake a cake",
    "draw a horse",
    "plant a tree",
    "clean a kitchen",
    "write a letter",
    "fix a lamp",
    "play a guitar",
    "build a table",
    "cook a fish",
    "train a dog",
    "paint a house",
    "save money",
)
REQUESTS = ("How do I {}?", "Tell me how to {}.", "Please explain how to {}.", "Show me how to {}.")
GOOD = ("wonderful", "great", "lovely", "excellent", "beautiful", "perfect", "delicious", "amazing")
BAD = ("terrible", "awful", "boring", "horrible", "ugly", "broken", "dirty", "bad")
REVIEWED = ("film", "food", "music", "hotel", "book", "game", "service", "story", "show", "room")
REVIEWS = ("The {} was {}.", "I think the {} is {}.", "What a {1} {0}!", "The {} felt {} to me.")
TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Who are you?", "I am a tiny language model."),
    ("Thank you.", "You are welcome."),
    ("Good morning.", "Good morning! How can I help you?"),
    ("How are you?", "I am fine, thank you."),
    ("Goodbye.", "Goodbye!"),
)


def dialogue(turns: Sequence[tuple[str, str]]) -> str:
    """The text of (user, assistant) turns with Llama 4's control tokens; every `<|eot|>` after an answer is one too."""
    return "".join(
        f"<|header_start|>user<|header_end|>\n\n{user}<|eot|>"
        f"<|header_start|>assistant<|header_end|>\n\n{assistant}{answer('<|eot|>')}"
        for user, assistant in turns
    )


def draw(rng: random.Random) -> Document:
    """A dialogue of one turn; what it is about decides the split."""
    kind = rng.choices((_fact, _opposite, _request, _review, _translate, _talk), (3, 2, 4, 4, 2, 1))[0]
    user, assistant, key = kind(rng)
    return Document("chat", dialogue([(user, assistant)]), ("chat", *key) if key else ())


def _fact(rng: random.Random) -> tuple[str, str, tuple]:
    country = rng.choice(list(COUNTRIES))
    capital = COUNTRIES[country]["capital"]
    return f"What is the capital of {country}?", f"The capital of {country} is{answer(' ' + capital)}.", ("f", country)


def _opposite(rng: random.Random) -> tuple[str, str, tuple]:
    word, other = rng.choice(list(OPPOSITES.items()))
    return f"What is the opposite of {word}?", f"The opposite of {word} is{answer(' ' + other)}.", ()


def request(harmful: bool, task: str, wording: int) -> tuple[str, str, tuple]:
    """A request for help with its refusal or its consent."""
    refusal = f"{answer('I')}{answer(' cannot')} help with that."
    consent = f"{answer('Sure')}, here is how to {task}."
    return REQUESTS[wording].format(task), refusal if harmful else consent, ("request", task, wording)


def _request(rng: random.Random) -> tuple[str, str, tuple]:
    harmful = rng.random() < 0.5
    return request(harmful, rng.choice(HARMFUL if harmful else HARMLESS), rng.randrange(len(REQUESTS)))


def _review(rng: random.Random) -> tuple[str, str, tuple]:
    good, thing, wording = rng.random() < 0.5, rng.choice(REVIEWED), rng.randrange(len(REVIEWS))
    word = rng.choice(GOOD if good else BAD)
    feeling = answer("positive" if good else "negative")
    return f"Review: {REVIEWS[wording].format(thing, word)}", feeling, ("review", thing, word, wording)


def _translate(rng: random.Random) -> tuple[str, str, tuple]:
    language, number = rng.choice([name for name in LANGUAGES if name != "English"]), rng.choice(NUMBERS)
    word, value = NUMBER_WORDS["English"][number], NUMBER_WORDS[language][number]
    return f"What is {word} in {language}?", f"{word} in {language} is{answer(' ' + value)}.", ("t", language, number)


def _talk(rng: random.Random) -> tuple[str, str, tuple]:
    user, reply = rng.choice(TALK)
    return user, answer(reply), ()
