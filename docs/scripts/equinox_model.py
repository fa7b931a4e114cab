"""Which examples taught an Equinox model?"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import jaxattr as ja

x = jax.random.normal(jax.random.key(0), (400, 8))
y = jnp.argmax(x[:, :3], axis=1)  # the largest of the first three numbers
train = {"x": x[:300], "y": y[:300]}
queries = {"x": x[300:], "y": y[300:]}

model = eqx.nn.MLP(in_size=8, out_size=3, width_size=32, depth=2, key=jax.random.key(1))
params, static = eqx.partition(model, eqx.is_inexact_array)  # what is trained, and the rest


def loss(params, example, key):  # one example, without a batch axis
    logits = eqx.combine(params, static)(example["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


@jax.jit
def step(params, state):
    def mean_loss(params):
        return jax.vmap(loss, (None, 0, None))(params, train, None).mean()

    updates, state = optimizer.update(jax.grad(mean_loss)(params), state)
    return optax.apply_updates(params, updates), state


optimizer = optax.adam(1e-2)
state = optimizer.init(params)
for _ in range(200):
    params, state = step(params, state)

index = ja.build_index(ja.ekfac(loss), params, train)
top = ja.top_k(index, queries, k=5)

for query in range(5):
    ids = top.ids[query]
    print(f"class {queries['y'][query]} was taught by {train['y'][ids].tolist()}")
