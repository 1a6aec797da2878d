"""The small model's language: its vocabulary, and RULER-like tasks written in it.

Pure standard library. Texts are words separated by one space; one word is one token, so lengths are in words.

    let KEY v1 .. vn .                                     a needle: n = 5..8 hex-byte words
    let KEY1 KEY2 .                                        an alias: KEY1 is whatever KEY2 is
    let KEY one v1 .. vn + ... let KEY two v1 .. vn .      one KEY, several values; `+`: more of KEY elsewhere
    the old river turns slowly .                           filler

`ask KEY [KEY ..] ?` is answered key by key: the key, its aliases hop by hop, its values as they were stated,
with the statement's own closing mark; then `<end>`. No two values of one text share a pair of adjacent words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PAD, UNK, END = "<pad>", "<unk>", "<end>"
LET, ASK, QUERY, STOP, MORE = "let", "ask", "?", ".", "+"
ORDINALS = ("one", "two", "three", "four")
BYTES = tuple(f"{i:02x}" for i in range(256))
_SYLLABLES = tuple(c + v for c in "bdgkmptz" for v in "aiou")
KEYS = tuple(_SYLLABLES[i % 32] + _SYLLABLES[(7 * i + i // 32) % 32] for i in range(256))
FILLER = (
    "the a this that each some every another".split(),
    "old quiet green narrow bright heavy gentle hollow silver distant early late wooden frozen open hidden "
    "golden empty patient crooked tall dusty pale calm broken simple warm cold wide slow "
    "soft round plain deep clear young light little large".split(),
    "river garden window table forest bridge letter mountain road kettle lantern orchard valley harbour "
    "clock market village meadow ladder engine painter farmer sailor teacher singer baker stone cloud shadow "
    "winter summer evening morning island castle field mirror basket blanket candle door fence "
    "feather hammer oven pocket ribbon saddle teapot umbrella violin wagon wall well yard "
    "pebble acorn anchor barrel beacon canal carpet cellar chimney cottage curtain drawer farm ferry "
    "fountain glove hedge hill jar lake lamp leaf library moon moss nest oak path pillow plum pond rain "
    "roof rope sail shelf ship shore snow spoon stair stove tower train vine".split(),
    "turns waits sleeps grows falls rises moves shines listens stands drifts bends breaks rests sings "
    "leans opens closes returns remains wanders travels glows fades flows hides lingers settles spins "
    "trembles dances hums whispers arrives".split(),
    "slowly quietly often again rarely softly gladly alone today together nearly always soon twice "
    "outside inside gently later quickly".split(),
    "under over behind beside near above below beyond through around along against".split(),
)
VOCABULARY: tuple[str, ...] = (
    PAD, UNK, END, LET, ASK, QUERY, STOP, MORE, *ORDINALS, *BYTES, *KEYS, *(w for ws in FILLER for w in ws),
)  # fmt: skip
assert len(set(VOCABULARY)) == len(VOCABULARY)
WORD_ID = {word: i for i, word in enumerate(VOCABULARY)}

TASKS = ("single", "multi_key", "multi_query", "multi_value", "variable_tracking", "follow_up")

Words = list[str]


@dataclass(frozen=True)
class Sample:
    """One test item: complete `prompt` greedily; the reply must be exactly `answer`, ending in `<end>`.

    `meta`: task, seed, n_tokens (of the prompt), haystack (text), turns: [(question, answer), ...], the last
    of which is the one asked; earlier ones are part of the prompt (only `follow_up` has one).
    """

    prompt: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class World:
    """The statements of one text, and what each key that may be asked about answers to."""

    rng: random.Random
    statements: list[Words] = field(default_factory=list)
    needles: dict[str, Words] = field(default_factory=dict)
    chains: dict[str, Words] = field(default_factory=dict)
    collections: dict[str, Words] = field(default_factory=dict)
    _pairs: set[tuple[str, str]] = field(default_factory=set)
    _fresh: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._fresh = self.rng.sample(KEYS, len(KEYS))

    @property
    def size(self) -> int:
        """Tokens in all statements so far."""
        return sum(map(len, self.statements))

    def _value(self) -> Words:
        """5 to 8 byte words, no adjacent pair of which occurs in another value of this world."""
        rng = self.rng
        words = [rng.choice(BYTES)]
        for _ in range(rng.randint(5, 8) - 1):
            word = rng.choice(BYTES)
            while (words[-1], word) in self._pairs:
                word = rng.choice(BYTES)
            self._pairs.add((words[-1], word))
            words.append(word)
        return words

    def add_needle(self) -> str:
        key = self._fresh.pop()
        block = [key, *self._value(), STOP]
        self.statements.append([LET, *block])
        self.needles[key] = block
        return key

    def add_chain(self, hops: int) -> str:
        """A needle behind `hops` aliases; returns the key at the far end."""
        key = self.add_needle()
        block = self.needles.pop(key)
        for _ in range(hops):
            alias = self._fresh.pop()
            self.statements.append([LET, alias, key, STOP])
            key, block = alias, [alias, *block]
        self.chains[key] = block
        return key

    def add_collection(self, parts: int) -> str:
        """One key with `parts` numbered values, each in its own statement."""
        key = self._fresh.pop()
        answer: Words = []
        for i in range(parts):
            block = [key, ORDINALS[i], *self._value(), STOP if i == parts - 1 else MORE]
            self.statements.append([LET, *block])
            answer += block
        self.collections[key] = answer
        return key

    def answer(self, keys: list[str]) -> Words:
        """What `ask keys ?` is answered with, `<end>` included."""
        words: Words = []
        for key in keys:
            words += self.needles.get(key) or self.chains.get(key) or self.collections[key]
        return [*words, END]

    def haystack(self, n_tokens: int) -> Words:
        """All statements in random order with filler between them: exactly `n_tokens` words."""
        parts = self.statements + fillers(self.rng, n_tokens - self.size)
        self.rng.shuffle(parts)
        words = [word for part in parts for word in part]
        assert len(words) == n_tokens, (len(words), n_tokens)
        return words


def question(keys: list[str]) -> Words:
    return [ASK, *keys, QUERY]


def fillers(rng: random.Random, n_tokens: int) -> list[Words]:
    """Filler sentences of 4 to 9 words (the last may be shorter), `n_tokens` words in all."""
    assert n_tokens >= 0, "the statements do not fit"
    sentences: list[Words] = []
    while n_tokens:
        length = min(rng.randint(4, 9), n_tokens)
        if n_tokens - length == 1:
            length += 1
        sentences.append([*(rng.choice(FILLER[i % 6]) for i in range(length - 1)), STOP])
        n_tokens -= length
    return sentences


def _fill_with_needles(world: World, n_tokens: int) -> None:
    """Adds needles until the statements hold `n_tokens` words or just less."""
    while world.size + 10 <= n_tokens and len(world._fresh) > 1:
        world.add_needle()


def _single(world: World, room: int) -> list[str]:
    return [world.add_needle()]


def _multi_key(world: World, room: int) -> list[str]:
    key = world.add_needle()
    _fill_with_needles(world, int(0.6 * room))
    return [key]


def _multi_query(world: World, room: int) -> list[str]:
    keys = [world.add_needle() for _ in range(4)]
    _fill_with_needles(world, int(0.3 * room))
    return keys


def _multi_value(world: World, room: int) -> list[str]:
    key = world.add_collection(4)
    if room >= 128:
        world.add_collection(world.rng.randint(2, 3))
    _fill_with_needles(world, int(0.3 * room))
    return [key]


def _variable_tracking(world: World, room: int) -> list[str]:
    key = world.add_chain(world.rng.randint(1, 3))
    for _ in range(room // 128):
        world.add_chain(world.rng.randint(1, 3))
    _fill_with_needles(world, int(0.3 * room))
    return [key]


def _follow_up(world: World, room: int) -> list[str]:
    """Two needles among many: asked one after the other."""
    keys = [world.add_needle(), world.add_needle()]
    _fill_with_needles(world, int(0.3 * room))
    return keys


_BUILDERS: dict[str, Callable[[World, int], list[str]]] = {
    "single": _single,
    "multi_key": _multi_key,
    "multi_query": _multi_query,
    "multi_value": _multi_value,
    "variable_tracking": _variable_tracking,
    "follow_up": _follow_up,
}


def make(task: str, n_tokens: int, seed: int) -> Sample:
    """One item of `task` whose prompt is exactly `n_tokens` (>= 64) long; the same for the same arguments."""
    world = World(random.Random(f"{task}/{n_tokens}/{seed}"))
    keys = _BUILDERS[task](world, n_tokens)
    asked = [[key] for key in keys] if task == "follow_up" else [keys]
    turns = [(question(turn), world.answer(turn)) for turn in asked]
    dialogue = [word for asks, reply in turns for word in (*asks, *reply)][: -len(turns[-1][1])]
    haystack = world.haystack(n_tokens - len(dialogue))
    return Sample(
        prompt=" ".join(haystack + dialogue),
        answer=" ".join(turns[-1][1]),
        meta={
            "task": task,
            "seed": seed,
            "n_tokens": n_tokens,
            "haystack": " ".join(haystack),
            "turns": [(" ".join(asks), " ".join(reply)) for asks, reply in turns],
        },
    )


def _populate(world: World, room: int, density: float) -> None:
    """Mixed statements up to `density * room` words: what a training text is made of."""
    rng = world.rng
    while True:
        draw = rng.random()
        left = density * room - world.size
        if draw < 0.2 and left >= 22:
            world.add_collection(rng.randint(2, min(4, int(left // 11))))
        elif draw < 0.5 and left >= 15:
            world.add_chain(rng.randint(1, 3 if left >= 23 else 1))
        elif left >= 11 or not world.statements:
            world.add_needle()
        else:
            return
        if len(world._fresh) < 8:
            return


def training_text(n_tokens: int, seed: int, haystack_share: tuple[float, float]) -> tuple[Words, list[bool]]:
    """A haystack and as many question/answer turns as fit: `n_tokens` words, and which of them are answers.

    `haystack_share`: the range the haystack's share of the text is drawn from. The last turn may be cut.
    """
    rng = random.Random(f"train/{n_tokens}/{seed}")
    world = World(rng)
    room = int(rng.uniform(*haystack_share) * n_tokens)
    _populate(world, room, rng.choice((0.3, 0.6, 0.95)) if n_tokens > 128 else 0.95)
    words = world.haystack(max(room, world.size))
    is_answer = [False] * len(words)
    kinds = [sorted(kind) for kind in (world.needles, world.chains, world.collections) if kind]
    unasked = [rng.sample(kind, len(kind)) for kind in kinds]
    while len(words) < n_tokens:
        i = rng.randrange(len(kinds))
        wanted = rng.choice((1, 1, 2, 3, 4, 4)) if kinds[i][0] in world.needles else 1
        keys: list[str] = []
        for _ in range(min(wanted, len(kinds[i]))):
            if not unasked[i]:
                unasked[i] = rng.sample(kinds[i], len(kinds[i]))
            if unasked[i][-1] not in keys:
                keys.append(unasked[i].pop())
        asks, reply = question(keys), world.answer(keys)
        words += asks + reply
        is_answer += [False] * len(asks) + [True] * len(reply)
    return words[:n_tokens], is_answer[:n_tokens]
