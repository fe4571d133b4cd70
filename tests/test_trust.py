"Folders of strangers: nothing that a manifest names runs, is followed out of the folder, or is allocated beyond what a run could have"
import json, os, pickle, resource, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from diffkd_nb.commands import verify_main
from diffkd_nb.stored_runs import Comparison
from diffkd_nb.files import InputError, file_hash
from diffkd_nb.models import make_model, registered_only
from diffkd_nb.recipes import get_recipe
from diffkd_nb.record import manifest_hash
from diffkd_nb.run import run, stored_learner
from diffkd_nb.trust import MOST, leads_out, read_manifest
from diffkd_nb.verify import verify
from diffkd_nb.weights import check_fit, read_weights, save_weights


@pytest.fixture(scope='module')
def honest(tmp_path_factory):
    "A finished run with its distiller, and its teacher"
    d, quick = tmp_path_factory.mktemp('runs'), get_recipe('tiny').replace(epochs=1)
    run(quick, 'digits', None, 'small:8', 'alone', 0, d/'teacher', progress=False)
    teacher = f"small:8@{d/'teacher'/'student.safetensors'}"
    run(quick, 'digits', teacher, 'small:4', 'diffkd', 0, d/'a', keep_distiller=True, progress=False)
    return d/'a', teacher


@pytest.fixture
def hostile(honest, tmp_path):
    "A copy of the run, and a function that changes its manifest and seals it anew"
    out = shutil.copytree(honest[0], tmp_path/'stranger'/'run')
    def change(place, value):
        m = json.loads((out/'manifest.json').read_text()); *way, last = place.split('.')
        at = m
        for k in way: at = at[k]
        at[last] = value
        m['hash'] = manifest_hash(m)
        (out/'manifest.json').write_text(json.dumps(m))
    return out, change, honest[1]


def failed(report): return [f'{c.what}: {c.detail}' for c in report if c.ok is False]


def test_an_honest_folder_passes(honest):
    assert verify(honest[0]) and not [c for c in verify(honest[0]) if c.ok is None]
    assert stored_learner(*honest).dls.device.type == 'cpu'


MODULE = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\nfrom diffkd_nb.models import make_model\ndef make(n): return make_model('small:4', n, 1, 8)\n"


def test_no_module_is_imported_that_a_manifest_names(hostile, tmp_path, monkeypatch):
    out, change, teacher = hostile
    (tmp_path/'strangers_code.py').write_text(MODULE); monkeypatch.syspath_prepend(tmp_path)
    change('settings.student', 'strangers_code:make')
    assert any('names code of its own' in f and 'trust=True' in f for f in failed(verify(out)))
    with pytest.raises(InputError, match='names code of its own'): stored_learner(out, teacher)
    assert verify_main([str(out)]) == 1
    assert not (tmp_path/'strangers_code.ran').exists() and 'strangers_code' not in sys.modules
    assert verify(out, trust=True) and verify_main([str(out), '--trust']) == 0 and (tmp_path/'strangers_code.ran').exists()
    assert stored_learner(out, teacher, trust=True)
    sys.modules.pop('strangers_code', None)


@pytest.mark.parametrize('name', ['os:system', 'posix:system', 'builtins:exec', 'subprocess:run', 'timm.models:create_model', 'torch.hub:load', 'small:8:x', 'hf-hub:a/b', 'timm:hf-hub:a/b', 'timm:local-dir:/tmp',
                                  'timm:resnet18.local-dir:/tmp', 'torchvision:../x', '../x', 'a\0b', '', '\x1b]0;x\x07'])
def test_only_registered_names_are_made(name, hostile, monkeypatch):
    out, change, teacher = hostile
    monkeypatch.setattr('diffkd_nb.models.importlib', SimpleNamespace(import_module=lambda *a: pytest.fail(f'imported {a}')))
    change('settings.student', name)
    report = verify(out)
    assert any(f.startswith('the student loads') for f in failed(report)) and '\x1b' not in str(report)
    with pytest.raises((InputError, AssertionError)): stored_learner(out, teacher)


