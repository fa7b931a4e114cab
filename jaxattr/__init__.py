"""jaxattr: which training examples made the model do this?"""

from jaxattr import diffusion, evaluation, language
from jaxattr.evaluation.lds import lds
from jaxattr.evaluation.outcomes import outcomes
from jaxattr.evaluation.retraining import retrain
from jaxattr.evaluation.training import trainer
from jaxattr.features import projections
from jaxattr.features.expectations import expectation
from jaxattr.fitting.eigenbases import TruncationWarning
from jaxattr.groups import by_layer, by_leaf, by_regex
from jaxattr.index.budgets import plan
from jaxattr.index.building import build_index
from jaxattr.index.index import ConvergenceWarning, Index, NonFiniteWarning
from jaxattr.index.opening import open_index
from jaxattr.index.queries import query_features
from jaxattr.inputs.data import without
from jaxattr.kernels import absolute, relative
from jaxattr.methods.curvature import data_inf, ekfac, influence, kfac, logra, trackstar
from jaxattr.methods.describing import describe
from jaxattr.methods.inner_products import grad_cos, tracin
from jaxattr.methods.method import Method, citation, featurizer
from jaxattr.methods.trak import d_trak, das, journey_trak, trak
from jaxattr.reports import report
from jaxattr.scores.scoring import attributor, contributions, score, self_influence, top_k
from jaxattr.store import StoreError
from jaxattr.weights.copies import noised
from jaxattr.weights.learning import learn_weights
from jaxattr.weights.outcomes import Outcomes
from jaxattr.weights.report import WeightWarning

__version__ = "0.2.0"

__all__ = [
    "ConvergenceWarning",
    "Index",
    "Method",
    "NonFiniteWarning",
    "Outcomes",
    "StoreError",
    "TruncationWarning",
    "WeightWarning",
    "__version__",
    "absolute",
    "attributor",
    "build_index",
    "by_layer",
    "by_leaf",
    "by_regex",
    "citation",
    "contributions",
    "d_trak",
    "das",
    "data_inf",
    "describe",
    "diffusion",
    "ekfac",
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
    "self_influence",
    "top_k",
    "tracin",
    "trackstar",
    "trainer",
    "trak",
    "without",
]


def __dir__() -> list[str]:
    """What is public; importing a module also puts its name here, and most are internal."""
    return sorted(__all__)
