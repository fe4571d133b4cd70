"""Read the package's error messages and their short names from its source.

    python tools/messages.py        # every message by its short name

The troubleshooting page lists them, and a test holds every `raise` to a name.
"""
import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent / 'diffkd_nb'
NAME = re.compile(r'\s*\[help: ([a-z-]+)\]$')
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


class Message(NamedTuple):
    where: str  # module.function
    line: int
    kind: str  # class of the error; '' where it is an object made elsewhere
    text: str  # `...` for what depends on the case; '' where no text can be read
    name: str | None  # what `[help: name]` at its end says


def scopes(tree):
    """The functions around each node, the innermost first."""
    found = {}

    def walk(node, around):
        found[node] = around
        inside = [node, *around] if isinstance(node, FUNCTIONS) else around
        for child in ast.iter_child_nodes(node):
            walk(child, inside)
    walk(tree, [])
    return found


def assigned(name, around, tree):
    """What a variable gets where it is used: in the innermost function that sets it, or in the module."""
    for place in [*around, tree]:
        if place is not tree and any(isinstance(a, ast.arg) and a.arg == name for a in ast.walk(place.args)):
            return []
        nodes = tree.body if place is tree else ast.walk(place)
        values = [a.value for a in nodes if isinstance(a, ast.Assign) and len(a.targets) == 1
                  and isinstance(a.targets[0], ast.Name) and a.targets[0].id == name]
        if values:
            return values
    return []


def texts(node, around, tree, seen=()):
    """What an expression can say: the texts of a string, a variable, or what a function of the module returns."""
    say = functools.partial(texts, around=around, tree=tree, seen=(*seen, node))
    if node in seen:
        return []
    if isinstance(node, ast.Constant):
        return [node.value if isinstance(node.value, str) else '...']
    if isinstance(node, ast.FormattedValue):
        return say(node.value) or ['...']
    if isinstance(node, ast.IfExp):
        return say(node.body) + say(node.orelse)
    if isinstance(node, ast.JoinedStr):
        *first, last = node.values
        start = ''.join(t[0] if len(t) == 1 else '...' for t in map(say, first))
        return [start + end for end in say(last)]
    if isinstance(node, ast.Name):
        return [t for v in assigned(node.id, around, tree) for t in say(v)]
    if isinstance(node, ast.Call):
        called = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
        if called.endswith(('Error', 'UnreadableImage')):
            return say(node.args[0]) if node.args else []
        makers = [f for f in ast.walk(tree) if isinstance(f, FUNCTIONS) and f.name == called]
        return [t for f in makers for r in ast.walk(f) if isinstance(r, ast.Return) and r.value is not None
                for t in say(r.value, around=[f])]
    return []


def said(tree):
    """Where errors are made: (node, class of the error, expression that has its text)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:  # a bare `raise` hands on what is there
            call = node.exc if isinstance(node.exc, ast.Call) else None
            yield node, getattr(call.func, 'id', getattr(call.func, 'attr', '')) if call else '', node.exc
        elif isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'error' and node.args:  # of a command's parser
            yield node, 'SystemExit', node.args[0]


def messages(package=PACKAGE):
    """Every error that the package makes."""
    for path in sorted(Path(package).glob('*.py')):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        around = scopes(tree)
        for node, kind, expression in said(tree):
            where = '.'.join([path.stem, *(f.name for f in reversed(around[node]))])
            for text in texts(expression, around[node], tree) or ['']:
                text = re.sub(r'(\.\.\.){2,}', '...', ' '.join(text.split()))
                name = NAME.search(text)
                yield Message(where, node.lineno, kind, NAME.sub('', text), name and name[1])


def by_name(package=PACKAGE):
    """Messages by their short name, each text once, in the order of the names."""
    found = {}
    for m in messages(package):
        if m.name and m.text.strip('.'):
            found.setdefault(m.name, {})[m.text] = None
    return {name: list(found[name]) for name in sorted(found)}


if __name__ == '__main__':
    for name, listed in by_name().items():
        print(name, *listed, sep='\n  ')
