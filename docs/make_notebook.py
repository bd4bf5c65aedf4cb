"""Writes docs/first_steps.ipynb: makes the notebook, runs it, and keeps its outputs.

python docs/make_notebook.py [OUT]     needs the extra `test`; a few minutes on a laptop
"""

import os
import pathlib
import sys
import tempfile

import nbclient
import nbformat
from nbformat import v4

CELLS = [
    """# First steps

A small network learns to draw handwritten digits (8 x 8 pixels, in scikit-learn), token by token.
All of this runs on a laptop's CPU in about two minutes.""",
    """import matplotlib.pyplot as plt
import numpy as np

import gptv_jax
from gptv_jax import config

settings = config.default()  # the data set is `digits`
settings.model.layers, settings.model.width, settings.model.heads = 2, 48, 4
settings.train.steps, settings.train.batch_size = STEPS, 64""",
    """`gptv_jax.train` does what `python -m gptv_jax.main` does. An interrupt of the kernel saves
the training; the same call goes on from there.""",
    """model = gptv_jax.train(settings, "runs/first", stages=["pretrain"])""",
    "New images, and their copies, whose lower half is drawn anew:",
    """def show(images, columns=8):
    framed = np.pad(images[..., 0], ((0, 0), (1, 1), (1, 1)), constant_values=6)
    rows = [np.concatenate(list(row), axis=1) for row in framed.reshape(-1, columns, 10, 10)]
    plt.figure(figsize=(6, 6 * len(rows) / columns))
    plt.imshow(np.concatenate(rows), cmap="gray")
    plt.axis("off")


drawn = model.sample(16, seed=1)
show(np.concatenate([drawn, model.complete(drawn, keep=0.5, seed=2)]))""",
    """More steps: the finished run goes on from its last checkpoint, with the schedule of the
longer run. The stages `probe`, `finetune` and `sample` come next.""",
    """settings.train.steps += STEPS // 2
model = gptv_jax.train(settings, "runs/first", stages=["pretrain"])
show(model.sample(16, seed=1))""",
]


def make(steps: int = 600) -> nbformat.NotebookNode:
    """The notebook before it runs; `steps` of pretraining."""
    cells = [
        (v4.new_code_cell if index % 2 else v4.new_markdown_cell)(text.replace("STEPS", str(steps)))
        for index, text in enumerate(CELLS)
    ]
    for index, cell in enumerate(cells):
        cell["id"] = f"cell-{index}"  # random ids would differ each time
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Runs the notebook in an empty folder; its outputs name no folder of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        client = nbclient.NotebookClient(notebook, timeout=1200, resources=resources)
        client.execute(env=environment)
        for cell in notebook.cells:
            cell.metadata.clear()  # times of the execution
            if cell.cell_type == "code":
                cell.outputs = merged(cell.outputs, f"{pathlib.Path(folder).resolve()}/")
    return notebook


def merged(outputs: list, folder: str) -> list:
    """Outputs whose neighbouring texts are one; of a bar, only what the bar showed last is kept."""
    found = []
    for output in outputs:
        if output.output_type != "stream":
            found.append(output)
        elif found and found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    for output in found:
        if output.output_type == "stream":
            lines = [line.rstrip().rpartition("\r")[2] for line in output.text.split("\n")]
            text = "\n".join(line for line in lines if line.strip())
            output.text = text.replace(folder, "")
    return found


if __name__ == "__main__":
    place = pathlib.Path(__file__).with_name("first_steps.ipynb")
    nbformat.write(run(make()), sys.argv[1] if sys.argv[1:] else place)
