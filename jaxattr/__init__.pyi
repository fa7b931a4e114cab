"""What is public, for type checkers; `__init__.py` imports from here what is asked for."""

from . import diffusion as diffusion
from . import evaluation as evaluation
from . import language as language
from .batches import OneAtATimeWarning as OneAtATimeWarning
from .evaluation.lds import lds as lds
from .evaluation.outcomes import outcomes as outcomes
from .evaluation.retraining import retrain as retrain
from .evaluation.training import trainer as trainer
from .features import projections as projections
from .features.expectations import expectation as expectation
from .fitting.eigenbases import TruncationWarning as TruncationWarning
from .groups import by_layer as by_layer
from .groups import by_leaf as by_leaf
from .groups import by_regex as by_regex
from .index.budgets import plan as plan
from .index.building import build_index as build_index
from .index.index import ConvergenceWarning as ConvergenceWarning
from .index.index import Index as Index
from .index.index import NonFiniteWarning as NonFiniteWarning
from .index.opening import open_index as open_index
from .index.queries import contrast as contrast
from .index.queries import query_features as query_features
from .index.refining import astra as astra
from .inputs.data import without as without
from .kernels import absolute as absolute
from .kernels import relative as relative
from .linear_maps.declaring import linear_map as linear_map
from .methods.curvature import ekfac as ekfac
from .methods.curvature import eshampoo as eshampoo
from .methods.curvature import kfac as kfac
from .methods.curvature import logra as logra
from .methods.curvature import source as source
from .methods.describing import describe as describe
from .methods.influence import data_inf as data_inf
from .methods.influence import influence as influence
from .methods.inner_products import grad_cos as grad_cos
from .methods.inner_products import tracin as tracin
from .methods.method import Method as Method
from .methods.method import citation as citation
from .methods.method import featurizer as featurizer
from .methods.similarity import embedding as embedding
from .methods.trackstar import trackstar as trackstar
from .methods.trak import d_trak as d_trak
from .methods.trak import das as das
from .methods.trak import journey_trak as journey_trak
from .methods.trak import trak as trak
from .reports import report as report
from .scores.scoring import attributor as attributor
from .scores.scoring import contributions as contributions
from .scores.scoring import score as score
from .scores.scoring import self_influence as self_influence
from .scores.scoring import top_k as top_k
from .store.folder import StoreError as StoreError
from .unrolling.backward import unroll as unroll
from .unrolling.runs import TrainingRun as TrainingRun
from .unrolling.segments import score_segments as score_segments
from .weights.copies import noised as noised
from .weights.learning import learn_weights as learn_weights
from .weights.outcomes import Outcomes as Outcomes
from .weights.report import WeightWarning as WeightWarning

__version__: str

__all__ = [
    "ConvergenceWarning",
    "Index",
    "Method",
    "NonFiniteWarning",
    "OneAtATimeWarning",
    "Outcomes",
    "StoreError",
    "TrainingRun",
    "TruncationWarning",
    "WeightWarning",
    "__version__",
    "absolute",
    "astra",
    "attributor",
    "build_index",
    "by_layer",
    "by_leaf",
    "by_regex",
    "citation",
    "contrast",
    "contributions",
    "d_trak",
    "das",
    "data_inf",
    "describe",
    "diffusion",
    "ekfac",
    "embedding",
    "eshampoo",
    "evaluation",
    "expectation",
    "featurizer",
    "grad_cos",
    "influence",
    "journey_trak",
    "kfac",
    "language",
    "lds",
    "learn_weights",
    "linear_map",
    "logra",
    "noised",
    "open_index",
    "outcomes",
    "plan",
    "projections",
    "query_features",
    "relative",
    "report",
    "retrain",
    "score",
    "score_segments",
    "self_influence",
    "source",
    "top_k",
    "tracin",
    "trackstar",
    "trainer",
    "trak",
    "unroll",
    "without",
]
