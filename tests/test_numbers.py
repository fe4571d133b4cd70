"One number stands for one thing: what several pages say is compared with the source that all of them should have"
import json, re, sys
from functools import lru_cache
from pathlib import Path
import pandas as pd
import pytest
from diffkd_nb.stored_runs import Comparison
from diffkd_nb.diffusion import alpha_bar_schedule
from diffkd_nb.methods import METHODS
from diffkd_nb.published import published

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'results'
sys.path.insert(0, str(ROOT/'tools'))
import measured        # noqa: E402


@lru_cache
def pages():
    "Text and outputs of each notebook, without line breaks"
    def said(c):
        if c['cell_type'] == 'markdown': return [c['source']]
        return [o.get('text') or o['data'].get('text/markdown') or o['data'].get('text/plain', '') for o in c.get('outputs', []) if 'text' in o or 'data' in o]
    return {p.name: ' '.join(' '.join(''.join(t) for c in json.loads(p.read_text())['cells'] for t in said(c)).split()) for p in (ROOT/'nbs').glob('*.ipynb')}


def teacher(folder): return 100*next(iter(json.loads((RESULTS/folder/'teachers.json').read_text()).values()))['accuracy']
def diffkd(folder):
    runs = Comparison(RESULTS/folder).runs
    return runs[(runs.method == 'diffkd') & runs.seed.isin([0, 1, 2])].accuracy.mean()
def implied(t): ab = float(alpha_bar_schedule()[t]); return 1/(1 + ((1 - ab)/ab)**.5)
def figure4(steps): return published('torchvision:resnet50', 'mobilenetv1', f'diffkd:steps={steps}', 'ImageNet')[0]['value']
def step(method): return json.loads((RESULTS/'bench'/'methods_cpu.json').read_text())['rows'][method]['to_alone']
def accuracy(folder): return 100*pd.read_csv(RESULTS/folder/'log.csv').accuracy.iloc[-1]
def planned(pair):
    from diffkd_nb.study import get_question
    return get_question('text').answer(RESULTS/'study'/'text').loc[pair, ['difference', 'low', 'high']].tolist()


# what it is: its source, how pages say it, on how many at least
N = r'([+-]?\d+(?:\.\d+)?)'
FACTS = {
    'the ResNet-32 that teaches': (lambda: [teacher('cifar100_resnet8')], rf'ResNet-32 (?:for CIFAR-100 \(|of ){N} %|resnet32_s\*\* \({N} %', 4),
    'the fine-tuned MiniLM': (lambda: [teacher('study/text')], rf'teacher: {N} % on the 500 test questions', 1),
    'DiffKD in short, channels first and last': (lambda: [diffkd('cifar100_resnet8'), diffkd('cifar100_controls')],
                                                 rf'seeds gave {N} there and {N} here|channels first {N}, channels last {N}', 2),
    'gamma at the start of 400': (lambda: [implied(400)], rf'start at 400 (?:would ask for \$\\gamma = |implies gamma ){N}', 2),
    'one step in figure 4': (lambda: [figure4(1), figure4(5)], rf'point at one step, {N} % against {N} % with five', 1),
    'five calls of the denoiser': (lambda: [5*3.125*1024**2*49/1e6], rf'five calls (?:of the denoiser are )?{N} M', 1),
    "the inside run's student": (lambda: [accuracy('inside')], rf'resnet18: {N} % of 1500', 1),
    'a step of DiffKD and of KD': (lambda: [step('diffkd'), step('kd')], rf'DiffKD takes {N} times a step of training alone, one of plain KD {N} times', 1),
    'DiffKD and KD on sentences': (lambda: planned('DiffKD - KD'), rf'carry over to sentences\?\*\* \d.*?\* DiffKD - KD: {N} points, {N} to {N}, 10 seeds: no gain', 1),
    'methods beside DiffKD': (lambda: [len(METHODS)], rf'\*\*{N} methods\*\*', 1)}


@pytest.mark.parametrize('name', FACTS)
def test_pages_agree_with_the_source(name):
    source, says, least = FACTS[name]
    want, found = source(), {p: [[g for g in m.groups() if g is not None] for m in re.finditer(says, t)] for p, t in pages().items()}
    found = {p: hits for p, hits in found.items() if hits}
    assert len(found) >= least, found
    wrong = [(p, hit, want) for p, hits in found.items() for hit in hits for said, true in zip(hit, want, strict=True)
             if abs(float(said) - true) > .5*10**-len(said.partition('.')[2]) + 1e-9]
    assert not wrong, wrong


def test_the_stored_demo_has_one_sentence_about_its_maps():
    said = {re.search(r'Over 797 images a denoised map correlates .*? with their average\.', t)[0] for p, t in pages().items()
            if p in ('31_demo.ipynb', '58_what_we_found.ipynb')}
    assert len(said) == 1, said


def test_every_verdict_on_a_page_is_one_of_a_stored_comparison():
    "A difference of two methods with its interval: the same words wherever it stands (26b has made-up runs; 27 and 30 compare runs of their own)"
    folders = 'demo/students', 'cifar100_resnet8', 'cifar100_controls', 'cifar100_ablations', 'imagenette_cpu'
    stored, refs = [Comparison(RESULTS/f) for f in folders], {'alone', 'kd', 'diffkd', 'diffkd:denoiser=identity'}
    true = {v.partition(', ')[2] for made in stored for ref in refs & {*made.runs.method} for v in made.verdicts(ref)}
    said = r'[a-z][\w:=.]*(?:,\w+=\w+)* - [a-z][\w:=.]*(?:,\w+=\w+)*: [+-]\d+\.\d+ points, corrected [^:]*? seeds: [a-z ]+\.'
    found = [(p, m[0]) for p, text in pages().items() if not p.startswith(('26b_', '27_', '30_')) for m in re.finditer(said, text)]
    assert len(found) > 30 and not (wrong := [(p, v) for p, v in found if v not in true]), wrong


def test_the_installed_table_says_what_was_stored():
    "`measured.csv`, which the command line reads, and the stored bench and runs"
    assert (ROOT/'diffkd_nb'/'measured.csv').read_text() == measured.measured(), 'run tools/measured.py'
