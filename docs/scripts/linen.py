"""Which handwritten digits taught a Flax linen classifier?"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import jaxattr as ja


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):  # [b, 64] -> [b, 10]
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


digits = load_digits()
pixels, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
train = {"x": pixels[:800], "y": labels[:800]}
queries = {"x": pixels[1000:1100], "y": labels[1000:1100]}

model = Net()


def loss(params, example, key):  # one example, without a batch axis
    logits = model.apply({"params": params}, example["x"][None])[0]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


@jax.jit
def step(params, state, rows):
    def mean_loss(params):
        batch = jax.tree.map(lambda x: x[rows], train)
        return jax.vmap(loss, (None, 0, None))(params, batch, None).mean()

    updates, state = optimizer.update(jax.grad(mean_loss)(params), state)
    return optax.apply_updates(params, updates), state


optimizer = optax.adam(1e-2)
params = model.init(jax.random.key(0), train["x"][:1])["params"]
state = optimizer.init(params)
for number in range(300):
    rows = jax.random.randint(jax.random.key(number), (64,), 0, 800)
    params, state = step(params, state, rows)

index = ja.build_index(ja.ekfac(loss), params, train)
top = ja.top_k(index, queries, k=5)

for query in range(5):
    ids = top.ids[query]
    print(f"a {queries['y'][query]} was taught by {train['y'][ids].tolist()}, ids {ids.tolist()}")
