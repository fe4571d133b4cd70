"""The site that `make docs` writes: whole, and whole in a browser. The slow tests make it; the others read what it is made of."""
import ast
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
import docs  # noqa: E402
import workers  # noqa: E402

NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
VOID = {'area', 'br', 'col', 'hr', 'img', 'input', 'link', 'meta', 'wbr'}
FENCED = re.compile(r'^(`{3,}|~{3,}).*?^\1[`~]*\s*$|`[^`\n]+`', re.M | re.S)
FORMULA = re.compile(r'\$\$.+?\$\$|(?<![\\$])\$(?=[^\s$])[^$]*?(?<=[^\s\\])\$(?![\d$])', re.S)


class Html(HTMLParser):
    """What a page holds: names, links, pictures, formulas, and the text outside of code and formulas."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.links, self.images, self.formulas, self.entries = [], [], [], [], 0, {}
        self.prose, self.code, self.wrong, self.classes = [], [], [], set()
        self.feed(text)
        self.close()
        self.wrong += [f'<{tag}> is not closed' for tag, _ in self.stack]

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        classes = set((attrs.get('class') or '').split())
        self.classes |= classes
        self.ids += [attrs['id']] if 'id' in attrs else []
        self.links += [attrs['href']] if tag in ('a', 'link') and attrs.get('href') else []
        self.images += [attrs['src']] if tag == 'img' else []
        self.links += [attrs['src']] if tag == 'script' and 'src' in attrs else []
        self.formulas += tag == 'math'
        if 'entry' in classes:
            self.entries[attrs.get('id')] = []
        if tag not in VOID:
            self.stack.append((tag, attrs.get('id') if 'entry' in classes else None))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.stack or self.stack[-1][0] != tag:
            self.wrong.append(f'</{tag}> in {[t for t, _ in self.stack[-3:]]} at {self.getpos()}')
        else:
            self.stack.pop()

    def handle_data(self, data):
        tags = {tag for tag, _ in self.stack}
        for _, entry in self.stack:
            if entry:
                self.entries[entry].append(data)
        if tags & {'code', 'pre'}:
            self.code.append(data)
        elif not tags & {'math', 'script', 'style'}:
            self.prose.append(data)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The folder of the site, made once by the command."""
    before = sorted(ROOT.glob('*')) + sorted(ROOT.glob('nbs/**/*'))
    out = tmp_path_factory.mktemp('docs') / 'site'
    done = workers.call(docs.main, ['--out', str(out)], timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f'The site: {out / "index.html"}'
    assert sorted(ROOT.glob('*')) + sorted(ROOT.glob('nbs/**/*')) == before  # nothing is left in the tree
    return out


@pytest.fixture(scope='module')
def pages(site):
    """The pages of the site, parsed."""
    return {path.name: Html(path.read_text(encoding='utf-8')) for path in sorted(site.glob('*.html'))}


def test_the_command_starts():
    done = subprocess.run([sys.executable, ROOT / 'tools' / 'docs.py', '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and '--out' in done.stdout, done.stderr


def page_of(path):
    """Return the name of a notebook's page."""
    return re.sub(r'^\d+[a-zA-Z0-9]*_', '', path.stem) + '.html'


@pytest.mark.slow
def test_every_notebook_has_a_page(pages):
    assert sorted(pages) == sorted(map(page_of, NOTEBOOKS))


@pytest.mark.slow
def test_pages_are_well_formed(pages):
    for name, page in pages.items():
        assert not page.wrong, (name, page.wrong[:5])
        assert len(page.ids) == len(set(page.ids)), (name, sorted({i for i in page.ids if page.ids.count(i) > 1}))


@pytest.mark.slow
def test_every_link_and_picture_is_there(site, pages):
    for name, page in pages.items():
        for url in page.links + page.images:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                assert not url.startswith(('http://', 'file:')) and 'github.io/diffkd_nb' not in url, (name, url)
                continue
            target = parts.path or name
            assert (site / unquote(target)).is_file(), (name, url)
            if parts.fragment:
                assert unquote(parts.fragment) in pages[target].ids, (name, url)
        assert not [url for url in page.images if urlsplit(url).scheme], name


@pytest.mark.slow
def test_outputs_of_the_notebooks_are_there(pages):
    for path in NOTEBOOKS:
        outputs = [o for c in json.loads(path.read_text())['cells'] for o in c.get('outputs', [])]
        drawn = sum('image/png' in o.get('data', {}) and 'text/html' not in o['data'] for o in outputs)
        assert len(pages[page_of(path)].images) >= drawn, path.name


@pytest.mark.slow
def test_every_formula_is_mathml(pages):
    total = 0
    for path in NOTEBOOKS:
        texts = [FENCED.sub('', ''.join(c['source'])) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown']
        count, page = sum(len(FORMULA.findall(text)) for text in texts), pages[page_of(path)]
        assert page.formulas >= count, path.name
        assert 'math' not in page.classes, path.name  # pandoc leaves what it cannot convert in a span of this class
        total += count
    assert total > 100


def public_symbols():
    """Yield module, name and syntax tree of every exported public function and class."""
    index = {}
    exec((ROOT / 'diffkd_nb' / '_modidx.py').read_text(), index)
    for module, symbols in index['d']['syms'].items():
        names = [symbol.removeprefix(module + '.') for symbol in symbols]
        path = ROOT / (module.replace('.', '/') + '.py')
        tree = {node.name: node for node in ast.parse(path.read_text()).body if hasattr(node, 'name')} if names else {}
        for symbol, (url, _) in symbols.items():
            name = symbol.removeprefix(module + '.')
            if '.' not in name and not name.startswith('_'):
                yield url.split('#')[0], name, tree[name]


@pytest.mark.slow
def test_every_public_name_has_an_entry_with_its_parameters(pages):
    seen = 0
    for page, name, node in public_symbols():
        entry = pages[page].entries.get(name.lower())
        assert entry is not None, f'{name} has no entry on {page}'
        if isinstance(node, ast.FunctionDef):
            words = set(re.findall(r'\w+', ''.join(entry)))
            assert words >= {a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs} - {'self'}, name
        seen += 1
    assert seen > 100


@pytest.mark.slow
def test_an_entry_shows_signature_types_defaults_and_meanings(pages):
    text = ' '.join(' '.join(pages['comparison.html'].entries['compare']).split())
    for part in ('compare', 'Parameter', 'Type', 'Default', 'Meaning', "'process'", 'int | list', '**options', 'returns', 'Table, plot and verdicts'):
        assert part in text, part


@pytest.mark.slow
def test_no_markup_is_left(pages):
    for name, page in pages.items():
        prose = ' '.join(page.prose)
        for mark in (':::', '{{', '}}', '#|', '**', '`', '](', '$'):
            assert mark not in prose, (name, mark, prose[max(0, prose.find(mark) - 60):][:120])
        assert not re.search(r'^#\s*\|', ''.join(page.code), re.M), name


@pytest.mark.slow
def test_nothing_comes_from_elsewhere(site):
    for path in [*site.glob('*.html'), *site.glob('*.css'), *site.glob('*.js')]:
        text = path.read_text(encoding='utf-8') if path.name != 'search.js' else ''
        assert not re.search(r'(src|@import|url\()\s*=?\s*["\']?(https?:)?//', text), path.name


@pytest.mark.slow
def test_the_search_index_covers_every_page(site, pages):
    text = (site / 'search.js').read_text(encoding='utf-8')
    index = json.loads(text[text.index('['):])
    for section in index:
        parts = urlsplit(section['url'])
        assert parts.path in pages and (not parts.fragment or parts.fragment in pages[parts.path].ids), section['url']
    for name, page in pages.items():
        words = {w for s in index if s['url'].split('#')[0] == name for w in re.findall(r'\w{4,}', s['title'] + ' ' + s['text'])}
        want = {w for entry in page.entries.values() for text in entry for w in re.findall(r'\w{4,}', text)}
        assert len(words) > 20 and want - words <= {'source'}, (name, sorted(want - words)[:10])


def test_imports_stand_in_cells_of_their_own():
    """nbdev runs every cell that imports when it makes a page, but not the cells before it: mixed cells would fail."""
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] == 'code' and not source.startswith('#| export'):
                body = ast.parse(source).body
                imports = [any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(node)) for node in body]
                assert len(set(imports)) < 2, f'{path.name}: {source[:80]}'


# what the site is made of

def prose(path):
    """Return a notebook's text: no code, no names of sections."""
    text = '\n\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown')
    return re.sub(r'\{#[\w-]+\}$', '', text, flags=re.M)


def test_every_formula_can_be_shown():
    texts = [prose(path) for path in NOTEBOOKS]
    page = docs.pandoc('\n\n'.join(texts), *docs.READER, '--to=html', '--mathml')
    count = sum(len(FORMULA.findall(FENCED.sub('', text))) for text in texts)
    assert 100 < count <= page.count('<math') and 'class="math' not in page


def test_every_link_to_a_notebook_leads_to_one():
    names, seen = {path.name for path in NOTEBOOKS}, 0
    for path in NOTEBOOKS:
        targets = re.findall(r'\]\((?:\./)?([\w.]+\.ipynb)', FENCED.sub('', prose(path)))
        assert set(targets) <= names, (path.name, set(targets) - names)
        seen += len(targets)
    assert seen > 300


# errors

def notebook(folder, *cells, name='00_page.ipynb'):
    """Write a processed notebook and return its page."""
    head = dict(cell_type='raw', metadata={}, source='---\ntitle: page\noutput-file: page.html\n---\n')
    (folder / name).write_text(json.dumps(dict(cells=[head, *cells], metadata={}, nbformat=4, nbformat_minor=5)))
    return docs.Page(folder / name)


def website(folder, *cells):
    """Make a site of one page in `folder`."""
    notebook(folder, *cells)
    (folder / 'nbdev.yml').write_text('website: {title: t, repo-url: https://example.org/r, repo-branch: main, site-url: https://example.org/d}')
    (folder / '_quarto.yml').write_text('website: {sidebar: {contents: [00_page.ipynb]}}')
    (folder / 'out').mkdir()
    docs.Site(folder).write(folder / 'out')
    return (folder / 'out' / 'page.html').read_text()


def markdown(text):
    return dict(cell_type='markdown', metadata={}, source=text)


def displayed(**data):
    data = {k.replace('_', '/', 1): v for k, v in data.items()}
    return dict(cell_type='code', metadata={}, source='x', outputs=[dict(output_type='display_data', metadata={}, data=data)])


def test_kinds_of_output(tmp_path):
    page = notebook(tmp_path, displayed(text_html='<b>rich</b>', text_plain='poor'), displayed(text_markdown='*said*'), displayed(text_plain='[1]'),
                    displayed(text_plain='<matplotlib.axes.Axes object>'), displayed(image_png='iVBORw0KGgo=', text_plain='<Figure>'),
                    displayed(**{'image_svg+xml': '<svg xmlns="http://www.w3.org/2000/svg"/>'}))
    assert '<b>rich</b>' in page.markdown and '*said*' in page.markdown and '[1]' in page.markdown
    assert 'poor' not in page.markdown and 'Axes' not in page.markdown and 'Figure>' not in page.markdown
    assert page.files == {'figures/page-1.png': b'\x89PNG\r\n\x1a\n', 'figures/page-2.svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>'}


def test_links(tmp_path):
    text = website(tmp_path, markdown('## A part\n\n[a](00_page.ipynb#a-part) [b](#a-part) [c](../results/x.csv) '
                                      '[`_d`](https://example.org/d/page.html#_d)'))
    assert 'href="page.html#a-part"' in text and 'href="#a-part"' in text
    assert 'href="https://example.org/r/blob/main/results/x.csv"' in text and 'example.org/d' not in text and '<code>_d</code>' in text


@pytest.mark.parametrize('cell, message', [
    (displayed(application_x='1'), 'no way to show an output of type application/x'),
    (dict(cell_type='code', source='x', outputs=[dict(output_type='error', ename='KeyError', evalue='k')]), 'ends in an error: KeyError'),
    (markdown('[a](#nowhere)'), 'the link #nowhere leads to no section'),
    (markdown('![a](images/none.png)'), 'the picture images/none.png is missing'),
    (markdown('$\\frac{1$'), 'Pandoc: '),
])
def test_what_cannot_be_shown_is_named(tmp_path, cell, message):
    with pytest.raises(docs.DocsError, match=re.escape(message)):
        website(tmp_path, cell)


def test_missing_pandoc_is_named(monkeypatch):
    import pypandoc

    def missing():
        raise OSError('No pandoc was found')
    monkeypatch.setattr(pypandoc, 'get_pandoc_path', missing)
    with pytest.raises(docs.DocsError, match='pip install pypandoc_binary'):
        docs.pandoc('text')


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / 'thesis.tex').touch()
    assert docs.main(['--out', str(tmp_path)]) == 1
    assert 'holds something else' in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


