"""Names to hide: words, word pairs, numbers and identifiers, drawn without repetition."""

from __future__ import annotations

import random
import uuid

ADJECTIVES = (
    "amber brave brisk calm clever copper crisp curly damp daring eager early faint fancy fierce fleet fresh frosty "
    "gentle giant glad golden grand hasty hazel hollow humble icy idle ivory jolly keen kind lively lone loud lucky "
    "mellow merry mighty misty modest narrow neat nimble noble odd olive pale patient plain polite proud quick quiet "
    "rapid rare ripe rough royal rusty sharp shy silent silver sleepy slim smooth snowy soft solid spare steady stern "
    "stout sunny swift tall tame tender thin tidy tiny vast velvet warm wary wild wise witty young zesty"
).split()
NOUNS = (
    "acorn anchor apron arrow badge barge basin beacon bishop blanket bottle branch breeze brick bridge broom bucket "
    "button cabin camel candle canoe canyon carpet castle cellar chapel cherry circle cliff cloud coast comet compass "
    "copse coral corner cradle crane crown curtain dagger desert dolphin donkey drum eagle ember engine falcon fence "
    "fiddle flag flute forest fountain garden garlic ginger glacier glove goblet granite hammer harbor hedge helmet "
    "heron hollow hunter island jacket jungle kettle kitten ladder lagoon lantern laurel lemon lizard lobster magnet "
    "mantle marble meadow melon mirror mitten monkey mortar mountain nectar needle nettle nickel oasis ocean orchard "
    "otter oyster paddle palace panther parrot pasture pebble pepper piano pigeon pillow pirate planet pocket pond "
    "prairie puddle quarry quartz quiver rabbit raven ribbon river rocket saddle salmon sandal shadow shelter shovel "
    "signal sparrow spider spoon stable statue stream summit sunset tailor temple thistle thunder ticket timber "
    "tower trumpet tulip tunnel turtle valley vessel village violin wagon walnut willow window winter zipper"
).split()


class Names:
    """Draws names from one generator; no name twice."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._used: set[str] = set()

    def _fresh(self, draws: list[str]) -> str:
        name = draws[0]
        for name in draws:
            if name not in self._used:
                break
        assert name not in self._used, "out of names"
        self._used.add(name)
        return name

    def word(self) -> str:
        """A noun or an adjective; two of them in one word when all are used."""
        rng = self.rng
        draws = [rng.choice(NOUNS + ADJECTIVES) for _ in range(6)]
        return self._fresh(draws + [rng.choice(ADJECTIVES) + rng.choice(NOUNS) for _ in range(200)])

    def pair(self) -> str:
        rng = self.rng
        draws = [f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}" for _ in range(20)]
        return self._fresh(draws + [f"{rng.choice(ADJECTIVES)}-{name}" for name in draws])

    def number(self, digits: int = 7) -> str:
        return self._fresh([str(self.rng.randrange(10 ** (digits - 1), 10**digits)) for _ in range(50)])

    def identifier(self) -> str:
        return self._fresh([str(uuid.UUID(int=self.rng.getrandbits(128), version=4))])

    def letters(self, count: int, alphabet: str) -> str:
        return self._fresh(["".join(self.rng.choices(alphabet, k=count)) for _ in range(200)])
