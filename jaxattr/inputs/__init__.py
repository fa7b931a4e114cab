"""What users pass, looked at before anything is traced or allocated.

wording.py      shapes and values in few words, for messages
data.py         data sets: arrays, lists of examples, random-access sources
arrays.py       what their arrays may hold, and how examples are stacked
parameters.py   parameters and checkpoints
outputs.py      losses and other functions of one example
matching.py     queries beside training examples
traces.py       what a traced function reads, and where its noise comes from

Every message says what was got and what to write instead, in at most six lines.
"""
