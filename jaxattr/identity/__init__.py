"""What a value is, by its content: the same in another process, on another mesh, made anew.

arrays.py     digests of arrays and of the rows of batches, computed where they are
programs.py   a user's function as what it computes, with all that it closes over
values.py     frozen dataclasses and what they hold, as plain data

An index says what it was made from in these words, caches of compiled steps are keyed by them, and
features of queries carry them.
"""

from jaxattr.identity.arrays import LANES as LANES
from jaxattr.identity.arrays import digest_of as digest_of
from jaxattr.identity.arrays import digests_of_leaves as digests_of_leaves
from jaxattr.identity.arrays import mixed as mixed
from jaxattr.identity.arrays import row_digests as row_digests
from jaxattr.identity.arrays import sum_of_rows as sum_of_rows
from jaxattr.identity.programs import Program as Program
from jaxattr.identity.programs import program_of as program_of
from jaxattr.identity.values import Contents as Contents
from jaxattr.identity.values import describe as describe
from jaxattr.identity.values import digest as digest
from jaxattr.identity.values import function as function
from jaxattr.identity.values import traced as traced
