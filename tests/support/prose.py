"""Texts of the project, and the words and names that its style forbids.

`python tests/support/prose.py` prints every hit as FILE:LINE.
"""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Archaic or vague words -> the words to use. Patterns match whole words, in any case.
WORDS = {
    r"mend(s|ed|ing)?": "fix",
    r"tell(s|ing)?|told": "print, report, show",
    r"sa(y|ys|id|ying)": "print, report, state, show",
    r"but for": "except",
    r"whatever|whoever|whichever|howsoever": "regardless of, any",
    r"look(s|ed|ing)? after": "monitor",
    r"(is|are|was|were) to be had": "is available",
    r"go(es|ing)? on|went on|gone on": "resume, continue",
    r"in step": "in sync",
    r"anew": "again",
    r"thereof|thereby|therein|whereof|wherein|hitherto|lest|nought": "plain words",
}
# Direction in the network is earlier/later or upstream/downstream: readers count layers both ways.
DIRECTIONS = {
    r"(layers?|blocks?|contributions?|components?|MLPs?|heads?|everything|all|those|ones?|lists?|zeros?) "
    r"(that (is|are|lie|lies) )?(above|below)": "upstream, downstream, earlier, later",
    r"(above|below) (the|an|that|each|every|this|its) (ablat\w+|layer|site|component|contribution)": "upstream, "
    r"downstream, earlier, later",
    r"(layers?|rows?) (up|down)wards?": "upstream, downstream",
}
# Labels of the figures, fixed by the definition of the regions of the scatter.
ALLOWED = re.compile(
    r"costs? (less|more) than (it|they) says?|cost (less|more) than they say"
    r"|(listed|described|named|table|see) above|lists? below",
    re.IGNORECASE,
)
NAMES = {"found", "said", "told", "through", "settle", "hold", "of", "place", "make", "whatever", "mend"}

PATTERNS = [
    (re.compile(rf"\b(?:{word})\b", re.IGNORECASE), use) for word, use in (WORDS | DIRECTIONS).items()
]
PAGES = {".md", ".rst", ".yaml", ".yml", ".j2", ".html", ".smk", ".txt", ".css", ".js"}
CODE_FENCE = re.compile(r"^```.*?^```|`[^`\n]*`|https?://\S+", re.MULTILINE | re.DOTALL)


def files() -> list[Path]:
    """Return every text of the project that a user or a maintainer reads, except data and tests."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        ROOT / name
        for name in listed
        if (ROOT / name).is_file()
        and (
            name in {"Snakefile", "Makefile", "README.md", "CHANGELOG.md", "config.yaml"}
            or _is_read(Path(name))
        )
    ]


def _is_read(path: Path) -> bool:
    if path.parts[0] not in {"docs", "scripts", "workflow", "profiles", "envs"}:
        return False
    if path.parts[:2] == ("workflow", "demo") and path.parts[2] in {"demo_corpus", "facts", "data"}:
        return False  # sentences that the demo model is trained on
    return path.suffix == ".py" or path.suffix in PAGES


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of every comment, docstring and message of a module, or of a page without its code."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _texts_of_module(content)
    else:
        # Blank out code, keeping line breaks, so that line numbers stay right.
        if path.suffix == ".md":
            content = CODE_FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), content)
        yield 1, content


def _texts_of_module(content: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def hits(path: Path) -> list[str]:
    """Return `FILE:LINE: 'word': use ...` for every forbidden word in a file."""
    messages = []
    for first, text in texts(path):
        flat = text.replace("\n", " ")  # a phrase may run over the end of a line
        allowed = [match.span() for match in ALLOWED.finditer(flat)]
        for pattern, use in PATTERNS:
            for match in pattern.finditer(flat):
                if not any(start <= match.start() < end for start, end in allowed):
                    line = first + text.count("\n", 0, match.start())
                    messages.append(f"{path.relative_to(ROOT)}:{line}: '{match[0]}': use {use}")
    return sorted(set(messages))


def bad_names(path: Path) -> list[str]:
    """Return `FILE:LINE: name` for every function, argument or variable with a forbidden name."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    named = [
        (n.lineno, n.name)
        for n in nodes
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    named += [(n.lineno, n.arg) for n in nodes if isinstance(n, ast.arg)]
    named += [(n.lineno, n.id) for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return sorted({f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in named if name in NAMES})


if __name__ == "__main__":
    for path in files():
        for message in hits(path) + (bad_names(path) if path.suffix == ".py" else []):
            print(message)
