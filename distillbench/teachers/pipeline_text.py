"""Prompts -> what a pipeline's denoiser is conditioned on, through the pipeline's own text encoders.

A function for each family: it encodes prompts into fields (n, ...), always padded to one length, so that an embedding does not
depend on the prompts beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Fields = dict[str, Tensor]
KEPT = 4096  # distinct prompts, beyond which the oldest are forgotten: SANA's take megabytes each
BATCH = 16  # prompts are encoded in batches of exactly this size, so that the size of a batch cannot show in the last digits


@dataclass(frozen=True)
class TextFamily:
    """encode(pipeline, prompts, settings) -> fields.  null(pipeline, negative, settings) -> fields of one prompt.

    too_long(pipeline, prompt, settings): whether the encoder would cut it.  settings: what distillbench.json of the folder says.
    """

    encode: Callable[[Any, list[str], Mapping[str, Any]], Fields]
    null: Callable[[Any, str, Mapping[str, Any]], Fields]
    too_long: Callable[[Any, str, Mapping[str, Any]], bool]


class TextStore:
    """Embeddings of the distinct prompts met last, in memory on the CPU."""

    def __init__(self, pipeline: Any, family: TextFamily, settings: Mapping[str, Any]):
        self._pipeline, self._family, self._settings = pipeline, family, settings
        self._fields: dict[str, Fields] = {}
        self._nulls: dict[str, Fields] = {}

    def fields(self, prompts: Sequence[str]) -> Fields:
        """The fields (n, ...) of these prompts."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._fields]
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            full = part + [part[-1]] * (BATCH - len(part))
            encoded = self._family.encode(self._pipeline, full, self._settings)
            for row, prompt in enumerate(part):
                self._fields[prompt] = {name: value[row].detach().cpu().clone() for name, value in encoded.items()}
        names = self._fields[prompts[0]] if prompts else {}
        found = {name: torch.stack([self._fields[prompt][name] for prompt in prompts]) for name in names}
        for prompt in list(self._fields)[:-KEPT]:
            del self._fields[prompt]
        return found

    def null(self, negative: str) -> Fields:
        """The fields of one negative prompt, without the batch."""
        if negative not in self._nulls:
            encoded = self._family.null(self._pipeline, negative, self._settings)
            self._nulls[negative] = {name: value[0].detach().cpu().clone() for name, value in encoded.items()}
        return self._nulls[negative]

    def forget(self) -> None:
        """Drop what was kept of prompts."""
        self._fields.clear()

    def too_long(self, prompts: Sequence[str]) -> list[int]:
        """Positions of the prompts that the encoder would cut."""
        return [i for i, prompt in enumerate(prompts) if self._family.too_long(self._pipeline, prompt, self._settings)]


def _tokens(tokens: Tensor) -> Fields:
    return {"tokens": tokens.float(), "mask": torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)}


def _token_count(tokenizer: Any, prompt: str) -> int:
    return len(tokenizer(prompt, truncation=False, padding=False, verbose=False).input_ids)


def _sd(pipeline: Any, prompts: list[str], _settings: Mapping[str, Any]) -> Fields:
    # The U-Nets attend to all tokens, those of the padding included, as they were trained.
    return _tokens(pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, False)[0])


def _sd_null(pipeline: Any, negative: str, settings: Mapping[str, Any]) -> Fields:
    return _sd(pipeline, [negative] * BATCH, settings)


def _sd_too_long(pipeline: Any, prompt: str, _settings: Mapping[str, Any]) -> bool:
    return _token_count(pipeline.tokenizer, prompt) > pipeline.tokenizer.model_max_length


def _time_ids(pipeline: Any, n: int, like: Tensor) -> Tensor:
    """Original size, crop and target size (n, 6) of an uncropped picture, as the pipeline's own call has them by default."""
    sides = pipeline.unet.config.sample_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    size = (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor)
    return torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=like.device).expand(n, 6)


def _sdxl(pipeline: Any, prompts: list[str], _settings: Mapping[str, Any]) -> Fields:
    tokens, _, pooled, _ = pipeline.encode_prompt(prompts, device=pipeline.text_encoder_2.device, do_classifier_free_guidance=False)
    return {**_tokens(tokens), "text_embeds": pooled.float(), "time_ids": _time_ids(pipeline, len(prompts), tokens)}


def _sdxl_null(pipeline: Any, negative: str, _settings: Mapping[str, Any]) -> Fields:
    """No negative prompt is zeros where the pipeline's config says so (`force_zeros_for_empty_prompt`)."""
    _, tokens, _, pooled = pipeline.encode_prompt(
        [""], device=pipeline.text_encoder_2.device, negative_prompt=[negative] if negative else None
    )
    return {**_tokens(tokens), "text_embeds": pooled.float(), "time_ids": _time_ids(pipeline, 1, tokens)}


def _sdxl_too_long(pipeline: Any, prompt: str, _settings: Mapping[str, Any]) -> bool:
    return any(_token_count(each, prompt) > each.model_max_length for each in (pipeline.tokenizer, pipeline.tokenizer_2) if each)


def _sana_settings(pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The length of a caption and the instruction before it: the folder's, or what the pipeline's own call takes by default."""
    defaults = inspect.signature(type(pipeline).__call__).parameters
    names = ("max_sequence_length", "complex_human_instruction")
    return {name: settings.get(name, defaults[name].default) for name in names}


def _sana(pipeline: Any, prompts: list[str], settings: Mapping[str, Any]) -> Fields:
    own = _sana_settings(pipeline, settings)
    options = {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in _names(pipeline.encode_prompt) else {}
    tokens, mask = pipeline.encode_prompt(prompts, device=pipeline.text_encoder.device, **options, **own)[:2]
    return {"tokens": tokens.float(), "mask": mask.to(torch.int64)}


def _sana_null(pipeline: Any, negative: str, settings: Mapping[str, Any]) -> Fields:
    """A negative prompt is encoded without the instruction."""
    return _sana(pipeline, [negative] * BATCH, {**_sana_settings(pipeline, settings), "complex_human_instruction": None})


def _sana_too_long(pipeline: Any, prompt: str, settings: Mapping[str, Any]) -> bool:
    own = _sana_settings(pipeline, settings)
    text = pipeline._text_preprocessing(prompt)[0]
    instruction, length = own["complex_human_instruction"], own["max_sequence_length"]
    if instruction:
        start = "\n".join(instruction)
        return _token_count(pipeline.tokenizer, start + text) > len(pipeline.tokenizer.encode(start)) + length - 2
    return _token_count(pipeline.tokenizer, text) > length


def _names(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


SD = TextFamily(_sd, _sd_null, _sd_too_long)
SDXL = TextFamily(_sdxl, _sdxl_null, _sdxl_too_long)
SANA = TextFamily(_sana, _sana_null, _sana_too_long)
