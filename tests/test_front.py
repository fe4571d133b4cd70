"What the first pages show: code that fits, and errors that exist"
import ast, json, re, sys
from functools import cache
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import messages as errors

WIDTH = 88
messages = cache(lambda *package: [*errors.messages(*package)])     # read once
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


@cache
def texts():
    "All strings of the package, those of one expression in one piece"
    nodes = [n for path in (ROOT/'diffkd_nb').glob('*.py') for n in ast.walk(ast.parse(path.read_text()))]
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def quoted(): return [e for k, t in cells(ROOT/'nbs'/'48_troubleshooting.ipynb') if k == 'markdown' for e in re.findall(r'^\*\*(?:Error|Sign)\.\*\* `(.+)`$', t, re.M)]


def test_every_quoted_error_is_one_of_the_package():
    "A quoted message is one as the code has it; other signs are texts of the code, piece by piece"
    whole, known, errors = '\n'.join(m.text for m in messages()), '\n'.join(texts()), quoted()
    assert len(errors) > 80
    missing = [e for e in errors if e not in whole and not all(piece.strip() in known for piece in e.split(' ... '))]
    assert not missing, missing


def sections():
    "Sections of the troubleshooting page that have a short name, with their text"
    page = '\n'.join(t for k, t in cells(ROOT/'nbs'/'48_troubleshooting.ipynb') if k == 'markdown')
    return dict(re.findall(r'^##+ .+ \{#([a-z-]+)\}$((?:\n(?!#).*)*)', page, re.M))


def test_the_short_name_of_every_refusal_has_its_section():
    "What `[help: name]` at the end of an error promises, and the other way round"
    messages = [m for m in texts() if '[help: ' in m]
    names = {n for m in messages for n in re.findall(r'\[help: ([^\]]*)\]', m)}
    assert names == set(sections()) and 30 < len(names) < 50, names ^ set(sections())
    unnamed = [name for name, text in sections().items() if '**Error.**' not in text]
    assert not unnamed, unnamed
    inside = [m for m in messages if not re.search(r'\[help: [a-z-]+\]$', m) and "[help: ')[" not in m]
    assert not inside, inside


# Errors without a name of their own, and why
NAMELESS = {
    'distributed.agree': "rank 0's error in the other processes, with its name", 'methods._parse_one': 'the error of `get_method`, with its name',
    'run._distilling': "the method's own error, with its name", 'run._stored_setup': "the manifest's own error, with its name",
    'setup.warning': 'the error of `slow_precision`, with its name', 'setup.plan': "the taps' own error, with its name",
    'taps._place': "the layout's own error, with its name", 'fast.record': 'the error of the step itself',
    'equal_time.before_validate': "fastai's way to leave validation out", 'equal_time.after_batch': "fastai's way to end a fit", 'shared_teacher.said': 'no error of ours', 'engine.time_limit.end': 'caught where the limit was set', 'recipes.after_batch': "fastai's way to end a batch",
    'shared_teacher.wait': 'caught where the run began', 'streams.before_batch': 'caught where the run began',
    'teacher_cache.reducer_override': 'told as the reason in the error of `content_key`', 'transforms.as_rgb': 'told as the reason in "cannot be read"'}


def test_every_error_ends_in_a_short_name():
    found = messages()
    assert len(found) > 400
    nameless = [m for m in found if m.name not in sections()]
    assert sorted(m.where for m in nameless) == sorted(NAMELESS), [f'{m.where}, line {m.line}: {m.text}' for m in nameless if m.where not in NAMELESS]


# Options that errors name and that belong to other libraries
FOREIGN = {'drop_last', 'batch_first', 'vocab', 'text_vocab', 'use_reentrant', 'min_size', 'output_stride'}


def test_what_errors_advise_exists():
    "Options, flags and commands in their texts"
    from importlib.metadata import distribution
    from diffkd_nb import commands, demo
    nodes = [n for path in (ROOT/'diffkd_nb').glob('*.py') for n in ast.walk(ast.parse(path.read_text()))]
    options = {n.arg for n in nodes if isinstance(n, ast.arg)} | {n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    parsers = commands.train_parser(), commands.compare_parser(), commands.verify_parser(), demo.parser()
    flags = {f for p in parsers for a in p._actions for f in a.option_strings}
    scripts = {e.name for e in distribution('diffkd_nb').entry_points}
    def missing(pattern, known): return {(m.where, n) for m in messages() for n in re.findall(pattern, m.text) if n not in known}
    assert not missing(r'(?<![\w.-])([a-z_]+)=(?!=)', options | FOREIGN)
    assert not missing(r'(?<!\S)\(?(--[a-z-]+)', flags) and not missing(r'\b(diffkd_(?!nb)\w+)', scripts)


@pytest.mark.parametrize('code, names', [
    ("def f(): raise ValueError('no name.')", [None]), ("def f(x): raise ValueError(f'{x} [help: a]')", ['a']), ("def f(e): raise ValueError(f'a: {e}')", [None]),
    ("def f(x):\n    why = 'a [help: a]' if x else 'b'\n    raise ValueError(why)", ['a', None]), ("def g(): return 'x [help: b]'\ndef f(): raise KeyError(g())", ['b']),
    ("def f():\n    wrong = ValueError('x '\n        '[help: c]')\n    raise wrong", ['c']), ("X = 'x [help: d]'\ndef f(): raise ValueError(f'a {X}')", ['d']),
    ("def f():\n    try: g()\n    except ValueError: raise", []), ("def f(): raise ValueError('x [help: a] and more')", [None]),
    ("def f(p): p.error('x [help: e]')", ['e'])])
def test_names_are_read_from_code(tmp_path, code, names):
    (tmp_path/'m.py').write_text(code)
    assert [m.name for m in messages(tmp_path)] == names


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
