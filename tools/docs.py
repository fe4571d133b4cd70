"""Render the site without Quarto, for reading offline: nbdev's processed notebooks through pandoc.

    python tools/docs.py [--out _docs_offline]

The public site is Quarto's. This one needs no server and no network.
"""
import argparse
import base64
import functools
import html
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import yaml

from readme import INVISIBLE, OBJECT_REPR, fence, is_off, join, merge_streams, plain_text, split_directives

ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context('fork' if 'fork' in multiprocessing.get_all_start_methods() else 'spawn')
PARTS = Path(__file__).resolve().parent / 'docs'
IMPORTS = ['nbdev.quarto', 'nbdev.serve_drv', 'diffkd_nb.all', 'diffkd_nb.commands', 'diffkd_nb.demo', 'sklearn.datasets', 'timm']
READER = ['--from=markdown-yaml_metadata_block', '--columns=100000']  # so wide that no table gets fixed column widths
WRITER = ['--to=html', '--mathml', '--standalone', '--toc', '--toc-depth=3', f'--template={PARTS / "page.html"}', '--wrap=preserve']
PICTURES = {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg'}
MARKED = {'Str', 'Code', 'Math', 'CodeBlock', 'RawBlock', 'RawInline'}
BLOCKS = {'Para', 'Plain', 'Header', 'CodeBlock', 'RawBlock', 'Space', 'SoftBreak', 'LineBreak'}


class DocsError(Exception):
    """What keeps the site from being made, in a sentence for the reader."""


def pandoc(text, *args):
    """Return what pandoc makes of `text`. A warning is an error: a formula or a file that it could not take."""
    try:
        import pypandoc
        program = pypandoc.get_pandoc_path()
    except (ImportError, OSError) as error:
        raise DocsError('Pandoc is missing. It comes with: pip install pypandoc_binary') from error
    done = subprocess.run([program, '--fail-if-warnings', *args], input=text, capture_output=True, encoding='utf-8')
    if done.returncode:
        raise DocsError(f'Pandoc: {done.stderr.strip()}')
    return done.stdout


def process_here(folder, n):
    """Process the notebooks in `folder` in `n` processes. What is printed goes into the file `log` there."""
    log = os.open(folder / 'log', os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = (open(stream, 'w', buffering=1, closefd=False) for stream in (1, 2))
    os.chdir(folder)
    import nbdev.processors
    import nbdev.serve
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml

    def in_turn(f, items, n_workers, **_):
        with FORK.Pool(n_workers) as pool:
            pool.map(f, sorted(items, key=lambda item: -item[0].stat().st_size), chunksize=1)
    nbdev.serve.parallel = in_turn
    nbdev.processors.get_config = functools.cache(nbdev.processors.get_config)  # it is read for every cell
    refresh_quarto_yml()
    nbdev_sidebar()
    nbdev.serve.proc_nbs(n_workers=n)


def process(root, folder):
    """Return the folder of nbdev's processed notebooks, made in a copy of `nbs` under `folder`. The tree is only read."""
    shutil.copytree(root / 'nbs', folder / 'nbs', ignore=shutil.ignore_patterns('.*', '__pycache__', 'nbdev.yml', '*.py'))
    settings = (root / 'pyproject.toml').read_text(encoding='utf-8')
    (folder / 'pyproject.toml').write_text(settings.replace('[tool.nbdev]', '[tool.nbdev]\nrenderer = "entry.Entry"'), encoding='utf-8')
    os.environ.update(MPLBACKEND='Agg', OMP_NUM_THREADS='1')
    sys.path[:0] = [str(root), str(PARTS)]
    try:
        for name in IMPORTS:  # once, before the processes are forked
            importlib.import_module(name)
        child = FORK.Process(target=process_here, args=(folder, min(os.cpu_count() or 1, 4)))
        child.start()
        child.join()
    finally:
        del sys.path[:2]
    if child.exitcode:
        said = (folder / 'log').read_text(encoding='utf-8', errors='replace')
        start = max(said.rfind('\nException: '), said.rfind('\nError'), 0)
        raise DocsError(f'nbdev could not process the notebooks. {said[start:].strip()[-2000:]}')
    if not (folder / '_proc' / 'index.ipynb').is_file():
        raise DocsError(f'nbdev passed over the notebooks in {folder}: no folder on the way may begin with a dot. Set TMPDIR to another.')
    return folder / '_proc'


def text_of(node):
    """Return the words of a pandoc tree."""
    if isinstance(node, list):
        return ''.join(map(text_of, node))
    if not isinstance(node, dict) or 't' not in node:
        return ''
    kind, content = node['t'], node.get('c')
    if kind == 'Link' and 'source' in content[0][1]:  # stands at every API entry
        return ''
    if kind in MARKED:
        text = content if isinstance(content, str) else content[1]
        text = html.unescape(re.sub(r'<[^>]*>', ' ' if kind == 'RawBlock' else '', text)) if kind.startswith('Raw') else text
    else:
        text = text_of(content)
    return text + ' ' if kind in BLOCKS else text


def flat(blocks):
    """Yield `blocks`, and instead of a division what stands in it."""
    for block in blocks:
        yield from flat(block['c'][1]) if block['t'] == 'Div' else [block]


class Page:
    """One notebook on its way to a page: Markdown, then pandoc's tree, then HTML."""

    def __init__(self, path):
        self.path, self.source, self.files = path, path.name, {}
        notebook = json.loads(path.read_text(encoding='utf-8'))
        raw = next((join(c['source']) for c in notebook['cells'] if c['cell_type'] == 'raw'), '')
        head = yaml.safe_load(raw.strip().strip('-')) or {}
        self.title, self.description = head.get('title', path.stem), head.get('description', '')
        self.name = head.get('output-file', path.with_suffix('.html').name)
        self.markdown = '\n\n'.join(filter(None, map(self.cell, notebook['cells'])))

    def cell(self, cell):
        """Return the Markdown of a cell: what it says, and what it printed and drew."""
        if cell['cell_type'] == 'markdown':
            return INVISIBLE.sub('', join(cell.get('source', '')))
        if cell['cell_type'] != 'code' or 'source' not in cell:
            return ''
        directives, source = split_directives(cell)
        if is_off(directives, 'include'):
            return ''
        shown = [fence(source, 'python')] if source and not is_off(directives, 'echo') else []
        outputs = [] if is_off(directives, 'output') else merge_streams(cell.get('outputs', []))
        outputs = [text for text in (self.output(o, directives) for o in outputs) if text]
        if outputs and directives.get('output') != 'asis':
            outputs = ['::::: {.output}', *outputs, ':::::']
        return '\n\n'.join(shown + outputs)

    def output(self, output, directives):
        """Return the Markdown of one output, in its richest form. Warnings on stderr are not part of a page."""
        kind, data = output['output_type'], output.get('data', {})
        if kind == 'error':
            raise DocsError(f"{self.source}: a cell ends in an error: {output.get('ename')}: {output.get('evalue')}")
        if kind == 'stream':
            return self.plain(output['text']) if output.get('name') != 'stderr' else ''
        if 'text/html' in data:
            return fence(INVISIBLE.sub('', join(data['text/html'])).strip(), '{=html}')
        if 'text/markdown' in data:
            return join(data['text/markdown'])
        for mime, ending in PICTURES.items():
            if mime in data:
                return self.picture(join(data[mime]), ending, directives, output.get('metadata', {}).get(mime, {}))
        if 'text/plain' in data:
            return self.plain(data['text/plain'])
        if data:
            raise DocsError(f"{self.source}: no way to show an output of type {', '.join(data)}.")

    def plain(self, text):
        """Return printed text as a block. A bare object repr says nothing."""
        text = plain_text(join(text))
        return '' if not text.strip() or OBJECT_REPR.fullmatch(text.strip()) else fence(text)

    def picture(self, data, ending, directives, size):
        """Return a picture as a link to a numbered file beside the page."""
        name = f'figures/{Path(self.name).stem}-{len(self.files) + 1}.{ending}'
        self.files[name] = data.encode() if ending == 'svg' else base64.b64decode(data)
        alt = (directives.get('fig-alt') or directives.get('fig-cap') or f'Figure {len(self.files)}, drawn by the code above').strip('"\'')
        width = f' width={size["width"]}' if 'width' in size else ''
        return f'![{alt}]({name}){{loading=lazy{width}}}\\'  # the backslash: a picture in the text, not a figure with a caption

    def parse(self):
        """Read the Markdown. Note the sections, their names and their words."""
        self.tree = json.loads(pandoc(self.markdown, *READER, '--to=json'))
        headers = [block for block in flat(self.tree['blocks']) if block['t'] == 'Header']
        entries = {dict(h['c'][1][2])['entry']: h for h in reversed(headers) if 'api' in h['c'][1][1]}
        for header in headers:  # an API entry gets the name that nbdev links to, a section called the same another
            header['c'][1][0] += '-section' if header['c'][1][0] in entries else ''
        for name, header in entries.items():
            header['c'][1] = [name, ['api'], []]
        self.sections = [dict(id='', title=self.title, text=f'{self.description} ')]
        for block in flat(self.tree['blocks']):
            if block['t'] == 'Header':
                self.sections.append(dict(id=block['c'][1][0], title=text_of(block['c'][2]).strip(), text=''))
            else:
                self.sections[-1]['text'] += text_of(block)
        self.ids = {section['id'] for section in self.sections}

    def html(self, site, sidebar, neighbours):
        """Return the page as HTML."""
        self.tree['blocks'] = site.walk(self.tree['blocks'], self)
        self.tree['meta'] = {}
        variables = dict(pagetitle=html.escape(self.title), description=html.escape(self.description), sidebar=sidebar,
                         site=html.escape(site.title), repo=site.repo, neighbours=neighbours)
        return pandoc(json.dumps(self.tree), '--from=json', *WRITER, *(f'--variable={k}={v}' for k, v in variables.items()))


class Site:
    """All pages, their order, and where links lead."""

    def __init__(self, folder):
        self.folder = folder
        nbdev, quarto = (yaml.safe_load((folder / f).read_text(encoding='utf-8'))['website'] for f in ('nbdev.yml', '_quarto.yml'))
        self.title, self.repo, self.branch = nbdev['title'], nbdev['repo-url'], nbdev['repo-branch']
        self.url = nbdev['site-url'].rstrip('/') + '/'
        self.pages = {path.name: Page(path) for path in sorted(folder.glob('*.ipynb'))}
        self.names = {page.name: page for page in self.pages.values()}
        self.contents, self.order = quarto['sidebar']['contents'], []
        self.sidebar('')
        missing = sorted(set(self.pages) - {page.source for page in self.order})
        if missing:
            raise DocsError(f"Not in the sidebar of _quarto.yml: {', '.join(missing)}")

    def sidebar(self, current, items=None):
        """Return the list of pages as HTML, with the `current` one marked."""
        self.order = [] if items is None else self.order
        lines = []
        for item in self.contents if items is None else items:
            item = {'href': item} if isinstance(item, str) else item
            if 'section' in item:
                lines.append(f'<li><p>{html.escape(item["section"])}</p>{self.sidebar(current, item["contents"])}</li>')
                continue
            if item['href'] not in self.pages:
                raise DocsError(f"The sidebar of _quarto.yml names {item['href']}, which is no notebook.")
            page = self.pages[item['href']]
            self.order.append(page)
            mark = ' aria-current="page"' if page.name == current else ''
            lines.append(f'<li><a href="{page.name}"{mark}>{html.escape(item.get("text", page.title))}</a></li>')
        return f'<ul>{"".join(lines)}</ul>'

    def link(self, url, page):
        """Return where `url` leads from `page`, or None for nbdev's link to a name that has no entry of its own."""
        generated = url.startswith(self.url)
        parts = urlsplit(url.removeprefix(self.url))
        if parts.scheme or parts.netloc:
            return url
        name = page.name if not parts.path else self.pages[parts.path].name if parts.path in self.pages else parts.path
        if name not in self.names:
            path = os.path.normpath(f'nbs/{parts.path}')
            return f'{self.repo}/blob/{self.branch}/{PurePosixPath(path)}'
        if unquote(parts.fragment) not in self.names[name].ids:
            if generated:
                return None
            raise DocsError(f'{page.source}: the link {url} leads to no section.')
        return (name if parts.path else '') + (f'#{parts.fragment}' if parts.fragment else '') or name

    def walk(self, node, page):
        """Return a pandoc tree with links resolved, pictures collected and tables in boxes that scroll."""
        if isinstance(node, list):
            result = []
            for new in (self.walk(item, page) for item in node):
                result.extend(new) if isinstance(new, tuple) else result.append(new)
            return result
        if not isinstance(node, dict):
            return node
        node = {k: self.walk(v, page) for k, v in node.items()}
        if node.get('t') == 'Link':
            url = self.link(node['c'][2][0], page)
            if url is None:
                return tuple(node['c'][1])
            node['c'][2][0] = url
        elif node.get('t') == 'Image':
            target = node['c'][2][0]
            path = self.folder / unquote(target)
            if target not in page.files:
                if not path.is_file():
                    raise DocsError(f'{page.source}: the picture {target} is missing.')
                page.files[target] = path.read_bytes()
        elif node.get('t') == 'Table' or node.get('t') == 'RawBlock' and '<table' in node['c'][1]:
            return {'t': 'Div', 'c': [['', ['scroll'], [['tabindex', '0']]], [node]]}
        return node

    def neighbours(self, page):
        """Return links to the pages before and after."""
        at = self.order.index(page)
        before, after = self.order[at - 1:at] if at else [], self.order[at + 1:at + 2]
        return (''.join(f'<a href="{p.name}">&larr; {html.escape(p.title)}</a>' for p in before)
                + ''.join(f'<a href="{p.name}">{html.escape(p.title)} &rarr;</a>' for p in after))

    def write(self, out):
        """Render every page into the folder `out`."""
        pages = list(self.order)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(Page.parse, pages))
            sidebars = [self.sidebar(page.name) for page in pages]
            feet = [self.neighbours(page) for page in pages]
            texts = list(pool.map(lambda page, *around: page.html(self, *around), pages, sidebars, feet))
        index = []
        for page, text in zip(pages, texts):
            (out / page.name).write_text(text, encoding='utf-8')
            for name, data in page.files.items():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_bytes(data)
            index += [dict(url=page.name + (f'#{s["id"]}' if s['id'] else ''), text=' '.join(s['text'].split()),
                           title=page.title if not s['id'] else f'{s["title"]} - {page.title}') for s in page.sections]
        (out / 'search.js').write_text(f'window.SEARCH = {json.dumps(index, ensure_ascii=False)}\n', encoding='utf-8')
        for name in ('style.css', 'site.js'):
            shutil.copy(PARTS / name, out / name)


def build(out, root=ROOT):
    """Make the site in the folder `out`. What stood there is replaced once all is rendered. Return its index page."""
    out, root = Path(out).absolute(), Path(root)
    if out.exists() and not (out / 'search.js').is_file() and (out.is_file() or any(out.iterdir())):
        raise DocsError(f'{out} holds something else. Name a folder that is new or empty.')
    out.parent.mkdir(parents=True, exist_ok=True)
    # nbdev skips folders whose names begin with a dot, so the notebooks are not processed beside the site
    with tempfile.TemporaryDirectory(prefix='docs-') as work, tempfile.TemporaryDirectory(prefix='.docs-', dir=out.parent) as new:
        done = Path(new) / 'site'
        done.mkdir()
        Site(process(root, Path(work))).write(done)
        if out.exists():
            out.rename(Path(new) / 'old')
        done.rename(out)
    return out / 'index.html'


def main(argv=None):
    """Command line. Return the exit status."""
    parser = argparse.ArgumentParser(description='Render the site without Quarto, for reading offline.')
    parser.add_argument('--out', type=Path, default=ROOT / '_docs_offline', help='folder of the site (default: _docs_offline)')
    try:
        print(f'The site: {build(parser.parse_args(argv).out)}')
    except DocsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
