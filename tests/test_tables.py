"A table of the paper by one command, with stand-ins for the published weights"
import json, socket
import numpy as np
import pytest, torch, torchvision
from PIL import Image
from resuming import cut_and_resumed
from diffkd_nb.commands import compare_main
from diffkd_nb.data import InputError, open_data
from diffkd_nb.diffkd import DiffKDDistiller
from diffkd_nb.experiment import all_options, make_teacher, parse_method, verify
from diffkd_nb.models import make_model, n_parameters
from diffkd_nb.recipes import get_recipe
from diffkd_nb.tables import TABLES, beside_paper, get_table, run_table
from diffkd_nb.taps import plan_taps
from diffkd_nb.weights import load_published, published_weights, trained_model

WNIDS = ['n01440764', 'n02102040', 'n03888257']      # numbers 0, 217 and 701 of ImageNet


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A few images in ImageNet's layout, and files of random weights under the names of the published ones"
    d, rng = tmp_path_factory.mktemp('imagenet'), np.random.RandomState(0)
    for split,n in (('train', 4), ('val', 2)):
        for c,w in enumerate(WNIDS):
            (d/'images'/split/w).mkdir(parents=True)
            for i in range(n): Image.fromarray((rng.rand(40, 48, 3)*80 + 50*c).astype('uint8')).save(d/'images'/split/w/f'{w}_{i}.JPEG')
    (d/'weights').mkdir()
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50().state_dict(), d/'weights'/'resnet50-0676ba61.pth')
    torch.save(torchvision.models.resnet34().state_dict(), d/'weights'/'resnet34-b627a593.pth')
    return d


def command(place, out, *more):
    return ['--table', '8', '--data', f"folder:{place/'images'}?size=64", '--weights', str(place/'weights'), '--epochs', '1', '--batch-size', '4', '--lr', '0.01', '--seeds', '1', '--workers', '0',
            '--executor', 'here', '--methods', 'diffkd:latent=256', 'diffkd:latent=128', '--out', str(out), *more]


@pytest.mark.slow
def test_table_8_runs_and_stands_beside_the_paper(place, tmp_path, capsys):
    assert compare_main(command(place, tmp_path)) == 0
    text = capsys.readouterr().out
    assert 'diffkd:latent=128' in text and 'torchvision:resnet50' in text
    m = json.loads(next((tmp_path/'B1').rglob('*latent=128/seed0/manifest.json')).read_text())
    s = m['settings']
    assert s['recipe']['name'].startswith('B1') and s['recipe']['nesterov'] and s['teacher_stats'] == [[.485, .456, .406], [.229, .224, .225]]
    assert m['options']['latent'] == 128 and m['taps'][1]['teacher_shape'] == [3, 1, 1] and m['data']['n_train'] == 12
    assert verify(tmp_path/'B1')
    t = beside_paper(8, tmp_path)
    assert t.set_index('method').verdict.to_dict() == {**{m: 'not run' for m in TABLES['8'].methods}, 'diffkd:latent=256': 'other data', 'diffkd:latent=128': 'other data'}
    assert t.set_index('method').paper['diffkd:latent=128'] == 72.84 and t.difference.isna().all()
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob('manifest.json')}
    assert compare_main(command(place, tmp_path)) == 0 and before == {f: f.stat().st_mtime_ns for f in tmp_path.rglob('manifest.json')}


def test_teacher_keeps_the_classes_of_the_data(place):
    data = open_data(f"folder:{place/'images'}?size=64")
    teacher, name = make_teacher('torchvision:resnet34@IMAGENET1K_V1', data, place/'weights')
    whole = load_published(published_weights('torchvision:resnet34'), place/'weights').eval()
    x = torch.randn(2, 3, 64, 64)
    assert name == 'torchvision:resnet34' and torch.allclose(teacher.eval()(x), whole(x)[:, [0, 217, 701]], atol=1e-5)


def test_missing_weights_name_the_file(tmp_path, monkeypatch):
    def no_network(*a, **k): raise OSError('no route to host')
    monkeypatch.setattr(socket, 'create_connection', no_network); monkeypatch.setattr(socket.socket, 'connect', no_network)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path)); monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    for spec,file in (('torchvision:resnet34@IMAGENET1K_V1', 'resnet34-b627a593.pth'), ('timm:resnet50.a1_in1k@pretrained', 'resnet50.a1_in1k.safetensors')):
        with pytest.raises(InputError, match='cannot be downloaded') as e: trained_model(spec, ['a', 'b'])
        assert file in str(e.value) and 'https://' in str(e.value) and '--weights' in str(e.value)


