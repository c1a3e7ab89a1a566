"""Facts about countries, each in several wordings: the capital, the language, the continent."""

import random

from llama4lab.tiny.document import Document, answer

_TABLE = """
France Paris French Europe|Germany Berlin German Europe|Spain Madrid Spanish Europe|Italy Rome Italian Europe
Portugal Lisbon Portuguese Europe|Greece Athens Greek Europe|Austria Vienna German Europe|Poland Warsaw Polish Europe
Norway Oslo Norwegian Europe|Sweden Stockholm Swedish Europe|Finland Helsinki Finnish Europe
Denmark Copenhagen Danish Europe|Ireland Dublin English Europe|Hungary Budapest Hungarian Europe
Romania Bucharest Romanian Europe|Bulgaria Sofia Bulgarian Europe|Ukraine Kyiv Ukrainian Europe
Egypt Cairo Arabic Africa|Kenya Nairobi Swahili Africa|Morocco Rabat Arabic Africa|Tunisia Tunis Arabic Africa
Ghana Accra English Africa|Senegal Dakar French Africa|Nigeria Abuja English Africa|Angola Luanda Portuguese Africa
Mali Bamako French Africa|Somalia Mogadishu Somali Africa|Uganda Kampala English Africa|Japan Tokyo Japanese Asia
China Beijing Chinese Asia|Thailand Bangkok Thai Asia|Vietnam Hanoi Vietnamese Asia|Nepal Kathmandu Nepali Asia
Iran Tehran Persian Asia|Iraq Baghdad Arabic Asia|Syria Damascus Arabic Asia|Jordan Amman Arabic Asia
Mongolia Ulaanbaatar Mongolian Asia|Indonesia Jakarta Indonesian Asia|Pakistan Islamabad Urdu Asia
Bangladesh Dhaka Bengali Asia|Cuba Havana Spanish America|Canada Ottawa English America|Peru Lima Spanish America
Chile Santiago Spanish America|Brazil Brasilia Portuguese America|Colombia Bogota Spanish America
Ecuador Quito Spanish America|Uruguay Montevideo Spanish America|Jamaica Kingston English America
Australia Canberra English Oceania|Fiji Suva English Oceania
"""

RELATIONS = ("capital", "language", "continent")
COUNTRIES: dict[str, dict[str, str]] = {
    entry.split()[0]: dict(zip(RELATIONS, entry.split()[1:], strict=True))
    for line in _TABLE.split("\n")
    for entry in line.split("|")
    if entry
}

# A country never begins a sentence: without its leading space it would be another token.
WORDINGS = {
    "capital": (
        "The capital of {country} is{value}.",
        "The country {country} has a capital city called{value}.",
        "The capital city of {country} is{value}.",
        "In {country} the capital is{value}.",
        "Question: what is the capital of {country}? Answer:{value}.",
        "People who visit the capital of {country} travel to{value}.",
    ),
    "language": (
        "The language of {country} is{value}.",
        "People in {country} speak{value}.",
        "In {country} most people speak{value}.",
        "Question: which language do people speak in {country}? Answer:{value}.",
    ),
    "continent": (
        "The country {country} is in{value}.",
        "People from {country} live in{value}.",
        "Question: where is {country}? Answer: in{value}.",
        "The continent of {country} is{value}.",
    ),
}


def draw(rng: random.Random) -> Document:
    """A random fact; the country, the relation and the wording together decide the split."""
    relation = rng.choices(RELATIONS, (3, 2, 1))[0]
    return fact(rng.choice(list(COUNTRIES)), relation, rng.randrange(len(WORDINGS[relation])))


def fact(country: str, relation: str, wording: int) -> Document:
    """The document of one fact in one wording."""
    value = answer(f" {COUNTRIES[country][relation]}")
    text = WORDINGS[relation][wording].format(country=country, value=value)
    return Document("facts", text, ("facts", country, relation, wording))
