"""README.md is generated from nbs/index.ipynb. These tests hold the two together."""
import base64
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PNG = base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==')


def load_tool():
    """Import tools/readme.py, which is no package."""
    spec = importlib.util.spec_from_file_location('readme_tool', ROOT / 'tools' / 'readme.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def markdown(*lines):
    return dict(cell_type='markdown', metadata={}, source='\n'.join(lines))


def code(source, *outputs, **metadata):
    return dict(cell_type='code', metadata=metadata, source=source, execution_count=None, outputs=list(outputs))


def stream(text, name='stdout'):
    return dict(output_type='stream', name=name, text=text)


def result(**data):
    return dict(output_type='display_data', metadata={}, data={k.replace('_', '/'): v for k, v in data.items()})


@pytest.fixture
def make_root(tmp_path):
    """Return a function that writes an index of the given cells and returns its project folder."""
    def _make(*cells):
        (tmp_path / 'nbs').mkdir(exist_ok=True)
        notebook = dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5)
        (tmp_path / 'nbs' / 'index.ipynb').write_text(json.dumps(notebook), encoding='utf-8')
        return tmp_path
    return _make


@pytest.fixture
def body(make_root):
    """Return a function from cells to the README's text without its first line."""
    def _body(*cells):
        text, _ = tool.render(make_root(*cells) / 'nbs' / 'index.ipynb')
        assert text.startswith(tool.HEADER)
        return text[len(tool.HEADER):]
    return _body


def test_readme_is_current(capsys):
    "README.md of this project is what its index gives."
    status = tool.main(['--check'])
    assert status == 0, capsys.readouterr().out


def test_first_line_names_the_source(make_root):
    text, _ = tool.render(make_root(markdown('# A')) / 'nbs' / 'index.ipynb')
    first = text.splitlines()[0]
    assert first.startswith('<!--') and first.endswith('-->') and 'nbs/index.ipynb' in first


def test_markdown_is_kept(body):
    text = body(markdown('# Title', '', '> Subtitle', '', 'One "line" with `code_x` and $a^2$.', '', '- item', '- item'))
    assert text == '# Title\n\n> Subtitle\n\nOne "line" with `code_x` and $a^2$.\n\n- item\n- item\n'


def test_front_matter_and_directives_are_dropped(body):
    raw = dict(cell_type='raw', metadata={}, source='---\ntitle: X\n---')
    assert body(raw, markdown('#| slow', 'Text.')) == 'Text.\n'


def test_rules_are_not_front_matter(body):
    assert body(markdown('One.', '', '---', 'a: b', '---')).startswith('One.')


def test_code_is_fenced(body):
    assert body(code('#| eval: false\nx = 1\n\ny = x')) == '``` python\nx = 1\n\ny = x\n```\n'


@pytest.mark.parametrize('directive', ['hide', 'hide: true', 'include: false', 'export', 'default_exp core'])
def test_hidden_cells(body, directive):
    hidden = code(f'#| {directive}\nx = 1', stream('out'))
    assert body(markdown('Text.'), hidden) == 'Text.\n'


def test_hidden_by_metadata(body):
    assert body(markdown('Text.'), code('x = 1', stream('out'), nbdev={'hide': 'true'})) == 'Text.\n'


def test_echo_false_hides_the_source(body):
    assert body(code('#| echo: false\nprint(1)', stream('1\n'))) == '    1\n'


def test_output_false_hides_the_output(body):
    assert body(code('#|output: false\nprint(1)', stream('1\n'))) == '``` python\nprint(1)\n```\n'


def test_text_outputs(body):
    text = body(code('#| echo: false\nf()', stream('a\n'), stream('\x1b[31mb\x1b[0m\n'), stream('10%\r100%\n'),
                     result(text_plain=['line 1\n', 'line ```` 2'])))
    assert text == '    a\n    b\n    100%\n\n    line 1\n    line ```` 2\n'


def test_object_reprs_and_warnings(body):
    text = body(code('#| echo: false\n#| warning: false\nf()', stream('careful\n', 'stderr'),
                     result(text_plain='<IPython.core.display.HTML object>')), markdown('End.'))
    assert text == 'End.\n'


def test_html_table_becomes_pipe_table(body):
    html = ('<style scoped>td {color: red}</style><div><table border="1" class="dataframe"><thead>'
            '<tr style="text-align: left;"><th>method</th><th>accuracy</th></tr></thead><tbody>'
            '<tr><td>alone</td><td>80.9</td></tr><tr><td>DiffKD</td><td>85.8</td></tr></tbody></table></div>')
    text = body(code('#| echo: false\ndf', result(text_html=html, text_plain='method accuracy')))
    rows = [[c.strip() for c in line.strip('|').split('|')] for line in text.splitlines()]
    assert rows[0] == ['method', 'accuracy'] and rows[2:] == [['alone', '80.9'], ['DiffKD', '85.8']]
    assert all(set(c) <= set(':-') for c in rows[1]) and '<' not in text


