"""Indexes on disk or in a bucket: the only package that touches either.

rows             what rows of an index are, and those in memory
disk_rows        TensorStore zarr3, one chunk per block of examples and host
recomputed_rows  rows that are made anew each time they are read
compression      one byte per feature
ledger           which blocks are done
arrays           scores and copies of features, in folders of their own
folder           manifests and ledgers, each written whole or not at all
lease            one writer at a time
seals            what each file of a finished index must be
state            what was fitted, through Orbax (orbax_arrays)
"""
