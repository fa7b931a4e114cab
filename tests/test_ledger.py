"""What is counted as finished, and how blocks are gone through."""

from jaxattr.store import rows
from jaxattr.store.folder import Folder
from jaxattr.store.ledger import Ledger, finished


def test_ledger_counts_what_all_processes_finished(tmp_path):
    folder = Folder(tmp_path)
    ledgers = [Ledger(folder, i, 2) for i in range(2)]
    for ledger in ledgers[::-1]:
        ledger.open(lambda name: None)
    ledgers[0].mark("features/0", 5)
    assert finished(folder) == {}  # the other has said nothing
    ledgers[1].mark("features/0", 3)
    assert finished(folder) == {"features/0": 3}
    later = Ledger(folder, 0, 1)
    later.open(lambda name: None)
    assert later.done("features/0") == 3 and folder.names("ledger/process") == []
    later.open(lambda name: None, limit=2)
    assert finished(folder) == {"features/0": 2}


def test_slabs_hold_every_block_once():
    for blocks in range(1, 9):
        for count in range(1, blocks + 1):
            seen = [
                start + i
                for start, fresh in rows.slab_starts(blocks, count)
                for i in range(fresh, count)
            ]
            assert seen == list(range(blocks))
