"""A corpus with a known answer: short factual passages about invented people, towns, companies and things.

Six kinds of entities with four relations each. An entity has two passages, each stating two of its relations in one of
several wordings, so the other passage of the same entity is a near miss. Names are built from syllables and few
enough parts that many share one (family names, ``Upper`` and ``Lower``), and people and towns recur as objects of other
passages: a search that finds the name still has to find the fact. Questions ask in words of their own. Every choice is
a hash of seed and place, so the same settings give the same text on every machine; nothing is taken from real data.

:class:`TemplateReader` reads these passages without training, by the wordings themselves.
"""
from __future__ import annotations

import functools
import hashlib
import re
from typing import NamedTuple, Sequence

from ..data.layout import DataError
from .corpus import FORMAT, Corpus, CorpusWriter, Passage, folder_of
from .sources import by_article

VERSION = 1                              # of the text: raise it when the same settings would give other passages
#: name -> entities of each kind, questions for testing, questions for training readers
PRESETS = {"synthetic_facts": (450, 2_000, 1_000), "synthetic_facts_xs": (40, 160, 80)}


class Relation(NamedTuple):
    """What is stated: the kind of its object, wordings of passages ({s} the subject, {o} the object), of questions."""

    kind: str
    told: tuple[str, ...]
    asked: tuple[str, ...]


