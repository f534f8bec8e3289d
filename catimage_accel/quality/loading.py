"""Metrics by name, as `catimage profile --metric` takes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from catimage_accel.quality.aesthetic import AestheticScore
from catimage_accel.quality.clip_score import CLIPScore
from catimage_accel.quality.image_reward import ImageReward
from catimage_accel.quality.sharpness import Sharpness

if TYPE_CHECKING:
    import torch

    from catimage_accel.quality.metric import Metric

METRICS = (CLIPScore.name, Sharpness.name, AestheticScore.name, ImageReward.name)


def load_metric(
    name: str,
    *,
    clip: str | Path | None = None,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Metric:
    """The metric called ``name``, one of ``METRICS``.

    "clip_score" needs ``clip`` (folder or hub id); "aesthetic" needs ``clip`` and ``weights``, the head's file;
    "image_reward" needs ``weights``, a folder or a hub id; "sharpness" needs neither. ValueError for another name and
    for what is missing; further errors as those metrics raise them.
    """
    needs = {CLIPScore.name: {"clip"}, AestheticScore.name: {"clip", "weights"}, ImageReward.name: {"weights"}}
    if name not in METRICS:
        raise ValueError(f"metric is {name!r}; accepted: {', '.join(METRICS)}")
    for needed, given in (("clip", clip), ("weights", weights)):
        if given is None and needed in needs.get(name, ()):
            raise ValueError(f"metric {name} needs {needed}, which is missing")
    if name == CLIPScore.name and clip is not None:
        return CLIPScore(clip, device=device)
    if name == AestheticScore.name and clip is not None and weights is not None:
        return AestheticScore(weights, clip, device=device)
    if name == ImageReward.name and weights is not None:
        return ImageReward(weights, device=device)
    return Sharpness()
