"""What the demo data can talk about: word pools, sentence frames and ten domains.

A frame holds the sentences for one sort of fact, with {e} for the entity and {v} for the value; its
other slots are filled by each attribute's own words. Two lists of questions per frame are kept
apart: one is asked in training only, the other in validation only.
"""

from dataclasses import dataclass


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words("""
    Mara Tobin Elsa Ravi Nora Hugo Ines Otto Lena Omar Greta Felix Clara Bruno Tessa Ivan Alma
    Jonas Edith Marco Petra Simon Wanda Leon Freya Oscar Hilda Anton Julia Karl Bella Amir Dora
    Peter Sonia Victor Luisa Henry Agnes Dylan
""")
LAST_NAMES = _words("""
    Quill Vale Marsh Holt Dunn Lark Pike Frost Webb Crane Nash Boyd Hale Moss Finch Tate Reed
    Stone Carr Penn Lowe Birch Cole Shaw Drake West Grant Hobbs Flynn Kerr Barr Snow Wolfe Page
    Doyle Hart Rowe Price Lamb York
""")
ADJECTIVES = _words("""
    Amber Silver Copper Golden Quiet Merry Crimson Brave Gentle Happy Hidden Royal Lucky Noble
    Proud Bright Swift Clever Frozen Wild Ancient Sunny Misty Velvet Jolly Humble Grand Ivory
    Scarlet Lonely
""")
NOUNS = _words("""
    Heron Falcon Lantern Thistle Otter Badger Comet Anchor Willow Fox Swan Acorn Raven Lion Harp
    Rose Crown Tiger Arrow Bell Pearl Eagle Maple Dragon Violin Star Rabbit Feather Castle
    Garden
""")
TOWN_FIRST = _words("""
    Alder Ash Barrow Bex Brook Clay Dale Dove East Elm Fern Glen Hazel High Kings Long Low Mill
    New North Oak Old Pine Queens Red Salt Sand South Stan Thorn Wald Wick
""")
TOWN_LAST = _words("Bay Bridge Cross Field Ford Green Hill Market Mills Wells")
TEAM_LAST = _words("Rovers United Rangers Athletic Wanderers Albion")
COURSE_FIRST = _words("""
    Modern Basic Practical Advanced Creative Digital Classic Applied Rural Urban
""")
COURSE_LAST = _words("""
    Weaving Botany Cooking Drawing History Music Pottery Dancing Writing Geology Law Poetry
    Farming Chess
""")
SHADES = _words("dark pale deep light soft dull warm faded")
COLOURS = _words("green blue red grey brown yellow pink orange purple white")
FINISHES = _words("polished carved solid rough smooth heavy local cheap")
MATERIALS = _words("oak brass steel glass marble pine iron granite clay leather")
WORKPLACES = _words("village harbour palace school hospital railway theatre market prison factory")
TRADES = _words("baker gardener painter nurse cook clerk porter tailor barber carpenter")
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
DAY_PARTS = _words("dawn morning noon afternoon evening night")
MONTHS = _words("""
    January February March April May June July August September October November December
""")


def _pairs(firsts: list[str], lasts: list[str]) -> list[str]:
    return [f"{first} {last}" for first in firsts for last in lasts]


# Every value that can be the answer to a question, by its type: names and other phrases of several
# words, and figures. A type's own form (two words, three or four digits, a colon, ...) keeps its
# values from being values of another type too.
PHRASES: dict[str, list[str]] = {
    "person": _pairs(FIRST_NAMES, LAST_NAMES),
    "title": _pairs(ADJECTIVES, NOUNS),
    "town": _pairs(TOWN_FIRST, TOWN_LAST),
    "team": _pairs(TOWN_FIRST, TEAM_LAST),
    "course": _pairs(COURSE_FIRST, COURSE_LAST),
    "colour": _pairs(SHADES, COLOURS),
    "material": _pairs(FINISHES, MATERIALS),
    "job": _pairs(WORKPLACES, TRADES),
    "weekday": _pairs(WEEKDAYS, DAY_PARTS),
    "date": [f"{day} {month}" for month in MONTHS for day in range(1, 29)],
}
FIGURES: dict[str, list[str]] = {
    "year": [str(year) for year in range(1800, 2000)],
    "time": [f"{hour}:{minute:02}" for hour in range(6, 23) for minute in range(0, 60, 15)],
    "number": [str(number) for number in range(100, 300)],
    "price": [f"${dollars}" for dollars in range(12, 100)],
    "metres": [f"{number} metres" for number in range(10, 100)],
    "inches": [f"{number} inches" for number in range(10, 100)],
    "kilos": [f"{number} kg" for number in range(10, 100)],
}

