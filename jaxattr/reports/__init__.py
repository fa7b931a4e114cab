"""The report: a page to look at, with queries beside the training examples that did it.

report.py     what the user calls: finds, reads and writes
examples.py   what is shown of one example: a picture, tokens, a text, a table
pictures.py   pixels as small PNG files, within a budget
tokens.py     a score, split over the tokens of both sides
facts.py      what the scores are: method, weights, gain, warnings, provenance
cards.py      queries as HTML
page.py       the page: page.html, filled in; page.css and page.js lie beside it
"""

from jaxattr.reports.report import report as report