# in a browser

@pytest.fixture(scope='module')
def browser():
    """A headless chromium."""
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
    program = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    driver = shutil.which('chromedriver')
    if not program or not driver:
        pytest.skip('chromium or chromedriver is not installed')
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--hide-scrollbars'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.set_script_timeout(20)
    yield chrome
    chrome.quit()


def look(browser, width, scheme='light'):
    """Give the browser a window of this width and a preferred colour scheme."""
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=844, deviceScaleFactor=1, mobile=width < 600))
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value=scheme)]))


def visit(browser, path):
    """Open a page and wait until all of it is there: under load the driver returns before that now and then."""
    from selenium.webdriver.support.ui import WebDriverWait
    browser.get(path.as_uri())
    ready = "return location.href == arguments[0] && document.readyState == 'complete' && !!document.querySelector('footer')"
    WebDriverWait(browser, 20).until(lambda b: b.execute_script(ready, path.as_uri()))


GUIDES = {f"{n}.html" for n in ("index", "quickstart", "resnet50_teaches_resnet18", "distill", "which_method", "what_it_costs", "bring_your_own",
                                "segmentation_tutorial", "detection_tutorial", "text_tutorial", "plain_loop", "compare", "troubleshooting")}     # their first code is read on phones too
STATE = """const done = arguments[0], images = [...document.images]
images.forEach(i => i.loading = 'eager')
Promise.all(images.map(i => i.decode().catch(() => 0))).then(() => done({
  width: document.documentElement.scrollWidth,
  missing: images.filter(i => !i.naturalWidth).map(i => i.src),
  wide: images.filter(i => i.getBoundingClientRect().right > innerWidth).map(i => i.src),
  first: [...document.querySelectorAll('main pre.sourceCode')].slice(0, 1).filter(p => p.scrollWidth > p.clientWidth + 1).map(p => p.textContent),
  small: [...document.querySelectorAll('main p, main li')].filter(p => parseFloat(getComputedStyle(p).fontSize) < 13).length,
  flat: [...document.querySelectorAll('math')].filter(m => !m.getBoundingClientRect().height || !(m instanceof MathMLElement)).length,
  math: document.querySelectorAll('math').length}))"""


