"""Digests of the code that a result depends on, so that a change of logic reruns exactly the jobs that use it.

Snakemake looks at the date of a rule's script, and not at all at the modules that the script imports. The profiles
turn that off (`rerun-triggers`). Each rule has, as a parameter, the digest of its script and of every module of this
package that its stage can import. The digest is over syntax trees: comments, docstrings and formatting do not count,
nor does the package's version number.

Syntax trees of the whole package take Python most of a second. What is read from the tree of a module is therefore kept
beside its byte code in `__pycache__`, with the digest of the source that it belongs to.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from selfrepair.planning.stages import stage_module

PACKAGE = Path(__file__).resolve().parents[1]


def code_digest(modules: Iterable[str], package: Path = PACKAGE) -> str:
    """Return the SHA-256 over the logic of `modules` (dotted names) and of everything they import from `package`.

    The data files of a package (templates, style sheets) are part of it. Raises ValueError for an unknown module.
    """
    return _digest(frozenset().union(*(import_closure(module, package) for module in modules)), package)


def stage_digest(stage: str, scripts: Path = PACKAGE.parent) -> str:
    """Return the SHA-256 over the logic of a stage: of its module, of everything it imports, and of its script."""
    script = scripts / f"{stage}.py"
    logic = _parsed(script, script.stat().st_mtime_ns).logic
    return hashlib.sha256(
        f"{code_digest([stage_module(stage)], scripts / PACKAGE.name)} {logic}".encode()
    ).hexdigest()


def import_closure(module: str, package: Path = PACKAGE) -> frozenset[str]:
    """Return every module of `package` that importing and running `module` can import, `module` included.

    Imports inside functions count, and so do imports for annotations only: an object passed as an argument brings
    the code of its class. `import_module(f"package.{name}")` counts as an import of every module in `package`. Other
    imports by a computed name are not detected.
    """
    closure: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in closure:
            continue
        if _source(name, package) is None:
            raise ValueError(f"no module {name} in {package}")
        closure.add(name)
        waiting += _imports(name, package)
        if "." in name:  # importing a module runs the __init__.py of its packages
            waiting.append(name.rpartition(".")[0])
    return frozenset(closure)


def _source(module: str, package: Path) -> Path | None:
    root, *rest = module.split(".")
    if root != package.name:
        return None
    path = package.joinpath(*rest)
    candidates = (path / "__init__.py", path.with_name(f"{path.name}.py") if rest else path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _imports(module: str, package: Path) -> list[str]:
    source = _source(module, package)
    assert source is not None
    return _modules(module, package, source, source.stat().st_mtime_ns)


@functools.cache
def _modules(module: str, package: Path, source: Path, changed: int) -> list[str]:
    """Return the modules that `module` imports. Every stage asks again for most of them."""
    around = module if source.name == "__init__.py" else module.rpartition(".")[0]
    parts = around.split(".")
    names: list[str] = []
    for level, base, imported in _parsed(source, changed).imports:
        start = ".".join([*parts[: len(parts) - level + 1], *([base] if base else [])]) if level else base
        # In `from x import y`, y is a module or a name in one. The existence of a file decides.
        names += [start, *(f"{start}.{name}" for name in imported)]
        if imported == ["*modules"]:
            names += [
                f"{start}.{path.stem}" for path in (package.parent / start.replace(".", "/")).glob("*.py")
            ]
    return [name for name in names if _source(name, package) is not None]


def _digest(modules: frozenset[str], package: Path) -> str:
    digest = hashlib.sha256()
    for module in sorted(modules):
        source = _source(module, package)
        assert source is not None
        digest.update(f"{module}\n{_parsed(source, source.stat().st_mtime_ns).logic}\n".encode())
        if source.name == "__init__.py":
            for path in _data_files(source.parent):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(package).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _data_files(directory: Path) -> list[Path]:
    """Return the files of a package that are not modules, without those of its sub-packages."""
    files: list[Path] = []
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            if path.name != "__pycache__" and not (path / "__init__.py").exists():
                files += _data_files(path)
        elif path.suffix not in {".py", ".pyc"} and not path.name.startswith("."):
            files.append(path)
    return files


class _Parsed(NamedTuple):
    logic: str  # digest of the syntax tree without line numbers, comments, docstrings and the version number
    imports: list[tuple[int, str, list[str]]]  # leading dots, module, names


@functools.cache
def _parsed(source: Path, changed: int) -> _Parsed:
    # `changed`, the time of the last change, is part of the cache's key.
    content = source.read_bytes()
    key = hashlib.sha256(_own_digest() + content).hexdigest()
    kept = Path(importlib.util.cache_from_source(os.fspath(source))).with_suffix(".logic.json")
    with contextlib.suppress(
        OSError, ValueError, TypeError, KeyError
    ):  # absent, or damaged: it is written again
        entry = json.loads(kept.read_bytes())
        if entry["key"] == key:
            return _Parsed(
                str(entry["logic"]), [(int(n), str(base), names) for n, base, names in entry["imports"]]
            )
    parsed = _parse(content, source)
    with contextlib.suppress(OSError):  # a read-only installation
        kept.parent.mkdir(exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"key": key, **parsed._asdict()}), encoding="utf-8")
        temporary.replace(kept)
    return parsed


@functools.cache
def _own_digest() -> bytes:
    """Return the digest of this module and of Python's version, which decide what is read from a syntax tree."""
    return hashlib.sha256(sys.version.encode() + Path(__file__).read_bytes()).digest()


def _parse(content: bytes, source: Path) -> _Parsed:
    tree = ast.parse(content, filename=os.fspath(source))
    imports: list[tuple[int, str, list[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append((node.level, node.module or "", [alias.name for alias in node.names]))
        elif isinstance(node, ast.JoinedStr) and (computed := _computed_module(node)):
            imports.append((0, computed, ["*modules"]))
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [line for line in node.body if not _is_text(line) and not _is_version(line)]
    return _Parsed(hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports)


def _computed_module(text: ast.JoinedStr) -> str | None:
    """Return `package` of an f-string `package.{...}`, as in `import_module(f"package.{name}")`, else None."""
    first = text.values[0] if text.values else None
    if not (isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.endswith(".")):
        return None
    package = first.value.removesuffix(".")
    return package if all(part.isidentifier() for part in package.split(".")) else None


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_version(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and statement.targets[0].id == "__version__"
    )
