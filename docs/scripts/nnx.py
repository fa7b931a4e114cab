"""Which document taught a Flax nnx language model a fact?"""

import itertools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxattr as ja
from jaxattr import language

# Facts that the model can know from one document alone.
NAMES = "ada ben cleo dora emil fay gus hana ivan june karl lena mina nico olga paul".split()
PLACES = "athens bergen cairo dakar essen faro genoa hanoi".split()
facts = [(name, PLACES[5 * number % 8]) for number, name in enumerate(NAMES)]
texts = [f"{name} lives in {place} ." for name, place in facts]
texts += [f"{name} does not like {other} ." for name, other in itertools.pairwise(NAMES)]

words = sorted({word for text in texts for word in text.split()})
token = {word: number + 1 for number, word in enumerate(words)}  # 0 is padding
documents = [[0] + [token[word] for word in text.split()] for text in texts]
train = language.rows(documents, 6, vocabulary=len(token) + 1)
# "ada lives in" is given, and only "athens" is asked for.
asked = [[0] + [token[word] for word in f"{n} lives in {p}".split()] for n, p in facts]
queries = language.rows(asked, 6, vocabulary=len(token) + 1, prompts=[4] * len(asked))


class Model(nnx.Module):
    """One layer of causal attention, and a perceptron."""

    def __init__(self, vocabulary, length, width, rngs):
        self.words = nnx.Embed(vocabulary, width, rngs=rngs)
        self.places = nnx.Embed(length, width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        self.out = nnx.Linear(4 * width, vocabulary, rngs=rngs)

    def __call__(self, ids):  # [t] -> [t, vocabulary]
        x = self.words(ids) + self.places(jnp.arange(len(ids)))
        x = x + self.attention(x, mask=nnx.make_causal_mask(ids))
        return self.out(nnx.gelu(self.hidden(x)))


model = Model(len(token) + 1, 6, 32, nnx.Rngs(0))
graph, params, rest = nnx.split(model, nnx.Param, ...)
loss = language.loss(lambda params, row: nnx.merge(graph, params, rest)(row["inputs"]))


@jax.jit
def step(params, state):
    def mean_loss(params):
        return jax.vmap(loss, (None, 0, None))(params, train, None).mean()

    updates, state = optimizer.update(jax.grad(mean_loss)(params), state)
    return optax.apply_updates(params, updates), state


optimizer = optax.adam(3e-3)
state = optimizer.init(params)
checkpoints = []
for number in range(1, 101):
    params, state = step(params, state)
    if number in (60, 100):  # one on the way, and the last
        checkpoints.append(params)

method = ja.ekfac(loss, mask=lambda row: row["mask"])  # padding has no part in its covariances
index = ja.build_index(method, checkpoints, train)
top = ja.top_k(index, queries, k=3)

for query in range(5):
    print(f"{' '.join(facts[query])}: taught by", [texts[int(i)] for i in top.ids[query]])
found = (top.ids[:, 0] == jnp.arange(len(facts))).mean()
print(f"the document that states the fact is first for {found:.0%} of the facts")
