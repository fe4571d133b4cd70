"""Segmentation from files to a verified comparison: trained, killed and resumed, distilled, by the commands; and what is refused."""
import json
from functools import partial
import numpy as np, pandas as pd, pytest, torch, torchvision
from PIL import Image
from torch.nn import functional as F
from fastai.vision.all import CrossEntropyLossFlat, DataBlock, DataLoaders, ImageBlock, Learner, MaskBlock, load_learner, resnet18, unet_learner
import workers
from resuming import cut_and_resumed
from diffkd_nb.callback import DiffKDCallback, DistillCallback
from diffkd_nb.comparison import compare
from diffkd_nb.files import InputError
from diffkd_nb.losses import PixelCrossEntropy
from diffkd_nb.models import registered_only
from diffkd_nb.outputs import ignored_by
from diffkd_nb.recipes import get_recipe
from diffkd_nb.rng import seeded
from diffkd_nb.run import evaluate, run
from diffkd_nb.segmentation import MeanIoU, Segmentation, confusion, iou
from diffkd_nb.segmentation_data import VOID, open_segmentation, write_shapes
from diffkd_nb.records import class_map, dry_run
from diffkd_nb.segmentation_models import Scores, segmentation_model
from diffkd_nb.tables import TABLES, beside_paper, run_table, table_cost
from diffkd_nb.tasks import open_data, task_of
from diffkd_nb.verify import verify
from diffkd_nb.weights import save_weights

RECIPE = get_recipe('camvid').replace(epochs=3, batch_size=6, augmentation=('scale:0.5-2', 'crop', 'flip'))
TEACHER, STUDENT, KD = 'pyramid:small:4?width=12', 'pyramid:small:2?width=8', 'kd'


@pytest.fixture(scope='module')
def data(tmp_path_factory): return write_shapes(tmp_path_factory.mktemp('shapes'), 30, (36, 44)) + '?size=24x32'


