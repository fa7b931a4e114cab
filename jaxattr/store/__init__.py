"""Indexes on disk or in a bucket: the only package that touches either.

disk_rows TensorStore zarr3, one chunk per block of examples and host
arrays    scores and copies of features, in folders of their own
folder    manifests and ledgers, each written whole or not at all
lease     one writer at a time
seals     what each file of a finished index must be
state     what was fitted, through Orbax
"""

from jaxattr.store.arrays import copy_array as copy_array
from jaxattr.store.arrays import finish_scores as finish_scores
from jaxattr.store.arrays import save_rows as save_rows
from jaxattr.store.arrays import score_array as score_array
from jaxattr.store.arrays import write_scores as write_scores
from jaxattr.store.disk_rows import DiskRows as DiskRows
from jaxattr.store.folder import Folder as Folder
from jaxattr.store.folder import StoreError as StoreError
from jaxattr.store.folder import malformed as malformed
from jaxattr.store.folder import on_first_process as on_first_process
from jaxattr.store.folder import reading as reading
from jaxattr.store.lease import Lease as Lease
from jaxattr.store.ledger import Ledger as Ledger
from jaxattr.store.ledger import finished as finished
from jaxattr.store.recomputed_rows import RecomputedRows as RecomputedRows
from jaxattr.store.recomputed_rows import kept_layout as kept_layout
from jaxattr.store.seals import SEALS as SEALS
from jaxattr.store.seals import Seals as Seals
from jaxattr.store.seals import load_seals as load_seals
from jaxattr.store.seals import save_seals as save_seals
from jaxattr.store.state import load_state as load_state
from jaxattr.store.state import save_state as save_state