def test_wide_table_stays_a_pipe_table(body):
    cells = ['long words ' * 12] * 4
    html = '<table><thead><tr>{}</tr></thead><tbody><tr>{}</tr></tbody></table>'.format(
        ''.join(f'<th>{c}</th>' for c in 'abcd'), ''.join(f'<td>{c}</td>' for c in cells))
    text = body(code('#| echo: false\ndf', result(text_html=html)))
    assert len(text.splitlines()) == 3 and all(line.startswith('|') for line in text.splitlines())


def test_html_without_text_is_left_out(body):
    empty = result(text_html='<style>progress {color: red}</style><progress value="1"></progress>', text_plain='<x.HTML object>')
    assert body(code('#| echo: false\nf()', empty), markdown('End.')) == 'End.\n'


def test_markdown_output_is_kept(body):
    text = body(code('#| echo: false\nf()', result(text_markdown='**bold** [x](09_callback.ipynb)', text_plain='obj')))
    assert text == '**bold** [x](nbs/09_callback.ipynb)\n'


def test_relative_targets_are_rebased(body):
    text = body(markdown('![a picture](images/first.png) [b](00f_taps.ipynb#x) [c](../LICENSE) [d](https://e.org/images/f.png) [g](#h)',
                         '', '<img src="images/g.png" width="50%">'))
    assert '![a picture](nbs/images/first.png)' in text
    assert '[b](nbs/00f_taps.ipynb#x)' in text and '[c](LICENSE)' in text
    assert '[d](https://e.org/images/f.png)' in text and '[g](#h)' in text
    assert '<img src="nbs/images/g.png" width="50%">' in text


def test_divisions_and_spans_are_opened(body):
    assert body(markdown(':::{.callout-note}', 'A [b]{.c}.', ':::')) == 'A b.\n'


def test_embedded_pictures_become_files(make_root):
    picture = result(image_png=base64.b64encode(PNG).decode(), text_plain='<Figure size 640x480 with 1 Axes>')
    root = make_root(code('#| echo: false\n#| fig-alt: "Two maps"\nplot()', picture, picture))
    assert tool.main(['--root', str(root)]) == 0
    text = (root / 'README.md').read_text()
    assert '![Two maps](nbs/images/readme_1.png)' in text and '![Two maps](nbs/images/readme_2.png)' in text
    assert (root / 'nbs/images/readme_2.png').read_bytes() == PNG
    assert 'Figure size' not in text

    make_root(code('#| echo: false\nplot()', picture))
    assert tool.main(['--root', str(root), '--check']) == 1
    assert tool.main(['--root', str(root)]) == 0
    assert not (root / 'nbs/images/readme_2.png').exists()
    (root / 'nbs/images/readme_1.png').write_bytes(b'other')
    assert tool.main(['--root', str(root), '--check']) == 1


def test_an_error_in_the_index_is_refused(body):
    with pytest.raises(ValueError, match='NameError'):
        body(code('x', dict(output_type='error', ename='NameError', evalue='x', traceback=[])))


def test_a_changed_index_is_detected(make_root, capsys):
    root = make_root(markdown('# One'), code('1 + 1', result(text_plain='2')))
    arguments = ['--root', str(root)]
    assert tool.main(arguments + ['--check']) == 1, 'no README yet'
    assert tool.main(arguments) == 0
    first = (root / 'README.md').read_bytes()
    assert tool.main(arguments + ['--check']) == 0
    assert tool.main(arguments) == 0 and (root / 'README.md').read_bytes() == first, 'the same each time'

    make_root(markdown('# One'), code('1 + 1', result(text_plain='3')))
    capsys.readouterr()
    assert tool.main(arguments + ['--check']) == 1
    out = capsys.readouterr().out
    assert '+    3' in out and 'make readme' in out
    assert (root / 'README.md').read_bytes() == first, '--check writes nothing'


def test_an_edited_readme_is_detected(make_root):
    root = make_root(markdown('# One'))
    assert tool.main(['--root', str(root)]) == 0
    with open(root / 'README.md', 'a') as f:
        f.write('More.\n')
    assert tool.main(['--root', str(root), '--check']) == 1


def test_a_missing_index_is_named(tmp_path, capsys):
    assert tool.main(['--root', str(tmp_path)]) == 2
    assert 'index.ipynb' in capsys.readouterr().err
