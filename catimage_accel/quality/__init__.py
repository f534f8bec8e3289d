"""Measures of how good a picture is, under one protocol."""

from catimage_accel.quality.clip_score import CLIPScore, caption_accuracy
from catimage_accel.quality.metric import Metric
from catimage_accel.quality.sharpness import Sharpness

__all__ = ["CLIPScore", "Metric", "Sharpness", "caption_accuracy"]
