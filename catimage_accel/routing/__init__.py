"""Predicting from a prompt alone how well each candidate will draw it, and choosing by that and the cost."""

from catimage_accel.routing.calibration import Calibration
from catimage_accel.routing.contenders import BASELINES, READERS, contenders, default_embedder, default_tokens
from catimage_accel.routing.counts import CountFeatures
from catimage_accel.routing.curves import (
    Curve,
    best_single,
    deferral_curve,
    hull_curve,
    oracle_curve,
    quality_neutral_cost,
)
from catimage_accel.routing.embedders import Embedder, JointEmbedder, NGramEmbedder, TextEncoderEmbedder, with_counts
from catimage_accel.routing.estimates import Estimate
from catimage_accel.routing.evaluation import Evaluation, evaluate, judge
from catimage_accel.routing.held_out import HeldOut, predict_held_out, training_for
from catimage_accel.routing.kernel import KernelRouter
from catimage_accel.routing.kinds import prompt_kinds
from catimage_accel.routing.knn import KNNRouter
from catimage_accel.routing.load import LoadTradeoff
from catimage_accel.routing.loading import load_router
from catimage_accel.routing.minilm import MiniLMEmbedder, minilm_installed
from catimage_accel.routing.pacing import BudgetPacer
from catimage_accel.routing.plots import plot_curves
from catimage_accel.routing.policy import choose, choose_reaching, choose_within_budget, tradeoff_for_budget
from catimage_accel.routing.ratings import Ratings
from catimage_accel.routing.reading import mean_scores, read_csv, read_parquet
from catimage_accel.routing.remembering import RememberingEmbedder
from catimage_accel.routing.routers import ConstantRouter, OracleRouter, RandomMixRouter, Router, check_candidates
from catimage_accel.routing.table import ScoreTable
from catimage_accel.routing.tokens import TokenEmbedder
from catimage_accel.routing.transformer import TransformerRouter
from catimage_accel.routing.wording import WordingFeatures

__all__ = [
    "BASELINES",
    "READERS",
    "BudgetPacer",
    "Calibration",
    "ConstantRouter",
    "CountFeatures",
    "Curve",
    "Embedder",
    "Estimate",
    "Evaluation",
    "HeldOut",
    "JointEmbedder",
    "KNNRouter",
    "KernelRouter",
    "LoadTradeoff",
    "MiniLMEmbedder",
    "NGramEmbedder",
    "OracleRouter",
    "RandomMixRouter",
    "Ratings",
    "RememberingEmbedder",
    "Router",
    "ScoreTable",
    "TextEncoderEmbedder",
    "TokenEmbedder",
    "TransformerRouter",
    "WordingFeatures",
    "best_single",
    "check_candidates",
    "choose",
    "choose_reaching",
    "choose_within_budget",
    "contenders",
    "default_embedder",
    "default_tokens",
    "deferral_curve",
    "evaluate",
    "hull_curve",
    "judge",
    "load_router",
    "mean_scores",
    "minilm_installed",
    "oracle_curve",
    "plot_curves",
    "predict_held_out",
    "prompt_kinds",
    "quality_neutral_cost",
    "read_csv",
    "read_parquet",
    "tradeoff_for_budget",
    "training_for",
    "with_counts",
]
