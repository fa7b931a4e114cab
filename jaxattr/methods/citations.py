"""BibTeX of the methods and of what they share: `citations.bib`, each entry below its name here."""

import importlib.resources

_ENTRIES = importlib.resources.files("jaxattr.methods").joinpath("citations.bib").read_text()

BIBTEX = dict(each.split("\n", 1) for each in _ENTRIES.strip().split("\n\n"))
