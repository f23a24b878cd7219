"""CLIP-shapes: a small CLIP (arXiv:2103.00020) in open_clip's format for pictures and captions of `shapes`, trained apart from teachers.

It sees scenes of the combinations that training sees, never those held out. In every batch each picture also meets captions that
differ from its own in one attribute: without them a contrastive model learns which words occur and not what they belong to.
It may serve as a reward (`MethodInfo.rewards`), and then scores nothing of that run.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from ..api import external
from ..data.shapes import (
    ANCHORS,
    BACKGROUNDS,
    COLOURS,
    LEFT_OPEN,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIZE,
    Scene,
    draw_captions,
    draw_scenes,
    fits,
    render,
    words,
)
from ..errors import BadFileError, UsageError
from ..randomness import generator_for, mix, name_key
from ..torchvision_repair import repair_torchvision

FOLDER = Path(__file__).parent / "weights" / "clip-shapes"
FILE = "network.safetensors"
NAME = "clip-shapes"
LENGTH = 18  # tokens of a caption, the first and the last included
WIDTH = 96  # of the space that pictures and captions share
VISION = {"layers": (1, 1, 1, 1), "width": 12, "head_width": 48, "image_size": SIZE}  # a ResNet: it learns faster than a transformer here
TEXT = {"context_length": LENGTH, "width": 64, "heads": 4, "layers": 2}
BATCH, NEAR = 96, 2  # pictures in a batch; captions that differ in one attribute, for each
RATE, WARM_UP = 2e-3, 100
CHUNK = 250
PREPROCESSING = ("uint8 pictures 32 x 32", "x / 127.5 - 1")


WORDS = tuple(words())
START, END = 1, len(WORDS) + 2  # 0 fills up; open_clip reads a caption out at its largest token, so that the end is the last


def tokenize(captions: Sequence[str]) -> Tensor:
    """Tokens (n, 18) of captions: a number a word, case and commas aside. Raises UsageError for another word or a caption too long."""
    numbers = {word: k + 2 for k, word in enumerate(WORDS)}
    tokens = torch.zeros(len(captions), LENGTH, dtype=torch.long)
    for row, caption in zip(tokens, captions, strict=True):
        words = re.findall(r"[^\s,.]+", caption.lower())
        foreign = [word for word in words if word not in numbers]
        if foreign:
            raise UsageError(f"{NAME} knows the {len(WORDS)} words of `shapes` captions only, not {foreign[0]!r} in {caption!r}")
        if len(words) > LENGTH - 2:
            raise UsageError(f"{NAME} reads captions of at most {LENGTH - 2} words and {caption!r} has {len(words)}")
        row[: len(words) + 2] = torch.tensor([START, *(numbers[word] for word in words), END])
    return tokens


def changed(scene: Scene) -> dict[str, list[Scene]]:
    """By attribute that is said: the scenes that differ from this one in it alone, one word or (binding: colours exchanged) one pair."""
    said = scene.said
    found: dict[str, list[Scene]] = {}
    if said.background:
        found["background"] = [replace(scene, background=b) for b in BACKGROUNDS if b != scene.background]
    colours, shapes = zip(*scene.objects, strict=True)
    for k, (colour, shape) in enumerate(scene.objects):
        if said.objects[k][0]:
            found.setdefault("colour", []).extend(_with_object(scene, k, (c, shape)) for c in COLOURS if c not in colours)
        found.setdefault("object", []).extend(_with_object(scene, k, (colour, s)) for s in SHAPES if s not in shapes)
    if said.size:
        found["size"] = [replace(scene, size=size) for size in ("small", "large") if size != scene.size]
    if said.place:
        name, options = ("position", ANCHORS) if scene.kind == "one" else ("relation", RELATIONS)
        found[name] = [replace(scene, place=place) for place in options if place != scene.place]
    if scene.kind == "two" and all(colour for colour, _ in said.objects):
        found["binding"] = [replace(scene, objects=tuple(zip(colours[::-1], shapes, strict=True)))]
    if scene.kind == "count":
        found["count"] = [replace(scene, number=number) for number in NUMBERS if number != scene.number]
    return found


def _with_object(scene: Scene, k: int, pair: tuple[str, str]) -> Scene:
    return replace(scene, objects=(*scene.objects[:k], pair, *scene.objects[k + 1 :]))


# ---------------------------------------------------------------------- use


def build() -> nn.Module:
    """The untrained network, an `open_clip.model.CLIP`."""
    repair_torchvision()
    from open_clip.model import CLIP  # slow to import, and optional

    return CLIP(WIDTH, dict(VISION), TEXT | {"vocab_size": END + 1})


@torch.no_grad()
def image_embeddings(images: Tensor, net: nn.Module | None = None) -> Tensor:
    """Unit vectors (n, 96) of uint8 pictures (n, 3, 32, 32)."""
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise UsageError(f"{NAME} sees uint8 pictures (n, 3, {SIZE}, {SIZE}), not {images.dtype} of shape {tuple(images.shape)}")
    clip: Any = load_clip() if net is None else net
    return torch.cat([clip.encode_image(_scaled(chunk), normalize=True) for chunk in images.cpu().split(CHUNK)])


@torch.no_grad()
def caption_embeddings(captions: Sequence[str], net: nn.Module | None = None) -> Tensor:
    """Unit vectors (n, 96) of captions."""
    clip: Any = load_clip() if net is None else net
    return torch.cat([clip.encode_text(chunk, normalize=True) for chunk in tokenize(captions).split(CHUNK)])


def cosines(images: Tensor, captions: Sequence[str], net: nn.Module | None = None) -> Tensor:
    """Cosine (n,) of each picture, uint8 (n, 3, 32, 32), with its caption. Raw: neither multiplied nor clamped."""
    if len(images) != len(captions):
        raise UsageError(f"{len(images)} pictures have {len(captions)} captions: give one for each")
    return (image_embeddings(images, net) * caption_embeddings(captions, net)).sum(1)


@cache
def load_clip(folder: Path = FOLDER) -> nn.Module:
    """The shipped network in float32, frozen. Raises BadFileError if its weights do not match the card, or its words those of `shapes`."""
    path = folder / FILE
    try:
        content = path.read_bytes()
        card = json.loads((folder / "card.json").read_text())
        stated, words = card["sha256"], tuple(card["words"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(f"{folder}: {NAME} cannot be read ({error}): install distillbench again") from error
    if sha256(content).hexdigest() != stated:
        raise BadFileError(f"{path}: checksum differs from its card, so the file is damaged or changed: install distillbench again")
    if words != WORDS:
        raise BadFileError(f"{folder}: {NAME} was trained on captions of other words: distillbench zoo train {NAME}")
    net = build()
    try:
        net.load_state_dict({name: tensor.float() for name, tensor in safetensors.torch.load(content).items()})
    except (SafetensorError, RuntimeError) as error:
        raise BadFileError(f"{path}: not the weights of {NAME}: install distillbench again") from error
    external(net)
    return net.eval()


def clip_sha256(folder: Path = FOLDER) -> str:
    """The checksum that the card states: part of the identity of every score of this network."""
    return str(json.loads((folder / "card.json").read_text())["sha256"])


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


# ---------------------------------------------------------------------- its own scores and its training


def own_scores(net: nn.Module, *, held_out: bool, n: int = 1000, among: int = 100) -> dict[str, Any]:
    """On n fresh scenes: how often the nearest of `among` captions is a true one, and by attribute, how often the scene's own caption
    beats one with that attribute changed (chance: 0.5)."""
    generator = generator_for(0, f"{NAME}/scores", int(held_out))
    scenes = draw_scenes(n, generator, held_out=held_out, left_open=LEFT_OPEN)
    images = image_embeddings(render(scenes, generator), net)
    captions = draw_captions(scenes, generator)
    own = (images * caption_embeddings(captions, net)).sum(1)
    won: dict[str, list[float]] = {}
    for attribute in ("object", "colour", "size", "position", "relation", "binding", "count", "background"):
        rows = [i for i, scene in enumerate(scenes) if changed(scene).get(attribute)]
        wrong = draw_captions([_one_of(changed(scenes[i])[attribute], generator) for i in rows], generator)
        won[attribute] = (own[rows] > (images[rows] * caption_embeddings(wrong, net)).sum(1)).tolist()
    nearest = []
    for start in range(0, n - among + 1, among):
        part = slice(start, start + among)
        likeness = images[part] @ caption_embeddings(captions[part], net).T
        true = fits(scenes[part], scenes[part]).T
        nearest += true[torch.arange(among), likeness.argmax(1)].tolist()
    return {"nearest_of_100": _share(nearest), "beats_one_changed": {name: _share(hits) for name, hits in won.items()}}


def _share(hits: list) -> float:
    return round(sum(hits) / len(hits), 4)


def _one_of(options: list, generator: torch.Generator) -> Any:
    return options[int(torch.randint(len(options), (), generator=generator))]


def _near(scene: Scene, generator: torch.Generator) -> list[Scene]:
    """`NEAR` scenes, each changed in one attribute, the attributes different; none that is held out. The scene itself where all are."""
    seen = {name: [other for other in options if not other.held_out] for name, options in changed(scene).items()}
    names = [name for name, options in seen.items() if options]
    order = torch.randperm(len(names), generator=generator).tolist()
    if not names:
        return [scene] * NEAR
    return [_one_of(seen[names[order[k % len(order)]]], generator) for k in range(NEAR)]


def contrastive_loss(net: Any, generator: torch.Generator) -> Tensor:
    """Of a fresh batch: pictures against all captions, the changed ones among them, and captions against pictures; both cross-entropies.

    Half of the captions say everything: which colour belongs to which shape is learnt where both are said, of both things.
    Captions of other rows that are true of a picture are left out there.
    """
    scenes = draw_scenes(BATCH // 2, generator) + draw_scenes(BATCH // 2, generator, left_open=LEFT_OPEN)
    near = [other for scene in scenes for other in _near(scene, generator)]
    tokens = tokenize(draw_captions(scenes + near, generator))
    images = net.encode_image(_scaled(render(scenes, generator)), normalize=True)
    logits = net.logit_scale.exp() * images @ net.encode_text(tokens, normalize=True).T
    true = fits(scenes + near, scenes).T
    logits = logits.masked_fill(true.fill_diagonal_(False), -math.inf)
    target = torch.arange(BATCH)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :BATCH].T, target)) / 2


def train(folder: Path, progress: Callable[[str], None], *, steps: int = 3000, seed: int = 0) -> dict:
    """Train the network (AdamW, cosine), save it in half precision with its card into `folder` and return the card."""
    start = time.perf_counter()
    generator = generator_for(seed, f"{NAME}/train", 0)
    with torch.random.fork_rng(devices=[]):  # open_clip draws its weights from the global generator
        torch.manual_seed(mix(seed, name_key(f"{NAME}/weights")))
        net: Any = build()
    decayed = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in net.parameters() if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.02, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = contrastive_loss(net, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            net.logit_scale.clamp_(max=math.log(100))
        if (step + 1) % 100 == 0:
            progress(f"step {step + 1} of {steps}, loss {loss.item():.4f}")
    return _save(net, folder, steps=steps, seed=seed, seconds=time.perf_counter() - start)


def _save(net: nn.Module, folder: Path, *, steps: int, seed: int, seconds: float) -> dict:
    halves = {name: tensor.detach().half().contiguous() for name, tensor in net.state_dict().items()}
    net.load_state_dict({name: tensor.float() for name, tensor in halves.items()})  # what is scored is what is kept
    net.eval()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(halves, folder / FILE)
    card = {
        "name": NAME,
        "what": "picture and caption embeddings of the track shapes, in open_clip's format (float16, used in float32)",
        "recipe": f"distillbench zoo train {NAME} (seed {seed}, {steps} steps of {BATCH} scenes with {NEAR} changed captions each)",
        "data": "scenes of distillbench.data.shapes, rendered afresh, held-out combinations left out of pictures and captions",
        "parameters": sum(p.numel() for p in net.parameters()),
        "words": list(WORDS),
        "held_out": own_scores(net, held_out=True),
        "seen_combinations": own_scores(net, held_out=False),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "licence": "Apache-2.0; trained on rendered scenes",
        "sha256": sha256((folder / FILE).read_bytes()).hexdigest(),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card
