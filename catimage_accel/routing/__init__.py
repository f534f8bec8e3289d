"""Predicting from a prompt alone how well each candidate will draw it, and choosing by that and the cost."""

from catimage_accel.routing.counts import CountFeatures
from catimage_accel.routing.curves import (
    Curve,
    best_single,
    deferral_curve,
    hull_curve,
    oracle_curve,
    quality_neutral_cost,
)
from catimage_accel.routing.embedders import Embedder, JointEmbedder, NGramEmbedder, TextEncoderEmbedder
from catimage_accel.routing.evaluation import Estimate, Evaluation, evaluate, judge
from catimage_accel.routing.kernel import KernelRouter
from catimage_accel.routing.knn import KNNRouter
from catimage_accel.routing.loading import load_router
from catimage_accel.routing.minilm import MiniLMEmbedder, minilm_installed
from catimage_accel.routing.plots import plot_curves
from catimage_accel.routing.policy import choose, choose_within_budget, tradeoff_for_budget
from catimage_accel.routing.routers import ConstantRouter, OracleRouter, RandomMixRouter, Router, check_candidates
from catimage_accel.routing.table import ScoreTable
from catimage_accel.routing.transformer import TransformerRouter
from catimage_accel.routing.wording import WordingFeatures

__all__ = [
    "ConstantRouter",
    "CountFeatures",
    "Curve",
    "Embedder",
    "Estimate",
    "Evaluation",
    "JointEmbedder",
    "KNNRouter",
    "KernelRouter",
    "MiniLMEmbedder",
    "NGramEmbedder",
    "OracleRouter",
    "RandomMixRouter",
    "Router",
    "ScoreTable",
    "TextEncoderEmbedder",
    "TransformerRouter",
    "WordingFeatures",
    "best_single",
    "check_candidates",
    "choose",
    "choose_within_budget",
    "deferral_curve",
    "evaluate",
    "hull_curve",
    "judge",
    "load_router",
    "minilm_installed",
    "oracle_curve",
    "plot_curves",
    "quality_neutral_cost",
    "tradeoff_for_budget",
]
