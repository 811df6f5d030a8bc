"""Questions over documents: what does Vemo do? Each question has documents of its own about people
with made-up names, so nothing can be known by heart.

The environment is text in, text out: a reply `?Vemo` searches, any other is the answer. Most of the
demonstrations that the model imitates first search for the wrong word of the question, find nothing
and give up; the others search for the name and read the answer. For every question the model also
imitates how the answer is read, behind a search that it is shown and does not imitate. The warm start
so teaches how to search and to read, and reinforcement which word to search for.
"""

from __future__ import annotations

import random
from typing import Any

PROFESSIONS = ("baker", "doctor", "farmer", "lawyer", "pilot", "singer", "tailor", "writer")
CITIES = ("Bonn", "Lima", "Oslo", "Pisa", "Riga", "Rome", "Kyiv", "Nice")
UNKNOWN = "unknown"
FRAMES: tuple[str, ...] = (*PROFESSIONS, *CITIES, UNKNOWN)
NUM_DOCUMENTS = 6
LOOKS = 0.35
"""The share of the demonstrations that search for the name."""
MAX_REPLY_TOKENS = 12
MAX_TOKENS = 96


class Library:
    """environment=recipes.agents.documents:Library"""

    def reset(self, task: dict[str, Any]) -> None:
        self.documents: list[str] = task["documents"]
        self.answer: str = task["answer"]

    def step(self, action: str) -> tuple[str, bool, float]:
        if action.startswith("?"):
            return search(self.documents, action[1:]), False, 0.0
        return "", True, float(action == self.answer)


def search(documents: list[str], query: str) -> str:
    """The document that shares the most words with the query; the first of equals."""
    words = set(query.split())
    scores = [len(words & set(document.split())) for document in documents]
    if not any(scores):
        return "nothing"
    return documents[scores.index(max(scores))]


def make_row(random_: random.Random) -> dict[str, Any]:
    """One question with its documents and its answer, and what is imitated: messages of the
    assistant and the user, and of the assistant's that are only shown."""
    names: dict[str, None] = {}
    while len(names) < NUM_DOCUMENTS:
        letters = [random_.choice("BDFGKLMNPRSTVZ"), random_.choice("aeiou")]
        letters += [random_.choice("bdfgklmnprstvz"), random_.choice("aeiou")]
        names["".join(letters)] = None
    documents, facts = [], {}
    for name in names:
        facts[name] = (random_.choice(PROFESSIONS), random_.choice(CITIES))
        documents.append(f"{name} is a {facts[name][0]} in {facts[name][1]}")
    name = random_.choice(list(names))
    kind = random_.randrange(2)
    answer = facts[name][kind]
    question = ("What", "Where")[kind]
    query, found = name, answer
    if random_.random() >= LOOKS:
        query, found = question, UNKNOWN
    demonstration = [
        ("assistant", f"?{query}"),
        ("user", search(documents, query)),
        ("assistant", found),
    ]
    return {
        "prompt": [{"role": "user", "content": f"{question} is {name}?"}],
        "answer": answer,
        "documents": documents,
        "demonstration": demonstration,
        "reading": [
            ("shown", f"?{name}"),
            ("user", search(documents, name)),
            ("assistant", answer),
        ],
    }
