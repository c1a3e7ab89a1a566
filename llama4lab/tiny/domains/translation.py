"""Number words in four languages: translated, counted and in digits."""

import random

from llama4lab.tiny.document import Document, answer

LANGUAGES = {
    "English": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen",
    "French": "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize",
    "German": "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn",
    "Spanish": "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis",
}
NUMBER_WORDS = {language: tuple(words.split()) for language, words in LANGUAGES.items()}
NUMBERS = range(17)
# What each language says for "is", "and" and "makes", so that a sentence stays in its language.
_SENTENCES = {
    "English": "{a} and {b} make{c}.",
    "French": "{a} et {b} font{c}.",
    "German": "{a} und {b} ergeben{c}.",
    "Spanish": "{a} y {b} son{c}.",
}


def draw(rng: random.Random) -> Document:
    """A translation (half of the time), a count, a sum in words, or a number in digits."""
    target = rng.choice(list(LANGUAGES))
    kind = rng.choices(("translate", "count", "add", "digit"), (5, 2, 2, 2))[0]
    if kind == "translate":
        source = rng.choice([language for language in LANGUAGES if language != target])
        return translation(source, target, rng.choice(NUMBERS), rng.randrange(3))
    if kind == "count":
        return count(target, rng.randint(0, 10), rng.randint(4, 8))
    if kind == "add":
        return addition(target, rng.randint(0, 8), rng.randint(0, 8))
    number = rng.choice(NUMBERS)
    text = f"{number} in {target} is{answer(' ' + NUMBER_WORDS[target][number])}."
    return Document(target.lower(), text, ())


def translation(source: str, target: str, number: int, wording: int = 0) -> Document:
    """A number word of one language in another; source, target and number decide the split."""
    word, value = NUMBER_WORDS[source][number], answer(f" {NUMBER_WORDS[target][number]}")
    text = (
        f"{source} {word} in {target} is{value}.",
        f"{source}: {word} {target}:{value}",
        f"Translate {word} from {source} to {target}:{value}.",
    )[wording]
    return Document(target.lower(), text, ("translation", source, target, number))


def count(language: str, start: int, length: int) -> Document:
    """A run of number words; all but the first are answers."""
    words = NUMBER_WORDS[language][start : start + length]
    text = f"{language}: {words[0]}" + "".join(answer(f" {word}") for word in words[1:]) + "."
    return Document(language.lower(), text, ("count", language, start, length))


def addition(language: str, a: int, b: int) -> Document:
    """A sum in number words of one language."""
    words = NUMBER_WORDS[language]
    text = _SENTENCES[language].format(a=words[a], b=words[b], c=answer(f" {words[a + b]}"))
    return Document(language.lower(), f"{language}: {text}", ("addition", language, a, b))
