"What the first pages show: code that fits, and errors that exist"
import ast, json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 88
PAGES = sorted(p for p in (ROOT/'nbs').glob('*.ipynb') if p.stem == 'index' or re.match('4[0-9][a-z]?_', p.stem))


def cells(page): return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(page.read_text())['cells']]


def shown_code(page):
    "Code that a reader sees: cells that are not hidden, and blocks in the text"
    for kind, text in cells(page):
        directives = [line for line in text.splitlines() if line.startswith('#|')]
        if kind == 'code' and not any(re.match(r'#\|\s*(hide|echo: false|default_exp|export)', d) for d in directives): yield text
        if kind == 'markdown': yield from re.findall(r'^```.*?\n(.*?)^```', text, re.M | re.S)


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_code_fits_the_page(page):
    long = [line for code in shown_code(page) for line in code.splitlines() if len(line) > WIDTH]
    assert not long, '\n'.join(['', *(f'{len(line)}  {line}' for line in long)])


def texts():
    "All strings of the package, those of one expression in one piece"
    for path in (ROOT/'diffkd_nb').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str): yield node.value


def quoted(): return [e for k, t in cells(ROOT/'nbs'/'48_troubleshooting.ipynb') if k == 'markdown' for e in re.findall(r'^\*\*(?:Error|Sign)\.\*\* `(.+)`$', t, re.M)]


def test_every_quoted_error_is_one_of_the_package():
    known, errors = '\n'.join(texts()), quoted()
    assert len(errors) > 25
    missing = [piece for e in errors for piece in e.split(' ... ') if piece.strip() not in known]
    assert not missing, missing


def test_the_short_name_of_every_refusal_has_its_section():
    "What `[help: name]` at the end of an error promises, and the other way round"
    page = '\n'.join(t for k, t in cells(ROOT/'nbs'/'48_troubleshooting.ipynb') if k == 'markdown')
    sections = dict(re.findall(r'^##+ .+ \{#([a-z-]+)\}$((?:\n(?!#).*)*)', page, re.M))
    messages = [m for m in texts() if '[help: ' in m]
    names = {n for m in messages for n in re.findall(r'\[help: ([^\]]*)\]', m)}
    assert names == set(sections) and len(names) > 15, names ^ set(sections)
    unnamed = [name for name, text in sections.items() if '**Error.**' not in text]
    assert not unnamed, unnamed


def test_the_front_page_counts_the_methods():
    from diffkd_nb.methods import METHODS
    said = re.findall(r'\*\*(\d+) methods\*\*', '\n'.join(t for _, t in cells(ROOT/'nbs'/'index.ipynb')))
    assert said == [str(len(METHODS))]


def test_the_reference_lists_every_notebook():
    text = '\n'.join(t for _, t in cells(ROOT/'nbs'/'49_reference.ipynb'))
    missing = [p.name for p in sorted((ROOT/'nbs').glob('*.ipynb')) if f']({p.name})' not in text and p.stem not in ('index', '49_reference', '29a_experiment')]
    assert not missing, missing


def test_the_package_shadows_no_name_of_fastai():
    "Both are imported with a star; `run` alone is ours and fastcore's"
    import fastai.tabular.all, fastai.text.all, fastai.vision.all
    import diffkd_nb.all as ours
    libraries = fastai.vision.all, fastai.text.all, fastai.tabular.all
    shadowed = {n for n in vars(ours) if not n.startswith('_') for lib in libraries if getattr(lib, n, vars(ours)[n]) is not vars(ours)[n]}
    assert shadowed == {'run'}
