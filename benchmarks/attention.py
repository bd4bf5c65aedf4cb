"""Causal attention on this machine's CPU, the plain form beside the blocked one.

Command:   python benchmarks/attention.py
One core:  taskset -c 0 python benchmarks/attention.py

Both forms take turns in one process, so that whatever else the machine does meets both. Prints the
medians as a table, and the same as one JSON line.
"""

import json
import os
import statistics
import time

import jax
import jax.numpy as jnp

from gptv_jax.model import attention

SHAPES = [(8, 1024, 2, 32), (4, 1024, 8, 32)]  # B, T, H, K
ROUNDS = 9


def plain(q, k, v):
    """All scores at once, with a triangular mask."""
    return attention.attention(q, k, v, jnp.tri(q.shape[1], dtype=bool))


def seconds(functions: dict, inputs: tuple) -> dict[str, float]:
    """Median time of each function, all of them called once a round, after one that compiles."""
    times = {name: [] for name in functions}
    for round_ in range(ROUNDS + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    """Measures every shape, forward and forward with backward."""
    forms = {"plain": plain, "blocked": lambda q, k, v: attention.blocked_attention(q, k, v)}
    passes = {
        "forward": lambda form: jax.jit(lambda q, k, v, _: form(q, k, v)),
        "forward+backward": lambda form: jax.jit(lambda q, k, v, g: jax.vjp(form, q, k, v)[1](g)),
    }
    rows = []
    print(f"{'shape':22}{'pass':18}{'plain ms':>10}{'blocked ms':>12}{'ratio':>8}")
    for shape in SHAPES:
        inputs = tuple(jax.random.normal(jax.random.key(i), shape) for i in range(4))
        for name, make in passes.items():
            found = seconds({form: make(attend) for form, attend in forms.items()}, inputs)
            row = {"shape": "B{} T{} H{} K{}".format(*shape), "pass": name}
            row |= {f"{form}_ms": round(1e3 * s, 1) for form, s in found.items()}
            row["ratio"] = round(found["plain"] / found["blocked"], 2)
            rows.append(row)
            print("{:22}{:18}{:10.1f}{:12.1f}{:8.2f}".format(*row.values()), flush=True)
    cores = len(os.sched_getaffinity(0))
    print(
        json.dumps(
            {"benchmark": "attention", "jax": jax.__version__, "cores": cores} | {"rows": rows}
        )
    )


if __name__ == "__main__":
    main()