#: kind -> how an entity is called after its first mention, and its relations, the first two in its first passage
KINDS: dict[str, tuple[str, dict[str, Relation]]] = {
    "person": ("This scholar", dict(
        birthplace=Relation("town", ("{s} was born in {o}", "{s} grew up as the child of a miller in {o}",
                                     "{s} came from {o}"),
                            ("Where was {s} born?", "In which town did {s} come into the world?",
                             "What is the home town of {s}?")),
        trade=Relation("trade", ("{s} worked as {o} for many years", "{s} made a living as {o}", "{s} trained as {o}"),
                       ("What did {s} do for a living?", "Which profession did {s} have?", "What was the job of {s}?")),
        death=Relation("year", ("{s} died in {o}", "{s} passed away in {o} after a long illness",
                                "{s} lived until {o}"),
                       ("When did {s} die?", "In what year did the life of {s} end?",
                        "What is the year of death of {s}?")),
        teacher=Relation("person", ("{s} studied under {o}", "{s} was a pupil of {o}",
                                    "{s} learned the craft from {o}"),
                         ("Who taught {s}?", "Who was the mentor of {s}?", "Whose student was {s}?")),
    )),
    "town": ("The town", dict(
        river=Relation("river", ("{s} lies on the river {o}", "{s} stands on the banks of the {o}",
                                 "{s} was built where a ford crosses the {o}"),
                       ("Which river flows through {s}?", "On what river is {s} situated?",
                        "What is the name of the stream at {s}?")),
        founded=Relation("year", ("{s} was founded in {o}", "{s} received its charter in {o}",
                                  "{s} was first settled in {o}"),
                         ("When was {s} founded?", "In which year did {s} come into being?",
                          "What year was {s} established?")),
        mayor=Relation("person", ("{s} is governed by mayor {o}", "{s} elected {o} as its mayor",
                                  "{s} has {o} at the head of its council"),
                       ("Who is the mayor of {s}?", "Who leads {s}?", "Which politician runs {s}?")),
        people=Relation("count", ("{s} has {o} inhabitants", "{s} is home to {o} residents",
                                  "{s} counted {o} citizens at the last census"),
                        ("How many people live in {s}?", "What is the population of {s}?", "How large is {s}?")),
    )),
    "company": ("The firm", dict(
        founder=Relation("person", ("{s} was started by {o}", "{s} was set up by the merchant {o}",
                                    "{s} goes back to a workshop of {o}"),
                         ("Who founded {s}?", "Who established the business {s}?", "By whom was {s} created?")),
        seat=Relation("town", ("{s} has its headquarters in {o}", "{s} is based in {o}",
                               "{s} moved its main office to {o}"),
                      ("Where is {s} headquartered?", "In which town is the head office of {s}?",
                       "Where does {s} have its seat?")),
        product=Relation("product", ("{s} makes {o}", "{s} is known for its {o}", "{s} sells {o} all over the coast"),
                         ("What does {s} produce?", "Which goods come from {s}?", "What can one buy from {s}?")),
        staff=Relation("count", ("{s} employs {o} people", "{s} has a staff of {o} workers",
                                 "{s} pays the wages of {o} hands"),
                       ("How many employees does {s} have?", "How many work at {s}?",
                        "What is the size of the workforce of {s}?")),
    )),
    "book": ("The volume", dict(
        author=Relation("person", ("{s} was written by {o}", "{s} is a novel by {o}", "{s} came from the pen of {o}"),
                        ("Who wrote {s}?", "Who is the author of {s}?", "Which writer composed {s}?")),
        printed=Relation("year", ("{s} was published in {o}", "{s} first appeared in print in {o}",
                                  "{s} reached the bookshops in {o}"),
                         ("When was {s} published?", "In which year did {s} come out?",
                          "What is the publication year of {s}?")),
        scene=Relation("town", ("{s} is set in {o}", "{s} tells of a winter in {o}", "{s} takes its readers to {o}"),
                       ("Where does {s} take place?", "What is the setting of {s}?",
                        "In which town does the story {s} happen?")),
        theme=Relation("theme", ("{s} deals with {o}", "{s} is a book about {o}", "{s} is concerned with {o}"),
                       ("What is {s} about?", "What is the subject of {s}?", "Which topic does {s} treat?")),
    )),
    "building": ("The structure", dict(
        architect=Relation("person", ("{s} was designed by {o}", "{s} follows the plans of {o}",
                                      "{s} is the work of the builder {o}"),
                           ("Who was the architect of {s}?", "Who drew up {s}?", "Whose design is {s}?")),
        height=Relation("metres", ("{s} is {o} metres tall", "{s} rises {o} metres above the ground",
                                   "{s} reaches a height of {o} metres"),
                        ("How high is {s}?", "What is the height of {s} in metres?", "How many metres tall is {s}?")),
        done=Relation("year", ("{s} was completed in {o}", "{s} was opened to the public in {o}",
                               "{s} was finished in {o}"),
                      ("When was {s} completed?", "In which year was {s} ready?",
                       "What year saw the inauguration of {s}?")),
        stone=Relation("stone", ("{s} is built of {o}", "{s} is clad in {o}", "{s} owes its look to {o}"),
                       ("What is {s} made of?", "Which material was used for {s}?", "Of what does {s} consist?")),
    )),
    "plant": ("The plant", dict(
        finder=Relation("person", ("{s} was first described by {o}", "{s} was discovered by {o}",
                                   "{s} was brought home by the traveller {o}"),
                        ("Who discovered {s}?", "Who found {s}?", "Which botanist first reported {s}?")),
        habitat=Relation("habitat", ("{s} grows in {o}", "{s} thrives in {o}", "{s} is found only in {o}"),
                         ("Where does {s} grow?", "What is the habitat of {s}?",
                          "In which surroundings can {s} be seen?")),
        colour=Relation("colour", ("{s} has {o} flowers", "{s} bears {o} blossoms in spring",
                                   "{s} is loved for its {o} petals"),
                        ("What colour are the flowers of {s}?", "In which colour does {s} bloom?",
                         "How are the petals of {s} coloured?")),
        use=Relation("use", ("{s} is used against {o}", "{s} is a remedy for {o}", "{s} is brewed into a cure for {o}"),
                     ("What does {s} cure?", "Against which complaint is {s} taken?",
                      "What do healers treat with {s}?")),
    )),
}
LISTS = dict(
    trade=("a clockmaker", "a cartographer", "a glassblower", "an apothecary", "a lens grinder", "a shipwright",
           "an organ builder", "a bookbinder", "a surveyor", "an engraver", "a weaver", "a bell founder",
           "an astronomer", "a saddler", "a notary", "a beekeeper", "a dyer", "a stonemason", "a locksmith",
           "a violin maker"),
    product=("brass lanterns", "woollen blankets", "fishing nets", "copper kettles", "writing paper", "church bells",
             "leather boots", "pocket watches", "porcelain bowls", "cheese wheels", "sailing ropes", "garden tools",
             "wax candles", "hunting knives", "iron stoves", "straw hats", "piano strings", "oak barrels"),
    theme=("a lost inheritance", "the life of smugglers", "a long drought", "two rival orchestras", "the first railway",
           "a forged map", "the loneliness of lighthouse keepers", "a failed expedition", "a feud between bakers",
           "the education of a queen", "a plague of locusts", "a stolen painting", "the art of sailing",
           "a trial for treason"),
    stone=("grey granite", "red brick", "white marble", "yellow sandstone", "black basalt", "green slate", "oak beams",
           "pale limestone", "glazed tiles", "river pebbles", "wrought iron", "volcanic tuff"),
    habitat=("salt marshes", "high alpine meadows", "beech forests", "coastal dunes", "peat bogs", "dry gorges",
             "abandoned quarries", "river islands", "chalk cliffs", "pine heaths", "limestone caves", "rice paddies"),
    colour=("crimson", "pale blue", "orange", "violet", "white", "deep yellow", "pink", "copper", "dark purple",
            "turquoise", "cream", "scarlet"),
    use=("headaches", "fever", "toothache", "coughs", "sleeplessness", "burns", "snake bites", "seasickness", "gout",
         "insect stings", "sore throats", "stomach cramps"),
)
_ONSETS = "b br d dr f g gl h j k kr l m n p pl r s sk st t tr v w y z".split()
_VOWELS = "a e i o u ae ou ei".split()
_CODAS = ["", "", "l", "n", "r", "s", "th", "m", "nd", "rk", "lt", "sk"]


