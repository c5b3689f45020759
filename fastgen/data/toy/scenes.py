"""Compositional scenes at 32 x 32, drawn from signed distances: endless, seeded, exactly described.

A scene has one or two objects on a plain background. Every object has a shape, a colour, a size and a texture; two objects
stand in a relation. Scenes are held as integer tensors, so a batch is drawn, captioned and checked without a loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped")
AXES = ("horizontal", "vertical")
BACKGROUNDS = ("black", "white", "gray", "navy", "brown")

COLOUR_VALUES = (
    (220, 35, 40), (245, 135, 20), (245, 225, 50), (40, 165, 60),
    (60, 210, 225), (45, 85, 235), (145, 50, 195), (250, 130, 190),
)  # fmt: skip
BACKGROUND_VALUES = ((18, 18, 22), (240, 240, 240), (125, 125, 125), (22, 28, 85), (105, 68, 42))
RADII = (4.3, 7.0)
RADIUS_JITTER = 0.07
ROTATION_JITTER = 12.0
STRIPE_PERIOD = 3.8
STRIPE_SHADE = 0.45
COLOUR_JITTER = 0.02


@dataclass
class Scenes:
    """A batch of scenes, one integer per attribute.

    `count` and `background` have shape [B], `axis` has shape [B] (how the two objects are separated), the object attributes
    have shape [B, 2]. The first object is the left one (horizontal axis) or the upper one (vertical axis). Entries of an absent
    second object are 0, and so is the axis of a one-object scene.
    """

    count: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    texture: Tensor
    axis: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))

    @staticmethod
    def cat(parts: Sequence[Scenes]) -> Scenes:
        """The scenes of all `parts`, one after another."""
        return Scenes(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Scenes)))


def is_held_out(shape: Tensor, colour: Tensor, texture: Tensor, size: Tensor, background: Tensor) -> Tensor:
    """Whether this kind of object on this background is kept out of training (an eleventh of the 960 combinations is)."""
    return (shape * 7 + colour * 3 + texture * 5 + size * 2 + background * 8) % 11 == 4


def sample_scenes(number: int, generator: torch.Generator, *, split: str = "train", objects: int | None = None) -> Scenes:
    """Draw `number` scene descriptions.

    `split` is "train" (no held-out combination appears) or "held-out" (the first or the second object, or both, is one of
    them). `objects` fixes the number of objects; by default half of the scenes have two.

    Raises ValueError for another split.
    """
    if split not in ("train", "held-out"):
        raise ValueError(f"split must be 'train' or 'held-out', not {split!r}")

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    count = draw(2, number) + 1 if objects is None else torch.full((number,), objects)
    second = (count == 2).long()
    background = draw(len(BACKGROUNDS), number)
    wanted = torch.zeros(number, 2, dtype=torch.bool)
    if split == "held-out":
        wanted[torch.arange(number), draw(2, number) * second] = True
        wanted |= (draw(4, number, 2) == 0) & (second == 1)[:, None]
    kinds = [draw(len(names), number, 2) for names in (SHAPES, COLOURS, TEXTURES, SIZES)]
    while (wrong := is_held_out(kinds[0], kinds[1], kinds[2], kinds[3], background[:, None]) != wanted).any():
        for kind, names in zip(kinds, (SHAPES, COLOURS, TEXTURES, SIZES), strict=True):
            kind[wrong] = draw(len(names), int(wrong.sum()))
    shape, colour, texture, size = (kind * torch.stack([torch.ones_like(second), second], 1) for kind in kinds)
    return Scenes(count, shape, colour, size, texture, draw(len(AXES), number) * second, background)


def render(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Draw each scene once, with free position, small rotation, scale and colour jitter: images [B, 3, 32, 32] in [-1, 1]."""
    number = len(scenes)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    radius = torch.tensor(RADII)[scenes.size] * (1 + RADIUS_JITTER * uniform(number, 2))
    centre = _place(scenes, radius, generator)
    angle = uniform(number, 2) * math.radians(ROTATION_JITTER)
    image = torch.tensor(BACKGROUND_VALUES)[scenes.background] / 255 + COLOUR_JITTER * uniform(number, 3)
    image = image[:, :, None, None].expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE)
    axis = torch.arange(IMAGE_SIZE) + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))
    for i in range(2):
        offset = grid - centre[:, i, :, None, None]
        cos, sin = (f(angle[:, i])[:, None, None] for f in (torch.cos, torch.sin))
        x, y = cos * offset[:, 0] + sin * offset[:, 1], cos * offset[:, 1] - sin * offset[:, 0]
        distance = _signed_distance(x, y, radius[:, i, None, None], scenes.shape[:, i])
        cover = (0.5 - distance).clamp(0, 1) * (scenes.count > i)[:, None, None]
        stripe = (0.5 + STRIPE_PERIOD / 2 * torch.sin(2 * math.pi / STRIPE_PERIOD * y)).clamp(0, 1)
        shade = 1 - (1 - STRIPE_SHADE) * stripe * scenes.texture[:, i, None, None]
        paint = torch.tensor(COLOUR_VALUES)[scenes.colour[:, i]] / 255 + COLOUR_JITTER * uniform(number, 3)
        image = torch.lerp(image, paint[:, :, None, None] * shade[:, None], cover[:, None])
    return image.clamp(0, 1) * 2 - 1


