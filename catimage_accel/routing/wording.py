"""How a prompt is worded: features a person can read, beside the counts of what it asks for."""

from __future__ import annotations

from catimage_accel.routing.counts import WORD, LogCounts, folded

# What image models are known to find hard, by the words that ask for it (the skills of GenAI-Bench, arXiv 2406.13743,
# and PartiPrompts, arXiv 2206.10789), and what tells an easy scene.
LISTS = {
    "universal": "all any always each entire every everyone everything both only whole",
    "contrasting": (
        "although another but different either except however instead one other others rather same unlike whereas while"
    ),
    "having": "carrying containing covered featuring filled has have having holding made of wearing with",
    "people": (
        "baby boy boys child children face girl girls guy hand hands he her him his kid kids lady man men people "
        "person she someone their they woman women"
    ),
    "lettering": (
        "book label labeled letter letters logo reading reads said saying says sign spelled spelling text title word "
        "words written"
    ),
    "shapes": (
        "circle circular cube dotted glass leather metal oval patterned plastic rectangular round sphere spotted "
        "square stone striped transparent triangle triangular wooden"
    ),
    "sizes": "big bigger giant huge large larger little long longer short shorter small smaller tall taller tiny",
    "scenery": (
        "background beach city desert field forest garden lake landscape mountain night ocean park river room sea sky "
        "snow street sunset"
    ),
    "styles": (
        "anime art cartoon cinematic detailed drawing illustration painting photo photograph portrait realistic render "
        "style watercolor"
    ),
    "times": "after as before during then until when",
    "pronouns": "he her him his it its she that their them they this which who",
    "directions": "across against along among at away by down from into off onto out through toward towards up around",
}
WORDS = {name: frozenset(words.split()) for name, words in LISTS.items()}
ENDINGS = {"ing": 5, "er": 5, "ed": 4, "ly": 5}  # and how many letters a word has at least
LONG_WORD = 9


class WordingFeatures(LogCounts):
    """Counts of words of 12 kinds (``LISTS``) and of 12 forms, as ``log(1 + count)``: (n, 24) float32, each >= 0.

    The forms, in order: words in -ing, -er, -ed, -ly, likely plurals, possessives, numerals, long words, repeated
    words, letters of the longest word, quotation marks, and marks that end a clause. The lists are English; in other
    scripts the forms still count something.
    """

    KIND = "wording"
    NAMES = (
        *LISTS, *(f"-{ending}" for ending in ENDINGS), "plurals", "possessives", "numerals", "long words",
        "repeated words", "longest word", "quotation marks", "clause marks",
    )  # fmt: skip

    def counts(self, prompt: str) -> list[int]:
        text = folded(prompt)
        words = [word for word in WORD.findall(text) if word not in ",&"]
        return [
            *(sum(word in listed for word in words) for listed in WORDS.values()),
            *(sum(word.endswith(end) and len(word) >= least for word in words) for end, least in ENDINGS.items()),
            sum(word.endswith("s") and not word.endswith("ss") and len(word) > 3 for word in words),
            sum(word.endswith("'s") for word in words),
            sum(word.isdecimal() for word in words),
            sum(len(word) >= LONG_WORD for word in words),
            len(words) - len(set(words)),
            max(map(len, words), default=0),
            sum(text.count(mark) for mark in '"\u201c'),
            sum(text.count(mark) for mark in ".;!?"),
        ]