class _Dice:
    """Choices that are hashes of a seed and a place."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, sides: int, *place) -> int:
        text = "/".join(map(str, (VERSION, self.seed, *place)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % sides

    def of(self, items: Sequence, *place):
        return items[self(len(items), *place)]

    def order(self, count: int, *place) -> list[int]:
        return sorted(range(count), key=lambda i: (self(1 << 62, "order", *place, i), i))


def _words(dice: _Dice, kind: str, count: int, syllables: int) -> list[str]:
    """So many different invented words."""
    found: dict[str, None] = {}
    turn = 0
    while len(found) < count:
        word = "".join(dice.of(part, kind, turn, i, j) for i in range(syllables)
                       for j, part in enumerate((_ONSETS, _VOWELS, _CODAS if i == syllables - 1 else _CODAS[:4])))
        found.setdefault(word.capitalize())
        turn += 1
    return list(found)


def _names(dice: _Dice, kind: str, count: int) -> list[str]:
    """Names of a kind: pairs of parts, each part in several names."""
    few = max(8, int(2 * count ** 0.5))
    if kind == "person":
        first, second, join = _words(dice, "first", few, 2), _words(dice, "family", few, 2), "{} {}"
    elif kind == "town":
        first, join = ("Upper", "Lower", "New", "Old", "Port", "Saint"), "{} {}"
        second = _words(dice, "place", count // 3 + 4, 2)
    elif kind == "river":
        return _words(dice, "river", count, 2)
    else:
        first, second, join = _words(dice, kind, count // 5 + 4, 2), dict(
            company=("Works", "Brothers", "Trading House", "Manufactory", "Company", "Foundry", "Mills", "and Sons"),
            book=("Letters", "Garden", "Chronicle", "Winter", "Daughters", "Silence", "Harvest", "Mirror"),
            building=("Tower", "Bridge", "Hall", "Lighthouse", "Abbey", "Palace", "Library", "Gate"),
            plant=("lily", "thistle", "fern", "orchid", "sage", "bellflower", "moss", "clover"))[kind], "{} {}"
        if kind == "book":
            join = "The {1} of {0}"
    pairs = [join.format(a, b) for a in first for b in second]
    if len(pairs) < count:
        raise DataError(f"entities {count}: expected at most {len(pairs)} of the kind {kind}")
    return [pairs[i] for i in dice.order(len(pairs), "names", kind)[:count]]


def generate(out="synthetic_facts", *, entities: int | None = None, questions: int | None = None,
             train: int | None = None, seed: int = 0, overwrite: bool = False) -> Corpus:
    """Write the generated corpus into a folder, or ``data/rag/<name>``.

    Parameters
    ----------
    out:
        A name of ``PRESETS`` sets the other defaults.
    entities:
        Of each of the six kinds; twelve passages each.
    questions, train:
        Questions for testing and for training readers, about different entities (set ``facts``).
    seed:
        Of names, facts and wordings.

    Raises
    ------
    DataError
        If the folder exists, or a number is out of range.
    """
    folder = folder_of(out)
    preset = PRESETS.get(folder.name, PRESETS["synthetic_facts"])
    entities, questions, train = (p if v is None else v for v, p in zip((entities, questions, train), preset))
    for name, value, least in (("entities", entities, 4), ("questions", questions, 1), ("train", train, 0)):
        if value < least:
            raise DataError(f"{name} {value}: expected at least {least}")
    dice = _Dice(seed)
    names = {kind: _names(dice, kind, entities) for kind in KINDS}
    names["river"] = _names(dice, "river", max(8, entities // 3))
    facts = [(kind, name, relation) for kind in KINDS for name in names[kind] for relation in KINDS[kind][1]]
    test = by_article([name for _, name, _ in facts], questions / max(1, questions + train), seed)
    if (most := len(facts)) < questions + train:
        raise DataError(f"questions {questions} and train {train}: expected at most {most} together, one per fact")
    source = dict(kind="generated", version=VERSION, entities=entities, questions=questions, train=train, seed=seed)
    name = folder.name if folder.name.startswith("synthetic_") else f"synthetic_{folder.name}"
    with CorpusWriter(folder, name=name, source=source, overwrite=overwrite) as writer:
        stated: dict[tuple[str, str], tuple[str, int]] = {}
        passages = [(kind, name, part) for kind in KINDS for name in names[kind] for part in (0, 1)]
        for i in dice.order(len(passages), "passages"):
            kind, name, part = passages[i]
            later, relations = KINDS[kind]
            chosen = list(relations)[2 * part:2 * part + 2]
            chosen = [chosen[j] for j in dice.order(2, name, part)]
            objects = [_object(dice, names, name, relation, relations[relation].kind) for relation in chosen]
            text = " ".join(
                dice.of(relations[r].told, "told", name, r).format(s=later if j else name, o=o) + "."
                for j, (r, o) in enumerate(zip(chosen, objects)))
            place = writer.add(name, text)
            stated |= {(name, r): (o, place) for r, o in zip(chosen, objects)}
        left = {"test": questions, "train": train}
        for i in dice.order(len(facts), "questions"):
            kind, name, relation = facts[i]
            split = "test" if name in test else "train"
            if left[split]:
                left[split] -= 1
                answer, place = stated[name, relation]
                wording = dice.of(KINDS[kind][1][relation].asked, "asked", name, relation)
                writer.ask(wording.format(s=name), [answer], group="facts", split=split, gold=[place], article=name)
    return Corpus.open(folder)


def _object(dice: _Dice, names: dict, name: str, relation: str, kind: str) -> str:
    place = "object", name, relation
    if kind in names:
        choice = dice.of(names[kind], *place)
        return choice if choice != name else names[kind][0] if names[kind][0] != name else names[kind][1]
    if kind in LISTS:
        return dice.of(LISTS[kind], *place)
    return {"year": str(1400 + dice(560, *place)), "metres": str(12 + dice(180, *place)),
            "count": f"{(11 + dice(480, *place)) * 50:,}"}[kind]


def open_generated(name: str = "synthetic_facts") -> Corpus:
    """A corpus of ``PRESETS``, generated on first use. Raises DataError for another name."""
    if name not in PRESETS:
        raise DataError(f"no generated corpus {name!r}: expected one of {', '.join(PRESETS)}")
    folder = folder_of(name)
    if (folder / "meta.json").is_file():
        found = Corpus.open(folder)
        if found.meta["source"].get("version") == VERSION and found.meta["format"] == FORMAT:
            return found
        return generate(name, overwrite=True)
    return generate(name)


class TemplateReader:
    """Reads the generated passages by their wordings; needs no training. See :mod:`ecstudy.rag` for the call.

    A question's wording tells relation and subject; a passage that states this relation offers its object, the
    better the more its title resembles the subject (shared runs of three characters). The best offer is the answer,
    of equals the one found first. No passage that states the relation: an empty answer.
    """

    fingerprint = f"template-{VERSION}"

    def __call__(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]], scores=None) -> list[str]:
        return [self._answer(question, found) for question, found in zip(questions, passages, strict=True)]

    def _answer(self, question: str, found: Sequence[Passage]) -> str:
        best, answer = 0.0, ""
        for asked, wordings in _wordings():
            if not (subject := asked.fullmatch(question)):
                continue
            for passage in found:
                offer = next((m for m in (told.search(passage.text) for told in wordings) if m), None)
                if offer and (score := _alike(subject[1], passage.title)) > best:
                    best, answer = score, offer[1]
        return answer


@functools.lru_cache(maxsize=1)
def _wordings() -> list[tuple[re.Pattern, list[re.Pattern]]]:
    """Each wording of a question (group 1: the subject) with the wordings of its relation (group 1: the object)."""
    def pattern(text: str, **groups: str) -> re.Pattern:
        parts = re.split(r"(\{[so]\})", text)
        return re.compile("".join(groups[p[1]] if p in ("{s}", "{o}") else re.escape(p) for p in parts))

    return [(pattern(asked, s="(.+)"), [pattern(told + ".", s="", o="([^.]+?)") for told in relation.told])
            for _, relations in KINDS.values() for relation in relations.values() for asked in relation.asked]


def _alike(a: str, b: str) -> float:
    """Share of runs of three characters that two names have in common (Jaccard)."""
    mine, theirs = ({f"  {t.lower()} "[i:i + 3] for i in range(len(t) + 1)} for t in (a, b))
    return len(mine & theirs) / len(mine | theirs)