def test_a_teacher_of_the_users_own_may_be_code(honest, tmp_path, monkeypatch):
    (tmp_path/'my_teacher.py').write_text(MODULE.replace('small:4', 'small:8')); monkeypatch.syspath_prepend(tmp_path)
    assert stored_learner(honest[0], f"my_teacher:make@{honest[1].partition('@')[2]}")
    sys.modules.pop('my_teacher', None)


def test_the_guard_holds_for_its_block_alone(tmp_path, monkeypatch):
    (tmp_path/'mine_too.py').write_text(MODULE); monkeypatch.syspath_prepend(tmp_path)
    with registered_only():
        with registered_only(False), pytest.raises(InputError): make_model('mine_too:make', 10)      # an inner block cannot lift it
    assert make_model('mine_too:make', 10)
    sys.modules.pop('mine_too', None)


SIZES = {'settings.student': ['small:4097', 'small:' + '9'*30, 'x'*501], 'settings.seed': [-1, 2**40, True], 'settings.recipe.epochs': [0, 10**15], 'settings.recipe.batch_size': [10**12],
         'settings.recipe.augmentation': [['crop']*101, 'crop', [1]], 'data.spec': ['digits?size=1000000', 'digits?size=' + '9'*40, 5], 'settings.method': ['diffkd:latent=10000000', 'crd:k=99999999', 'kd:temperature=1e400', 7],
         'settings.teacher_stats': [[[0.]*1000]*2], 'settings.data_hash': [None, 5], 'student_hash': [[]]}


@pytest.mark.parametrize('place,value', [(p, v) for p,vs in SIZES.items() for v in vs], ids=lambda v: str(v)[:30])
def test_sizes_are_bounded_before_anything_is_allocated(place, value, hostile, monkeypatch):
    out, change, teacher = hostile
    change(place, value)
    def none(*a, **k): pytest.fail('data was opened')
    monkeypatch.setattr('diffkd_nb.setup.open_data', none)
    assert any('the manifest can be read' in f and place in f for f in failed(verify(out)))
    with pytest.raises(InputError, match=place): stored_learner(out, teacher)


def test_a_model_larger_than_its_file_is_not_made(hostile):
    "small:4096 on digits has 151 million weights, which a limit on memory would not allow"
    out, change, teacher = hostile
    change('settings.student', 'small:4096')
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path('/proc/self/statm').read_text().split()[0])*4096 if Path('/proc/self/statm').exists() else None
    if used: resource.setrlimit(resource.RLIMIT_AS, (used + 400*2**20, limit[1]))
    try:
        assert any('does not fit the model' in f for f in failed(verify(out)))
        with pytest.raises(InputError, match='does not fit the model'): stored_learner(out, teacher)
    finally: resource.setrlimit(resource.RLIMIT_AS, limit)


@pytest.mark.parametrize('name', ['../secret', '/etc/hostname', 'a/b', 'a\\b', '..', '', 'C:x', 'x'*600])
def test_names_of_files_stay_in_the_folder(name, hostile, monkeypatch):
    out, change, teacher = hostile
    (out.parent/'secret').write_text('secret')
    change('files', {name: 'a'*64})
    read = []
    monkeypatch.setattr('diffkd_nb.verify.file_hash', lambda f: read.append(f) or file_hash(f))
    assert any('names of files in its own folder' in f for f in failed(verify(out))) and not read
    with pytest.raises(InputError, match='names of files in its own folder'): stored_learner(out, teacher)


