"""The command `jaxattr`: parses, calls the library, prints. No attribution is done here.

tasks         a Python file that names what is attributed
failures      errors and warnings as lines, and exit codes
printing      results as text or as one JSON document
options       what several commands share
indexing      describe, plan, build
attributing   weights, top, report, lds
inspecting    info, verify, export
starting      new
"""