OPENERS = [
    "Here are some notes about {kinds}.",
    "This page is about {kinds}.",
    "A local newspaper wrote about some {kinds}.",
    "The clerk made a short list of {kinds}.",
    "A visitor asked about several {kinds}.",
    "These lines come from an old guide to {kinds}.",
    "We were told a few things about {kinds}.",
    "There is much to say about {kinds}.",
    "Not all {kinds} are the same.",
    "The report begins with some {kinds}.",
]
FILLERS = [
    "Nobody was surprised by this.",
    "The weather was fine that week.",
    "Most visitors like it that way.",
    "The rest is not known.",
    "More news will follow soon.",
    "Some details are still missing.",
    "A few readers sent letters about it.",
    "That has not changed for a while.",
]


@dataclass(frozen=True)
class Frame:
    """The sentences of one sort of fact, entity before value, and the questions for the value."""

    statements: list[str]
    questions: dict[str, list[str]]

    def filled(self, **words: str) -> "Frame":
        """The same frame with these slots filled in every sentence."""

        def fill(templates: list[str]) -> list[str]:
            for slot, word in words.items():
                templates = [template.replace(f"{{{slot}}}", word) for template in templates]
            return templates

        return Frame(
            fill(self.statements),
            {split: fill(templates) for split, templates in self.questions.items()},
        )

    def plainest(self, statements: int, questions: int) -> "Frame":
        """The frame with so many phrasings of each list at most: those first that name the value
        soon after the entity, and that end soon after the entity."""
        return Frame(
            sorted(self.statements, key=_words_between)[:statements],
            {
                split: sorted(templates, key=lambda text: _words_from(text, "{e}"))[:questions]
                for split, templates in self.questions.items()
            },
        )


def _words_from(template: str, slot: str) -> int:
    return len(template[template.index(slot) :].split())


def _words_between(template: str) -> int:
    return _words_from(template, "{e}") - _words_from(template, "{v}")