@pytest.mark.parametrize('file', ['manifest.json', 'log.csv', 'student.safetensors', 'distiller.safetensors'])
def test_links_out_of_the_folder_are_not_followed(file, hostile, tmp_path):
    out, change, teacher = hostile
    shutil.move(out/file, tmp_path/'elsewhere'); (out/file).symlink_to(tmp_path/'elsewhere')
    report = verify(out.parent)
    assert not report and failed(report) == [f"nothing leads out of the folder: {file} links to {tmp_path/'elsewhere'}"]
    with pytest.raises(InputError, match='links to a place outside'): stored_learner(out, teacher)
    assert verify(out.parent, trust=True) and stored_learner(out, teacher, trust=True)


def test_links_inside_of_the_folder_are_fine(hostile, tmp_path):
    out, *_ = hostile
    shutil.move(out/'log.csv', out/'real.csv'); (out/'log.csv').symlink_to('real.csv')
    (tmp_path/'here').symlink_to(out)
    assert verify(out) and verify(tmp_path/'here') and not leads_out(tmp_path/'here')
    (out/'round').symlink_to('round')
    assert [f.name for f in leads_out(out)] == ['round']


def test_data_outside_of_the_folder_is_not_opened(hostile, tmp_path, monkeypatch):
    from PIL import Image
    out, change, teacher = hostile
    for c in 'ab':
        (tmp_path/'private'/c).mkdir(parents=True)
        for i in range(10): Image.new('RGB', (8, 8), (i, 0, 0)).save(tmp_path/'private'/c/f'{i}.png')
    opened = []
    from diffkd_nb import setup
    monkeypatch.setattr(setup, 'open_data', lambda spec, *a, f=setup.open_data: opened.append(spec) or f(spec, *a))
    for spec in (f"folder:{tmp_path/'private'}", f"arrays:{out}/../../private", str(tmp_path/'private'), 'folder:', 'cifar10:/', '/'):
        change('data.spec', spec); opened.clear()
        report = verify(out)
        assert report and 'outside of the folder' in str(report) and not opened, spec                 # a question that could not be asked
        with pytest.raises(InputError, match='outside of the folder'): stored_learner(out, teacher)
        assert not opened
    change('data.spec', f"folder:{tmp_path/'private'}?size=8")
    assert 'the data is the same' in failed(verify(out, trust=True))[0] and opened
    shutil.copytree(tmp_path/'private', out/'photos')
    change('data.spec', f"folder:{out/'photos'}?size=8"); opened.clear()
    assert 'the data is the same' in failed(verify(out))[0] and opened                                # its own data is looked at
    assert verify(out, data='digits')                                                                # and what the user names


class Evil:
    def __reduce__(self): return os.mkdir, (os.environ['EVIL'],)


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.bin', '.ckpt', '.pth.tar', '.tar'])
def test_weights_and_checkpoints_run_no_code(suffix, hostile, tmp_path, monkeypatch):
    out, change, teacher = hostile
    monkeypatch.setenv('EVIL', str(tmp_path/'evil'))
    f = tmp_path/f'w{suffix}'
    torch.save({'state_dict': {'w': torch.ones(2)}, 'more': Evil()}, f)
    with pytest.raises(InputError, match='cannot be read'): read_weights(f)
    shutil.copy(f, out/'checkpoint.pt'); (out/'manifest.json').unlink()
    with pytest.raises((pickle.UnpicklingError, InputError)): run(get_recipe('tiny').replace(epochs=1), 'digits', teacher, 'small:4', 'diffkd', 0, out, progress=False)
    shutil.copy(f, out/'student.safetensors')
    with pytest.raises(InputError): check_fit(lambda: make_model('small:4', 10, 1, 8), out/'student.safetensors')
    assert not (tmp_path/'evil').exists()


@pytest.mark.parametrize('text', ['', '[', '[]', '5', '{"settings": 5}', '['*100_000, '{"a": ' + '9'*5000 + '}', '{"settings": {"task": []}, "result": {}, "files": {}, "student_hash": "", "data": {}}',
                                  '{"settings": [], "result": [], "files": [], "student_hash": [], "data": []}', 'x'*(MOST['manifest'] + 1)], ids=lambda t: t[:40])
