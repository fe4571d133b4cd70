"""The API entries of the site that `make docs` writes. nbdev finds this renderer by its name in the configuration."""
import inspect
import re
import textwrap

from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.showdoc import BasicMarkdownRenderer

EMPTY = inspect.Parameter.empty


def code(text):
    """Return `text` as code for a table cell. Every sign is escaped, so that none of it is Markdown or a link."""
    return '<code>' + re.sub(r'([^\w\s])', r'\\\1', text) + '</code>' if text else ''


def type_name(annotation):
    """Return an annotation as it was typed. None counts as no annotation: fastcore guesses it from the default."""
    if annotation in (EMPTY, None, type(None), 'None'):
        return ''
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.removeprefix('typing.').strip('\'"').replace(' | ', '|').replace('|', ' | ')


def has_foreign_init(sym):
    """Say whether `sym` is a class that takes its arguments as a class of another package does: they say nothing about it."""
    if not inspect.isclass(sym):
        return False
    owner = next(c for c in sym.__mro__ if '__init__' in vars(c) or '__new__' in vars(c))
    return owner.__module__.partition('.')[0] not in ('__main__', get_config().lib_path.name)


class Shown:
    """A default value that prints as in the source: a function by its name."""

    def __init__(self, value):
        self.text = getattr(value, '__name__', None) or repr(value)

    def __repr__(self):
        return self.text


class Entry(BasicMarkdownRenderer):
    """Heading, link to the source, signature, docstring, table of parameters."""

    def signature(self):
        """Return the signature without types, which the table holds. A long one is broken between parameters."""
        kind, args = 'class' if inspect.isclass(self.sym) else 'def', ''
        if has_foreign_init(self.sym):
            args = f'({", ".join(base.__name__ for base in self.sym.__bases__)})'
        elif self.sig is not None:
            bare = [p.replace(annotation=EMPTY, default=p.default if p.default is EMPTY else Shown(p.default))
                    for p in self.sig.parameters.values() if p.name != 'self']
            args = str(inspect.Signature(bare))
        if len(self.nm + args) > 76:
            args = '(\n' + textwrap.fill(args[1:-1], 76, initial_indent='    ', subsequent_indent='    ', break_on_hyphens=False) + '\n)'
        return f'```{{.python .signature}}\n{kind} {self.nm}{args}\n```'

    def table(self):
        """Return the parameters and the result as a table, without columns that would be empty."""
        docs = {} if has_foreign_init(self.sym) else docments(self.sym, full=True, args_kwargs=True)
        stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
        rows = [[code(stars.get(p.get('kind'), '') + name) if name != 'return' else 'returns', code(type_name(p.anno)),
                 '' if p.default is EMPTY else code(repr(Shown(p.default))), ' '.join((p.docment or '').split())]
                for name, p in docs.items() if name != 'self']
        if rows and rows[-1][0] == 'returns' and not any(rows[-1][1:]):
            rows.pop()
        keep = [i for i in range(4) if i == 0 or any(row[i] for row in rows)]
        if not rows or keep == [0]:
            return ''
        lines = [['Parameter', 'Type', 'Default', 'Meaning'], ['---'] * 4, *rows]
        return '\n'.join('| ' + ' | '.join(line[i] for i in keep) + ' |' for line in lines)

    def _repr_markdown_(self):
        if not callable(self.sym):
            return super()._repr_markdown_()
        source = NbdevLookup().code(self.fn)
        parts = [f'{"#" * self.title_level} {self.nm.replace("_", chr(92) + "_")} {{.api entry={self.nm.lower()}}}',
                 f'[source]({source}){{.source}}' if source else '', self.signature(),
                 self.docs or '', self.table()]
        return '\n\n'.join(['::::: {.entry}', *filter(None, parts), ':::::'])
