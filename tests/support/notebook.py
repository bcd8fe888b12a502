"""Run a notebook's code cells in this process, without a Jupyter installation.

`python tests/support/notebook.py docs/ledger.ipynb` runs it and stores the outputs in the file.
"""

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(cell: dict[str, Any]) -> str:
    """Return the text that a cell has printed or shown."""
    outputs = cell["outputs"]
    parts = [
        output["text"] if "text" in output else output["data"].get("text/plain", []) for output in outputs
    ]
    return "".join(line for part in parts for line in part)


def run(path: Path) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Return the variables, and what each code cell printed with the value of its last expression."""
    namespace: dict[str, Any] = {}
    results = []
    cells = code_cells(json.loads(path.read_text(encoding="utf-8")))
    with contextlib.chdir(path.parent):
        for cell in cells:
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(tree, str(path), "exec"), namespace)
                value = None
                if isinstance(last, ast.Expr):
                    value = eval(compile(ast.Expression(last.value), str(path), "eval"), namespace)
            results.append((printed.getvalue(), value))
    return namespace, results


def store(path: Path) -> None:
    """Run the notebook and write its outputs into it: texts, and figures as PNG."""
    import base64

    import altair as alt

    notebook = json.loads(path.read_text(encoding="utf-8"))
    _, results = run(path)
    for number, (cell, (printed, value)) in enumerate(zip(code_cells(notebook), results, strict=True), 1):
        cell["execution_count"] = number
        cell["outputs"] = []
        if printed:
            cell["outputs"].append(
                {"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)}
            )
        if value is None:
            continue
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if isinstance(value, alt.TopLevelMixin):
            picture = io.BytesIO()
            value.save(picture, format="png", scale_factor=1)
            data = {
                "image/png": base64.b64encode(picture.getvalue()).decode(),
                "text/plain": ["alt.Chart(...)"],
            }
        cell["outputs"].append(
            {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}
        )
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    store(Path(sys.argv[1]))
