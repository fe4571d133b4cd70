"""Write README.md from nbs/index.ipynb, with pandoc and without Quarto.

    python tools/readme.py            write README.md and its pictures
    python tools/readme.py --check    exit with 1 if they are not what would be written
"""
import argparse
import base64
import difflib
import json
import posixpath
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pypandoc

ROOT = Path(__file__).resolve().parent.parent
HEADER = '<!-- Generated from nbs/index.ipynb by "make readme". Edit the notebook, not this file. -->\n\n'

# Pandoc's own markdown is what Quarto reads. Quotes stay as typed; a picture stays a picture.
# A line of dashes is a rule and never opens metadata.
READER = 'markdown-smart-implicit_figures-yaml_metadata_block'
# Divisions and spans of an HTML output only carry style.
HTML_READER = 'html-native_divs-native_spans'
WRITER = 'gfm-tex_math_gfm+tex_math_dollars'
HIDDEN = ('hide', 'export', 'exporti', 'default_exp')  # nbdev: nothing of the cell is shown
DIRECTIVE = re.compile(r'^#\s*\|\s*([^\s:]+)\s*:?\s*(.*?)\s*$')
ANSI = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')
OBJECT_REPR = re.compile(r'<[\w.]+ object>')
INVISIBLE = re.compile(r'<(style|script)\b.*?</\1>|<!--.*?-->', re.S | re.I)
HTML_TARGET = re.compile(r'''(\b(?:src|href)\s*=\s*)(["'])(.*?)\2''', re.I)


def join(text):
    """Return a notebook's text field, a string or a list of lines, as one string."""
    return text if isinstance(text, str) else ''.join(text)


def split_directives(cell):
    """Return the directives of `cell` as a dict, and its source without them."""
    directives = {k: '' if v == 'true' else v for k, v in cell.get('metadata', {}).get('nbdev', {}).items()}
    lines = join(cell['source']).split('\n')
    while lines and (not lines[0].strip() or DIRECTIVE.match(lines[0])):
        found = DIRECTIVE.match(lines.pop(0))
        if found:
            directives[found[1]] = '' if found[2] == 'true' else found[2]
    return directives, '\n'.join(lines).rstrip()


def is_off(directives, name):
    """Say whether the directive `name` is set to false."""
    return directives.get(name) == 'false'


def fence(text, language=''):
    """Return `text` as a fenced block. The fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall('`{3,}', text)), default=2)
    ticks = '`' * (longest + 1)
    return f'{ticks}{language}\n{text}\n{ticks}'


def plain_text(text):
    """Return terminal output as it ends: no colours, and of a rewritten line only the last state."""
    lines = ANSI.sub('', text).replace('\r\n', '\n').split('\n')
    return '\n'.join(line.rstrip('\r').rsplit('\r', 1)[-1].rstrip() for line in lines).strip('\n')


def html_to_markdown(html):
    """Return `html` as GitHub markdown, tables as pipe tables. Empty if nothing of it is visible."""
    html = INVISIBLE.sub('', html)
    text = re.sub(r'<progress\b.*?(</progress>|>)', '', html, flags=re.S | re.I)
    if not re.search(r'<(table|img|svg)\b', html, re.I) and not re.sub(r'<[^>]*>', '', text).strip():
        return ''
    return pypandoc.convert_text(html, WRITER, format=HTML_READER, extra_args=['--wrap=none']).strip()


class Readme:
    """Collects the markdown of a notebook and the pictures its outputs hold."""

    def __init__(self, folder):
        self.folder, self.blocks, self.images = folder, [], {}

    def add(self, text):
        """Add a block of markdown, if there is anything in it."""
        if text.strip():
            self.blocks.append(text)

    def add_cell(self, cell):
        """Add what a reader sees of `cell`: its source, then its outputs."""
        directives, source = split_directives(cell)
        if any(d in directives and not is_off(directives, d) for d in HIDDEN) or is_off(directives, 'include'):
            return
        if cell['cell_type'] == 'markdown':
            self.add(source)
        elif cell['cell_type'] == 'code':
            if source and not is_off(directives, 'echo'):
                self.add(fence(source, 'python'))
            if not is_off(directives, 'output'):
                for output in merge_streams(cell.get('outputs', [])):
                    self.add_output(output, directives)

    def add_output(self, output, directives):
        """Add one output in its richest form: markdown, picture, HTML, text."""
        kind = output['output_type']
        if kind == 'error':
            raise ValueError(f"a cell of the index ends in an error: {output.get('ename')}: {output.get('evalue')}")
        if kind == 'stream':
            if output.get('name') == 'stderr' and is_off(directives, 'warning'):
                return
            return self.add_text(join(output['text']))
        data = output.get('data', {})
        if 'text/markdown' in data:
            self.add(join(data['text/markdown']))
        elif 'image/png' in data:
            self.add_image(base64.b64decode(join(data['image/png'])), directives)
        elif 'text/html' in data:
            self.add(html_to_markdown(join(data['text/html'])))
        elif 'text/plain' in data:
            self.add_text(join(data['text/plain']))

    def add_text(self, text):
        """Add plain text as a block of its own. A bare object repr says nothing and is left out."""
        text = plain_text(text)
        if text.strip() and not OBJECT_REPR.fullmatch(text.strip()):
            self.add(fence(text))

    def add_image(self, png, directives):
        """Add a picture of an output. It becomes a numbered file beside the notebook's own pictures."""
        name = f'images/readme_{len(self.images) + 1}.png'
        self.images[posixpath.join(self.folder, name)] = png
        caption = (directives.get('fig-alt') or directives.get('fig-cap') or '').strip('"\'')
        self.add(f'![{caption}]({name})')