def test_a_manifest_of_any_content_is_one_failed_check(text, hostile):
    out, *_ = hostile
    (out/'manifest.json').write_text(text)
    report = verify(out)
    assert [c.what for c in report if c.ok is False] == ['the manifest can be read'] and len(str(report)) < 1000
    with pytest.raises(InputError): read_manifest(out)


def test_stored_results_are_still_read():
    results = Path(__file__).parents[1]/'results'
    manifests = [f for f in results.rglob('manifest.json') if 'student_hash' in json.loads(f.read_text())]
    assert len(manifests) > 100 and all(read_manifest(f.parent)['result'] for f in manifests)


def test_a_run_that_diverges_says_so_and_stays_on_record(tmp_path, capfd):
    from diffkd_nb.commands import train_main
    args = ['--data', 'digits', '--recipe', 'tiny', '--epochs', '1', '--lr', '1e30', '--student', 'small:4', '--method', 'alone', '--device', 'cpu', '--out', str(tmp_path/'o')]
    assert train_main(args) == 1
    lines = [l for l in capfd.readouterr().err.splitlines() if l.strip()]
    assert len(lines) == 1 and 'not finite from epoch 1' in lines[0]
    assert json.loads((tmp_path/'o'/'manifest.json').read_text())['status'] == 'diverged' and verify(tmp_path/'o')
    assert train_main(args) == 1                                    # the finished record is asked again


def test_a_grid_with_a_method_that_diverges_says_so(tmp_path, capfd):
    from diffkd_nb.commands import compare_main
    save_weights(make_model('small:8', 10, 1, 8), tmp_path/'t.safetensors')
    args = ['--data', 'digits', '--recipe', 'tiny', '--epochs', '1', '--pair', f"small:8@{tmp_path/'t.safetensors'}", 'small:4', '--seeds', '1',
            '--methods', 'alone', 'kd:weight=1e39', '--executor', 'here', '--device', 'cpu', '--out', str(tmp_path/'c')]
    assert compare_main(args) == 1
    said = capfd.readouterr()
    assert said.err.count('DIVERGED small_4-from-small_8/kd') == 1 and 'kd:weight=1e+39 (1 of 1 diverged)' in said.out
    assert len(Comparison(tmp_path/'c').diverged) == 1 and verify(tmp_path/'c', trust=True)      # a weight of this size asks for trust
    assert compare_main(['--show', str(tmp_path/'c')]) == 1 and 'diverged' in capfd.readouterr().out


def test_a_stored_teacher_of_other_classes_is_refused(tmp_path):
    from PIL import Image
    def folder(name, classes):
        for v,c in enumerate(classes):
            (tmp_path/name/c).mkdir(parents=True)
            for i in range(25): Image.new('RGB', (8, 8), (90*v, i, 0)).save(tmp_path/name/c/f'{i}.png')
        return f'arrays:{tmp_path/name}?size=8'
    quick = get_recipe('tiny').replace(epochs=1, batch_size=16)
    m = run(quick, folder('a', ['ant', 'bee']), None, 'small:4', 'alone', 0, tmp_path/'t', progress=False)
    assert m['data']['class_names'] == ['ant', 'bee']
    teacher, go = f"small:4@{tmp_path/'t'/'student.safetensors'}", lambda data, out: run(quick, data, teacher, 'small:4', 'kd', 0, tmp_path/out, progress=False)
    with pytest.raises(InputError, match='was trained on the classes ant, bee and the data has bee, cow'): go(folder('b', ['bee', 'cow']), 'o')
    assert go(folder('c', ['ant', 'bee']), 'p')['status'] == 'finished'
    old = json.loads((tmp_path/'t'/'manifest.json').read_text()); del old['data']['class_names']; (tmp_path/'t'/'manifest.json').write_text(json.dumps(old))
    assert go(f"arrays:{tmp_path/'b'}?size=8", 'o')                 # an older manifest tells nothing