@pytest.fixture(scope='module')
def teacher(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    m = run(RECIPE, data, None, TEACHER, 'alone', 0, out, progress=False)
    assert m['settings']['task'] == 'segmentation' and m['data']['class_names'] == ['ground', 'disc', 'box']
    return f"{TEACHER}@{out/'student.safetensors'}"


def test_the_log_has_the_mean_and_each_class(data, teacher):
    log = pd.read_csv(f"{teacher.partition('@')[2].rpartition('/')[0]}/log.csv")
    each = log[['iou_ground', 'iou_disc', 'iou_box']]
    assert np.allclose(each.mean(axis=1), log.miou, atol=1e-6) and log.train_loss.iloc[-1] < log.train_loss.iloc[0]


@pytest.mark.parametrize('method', ['diffkd', pytest.param('cwd', marks=pytest.mark.slow)])
def test_killed_and_resumed(method, data, teacher, tmp_path, monkeypatch):
    whole, _ = cut_and_resumed(lambda out: run(RECIPE, data, teacher, STUDENT, method, 1, out, progress=False), tmp_path, monkeypatch)
    assert [(t['student'], t['student_shape'], t['teacher_shape']) for t in whole['taps']] == [('head', [3, 6, 8], [3, 6, 8])]      # the class map alone


@pytest.mark.slow
@pytest.mark.parametrize('method', ['kd', 'dist', 'cirkd', 'maskd', 'fitnet', 'diffkd:denoiser=identity', 'diffkd:taps=feature'])
def test_every_method_of_the_study_and_of_table_6_trains(method, data, teacher, tmp_path):
    m = run(RECIPE, data, teacher, STUDENT, method, 0, tmp_path, progress=False)
    assert m['status'] == 'finished' and verify(tmp_path, data=data)


def test_workers_give_the_same_student(data, tmp_path):
    args = RECIPE.replace(epochs=1), data, None, STUDENT, 'alone', 0
    a, b = (run(*args, tmp_path/str(n), num_workers=n, progress=False) for n in (0, 2))
    assert a['student_hash'] == b['student_hash'] and a['result'] == b['result']


def test_a_length_in_steps(data, tmp_path):
    m = run(get_recipe('C1').replace(steps=7, batch_size=6, augmentation=('flip',)), data, None, STUDENT, 'alone', 0, tmp_path, progress=False)
    recipe, log = m['settings']['recipe'], pd.read_csv(tmp_path/'log.csv')
    assert (recipe['epochs'], recipe['steps'], len(log)) == (2, 7, 2)       # 4 steps an epoch
    assert log.lr.iloc[-1] == pytest.approx(.02*(1 - 6/7)**.9, rel=1e-4)
    assert verify(tmp_path, data=data)


@pytest.mark.slow
def test_compares_and_verifies(data, teacher, tmp_path):
    c = compare([(teacher, STUDENT)], ['alone', KD], 2, RECIPE.replace(epochs=1), data, tmp_path, executor='here', threads=1, progress=False)
    assert not c.failed and c.task.name == 'segmentation' and list(c.table().n) == [2, 2] and 'miou' in c.markdown()
    report = verify(tmp_path, data=data, teacher=teacher.partition('@')[2])
    assert report and 'the student gives the miou of the manifest' in {k.what for k in report}, str(report)
    f = next(tmp_path.rglob('manifest.json')); m = json.loads(f.read_text()); m['result']['miou'] += .1; f.write_text(json.dumps(m))
    assert not verify(tmp_path, data=data)


def test_verify_finds_a_damaged_student(data, teacher, tmp_path):
    run(RECIPE.replace(epochs=1), data, None, STUDENT, 'alone', 0, tmp_path, progress=False)
    other, _ = data.split('?'); assert 'skipped' in str(verify(tmp_path))      # the data lies outside and is not named
    assert 'data is the same' in str(verify(tmp_path, data=f'{other}?size=36x44'))
    raw = bytearray((tmp_path/'student.safetensors').read_bytes()); raw[-5] ^= 64; (tmp_path/'student.safetensors').write_bytes(raw)
    assert not verify(tmp_path, data=data)


def test_the_cache_refuses_joint_augmentation(data, teacher, tmp_path):
    with pytest.raises(InputError, match='numbers its views.*MaskDL'): run(RECIPE, data, teacher, STUDENT, KD, 0, tmp_path/'o', cache=tmp_path/'c', progress=False)


def test_the_command_trains(data, tmp_path):
    r = workers.command('diffkd_nb.commands:train_main', '--data', data, '--recipe', 'camvid', '--epochs', '1', '--batch-size', '6', '--student', STUDENT,
                        '--method', 'alone', '--out', tmp_path/'o')
    assert r.returncode == 0 and f'{STUDENT}, alone, seed 0' in r.stdout and ' %' in r.stdout, r.stderr
    assert evaluate(Segmentation().teacher(f"{STUDENT}@{tmp_path/'o'/'student.safetensors'}", open_data(data)), data)[0] == pytest.approx(
        json.loads((tmp_path/'o'/'manifest.json').read_text())['result']['miou'], abs=1e-6)


@pytest.mark.parametrize('loss', [PixelCrossEntropy(), partial(F.cross_entropy, ignore_index=VOID)], ids=['module', 'partial'])
def test_miou_of_a_model_that_gives_a_dict_leaves_void_out(loss):
    class Dict(torch.nn.Conv2d):
        def forward(self, x): return {'out': super().forward(x), 'aux': x}
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8)); y[:, :2] = VOID
    dls = DataLoaders.from_dsets(list(zip(x, y)), list(zip(x, y)), bs=2, device='cpu', num_workers=0)
    model = Dict(3, 3, 1)
    learn = Learner(dls, model, loss_func=loss if isinstance(loss, PixelCrossEntropy) else lambda p, t: loss(p['out'], t), metrics=[MeanIoU(
        ignored_by(loss))])
    with learn.no_bar(): got = learn.validate()[1]
    assert got == pytest.approx(float(iou(confusion(model(x)['out'], y)).nanmean())) and ignored_by(loss) == VOID


def test_a_name_fetches_no_weights_for_a_stranger():
    pytest.importorskip('segmentation_models_pytorch')
    with registered_only(), pytest.raises(InputError, match="no option 'encoder_weights'"):
        segmentation_model('smp:Unet?encoder=resnet18&encoder_weights=imagenet', 3)
    with registered_only(): segmentation_model('smp:Unet?encoder=resnet18&weights=imagenet', 3)        # the place for weights, nothing fetched