def merge_streams(outputs):
    """Yield `outputs` with neighbouring pieces of the same stream joined."""
    last = None
    for output in outputs:
        if (last and output['output_type'] == last['output_type'] == 'stream'
                and output.get('name') == last.get('name')):
            last = {**last, 'text': join(last['text']) + join(output['text'])}
            continue
        if last:
            yield last
        last = output
    if last:
        yield last


def rebase(target, folder):
    """Return a link that is relative to `folder` as one relative to the folder's parent."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc or not parts.path or parts.path.startswith('/'):
        return target
    path = posixpath.normpath(posixpath.join(folder, parts.path))
    return parts._replace(path=path).geturl()


def rebase_html(html, folder):
    """Return raw `html` with its `src` and `href` rebased."""
    return HTML_TARGET.sub(lambda m: m[1] + m[2] + rebase(m[3], folder) + m[2], html)


def walk(node, folder):
    """Return the pandoc tree `node` with links rebased and with divisions and spans opened."""
    if isinstance(node, list):
        result = []
        for item in node:
            new = walk(item, folder)
            opened = isinstance(item, dict) and item.get('t') in ('Div', 'Span')
            result.extend(new['c'][1]) if opened else result.append(new)
        return result
    if not isinstance(node, dict):
        return node
    node = {k: walk(v, folder) for k, v in node.items()}
    if node.get('t') in ('Link', 'Image'):
        attributes, content, (url, title) = node['c']
        node['c'] = [attributes, content, [rebase(url, folder), title]]
    elif node.get('t') in ('RawInline', 'RawBlock') and node['c'][0] == 'html':
        node['c'] = ['html', rebase_html(node['c'][1], folder)]
    return node


def to_gfm(markdown, folder):
    """Return Quarto's `markdown` as GitHub's, with links rebased from `folder` to its parent."""
    tree = json.loads(pypandoc.convert_text(markdown, 'json', format=READER))
    tree['blocks'] = walk(tree['blocks'], folder)
    tree['meta'] = {}
    return pypandoc.convert_text(json.dumps(tree), WRITER, format='json', extra_args=['--wrap=none'])


def render(index):
    """Return the README made from the notebook `index`, and its pictures as {path: bytes}."""
    index = Path(index)
    notebook = json.loads(index.read_text(encoding='utf-8'))
    readme = Readme(index.parent.name)
    for cell in notebook['cells']:  # raw cells hold front matter and are left out
        readme.add_cell(cell)
    text = to_gfm('\n\n'.join(readme.blocks), readme.folder)
    return HEADER + text.replace('\r\n', '\n').strip('\n') + '\n', readme.images


def stale_images(root, images, folder='nbs'):
    """Return the numbered pictures in the folder that this README does not use."""
    found = sorted((root / folder / 'images').glob('readme_*.png'))
    return [path for path in found if path.relative_to(root).as_posix() not in images]


def differences(root, text, images):
    """Return what differs between the files under `root` and the rendered README, as lines."""
    readme = root / 'README.md'
    old = readme.read_text(encoding='utf-8') if readme.exists() else ''
    lines = list(difflib.unified_diff(old.splitlines(), text.splitlines(), 'README.md', 'nbs/index.ipynb', lineterm=''))
    if not lines and old != text:
        lines = ['README.md: line endings']
    for name, png in images.items():
        path = root / name
        if not path.exists() or path.read_bytes() != png:
            lines.append(f'{name}: missing or not the picture of the notebook')
    return lines + [f'{path.relative_to(root).as_posix()}: not used' for path in stale_images(root, images)]


def write(root, text, images):
    """Write the README and its pictures under `root`. Remove numbered pictures no longer used."""
    for path in stale_images(root, images):
        path.unlink()
    for name, png in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png)
    (root / 'README.md').write_text(text, encoding='utf-8', newline='\n')


def main(argv=None):
    """Command line. Return the exit status."""
    parser = argparse.ArgumentParser(description='Write README.md from nbs/index.ipynb.')
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if README.md is out of date')
    parser.add_argument('--root', type=Path, default=ROOT, help='folder of README.md and nbs/')
    args = parser.parse_args(argv)
    index = args.root / 'nbs' / 'index.ipynb'
    if not index.exists():
        print(f'There is no {index}.', file=sys.stderr)
        return 2
    text, images = render(index)
    if not args.check:
        write(args.root, text, images)
        return 0
    lines = differences(args.root, text, images)
    if lines:
        print(*lines, sep='\n')
        print('README.md is not what nbs/index.ipynb gives. Run: make readme')
        return 1
    print('README.md is what nbs/index.ipynb gives.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
