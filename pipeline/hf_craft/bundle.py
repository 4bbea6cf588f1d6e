"""A module and all that it uses of ours, as one file that imports nothing of ours.

In: a module, the names that are wanted of it. Out: Python source. Definitions are copied as they stand, docstrings and
comments with them, each once and after what it is made of; what nothing uses is left out. So an export's code is the
code that trained it, and there is no second copy to keep.
"""

import ast
import builtins
import graphlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("pipeline", "shard_tools")


class Module:
    """What a file of ours defines and imports.

    Args:
        name: Such as `pipeline.flow`.

    Attributes:
        lines: Of the file.
        definitions: Statement of each name at the top level.
        imports: Of each imported name, the module and the name there (empty: the module itself), and the alias.
    """

    def __init__(self, name: str) -> None:
        path = ROOT / Path(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = file.read_text(encoding="utf-8")
        self.name, self.lines = name, text.splitlines()
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import):
                self.imports |= {alias.asname or alias.name.split(".")[0]: (alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.definitions |= {part.id: node for target in targets for part in ast.walk(target)
                                     if isinstance(part, ast.Name)}  # fmt: skip

    def source(self, node: ast.stmt) -> str:
        """The statement's lines, with its decorators and the comment lines above it."""
        first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))])
        while first > 1 and self.lines[first - 2].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first - 1 : node.end_lineno])


@lru_cache(maxsize=64)
def _module(name: str) -> Module:
    return Module(name)


def bundle(module: str, wanted: list[str], header: str, beside: dict[str, str]) -> str:
    """Source of a file with the wanted definitions.

    Args:
        module: Such as `pipeline.hf_craft.modeling`.
        wanted: Names that it defines.
        header: The file's docstring.
        beside: Modules of ours that are files of the same directory there: name here -> name there.

    Raises:
        ValueError: two modules define one name, or something is used that is nowhere.
    """
    needed: dict[tuple[str, str], ast.stmt] = {}
    uses: dict[str, set[str]] = {}  # module -> those that it takes definitions from
    external: set[tuple[str, str, str]] = set()  # module, name there, name here
    todo = [(module, name) for name in wanted]
    while todo:
        home, name = todo.pop()
        found = _module(home)
        if (home, name) in needed:
            continue
        needed[home, name] = node = found.definitions[name]
        uses.setdefault(home, set())
        for used, at_run_time in _names(node):
            if used in found.definitions:
                todo += [(home, used)] * at_run_time
            elif used in found.imports:
                source, original = found.imports[used]
                if source in beside:
                    external.add((f".{beside[source]}", original, used))
                elif source.split(".")[0] not in OURS:
                    external.add((source, original, used))
                elif not at_run_time:
                    continue
                elif original != used:
                    raise ValueError(f"{home}: {original} of {source} goes by the name {used}; import it by its own")
                else:
                    uses[home].add(source)
                    todo.append((source, original))
    homes: dict[str, str] = {}
    for home, name in needed:
        if homes.setdefault(name, home) != home:
            raise ValueError(f"{name} is defined in {homes[name]} and in {home}; one file cannot hold both")
    parts = [f'"""{header}"""\n\nfrom __future__ import annotations\n', "\n".join(_imports(external)) + "\n"]
    for home in graphlib.TopologicalSorter(uses).static_order():
        nodes = {id(node): node for (of, _), node in needed.items() if of == home}
        parts += [f"\n{_module(home).source(node)}\n" for node in sorted(nodes.values(), key=lambda node: node.lineno)]
    return "\n".join(parts)


def _names(node: ast.AST, at_run_time: bool = True) -> Iterator[tuple[str, bool]]:
    """Names that are read, and whether at run time: `from __future__ import annotations` makes annotations text."""
    if isinstance(node, ast.Name):
        if not hasattr(builtins, node.id):
            yield node.id, at_run_time
        return
    for name, value in ast.iter_fields(node):
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from _names(part, at_run_time and name not in ("annotation", "returns"))


def _imports(found: set[tuple[str, str, str]]) -> list[str]:
    """Statements for (module, name there, name here): whole modules, then names by module, neighbours last."""
    lines = [f"import {source}" if source.split(".")[0] == used else f"import {source} as {used}"
             for source, original, used in sorted(found) if not original]  # fmt: skip
    named: dict[str, list[str]] = {}
    for source, original, used in sorted(found, key=lambda one: (one[0].startswith("."), one)):
        if original:
            named.setdefault(source, []).append(original if original == used else f"{original} as {used}")
    return lines + [f"from {source} import {', '.join(names)}" for source, names in named.items()]