def _place(scenes: Scenes, radius: Tensor, generator: torch.Generator) -> Tensor:
    """Centres [B, 2, 2] (object, x and y): inside the image, apart along the scene's axis and closer together across it."""
    number = len(scenes)
    share = torch.rand(number, 3, generator=generator) + 0.05
    share = share / share.sum(1, keepdim=True)
    gap = 1.5
    slack = (IMAGE_SIZE - 2 * radius.sum(1) - gap).clamp_min(0)
    first = radius[:, 0] + slack * share[:, 0]
    second = first + radius.sum(1) + gap + slack * share[:, 1]
    along = torch.stack([first, second], 1)
    lean = (torch.rand(number, generator=generator) - 0.5) * (second - first)
    across0 = radius[:, 0] + torch.rand(number, generator=generator) * (IMAGE_SIZE - 2 * radius[:, 0])
    across1 = torch.minimum(torch.maximum(across0 + lean, radius[:, 1]), IMAGE_SIZE - radius[:, 1])
    across = torch.stack([across0, across1], 1)
    alone = radius[:, :1] + torch.rand(number, 2, generator=generator) * (IMAGE_SIZE - 2 * radius[:, :1])
    vertical = (scenes.axis == 1)[:, None]
    centre = torch.stack([torch.where(vertical, across, along), torch.where(vertical, along, across)], 2)
    return torch.where((scenes.count == 1)[:, None, None], alone[:, None], centre)


def _signed_distance(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Distance in pixels to the outline of each shape (negative inside); near the outline it is close to Euclidean."""
    r = torch.hypot(x, y)
    triangle = torch.maximum(0.8660 * x.abs() - 0.5 * y, y) - 0.5 * radius
    arm, reach = 0.34 * radius, 0.98 * radius
    bars = [torch.maximum(a.abs() - reach, b.abs() - arm) for a, b in ((x, y), (y, x))]
    distances = {
        "circle": r - 0.93 * radius,
        "square": torch.maximum(x.abs(), y.abs()) - 0.82 * radius,
        "triangle": torch.where(radius > 0, triangle - 0.08 * radius, triangle),
        "diamond": (x.abs() + y.abs() - 1.05 * radius) * 0.7071,
        "cross": torch.minimum(*bars),
        "ring": (r - 0.72 * radius).abs() - 0.25 * radius,
    }
    stacked = torch.stack([distances[name] for name in SHAPES], 1)
    return stacked.gather(1, shape[:, None, None, None].expand(-1, 1, *x.shape[1:]))[:, 0]