PERSON = Frame(
    statements=[
        "{e} is {done} by {v}.",
        "The {noun} of {e} is {v}.",
        "These days, {e} is {done} by {v}.",
        "As for {e}, its {noun} is {v}.",
    ],
    questions={
        "train": [
            "Who is the {noun} of {e}?",
            "Who {does} {e}?",
            "What is the name of the {noun} of {e}?",
            "By whom is {e} {done}?",
            "{e} is {done} by whom?",
            "Which person is the {noun} of {e}?",
            "Tell me who {does} {e}.",
            "{e} has which person as its {noun}?",
            "By which person is {e} {done}?",
            "The {noun} of {e} is who?",
            "Tell me who the {noun} of {e} is.",
            "Which person is {e} {done} by?",
            "The name of the {noun} of {e} is what?",
        ],
        "validation": [
            "Who is {e} {done} by?",
            "Which person {does} {e}?",
            "Tell me the name of the {noun} of {e}.",
            "The {noun} of {e} is which person?",
        ],
    },
)
PLACE = Frame(
    statements=[
        "{e} {does} {v}.",
        "The {noun} of {e} is {v}.",
        "As everyone knows, {e} {does} {v}.",
        "The {noun} given for {e} is {v}.",
    ],
    questions={
        "train": [
            "Which town does {e} {do}?",
            "What is the {noun} of {e}?",
            "{e} {does} which town?",
            "Which town is the {noun} of {e}?",
            "What is the name of the town that {e} {does}?",
            "Tell me which town {e} {does}.",
            "What is the town that {e} {does}?",
            "Do you know which town {e} {does}?",
            "The {noun} of {e} is what town?",
            "{e} {does} what town?",
            "The town that {e} {does} is which?",
            "What town is the {noun} of {e}?",
        ],
        "validation": [
            "What town does {e} {do}?",
            "Tell me the {noun} of {e}.",
            "The {noun} of {e} is which town?",
            "Which town is it that {e} {does}?",
        ],
    },
)
COUNT = Frame(
    statements=[
        "{e} has {v} {things}.",
        "The number of {things} {prep} {e} is {v}.",
        "In all, {e} has {v} {things}.",
        "The {things} {prep} {e} number {v}.",
    ],
    questions={
        "train": [
            "How many {things} does {e} have?",
            "How many {things} are there {prep} {e}?",
            "What is the number of {things} {prep} {e}?",
            "{e} has how many {things}?",
            "Tell me how many {things} {e} has.",
            "Tell me how many {things} are {prep} {e}.",
            "What is the number of {things} that {e} has?",
            "{e} has what number of {things}?",
            "How many are the {things} {prep} {e}?",
            "Tell me what number of {things} {e} has.",
            "Do you know how many {things} {e} has?",
            "What is the number of the {things} {prep} {e}?",
        ],
        "validation": [
            "How many {things} are {prep} {e}?",
            "Tell me the number of {things} {prep} {e}.",
            "What number of {things} does {e} have?",
        ],
    },
)
MEASURE = Frame(
    statements=[
        "{e} has a {noun} of {v}.",
        "The {noun} of {e} is {v}.",
        "As for {e}, its {noun} is {v}.",
        "They say {e} has a {noun} of {v}.",
    ],
    questions={
        "train": [
            "What is the {noun} of {e}?",
            "How {how} is {e}?",
            "What is the {noun} that {e} has?",
            "{e} has what {noun}?",
            "Tell me how {how} {e} is.",
            "Tell me what {noun} {e} has.",
            "{e} has which {noun}?",
            "Tell me which {noun} {e} has.",
            "Which is the {noun} of {e}?",
            "Tell me what the {noun} of {e} is.",
            "Do you know what {noun} {e} has?",
            "What is it that {e} has as its {noun}?",
        ],
        "validation": [
            "Tell me the {noun} of {e}.",
            "Which {noun} does {e} have?",
            "The {noun} of {e} is what?",
            "{e} is how {how}?",
        ],
    },
)
PRICE = Frame(
    statements=[
        "{thing} costs {v}.",
        "The price of {thing} is {v}.",
        "For {thing}, you pay {v}.",
        "These days, {thing} costs {v}.",
    ],
    questions={
        "train": [
            "How much does {thing} cost?",
            "What is the price of {thing}?",
            "How much is {thing}?",
            "How much do you pay for {thing}?",
            "{thing} costs how much?",
            "Tell me how much {thing} costs.",
            "What is it that {thing} costs?",
            "{thing} costs what?",
            "Tell me what {thing} costs.",
            "Do you know how much {thing} costs?",
            "For {thing}, you pay how much?",
            "Tell me how much you pay for {thing}.",
        ],
        "validation": [
            "What does {thing} cost?",
            "Tell me the price of {thing}.",
            "The price of {thing} is how much?",
            "What do you pay for {thing}?",
        ],
    },
)
YEAR = Frame(
    statements=[
        "{e} was {done} in {v}.",
        "The year when {e} was {done} is {v}.",
        "As everyone knows, {e} was {done} in {v}.",
        "They say {e} was {done} in {v}.",
    ],
    questions={
        "train": [
            "When was {e} {done}?",
            "In which year was {e} {done}?",
            "In what year was {e} {done}?",
            "What is the year when {e} was {done}?",
            "{e} was {done} in which year?",
            "Tell me when {e} was {done}.",
            "What year was {e} {done} in?",
            "{e} was {done} when?",
            "The year when {e} was {done} is which?",
            "Tell me in which year {e} was {done}.",
            "Tell me what year {e} was {done} in.",
            "Which is the year when {e} was {done}?",
        ],
        "validation": [
            "Which year was {e} {done} in?",
            "Tell me the year when {e} was {done}.",
            "When was it that {e} was {done}?",
            "{e} was {done} in what year?",
        ],
    },
)
WHEN = Frame(
    statements=[
        "{e} {does} {prep} {v}.",
        "The {unit} when {e} {does} is {v}.",
        "These days, {e} {does} {prep} {v}.",
        "They say {e} {does} {prep} {v}.",
    ],
    questions={
        "train": [
            "When does {e} {do}?",
            "{prep} which {unit} does {e} {do}?",
            "{prep} what {unit} does {e} {do}?",
            "What is the {unit} when {e} {does}?",
            "{e} {does} {prep} which {unit}?",
            "Tell me when {e} {does}.",
            "Which {unit} does {e} {do}?",
            "{e} {does} when?",
            "The {unit} when {e} {does} is which?",
            "Tell me {prep} which {unit} {e} {does}.",
            "Which is the {unit} when {e} {does}?",
            "Tell me what {unit} {e} {does}.",
        ],
        "validation": [
            "What {unit} does {e} {do}?",
            "Tell me the {unit} when {e} {does}.",
            "When is it that {e} {does}?",
            "{e} {does} {prep} what {unit}?",
        ],
    },
)
LOOK = Frame(
    statements=[
        "{e} is {done} {v}.",
        "The {noun} of {e} is {v}.",
        "As for {e}, its {noun} is {v}.",
        "They say {e} is {done} {v}.",
    ],
    questions={
        "train": [
            "What is the {noun} of {e}?",
            "What {noun} is {e} {done}?",
            "Which is the {noun} that {e} has?",
            "{e} has which {noun}?",
            "{e} is {done} what {noun}?",
            "Tell me what {noun} {e} has.",
            "{e} has what {noun}?",
            "Which is the {noun} of {e}?",
            "The {noun} of {e} is which?",
            "Tell me which {noun} {e} has.",
            "Tell me what the {noun} of {e} is.",
            "{e} is {done} which {noun}?",
        ],
        "validation": [
            "Tell me the {noun} of {e}.",
            "What {noun} does {e} have?",
            "The {noun} of {e} is what?",
            "Which {noun} is {e} {done}?",
        ],
    },
)
JOB = Frame(
    statements=[
        "{e} works as a {v}.",
        "{e} is a {v}.",
        "{e} has a job as a {v}.",
        "These days, {e} works as a {v}.",
    ],
    questions={
        "train": [
            "What is the job of {e}?",
            "What does {e} work as?",
            "What is the job that {e} has?",
            "{e} works as what?",
            "{e} has what job?",
            "Tell me what {e} works as.",
            "Which is the job of {e}?",
            "What is it that {e} works as?",
            "The job of {e} is which?",
            "Tell me what job {e} has.",
            "{e} has which job?",
            "Tell me what the job of {e} is.",
        ],
        "validation": [
            "Tell me the job of {e}.",
            "Which job does {e} have?",
            "The job of {e} is what?",
        ],
    },
)


