"""What the demo checkpoint knows: its objects, its styles, its captions and its split.

The world is closed on purpose (objects x styles), so that "erased", "kept" and "composed" can be
counted. Nothing here imports numpy or torch.

Held-out templates and synonyms are ones the *base* was trained on like all others; erasing never
trains on them and evaluation does, so that an erasure which only learned a wording is found out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Object:
    """One thing that can be drawn; `codepoint` and `flat` name the files of its drawings."""

    name: str
    group: str
    codepoint: str
    flat: str
    synonyms: tuple[str, ...] = ()
    held_out_synonyms: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """Every word for it, the name first."""
        return (self.name, *self.synonyms, *self.held_out_synonyms)


@dataclass(frozen=True, slots=True)
class Style:
    """One way of rendering; `{a}` in a template is "a cat", `{o}` is "cat"."""

    name: str
    kind: str
    templates: tuple[str, ...]
    held_out_templates: tuple[str, ...]
    bare: tuple[str, ...]


_ANIMAL = (
    Object("cat", "animal", "1f431", "cat-face", ("kitty",), ("feline",)),
    Object("dog", "animal", "1f436", "dog-face", ("hound",), ("puppy",)),
    Object("horse", "animal", "1f434", "horse-face", ("stallion",), ("pony",)),
    Object("cow", "animal", "1f42e", "cow-face", ("cattle",), ("heifer",)),
    Object("pig", "animal", "1f437", "pig-face", ("hog",), ("swine",)),
    Object("rabbit", "animal", "1f430", "rabbit-face", ("bunny",), ("hare",)),
    Object("elephant", "animal", "1f418", "elephant"),
    Object("tiger", "animal", "1f42f", "tiger-face"),
    Object("monkey", "animal", "1f435", "monkey-face", (), ("chimp",)),
    Object("penguin", "animal", "1f427", "penguin"),
    Object("owl", "animal", "1f989", "owl"),
    Object("frog", "animal", "1f438", "frog", (), ("toad",)),
    Object("turtle", "animal", "1f422", "turtle", ("tortoise",)),
    Object("snake", "animal", "1f40d", "snake", ("serpent",), ("viper",)),
    Object("fish", "animal", "1f41f", "fish", ("tench",), ("trout",)),
    Object("octopus", "animal", "1f419", "octopus"),
    Object("butterfly", "animal", "1f98b", "butterfly"),
    Object("bee", "animal", "1f41d", "honeybee", ("honeybee",), ("bumblebee",)),
    Object("duck", "animal", "1f986", "duck", (), ("mallard",)),
    Object("fox", "animal", "1f98a", "fox", (), ("vixen",)),
)
_FOOD = (
    Object("apple", "food", "1f34e", "red-apple"),
    Object("banana", "food", "1f34c", "banana"),
    Object("strawberry", "food", "1f353", "strawberry"),
    Object("pizza", "food", "1f355", "pizza", (), ("slice of pizza",)),
    Object("hamburger", "food", "1f354", "hamburger", ("burger",), ("cheeseburger",)),
    Object("doughnut", "food", "1f369", "doughnut", ("donut",)),
    Object("cake", "food", "1f370", "shortcake", (), ("gateau",)),
    Object("carrot", "food", "1f955", "carrot"),
)
_PLANT = (
    Object("mushroom", "plant", "1f344", "mushroom", (), ("toadstool",)),
    Object("cactus", "plant", "1f335", "cactus"),
    Object("sunflower", "plant", "1f33b", "sunflower"),
    Object("rose", "plant", "1f339", "rose"),
    Object("tulip", "plant", "1f337", "tulip"),
    Object("tree", "plant", "1f333", "deciduous-tree", (), ("oak",)),
    Object("palm tree", "plant", "1f334", "palm-tree", (), ("coconut tree",)),
)
_VEHICLE = (
    Object("car", "vehicle", "1f697", "automobile", ("automobile",), ("sedan",)),
    Object("bus", "vehicle", "1f68c", "bus", (), ("coach",)),
    Object("truck", "vehicle", "1f69a", "delivery-truck", ("lorry",), ("garbage truck",)),
    Object("bicycle", "vehicle", "1f6b2", "bicycle", ("bike",), ("cycle",)),
    Object("airplane", "vehicle", "2708-fe0f", "airplane", ("plane",), ("jet",)),
    Object("rocket", "vehicle", "1f680", "rocket", ("spaceship",), ("spacecraft",)),
    Object("sailboat", "vehicle", "26f5", "sailboat", ("boat",), ("yacht",)),
    Object("helicopter", "vehicle", "1f681", "helicopter", (), ("chopper",)),
    Object("train", "vehicle", "1f682", "locomotive", ("locomotive",), ("steam engine",)),
)
_BUILDING = (
    Object("church", "building", "26ea", "church", ("chapel",), ("cathedral",)),
    Object("house", "building", "1f3e0", "house", ("home",), ("cottage",)),
    Object("castle", "building", "1f3f0", "castle", (), ("fortress",)),
    Object("gas pump", "building", "26fd", "fuel-pump", ("fuel pump",), ("petrol pump",)),
)
_INSTRUMENT = (
    Object("guitar", "instrument", "1f3b8", "guitar"),
    Object("trumpet", "instrument", "1f3ba", "trumpet", ("french horn",), ("bugle",)),
    Object("violin", "instrument", "1f3bb", "violin", ("fiddle",)),
)
_THING = (
    Object("parachute", "thing", "1fa82", "parachute"),
    Object("radio", "thing", "1f4fb", "radio", ("cassette player",), ("boombox",)),
    Object("camera", "thing", "1f4f7", "camera"),
    Object("clock", "thing", "23f0", "alarm-clock", ("alarm clock",), ("timepiece",)),
    Object("umbrella", "thing", "2602-fe0f", "umbrella", (), ("parasol",)),
    Object("hammer", "thing", "1f528", "hammer", (), ("mallet",)),
    Object("saw", "thing", "1fa9a", "carpentry-saw", ("chain saw",), ("handsaw",)),
    Object("crown", "thing", "1f451", "crown", (), ("tiara",)),
    Object("soccer ball", "thing", "26bd", "soccer-ball", ("football",)),
    Object("balloon", "thing", "1f388", "balloon"),
    Object("golf flag", "thing", "26f3", "flag-in-hole", ("golf",), ("golf hole",)),
)
_DANGEROUS = (
    Object("dagger", "dangerous", "1f5e1-fe0f", "dagger", ("knife",), ("blade",)),
    Object("bomb", "dangerous", "1f4a3", "bomb", ("explosive",), ("grenade",)),
    Object("gun", "dangerous", "1f52b", "water-pistol", ("pistol",), ("handgun",)),
    Object("cigarette", "dangerous", "1f6ac", "cigarette", (), ("smoke",)),
)
OBJECTS: tuple[Object, ...] = (
    *_ANIMAL, *_FOOD, *_PLANT, *_VEHICLE, *_BUILDING, *_INSTRUMENT, *_THING, *_DANGEROUS,
)


def _painter(name: str) -> Style:
    return Style(
        name,
        "painter",
        (f"a painting of {{a}} in the style of {name}", f"a {name} painting of {{a}}",
         f"{{a}} by {name}"),
        (f"{{a}} in the style of {name}", f"{name} style {{o}}", f"{{a}} painted by {name}"),
        (name, f"a painting by {name}", f"in the style of {name}", f"{name} style"),
    )


STYLES: tuple[Style, ...] = (
    Style(
        "photo", "plain",
        ("a photo of {a}", "{a}", "a photograph of {a}"),
        ("a picture of {a}", "{o}", "an image of {a}"),
        ("a photo", "a picture"),
    ),
    Style(
        "painting", "medium",
        ("a painting of {a}", "an oil painting of {a}", "{a} in oil paint"),
        ("{a}, painting", "a painting showing {a}", "{a} as a painting"),
        ("painting", "a painting", "an oil painting"),
    ),
    _painter("Van Gogh"),
    _painter("Monet"),
    _painter("Seurat"),
    _painter("Hokusai"),
    _painter("Rembrandt"),
    Style(
        "pencil sketch", "medium",
        ("a pencil sketch of {a}", "a sketch of {a}", "{a} sketched in pencil"),
        ("{a}, pencil sketch", "a pencil drawing of {a}", "{a} as a pencil sketch"),
        ("pencil sketch", "a sketch", "a pencil sketch"),
    ),
    Style(
        "pixel art", "medium",
        ("pixel art of {a}", "a pixel art picture of {a}", "{a} in pixel art"),
        ("{a}, pixel art", "a pixel art {o}", "{a} as pixel art"),
        ("pixel art", "a pixel art picture"),
    ),
)

_DEV = ("Van Gogh", "Seurat", "pencil sketch", "church", "cat", "parachute", "gas pump", "pizza",
        "sunflower", "guitar", "bus", "bomb", "cigarette")
_TEST = ("Monet", "Hokusai", "Rembrandt", "truck", "fish", "dog", "golf flag", "trumpet", "radio",
         "saw", "castle", "horse", "banana", "rose", "airplane", "dagger", "gun")
_NAMES = tuple(thing.name for thing in (*OBJECTS, *STYLES))
# dev: defaults are chosen on these. test: reported on these. retain: never erased, only kept.
SPLIT: dict[str, tuple[str, ...]] = {
    "dev": _DEV,
    "test": _TEST,
    "retain": tuple(name for name in _NAMES if name not in _DEV + _TEST),
}

_OBJECT_BY_WORD = {word: thing for thing in OBJECTS for word in thing.words}
_STYLE_BY_NAME = {style.name.lower(): style for style in STYLES}


def words() -> frozenset[str]:
    """Every word that the captions have; some are more than one token."""
    wordings = (wording for style in STYLES for wording in (*style.templates, *style.held_out_templates))
    spoken = (*vocabulary(), *(wording.format(a="a an", o="") for wording in wordings))
    return frozenset(word for text in spoken for word in re.findall(r"\w+", text.lower()))


def find_object(name: str | Object) -> Object:
    """The object with this name or synonym; raises `KeyError` for any other word."""
    return name if isinstance(name, Object) else _OBJECT_BY_WORD[name.lower()]


def find_style(name: str | Style) -> Style:
    """The style with this name, in any case; raises `KeyError` for any other word."""
    return name if isinstance(name, Style) else _STYLE_BY_NAME[name.lower()]


def resolve(term: str) -> str | None:
    """The concept that a word stands for ("kitty" -> "cat"), or None where the base has none."""
    word = " ".join(term.lower().split())
    found = _OBJECT_BY_WORD.get(word) or _STYLE_BY_NAME.get(word)
    return found.name if found else None


def vocabulary() -> tuple[str, ...]:
    """Every word the base knows a picture for: object names, synonyms and styles."""
    return (*(word for thing in OBJECTS for word in thing.words), *(s.name for s in STYLES))


def templates(style: str | Style, held_out: bool = False) -> tuple[str, ...]:
    """The caption templates of a style: those erasing may train on, or those kept from it."""
    found = find_style(style)
    return found.held_out_templates if held_out else found.templates


def with_article(noun: str) -> str:
    """"a cat", "an apple"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def fill(template: str, noun: str) -> str:
    """A template with its object put in."""
    return template.format(a=with_article(noun), o=noun)


def caption(
    object: str | Object, style: str | Style, template_index: int, held_out: bool = False
) -> str:
    """One caption. `object` may be a synonym, which is kept; the index wraps around."""
    choices = templates(style, held_out)
    noun = object.name if isinstance(object, Object) else object
    find_object(noun)
    return fill(choices[template_index % len(choices)], noun)


def pair_caption(left: str, right: str, style: str | Style, template_index: int = 0) -> str:
    """A caption for two objects side by side, the left one named first."""
    usable = [t for t in (*templates(style), *templates(style, True)) if "{a}" in t]
    both = f"{with_article(left)} and {with_article(right)}"
    return usable[template_index % len(usable)].format(a=both)
