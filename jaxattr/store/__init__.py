"""Indexes on disk or in a bucket: the only package that touches either.

disk_rows TensorStore zarr3, one chunk per block of examples and host
arrays    scores and copies of features, in folders of their own
folder    manifests and ledgers, each written whole or not at all
lease     one writer at a time
seals     what each file of a finished index must be
state     what was fitted, through Orbax
"""