def test_one_line_in_a_plain_learner(data, tmp_path):
    "fastai's own loaders, loss and metric of the front door; odd sides; a batch that is all void does no harm to the task's loss"
    opened = open_segmentation(data.partition('?')[0])
    masks = {f: m for pairs in opened.pairs for f, m in pairs}
    block = DataBlock((ImageBlock, MaskBlock(opened.classes)), get_items=lambda _: list(masks), get_y=lambda f: masks[f])
    dls = block.dataloaders(None, bs=6, num_workers=0, device='cpu')
    with seeded(0): student, big = (segmentation_model(n, 3) for n in (STUDENT, TEACHER))
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=VOID), metrics=[MeanIoU()], cbs=DistillCallback(big, KD))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.recorder.metric_names[3] == 'miou' and 0 <= learn.recorder.values[-1][2] <= 1
    learn.show_results(max_n=2)
    assert learn.predict(opened.pairs[0][0][0])[0].shape == (36, 44)
    x, y = dls.one_batch()
    x, y = (t.as_subclass(torch.Tensor) for t in (x, y))
    loss = PixelCrossEntropy(VOID)(student(x), torch.full_like(y, VOID)); loss.backward()
    assert loss == 0 and all(p.grad is None or torch.isfinite(p.grad).all() for p in student.parameters())


@pytest.mark.parametrize('name,size', [('pyramid:mobilenetv1_075_tf?stride=8', (37, 50)), ('torchvision:lraspp_mobilenet_v3_large', (33, 65)), ('unet:resnet18', (35, 48))])
def test_models_of_three_families(name, size):
    m = segmentation_model(name, 5, size).eval()
    with torch.no_grad(): assert m(torch.randn(1, 3, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize('name', ['DeepLabV3?encoder=resnet18&output_stride=8', 'PSPNet?encoder=resnet18&output_stride=8', 'DeepLabV3?encoder=mobilenet_v2&output_stride=8'])
def test_models_of_smp(name):
    pytest.importorskip('segmentation_models_pytorch')
    m, seen = segmentation_model(f'smp:{name}', 5).eval(), []
    m.get_submodule('model.segmentation_head.0').register_forward_hook(lambda mod, i, o: seen.append(tuple(o.shape)))
    with torch.no_grad(): assert m(torch.randn(1, 3, 50, 72)).shape == (1, 5, 50, 72)
    assert seen == [(1, 5, 7, 9)]       # an eighth, rounded up
    for sides in ((50, 72), (45, 61)): assert class_map(dry_run(m, torch.randn(2, 3, *sides))) == 'model'       # what `Scores` enlarges


@pytest.mark.slow
def test_what_torchvision_gives_can_be_taken(data, tmp_path, monkeypatch):
    "Dicts of one map: said in words, and read through `Scores`; a file with an auxiliary head"
    import matplotlib; matplotlib.use('Agg')
    opened, name = open_segmentation(data), 'deeplabv3_mobilenet_v3_large'
    bare = lambda **kw: torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3, **kw)
    with seeded(0): big, model = bare(aux_loss=True), bare()
    save_weights(big, tmp_path/'aux.safetensors')
    teacher = Segmentation().teacher(f"torchvision:{name}@{tmp_path/'aux.safetensors'}", opened)
    assert not any('aux' in k for k in teacher.state_dict())
    x = torch.randn(1, 3, 24, 32); big.eval(); assert torch.allclose(teacher.eval()(x), big(x)['out'], atol=1e-5)
    learn = lambda model, loss: Learner(opened.dls(6), model, loss_func=loss, metrics=[MeanIoU()], cbs=DiffKDCallback(teacher, verbose=False))
    def fit(l):
        with l.no_bar(), l.no_logging(): l.fit(1, 1e-3)
        return l
    with pytest.raises(ValueError, match='gives a dict .out.*use PixelCrossEntropy'): fit(learn(model, CrossEntropyLossFlat(axis=1, ignore_index=VOID)))
    with pytest.warns(UserWarning, match='such as Scores.model. for class maps'): fit(learn(model, PixelCrossEntropy()))
    l = fit(learn(Scores(model), PixelCrossEntropy()))
    with l.no_bar():
        assert l.get_preds()[0].shape == (opened.n_valid, 3, 24, 32)
        l.show_results(max_n=2); assert l.predict(opened.pairs[0][0][0])[0].shape == (24, 32)
    l.export(tmp_path/'m.pkl'); assert torch.equal(load_learner(tmp_path/'m.pkl').model.eval()(x), l.model.eval()(x))


def test_masks_that_lie_across_are_refused():
    learn = Learner(DataLoaders.from_dsets(d := list(zip(torch.randn(4, 3, 24, 40), torch.zeros(4, 40, 24, dtype=torch.long))), d, bs=2, device='cpu', num_workers=0),
                    segmentation_model(STUDENT, 3), loss_func=CrossEntropyLossFlat(axis=1), metrics=[MeanIoU()])
    with pytest.raises(ValueError, match='24x40 and the masks are 40x24'), learn.no_bar(), learn.no_logging(): learn.fit(1)


def test_table_6_is_planned_without_data(tmp_path):
    t = beside_paper(6, tmp_path)
    assert set(t.verdict) == {'not run'} and t[t.method == 'diffkd'].paper.tolist() == [77.78, 74.45, 75.83, 75.71] and 'miou' in t
    assert table_cost(6, lambda t, s, m: 10., images=2975).hours.iloc[0] == pytest.approx(40_000*16/10/3600)
    with pytest.raises(InputError, match='smp_DeepLabV3_encoder=resnet101_output_stride=8.safetensors'): run_table(6, 'cityscapes:nowhere', tmp_path)


def test_numbers_that_do_not_fit_are_one_error(data, teacher, tmp_path):
    with pytest.raises(InputError, match='expected smp:'): run(RECIPE, data, None, 'resnet20', 'alone', 0, tmp_path/'a', progress=False)
    with pytest.raises(InputError, match="'crop:bicubic' is not one for pictures with masks"):
        run(RECIPE.replace(augmentation=('crop:bicubic',)), data, None, STUDENT, 'alone', 0, tmp_path/'b', progress=False)
    two = write_shapes(tmp_path/'two', 10); (tmp_path/'two'/'codes.txt').write_text('ground\ndisc\nbox\nsea\n')
    with pytest.raises(InputError, match='does not fit the model.*head'): run(RECIPE, two, teacher, STUDENT, KD, 0, tmp_path/'c', progress=False)
    with pytest.raises(InputError, match='the class 4, and the model gives 3'): confusion(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 4))
    assert task_of(dict(task='segmentation')).metric == 'miou'


