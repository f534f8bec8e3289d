"""Measures of how good pictures are: of one picture (Metric), or of a set of them beside another set (SetMetric)."""

from catimage_accel.quality.aesthetic import AestheticScore
from catimage_accel.quality.clip_score import CLIPScore, caption_accuracy, picks_caption
from catimage_accel.quality.cmmd import CMMD
from catimage_accel.quality.fid import FID, frechet_distance
from catimage_accel.quality.image_reward import ImageReward
from catimage_accel.quality.loading import METRICS, load_metric
from catimage_accel.quality.metric import Metric
from catimage_accel.quality.sets import ImageEmbedder, SetMetric
from catimage_accel.quality.sharpness import Sharpness

__all__ = [
    "CMMD",
    "FID",
    "METRICS",
    "AestheticScore",
    "CLIPScore",
    "ImageEmbedder",
    "ImageReward",
    "Metric",
    "SetMetric",
    "Sharpness",
    "caption_accuracy",
    "frechet_distance",
    "load_metric",
    "picks_caption",
]