@dataclass(frozen=True)
class Attribute:
    """One thing that can be said of an entity: the type of its value and its sentences."""

    type: str
    frame: Frame


@dataclass(frozen=True)
class Domain:
    """One kind of entity: where its names come from, how they are written, what is said of it.

    `name` turns one of the PHRASES of `name_type` into the full name, `mention` turns the full name
    into a noun phrase.
    """

    kind: str
    kinds: str
    name_type: str
    name: str
    mention: str
    attributes: list[Attribute]


def _person(noun: str, does: str, done: str) -> Attribute:
    return Attribute("person", PERSON.filled(noun=noun, does=does, done=done))


def _town(noun: str, does: str, do: str) -> Attribute:
    return Attribute("town", PLACE.filled(noun=noun, does=does, do=do))


def _number(things: str, prep: str) -> Attribute:
    return Attribute("number", COUNT.filled(things=things, prep=prep))


def _measure(unit: str, noun: str, how: str) -> Attribute:
    return Attribute(unit, MEASURE.filled(noun=noun, how=how))


def _price(thing: str) -> Attribute:
    return Attribute("price", PRICE.filled(thing=thing))


def _year(done: str) -> Attribute:
    return Attribute("year", YEAR.filled(done=done))


def _when(type_: str, does: str, do: str) -> Attribute:
    prep, unit = {"time": ("at", "time"), "date": ("on", "date"), "weekday": ("on", "day")}[type_]
    return Attribute(type_, WHEN.filled(does=does, do=do, prep=prep, unit=unit))


