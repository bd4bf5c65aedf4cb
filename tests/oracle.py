"""Image GPT in NumPy, float64, from the variables of openai/image-gpt: independent of the package.

Written from the released code (src/model.py), in its order and with its names; slow and plain.
"""

import numpy as np


def variables(rng, layers, width, heads, vocabulary, length, classes=0) -> dict[str, np.ndarray]:
    """Random weights, norm gains too, of the checkpoint's names and shapes; float32 holds them."""
    size, shapes = width // heads, {}
    shapes |= {"wte": (vocabulary, width), "wpe": (length, width), "sos": (width,)}
    shapes |= {"wtet": (vocabulary, width), "ln_f/g": (width,)}
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
            shapes[f"h{i}/attn/{name}"] = (heads, size, width)
        shapes |= {f"h{i}/ln_1/g": (width,), f"h{i}/ln_2/g": (width,)}
        shapes |= {f"h{i}/mlp/c_fc/w": (width, 4 * width), f"h{i}/mlp/c_proj/w": (4 * width, width)}
    if classes:
        shapes["clf/wclf"] = (classes, width)
    scale = {1: 0.5, 2: 0.2, 3: 0.3}
    found = {name: scale[len(s)] * rng.standard_normal(s) for name, s in shapes.items()}
    found = {n: a + 1 if n.endswith("/g") else a for n, a in found.items()}
    return {n: a.astype(np.float32).astype(np.float64) for n, a in found.items()}


def forward(v: dict[str, np.ndarray], tokens: np.ndarray, shown: np.ndarray | None = None):
    """Logits [B, T, V], hidden states h^0 .. h^L, their normed forms n^0 .. n^L, class logits.

    With `shown` (1 or 0, [B, T]) it is the BERT variant: no start, no shift, no causal mask.
    """
    x, causal = v["wte"][tokens], shown is None
    if causal:
        start = np.broadcast_to(v["sos"], x[:, :1].shape)
        x = np.concatenate([start, x[:, :-1]], axis=1)
    else:
        x = x * shown[..., None]
    h = x + v["wpe"]
    hidden, normed, i = [h], [], 0
    while f"h{i}/ln_1/g" in v:
        n = norm(h, v[f"h{i}/ln_1/g"])
        normed.append(n)
        h = h + attention(v, f"h{i}/attn/", n, causal)
        up = norm(h, v[f"h{i}/ln_2/g"]) @ v[f"h{i}/mlp/c_fc/w"]
        h = h + (up / (1 + np.exp(-1.702 * up))) @ v[f"h{i}/mlp/c_proj/w"]
        hidden.append(h)
        i += 1
    final = norm(h, v["ln_f/g"])
    classes = final.mean(axis=1) @ v["clf/wclf"].T if "clf/wclf" in v else None
    return final @ v["wtet"].T, hidden, [*normed, final], classes


def norm(x, gain):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain


def attention(v, scope, x, causal):
    q, k, w = (np.einsum("bsf,hef->bhse", x, v[f"{scope}{n}_proj"]) for n in "qkv")
    scores = np.einsum("bhse,bhte->bhst", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("bhst,bhte->bhse", weights, w)
    return np.einsum("bhse,hef->bsf", mixed, v[f"{scope}c_proj"])


def loss(v, tokens, shown=None):
    """Nats per token; for BERT the mean over images of that over their tokens not shown."""
    logits = forward(v, tokens, shown)[0]
    top = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    nats = total - np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    if shown is None:
        return nats.mean()
    return ((nats * (1 - shown)).sum(axis=1) / (1 - shown).sum(axis=1)).mean()