@pytest.mark.slow
def test_pages_in_a_browser(browser, site, pages):
    "On a screen and on a phone"
    for name, page in pages.items():
        visit(browser, site / name)
        for width in (1280, 390):
            look(browser, width)
            state = browser.execute_async_script(STATE)
            assert state['width'] <= width, (name, state)
            assert not state['missing'] and not state['wide'] and not state['small'] and not state['flat'], (name, state)
            assert name not in GUIDES or not state['first'], (name, state)
            assert state['math'] == page.formulas, name
        assert not [line for line in browser.get_log('browser') if line['level'] in ('SEVERE', 'WARNING')], name


@pytest.mark.slow
@pytest.mark.parametrize('width', [1280, 390])
def test_search_in_a_browser(browser, site, width):
    from selenium.webdriver.support.ui import WebDriverWait
    look(browser, width)
    visit(browser, site / 'losses.html')
    browser.find_element('css selector', '#search input').send_keys('DDIM')
    hits = WebDriverWait(browser, 10).until(lambda b: b.find_elements('css selector', '#search li a'))
    boxes = [hit.rect for hit in hits]
    assert all(b['x'] >= 0 and b['x'] + b['width'] <= width for b in boxes), boxes
    assert '/diffusion.html#' in hits[0].get_attribute('href')
    hits[0].click()
    WebDriverWait(browser, 10).until(lambda b: '/diffusion.html#' in b.current_url)
    assert not browser.get_log('browser')


@pytest.mark.slow
def test_dark_and_light_in_a_browser(browser, site):
    def brightness():
        colour = browser.execute_script('return getComputedStyle(document.body).backgroundColor')
        return sum(map(int, re.findall(r'\d+', colour)[:3]))
    for scheme, dark in (('light', False), ('dark', True)):
        look(browser, 1280, scheme)
        visit(browser, site / 'index.html')
        assert (brightness() < 200) == dark
        browser.find_element('id', 'scheme').click()
        assert (brightness() < 200) != dark
        visit(browser, site / 'taps.html')
        assert (brightness() < 200) != dark  # the choice is kept
        browser.execute_script('localStorage.clear()')


@pytest.mark.slow
def test_menu_on_a_phone(browser, site):
    look(browser, 390)
    visit(browser, site / 'index.html')
    pages = browser.find_element('id', 'pages')
    assert not pages.is_displayed()
    browser.find_element('id', 'menu').click()
    assert pages.is_displayed()
    browser.find_element('link text', 'diffusion').click()
    assert browser.current_url.endswith('/diffusion.html')