def _look(noun: str, done: str) -> Attribute:
    return Attribute(noun, LOOK.filled(noun=noun, done=done))


DOMAINS = [
    Domain(
        "hotel", "hotels", "title", "{} Hotel", "the {}",
        [
            _person("manager", "runs", "run"),
            _person("owner", "owns", "owned"),
            _town("location", "stands in", "stand in"),
            _number("rooms", "in"),
            _price("a night at {e}"),
            _price("a meal at {e}"),
            _year("opened"),
        ],
    ),
    Domain(
        "person", "people", "person", "{}", "{}",
        [
            Attribute("job", JOB),
            _town("home", "lives in", "live in"),
            _town("birthplace", "comes from", "come from"),
            _year("born"),
            _year("married"),
            _number("books", "owned by"),
            _when("weekday", "rests", "rest"),
        ],
    ),
    Domain(
        "town", "towns", "town", "{}", "{}",
        [
            _person("mayor", "leads", "led"),
            _person("sheriff", "guards", "guarded"),
            _number("houses", "in"),
            _number("shops", "in"),
            _year("founded"),
            _when("weekday", "holds its market", "hold its market"),
        ],
    ),
    Domain(
        "festival", "festivals", "title", "{} Festival", "the {}",
        [
            _person("director", "directs", "directed"),
            _person("host", "hosts", "hosted"),
            _town("location", "takes place in", "take place in"),
            _when("date", "opens", "open"),
            _when("date", "closes", "close"),
            _price("a ticket for {e}"),
            _number("singers", "at"),
        ],
    ),
    Domain(
        "train", "trains", "title", "{} Express", "the {}",
        [
            _town("starting point", "leaves from", "leave from"),
            _town("destination", "goes to", "go to"),
            _when("time", "departs", "depart"),
            _when("time", "arrives", "arrive"),
            _person("driver", "drives", "driven"),
            _number("seats", "on"),
            _look("colour", "painted"),
        ],
    ),
    Domain(
        "lamp", "lamps", "title", "{} lamp", "the {}",
        [
            _person("designer", "designs", "designed"),
            _person("seller", "sells", "sold"),
            _price("{e}"),
            _measure("inches", "height", "tall"),
            _measure("inches", "width", "wide"),
            _measure("kilos", "weight", "heavy"),
            _look("colour", "painted"),
            _look("material", "made of"),
        ],
    ),
    Domain(
        "team", "teams", "team", "{}", "{}",
        [
            _person("coach", "trains", "trained"),
            _person("captain", "leads", "led"),
            _number("players", "in"),
            _number("trophies", "owned by"),
            _year("founded"),
            _look("colour", "dressed in"),
            _when("weekday", "plays", "play"),
        ],
    ),
    Domain(
        "museum", "museums", "title", "{} Museum", "the {}",
        [
            _when("time", "opens", "open"),
            _when("time", "closes", "close"),
            _person("director", "directs", "directed"),
            _price("a visit to {e}"),
            _town("location", "stands in", "stand in"),
            _number("paintings", "in"),
            _number("statues", "in"),
        ],
    ),
    Domain(
        "ship", "ships", "title", "{}", "the {}",
        [
            _person("captain", "commands", "commanded"),
            _person("owner", "owns", "owned"),
            _town("home port", "sails from", "sail from"),
            _year("built"),
            _year("repaired"),
            _measure("metres", "length", "long"),
            _measure("metres", "width", "wide"),
            _number("sailors", "on"),
            _when("date", "returns", "return"),
        ],
    ),
    Domain(
        "course", "courses", "course", "{}", "{}",
        [
            _person("teacher", "teaches", "taught"),
            _person("examiner", "examines", "examined"),
            _when("time", "begins", "begin"),
            _when("time", "ends", "end"),
            _when("weekday", "meets", "meet"),
            _price("a place in {e}"),
            _number("students", "in"),
        ],
    ),
]  # fmt: skip
