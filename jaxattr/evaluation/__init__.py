"""Ground truth and metrics: is an attribution method right about this model?

retraining.py     train on many subsets at once
outcomes.py       small models on subsets, to learn weights from
training.py       a training function for those who have none
gains.py          what do learned weights gain on other queries?
removal.py        is the model worse without what scores name?
lds.py            do scores predict what the retrained models do?
mislabel.py       does self-influence find wrong labels?
heterogeneity.py  how right is each parameter group by itself?
tail_patch.py     does one more step on a proponent help the query?
damping_paths.py  indexes at several dampings, to choose one by what is above
given_scores.py   scores that were made elsewhere, as an index
retrieval.py      do the strongest proponents hold what the query asks for?
"""

from jaxattr.evaluation.damping_paths import damping_path as damping_path
from jaxattr.evaluation.gains import MeasuredGain as MeasuredGain
from jaxattr.evaluation.gains import measured_gain as measured_gain
from jaxattr.evaluation.given_scores import index_of_scores as index_of_scores
from jaxattr.evaluation.heterogeneity import group_lds as group_lds
from jaxattr.evaluation.lds import LDS as LDS
from jaxattr.evaluation.lds import Difference as Difference
from jaxattr.evaluation.lds import lds as lds
from jaxattr.evaluation.lds import lds_of_predictions as lds_of_predictions
from jaxattr.evaluation.lds import paired_difference as paired_difference
from jaxattr.evaluation.mislabel import flip_labels as flip_labels
from jaxattr.evaluation.mislabel import mislabel_auc as mislabel_auc
from jaxattr.evaluation.outcomes import outcomes as outcomes
from jaxattr.evaluation.removal import Fall as Fall
from jaxattr.evaluation.removal import Removal as Removal
from jaxattr.evaluation.removal import removal as removal
from jaxattr.evaluation.retraining import outputs as outputs
from jaxattr.evaluation.retraining import random_subsets as random_subsets
from jaxattr.evaluation.retraining import retrain as retrain
from jaxattr.evaluation.retrieval import hit_at_k as hit_at_k
from jaxattr.evaluation.retrieval import mean_interval as mean_interval
from jaxattr.evaluation.retrieval import mean_reciprocal_rank as mean_reciprocal_rank
from jaxattr.evaluation.retrieval import precision_at_k as precision_at_k
from jaxattr.evaluation.retrieval import ranks as ranks
from jaxattr.evaluation.retrieval import recall_at_k as recall_at_k
from jaxattr.evaluation.retrieval import strongest as strongest
from jaxattr.evaluation.tail_patch import tail_patch as tail_patch
from jaxattr.evaluation.training import trainer as trainer
from jaxattr.scores.subsets import subset_contributions as subset_contributions
from jaxattr.scores.subsets import subset_products as subset_products
