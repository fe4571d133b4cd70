"""Is what denoising adds about the picture? Question 6 of the study, from stored runs with students and distillers.

    python bench/about_the_image.py --study FOLDER --data 'camvid:FOLDER?size=180x240&valid=test' --teacher FILE [--question segmentation] [--out results/bench/about_the_image.json] [--redo]

One row per variant, seed and map: correlation with the teacher's map of the same picture, of the others and with their average, over all validation
pictures (`about_the_sample`). Where all planned seeds are there the four planned differences follow; with fewer none is printed. A second call goes on
where code, data and weights are the same.
"""
import argparse
from pathlib import Path
import pandas as pd, torch
from diffkd_nb.stored_runs import Comparison
from diffkd_nb.diffkd import trajectory
from diffkd_nb.feature_measures import about_the_sample, adds_words, what_denoising_adds
from diffkd_nb.files import file_hash
from diffkd_nb.methods import parse_method
from diffkd_nb.plots import tap_features
from diffkd_nb.rng import Draws
from diffkd_nb.run import stored_learner
from diffkd_nb.study import SETTINGS, get_question
from diffkd_nb.tasks import open_data
from rows import Rows

FILES = 'manifest.json', 'student.safetensors', 'distiller.safetensors'
DENOISER, CONTROL = 'DiffKD', 'identity'


def shown(x, form): return x.softmax(1) if form in ('dense', 'logits') else x


@torch.no_grad()
def maps_of(learn, tap):
    "What is compared, of all validation pictures: `student` where it is of the teacher's kind, `before` and `denoised` (one without a denoiser), `teacher`; and classes, one a picture, or None"
    parts, classes = [], []
    for i,(x, y) in enumerate(learn.dls.valid):
        x = x.as_subclass(torch.Tensor)
        with tap_features(learn, x, tap=tap) as (module, s, t): way = trajectory(module, s, t, Draws(torch.Generator().manual_seed(i)))
        found = dict(before=way['out'][0], denoised=way['out'][-1], teacher=way['target'])
        if s.shape == way['target'].shape and module.kind == 'dense': found['student'] = s
        if module.denoiser is None: del found['before']
        parts.append({k: shown(v.float(), module.kind) for k,v in found.items()})
        if y.dim() == 1 and not y.is_floating_point(): classes.append(y)
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}, torch.cat(classes) if classes else None


def stored(study, q):
    "Folders of the runs that are needed, by variant and seed, and what they lack"
    methods = {str(parse_method(q.variants[v])): v for v in (DENOISER, CONTROL)}
    found = {(methods.get(m['settings']['method']), m['settings']['seed']): study/f for f,m in Comparison(study).manifests.items()}
    wanted = {(v, s): found.get((v, s)) for s in q.seeds for v in (DENOISER, CONTROL)}
    lacks = {k: ['the run'] if f is None else [n for n in FILES if not (f/n).is_file()] for k,f in wanted.items()}
    return {k: f for k,f in wanted.items() if not lacks[k]}, {k: v for k,v in lacks.items() if v}


def answer(rows, seeds):
    "The planned differences, tested together; None where a seed is missing"
    table = pd.DataFrame(rows)
    of = lambda map_, what: table[(table['map'] == map_) & (table.variant == (CONTROL if map_ == CONTROL else DENOISER))].set_index('seed')[what] if len(table) else pd.Series(dtype=float)
    if any(set(of(m, 'own').index) != set(seeds) for m in ('before', 'denoised', CONTROL)): return None
    return what_denoising_adds(table[(table.variant == CONTROL) == (table['map'] == CONTROL)])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--study', type=Path, required=True); p.add_argument('--data', required=True); p.add_argument('--teacher', type=Path, required=True)
    p.add_argument('--question', default='segmentation'); p.add_argument('--tap', default='logits')
    p.add_argument('--out', type=Path); p.add_argument('--redo', action='store_true', help='measure all rows again')
    a = p.parse_args()
    torch.set_num_threads(1)
    q, data = get_question(a.question), open_data(a.data)
    runs, lacks = stored(a.study, q)
    for (v, s),what in lacks.items(): print(f"{v}, seed {s}: {', '.join(what)} missing")
    rows = Rows(a.out, __file__, a.redo, bench='about_the_image', question=q.key, planned=list(q.seeds), data=data.name, data_hash=data.hash(), teacher_hash=file_hash(a.teacher), tap=a.tap)
    done = {(r['variant'], r['seed']) for r in rows}
    for (v, s),f in runs.items():
        if (v, s) in done: continue
        maps, y = maps_of(stored_learner(f, f'{SETTINGS[q.setting].teacher}@{a.teacher}', data), a.tap)
        teacher = maps.pop('teacher')
        if v == CONTROL: maps[CONTROL] = maps.pop('denoised')
        for name,m in {**maps, 'teacher': teacher}.items(): rows.add(variant=v, seed=s, map=name, pictures=len(m), **about_the_sample(m, teacher, y), run=file_hash(f/FILES[0])[:16])
    found = answer(rows, q.seeds)
    if found is None: return print(f'{len({r["seed"] for r in rows})} of {len(q.seeds)} planned seeds, perhaps not of both variants: no result.')
    print(found.round(3).to_string()); print(f'What denoising adds is {adds_words(found)}.')


if __name__ == '__main__': main()