@pytest.mark.parametrize('args,says', [(['--table', '1'], 'expected 2, 3, 7, 8, 9, 11, figure4'), (['--table', '9'], 'resnet56.safetensors'),
                                       (['--table', '8', '--weights', 'W'], 'fails on|does not|cannot be')])
def test_mistakes(args, says, place, tmp_path, capsys):
    import re
    (tmp_path/'W').mkdir(); (tmp_path/'W'/'resnet50-0676ba61.pth').write_bytes(b'nothing')
    args = [str(tmp_path/'W') if a == 'W' else a for a in args]
    assert compare_main([*args, '--data', f"folder:{place/'images'}?size=64", '--out', str(tmp_path/'out'), '--epochs', '1', '--batch-size', '4', '--seeds', '1']) == 2
    err = capsys.readouterr().err
    assert re.search(says, err) and len(err.strip().splitlines()) == 1, err
    with pytest.raises(SystemExit): compare_main(['--table', '2', '--pair', 'a@b', 'c', '--data', 'digits', '--out', str(tmp_path/'o')])
    assert '--table brings its own' in capsys.readouterr().err


def test_recipes_and_methods_of_the_tables_are_known():
    for t in TABLES.values():
        for g in t.groups: get_recipe(g.recipe)
        for m in t.methods: all_options(parse_method(m))
    with pytest.raises(InputError, match='takes no drop path'): make_model('torchvision:resnet18', 10, drop_path=.2)
    rates = [m.drop_prob for m in make_model('timm:swin_tiny_patch4_window7_224', 10, 3, 224, drop_path=.2).modules() if type(m).__name__ == 'DropPath']
    assert max(rates) == pytest.approx(.2)


def test_parameters_as_in_the_literature():
    # millions, from the papers of the models
    for name,want in (('torchvision:resnet18', 11.69), ('torchvision:resnet34', 21.80), ('torchvision:resnet50', 25.56), ('timm:resnet50.a1_in1k', 25.56), ('mobilenetv1', 4.23), ('torchvision:mobilenet_v2', 3.50),
                      ('torchvision:efficientnet_b0', 5.29), ('timm:swin_tiny_patch4_window7_224', 28.29)):
        with torch.device('meta'): model = make_model(name, 1000, 3, 224)
        assert round(n_parameters(model)/1e6, 2) == want, name


@pytest.mark.parametrize('teacher,student,feature', [('torchvision:resnet34', 'torchvision:resnet18', 7_644_418), ('torchvision:resnet50', 'mobilenetv1', 11_315_970)])
def test_training_only_parameters_are_those_of_the_released_program(teacher, student, feature):
    plan = plan_taps(make_model(student, 1000, 3, 64), make_model(teacher, 1000, 3, 64), torch.randn(2, 3, 64, 64))
    taps = DiffKDDistiller(plan, latent=1024).taps if teacher.endswith('34') else DiffKDDistiller(plan).taps
    counts = [sum(p.numel() for p in t.parameters()) for t in taps]
    assert counts[0] == feature
    assert counts[1] == 23_323_002


@pytest.mark.slow
@pytest.mark.parametrize('name,student', [('B2', 'torchvision:mobilenet_v2'), ('B3', 'timm:resnet10t')])
def test_the_strong_recipes_train_and_go_on_bit_for_bit(name, student, place, tmp_path, monkeypatch):
    "RMSProp or AdamW, warm-up, RandAugment, erasing, label smoothing, average of weights, Mixup and CutMix, clipping, drop path"
    from diffkd_nb import experiment
    recipe = get_recipe(name).scaled(3).replace(batch_size=4, **({'drop_path': .2} if name == 'B3' else {}))
    args = (recipe, f"folder:{place/'images'}?size=32", 'torchvision:resnet34@IMAGENET1K_V1', student, 'diffkd:latent=32', 0)
    options = dict(weights=place/'weights', device='cpu', num_workers=0, progress=False)
    whole, _ = cut_and_resumed(lambda out: experiment.run(*args, out, **options), tmp_path, monkeypatch)
    assert whole['settings']['recipe'] == recipe.to_dict() and whole['settings']['recipe']['warmup'] > 0