def test_the_file_an_encoder_starts_from_is_on_record(data, tmp_path):
    "By its hash: the same path with other weights is another run"
    from diffkd_nb.files import file_hash
    from diffkd_nb.weights import save_weights
    first = tmp_path/'first.safetensors'
    def write(seed):
        with seeded(seed): save_weights(segmentation_model('pyramid:small:2?width=8', 3).encoder, first)
        return file_hash(first)
    name, recipe = f'pyramid:small:2?width=8&weights={first}', RECIPE.replace(epochs=1)
    was = write(1)
    m = run(recipe, data, None, name, 'alone', 0, tmp_path/'o', progress=False)
    assert m['settings']['student_weights'] == was and verify(tmp_path/'o', data=data)
    assert 'student_weights' not in run(recipe, data, None, 'pyramid:small:2?width=8', 'alone', 0, tmp_path/'p', progress=False)['settings']
    now = write(2)
    with pytest.raises(InputError, match=f"student_weights: '{was}' there, '{now}' now"): run(recipe, data, None, name, 'alone', 0, tmp_path/'o', progress=False)
    first.unlink()
    assert verify(tmp_path/'o', data=data)      # the student is stored, the file is not needed
    with pytest.raises(InputError, match='first.safetensors'): run(recipe, data, None, name, 'alone', 0, tmp_path/'q', progress=False)


@pytest.mark.slow
def test_the_table_of_methods_says_which_do_segmentation(data, teacher):
    "What `which_method` names trains with those taps; a dash is refused"
    from diffkd_nb.methods import METHODS, which_method
    model, dls = task_of({'task': 'segmentation'}).teacher(teacher, open_data(data)), open_data(data).dls(6, (), 0)
    said, found = which_method().segmentation, {}
    for m in METHODS:
        cb = DistillCallback(None if METHODS[m].teacherless else model, m, verbose=False)
        try:
            learn = Learner(dls, segmentation_model(STUDENT, 3), loss_func=PixelCrossEntropy(VOID), cbs=cb)
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
        except ValueError as e: found[m] = '-'; continue
        places = ['class map' if t.form == 'dense' else t.kind for t in cb.plan]
        found[m] = 'stages' if len(places) > 2 and set(places) == {'feature'} else ', '.join(places)
    differ = {m: (said[m], found[m]) for m in METHODS if said[m] != found[m]}
    assert not differ, differ
